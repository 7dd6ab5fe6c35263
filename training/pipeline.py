"""The whole path of one training run: images → split → network → learned margin → evaluation → bundle and card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tomli_w
import torch
from rich.console import Console

from embedding.bundle import Bundle, Lineage, learned_metrics, write_bundle
from embedding.calibration import Calibration
from embedding.destination import check_destination
from embedding.encoder import PixelEncoder
from embedding.errors import InvalidRecipe
from embedding.networks import EmbeddingNetwork, build
from embedding.reference import Reference
from embedding.runtime import tune_malloc
from embedding.seen import Seen
from training.calibration import calibrate
from training.checkpoint import checkpoint_in, held
from training.config import Recipe
from training.datasets import load
from training.distributed import Ranks, is_first, joined
from training.embedded import embed, embed_with_norms, say_skipped
from training.evaluation import evaluate as evaluate_embeddings
from training.facts import environment, facts
from training.initial import initial_recall
from training.material import Material
from training.measurement import Measurement, measure
from training.pairs import HeldOut, held_out
from training.progress import TrainingDisplay
from training.reference import reference_of
from training.report import model_card
from training.result import TrainingResult
from training.second_stage import FILE as CLASSIFIER
from training.second_stage import fit_second_stage
from training.trainer import Trainer
from training.turns import TurnedImages
from training.whitening import whiten


def train(
    recipe: Recipe,
    *,
    out: Path,
    data_root: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Bundle | None:
    """Train as the recipe says, learn the margin on held-out identities, and write the bundle with its model card.

    Under `torchrun`, all processes train together; the first one alone does the rest, and the others get None.
    Checkpoints go to a folder beside `out` and are removed once the bundle stands.
    Before any work, raises AlreadyExists unless `overwrite` takes the place of a bundle, StorageFailed where `out`
    cannot be written, Busy while another training writes there, InvalidInput for a device that is not there, and
    InvalidRecipe or NotFound when there is no checkpoint to resume from; then whatever the recipe, its data or the disk
    give cause for: see `embedding.errors`.
    """
    check_destination(out, overwrite=overwrite)
    checkpoints = out.with_name(f"{out.name}.checkpoint")
    if resume:
        if not recipe.training.checkpoint_every:
            raise InvalidRecipe(
                "the recipe writes no checkpoints (training.checkpoint_every = 0), so there is none to resume from; "
                "train without --resume",
                field="training.checkpoint_every",
            )
        checkpoint_in(checkpoints)
    console = (console or Console(stderr=True)) if is_first() else Console(quiet=True)
    run = _Run(recipe=recipe, out=out, checkpoints=checkpoints, data_root=data_root, device=device, console=console)
    with held(checkpoints) if is_first() else nullcontext():
        tune_malloc()
        with joined(device) as ranks:
            trained = _trained(run, ranks, resume=resume)
        if not ranks.is_first:
            return None
        bundle = _bundled(run, trained, overwrite=overwrite)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What is trained, on what, and where it goes."""

    recipe: Recipe
    out: Path
    checkpoints: Path
    data_root: Path | None
    device: str
    console: Console

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Trained:
    """What came of training, before the margin is learned."""

    network: EmbeddingNetwork
    material: Material
    result: TrainingResult
    initial: Mapping[str, float | None]
    """What the weights that it began with could do, by name of the figure; empty for random ones."""
    environment: dict[str, str]


def _trained(run: _Run, ranks: Ranks, *, resume: bool) -> _Trained:
    recipe = run.recipe
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left as they were
        torch.manual_seed(recipe.seed)
        network = build(recipe.architecture, weights=recipe.network.initial_weights(run.data_root))
    images = load(recipe.data, data_root=run.data_root, preprocessing=recipe.preprocessing)
    say_skipped(run.console, images.skipped)
    material = Material.of(images, recipe)
    run.say(material.describe())
    if material.flattering:
        run.say(f"warning: {material.flattering}")
    trainer = Trainer(
        recipe,
        network,
        material.train,
        device=run.device,
        out_dir=run.checkpoints if recipe.training.checkpoint_every else None,
        events_dir=run.out.with_name(f"{run.out.name}.tensorboard") if recipe.training.tensorboard else None,
        progress=TrainingDisplay(run.console),
        evaluate=lambda current: _watch(current, material, run),
        ranks=ranks,
    )
    if (precision := trainer.step.precision) != recipe.training.precision != "auto":
        lacks = f"this {trainer.device.type} has no {recipe.training.precision} instructions"
        run.say(f"training in {precision}: {lacks}")
    initial: Mapping[str, float | None] = {}
    if recipe.network.weights != "random" and ranks.is_first:
        initial = initial_recall(network, material.test, material.searches, recipe.preprocessing, device=run.device)
    result = trainer.fit(resume=resume)
    return _Trained(
        network=network,
        material=material,
        result=result,
        initial=initial,
        environment=environment(trainer, result, ranks),
    )


def _bundled(run: _Run, trained: _Trained, *, overwrite: bool) -> Bundle:
    """The margin learned, everything measured, and written down."""
    recipe, material, result = run.recipe, trained.material, trained.result
    run.say(f"trained: {result.summary()}")
    for warning in result.warnings:  # again, where it is not lost among the lines of the steps
        run.say(f"warning: {warning}")
    _whiten(trained.network, material, run)
    # A boundary belongs to the projection that was trained with it.
    learned = result.learned if recipe.training.whitening is None else {}
    encoder = PixelEncoder(trained.network, recipe.preprocessing, device=run.device)
    calibration, reference = _calibrated(encoder, run, material)
    measurement, files = _measured(encoder, run, trained, calibration)
    lineage = Lineage(
        created=datetime.now(UTC),
        recipe=recipe.model_dump(mode="json"),
        data=material.summary(),
        metrics={**measurement.metrics(), **learned_metrics(learned)},
        environment=trained.environment,
    )
    card = model_card(
        name=recipe.name,
        recipe_text=tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)),
        facts=facts(recipe, material, lineage, result),
        measurement=measurement,
        learned=learned,
        image_of=lambda index: material.test.pixels([index], recipe.preprocessing)[0],
        identity_names=dict(enumerate(material.test.identities)),
        **({"intended_use": recipe.description} if recipe.description else {}),
    )
    return write_bundle(
        run.out,
        name=recipe.name,
        network=trained.network,
        preprocessing=recipe.preprocessing,
        calibration=calibration,
        lineage=lineage,
        reference=reference,
        seen=Seen.of(material.train.pixel_digests, material.train.identities),
        extra_files={**card, **files},
        overwrite=overwrite,
    )


def _whiten(network: EmbeddingNetwork, material: Material, run: _Run) -> None:
    """As the recipe asks for."""
    recipe = run.recipe
    if recipe.training.whitening is not None:
        whiten(
            network,
            TurnedImages(material.train, recipe.sampling.turned_identities),
            recipe.preprocessing,
            shrinkage=recipe.training.whitening,
            views=("as-is", "mirror") if recipe.augmentation.horizontal_flip else ("as-is",),
            device=run.device,
        )


def _calibrated(encoder: PixelEncoder, run: _Run, material: Material) -> tuple[Calibration, Reference]:
    images, seed = material.calibration, run.recipe.seed
    emb_ND, norm_N = embed_with_norms(encoder, images, run.console)
    calibration = calibrate(
        emb_ND,
        images.labels_N,
        protocol=material.split.protocol,
        groups_N=images.super_class_labels if run.recipe.split.by == "super" else None,
        seed=seed,
    )
    return calibration, reference_of(emb_ND, images.labels_N, norm_N, seed=seed)


def _measured(
    encoder: PixelEncoder, run: _Run, trained: _Trained, calibration: Calibration
) -> tuple[Measurement, dict[str, bytes]]:
    """All figures of the test side, and the file of the second stage where the recipe has one."""
    material, test = trained.material, trained.material.test
    emb_ND = embed(encoder, test, run.console)
    is_closed = material.split.protocol == "closed-set"
    measurement = measure(
        emb_ND,
        test.labels_N,
        calibration,
        images=test,
        searches=material.searches,
        trained_on=_known_identities(encoder, material, run.console) if is_closed else None,
    )
    further, files = dict(trained.initial), dict[str, bytes]()
    if run.recipe.classifier is not None:
        train_set = material.train
        second = fit_second_stage(
            embed(encoder, train_set, run.console),
            train_set.labels_N,
            train_set.identities,
            run.recipe.classifier,
            seed=run.recipe.seed,
        )
        further["second-stage accuracy"] = second.accuracy(emb_ND, [test.identities[at] for at in test.labels_N])
        files[CLASSIFIER] = second.to_bytes()
    return replace(measurement, further={**measurement.further, **further}), files


def _known_identities(encoder: PixelEncoder, material: Material, console: Console) -> HeldOut:
    """Training images of the identities on the test side, with the labels that these have there."""
    images, sides = material.images, material.split
    test_labels = np.unique(images.labels_N[sides.test_N])
    known_N = sides.train_N[np.isin(images.labels_N[sides.train_N], test_labels)]
    emb_ND = embed(encoder, images.subset(known_N), console)
    return held_out(emb_ND, np.searchsorted(test_labels, images.labels_N[known_N]))


def _watch(network: EmbeddingNetwork, material: Material, run: _Run) -> Mapping[str, float]:
    """Figures of a running training, on calibration images; the network is made what would ship."""
    _whiten(network, material, run)
    encoder = PixelEncoder(network, run.recipe.preprocessing, device=run.device)
    emb_ND = embed(encoder, material.watched, Console(quiet=True))
    metrics = evaluate_embeddings(emb_ND, material.watched.labels_N).metrics()
    return {name: value for name, value in metrics.items() if name in {"recall@1", "EER"} and value is not None}
