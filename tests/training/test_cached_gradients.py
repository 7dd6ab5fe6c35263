"""Gradients by micro-batches against those of the whole batch, and against autograd on the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import STEPS, draw_images, first_gradients, load_images, recipe, trainer
from training.cached_gradients import CachedEmbeddings
from training.datasets import ImageSet
from training.losses.softmax import SupervisedContrastiveLoss

LABELS_B = torch.arange(10) // 2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root: Path = tmp_path_factory.mktemp("data")
    draw_images(root)
    return load_images(root)


def small(*, norm: bool, dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    normalise = nn.BatchNorm2d(3) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), normalise, nn.GELU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(108, 4)
    ).double()


def batch() -> Tensor:
    return torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cached(model: nn.Module, parts: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, the gradients of the network, and its buffers."""
    torch.manual_seed(5)
    embeddings = CachedEmbeddings(model, model, batch().tensor_split(parts))
    loss: Tensor = SupervisedContrastiveLoss()(nn.functional.normalize(embeddings.emb_rD), LABELS_B).loss
    loss.backward()
    embeddings.backward()
    return loss, [parameter.grad for parameter in model.parameters()], list(model.buffers())


def by_autograd(model: nn.Module, parts: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same, keeping everything that the parts need for their backward pass."""
    torch.manual_seed(5)
    emb_BD = torch.cat([model(part) for part in batch().tensor_split(parts)])
    loss: Tensor = SupervisedContrastiveLoss()(nn.functional.normalize(emb_BD), LABELS_B).loss
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()], list(model.buffers())


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_without_batch_statistics_they_are_those_of_the_whole_batch(parts: int) -> None:
    found = cached(small(norm=False, dropout=0.0), parts)
    expected = by_autograd(small(norm=False, dropout=0.0), 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("norm", [False, True])
def test_dropout_is_replayed_and_statistics_are_counted_once(norm: bool) -> None:
    found, expected = (of(small(norm=norm, dropout=0.5), 3) for of in (cached, by_autograd))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    after = torch.rand(1)
    by_autograd(small(norm=norm, dropout=0.5), 3)
    assert torch.equal(torch.rand(1), after)  # what is drawn next is as if nothing had been replayed


def test_a_frozen_recipe_trains_alike_by_parts(images: ImageSet) -> None:
    """With the batch statistics of frozen weights nothing else differs."""
    sections: dict[str, Any] = {"network": {"dropout": 0.0, "weights": "given.pt"}}
    found, expected = (
        trainer(
            recipe(
                **sections,
                training={"freeze_backbone_steps": STEPS, "micro_batch": size},
            ),
            images,
        )
        for size in (5, None)
    )
    losses = [[report.loss for report in run.fit().history] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_more_than_a_micro_batch_is_kept_for_a_backward_pass(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = recipe(training={"micro_batch": 5})
    run, sizes = trainer(tiny, images), []
    run.network.register_forward_hook(lambda _, given, emb: sizes.append((len(given[0]), emb.requires_grad)))
    run.step(0, *run.load_batch(0))
    assert sizes == [(4, False)] * 3 + [(4, True)] * 3


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"precision": "bf16", "ema_decay": 0.9}},
        {"loss": {"name": "joint", "pair": {"name": "contrastive"}}},
        {"training": {"compile": "eager"}},
    ],
    ids=["bf16, averaged", "classifier", "compiled"],
)
@pytest.mark.usefixtures("bf16")
def test_it_goes_with_the_rest(images: ImageSet, sections: dict[str, dict[str, Any]]) -> None:
    training = {"micro_batch": 5, "steps": 40, "log_every": 10, **sections.get("training", {})}
    history = trainer(recipe(**{**sections, "training": training}), images).fit().history
    assert history[-1].loss < 0.8 * history[0].loss
    assert history[-1].d_ap < 0.7 * history[-1].d_an


def test_compiled_gradients_are_those_of_the_plain_network(images: ImageSet) -> None:
    plain, compiled = (
        first_gradients(recipe(network={"dropout": 0.0}, training={"compile": backend}), images, steps=1)
        for backend in (None, "aot_eager")
    )
    torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-5)


def test_no_part_has_a_single_image(images: ImageSet) -> None:
    """Batch normalisation of a map of one pixel takes none."""
    sizes: list[int] = []
    three_by_three = {"identities_per_batch": 3, "images_per_identity": 3}
    run = trainer(recipe(sampling=three_by_three, training={"micro_batch": 2, "steps": 2}), images)
    run.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    run.fit()
    assert set(sizes) == {2, 3}
