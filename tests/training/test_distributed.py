"""Training by two processes against one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from embedding.bundle import Bundle
from embedding.errors import InvalidInput
from tests.training.ranks import CASES, EXACT, MICRO, exact_gradients
from tests.training.tiny import draw_images, first_gradients, load_images
from training.datasets import ImageSet
from training.distributed import ALONE, Ranks, SumOverRanks, joined

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

RECIPE = """
name = "tiny"
data = {source = "folder", path = "images"}
split = {protocol = "closed-set", train = 0.34, calibration = 0.33, test = 0.33}
preprocessing = {image_size = 8, channels = 1}
network = {name = "small_cnn", embedding_dim = 8, width = 4}
sampling = {identities_per_batch = 3, images_per_identity = 3}
loss = {name = "supervised-contrastive"}
optimizer = {warmup_steps = 2}
training = {steps = 6, log_every = 3, checkpoint_every = 3}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("alone")
    draw_images(root)
    return load_images(root)


def by_two_processes(root: Path, what: str, *, start: Sequence[str]) -> str:
    """Run `tests/training/ranks.py`, started so, on images in `root`; what its processes have printed."""
    draw_images(root)
    (root / "tiny.toml").write_text(RECIPE)
    ran = subprocess.run(
        [*start, "-m", "tests.training.ranks", root, root, what],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have written their gradients to."""
    root = tmp_path_factory.mktemp("ranks")
    by_two_processes(root, "gradients", start=[sys.executable])
    return root


def of_rank(written: Path, name: str, rank: int) -> dict[str, Tensor]:
    return load_file(written / f"{name}.{rank}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_two_processes_are_those_of_one(written: Path, images: ImageSet, name: str) -> None:
    expected = first_gradients(CASES[name], images)
    for rank in (0, 1):
        found = of_rank(written, name, rank)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (found[key] - tensor).abs().max() <= 1e-6, key
    assert any(key.startswith("loss.") for key in expected) == (name in {"arcface", "joint", "drawn negatives"})


@pytest.mark.parametrize("total", EXACT)
def test_in_float64_they_are_the_same_to_the_last_digits(written: Path, total: int) -> None:
    expected = exact_gradients(ALONE, total)
    for rank in (0, 1):
        torch.testing.assert_close(of_rank(written, f"exact {total}", rank), expected, atol=1e-12, rtol=1e-10)


def test_cached_gradients_are_alike_on_both_processes(written: Path, images: ImageSet) -> None:
    """Micro-batches are other images than in one process, and so are their batch statistics: near, not equal."""
    first, second, alone = of_rank(written, "micro", 0), of_rank(written, "micro", 1), first_gradients(MICRO, images)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], atol=0, rtol=0)
    gradients = [key for key in alone if key.startswith("network.")]
    one, other = (torch.cat([found[key].flatten() for key in gradients]) for found in (alone, first))
    assert torch.cosine_similarity(one, other, dim=0) > 0.9


def test_a_whole_run_leaves_both_with_the_same_weights(written: Path) -> None:
    first, second = of_rank(written, "run", 0), of_rank(written, "run", 1)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.slow
def test_train_under_torchrun_writes_one_bundle_and_talks_once(tmp_path: Path) -> None:
    said = by_two_processes(tmp_path, "train", start=TORCHRUN)
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.calibration.protocol == "closed-set"
    assert said.count("step 6/6") == said.count("wrote tiny-") == said.count("learned margin") == 1


def test_shares_are_neighbours_that_differ_by_one_at_most() -> None:
    for total in range(12):
        for size in range(1, 5):
            shares = [range(total)[Ranks(rank=rank, size=size).share(total)] for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert max(map(len, shares)) == ALONE.largest_share(total) if size == 1 else True
            assert max(map(len, shares)) == Ranks(size=size).largest_share(total)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some schedulers set it
    with joined("cpu") as ranks:
        assert ranks == ALONE


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for local_rank in (0, 1):  # the first process says it, and it alone is heard
        with pytest.raises(InvalidInput, match="2 processes on this machine and 1 CUDA devices; lower"):
            Ranks(rank=local_rank, size=2, local_rank=local_rank, local_size=2).device("auto")


def test_a_process_that_is_lost_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:30097: Connection reset by peer. This is typical."
        )

    for name in ("all_reduce", "all_gather", "broadcast", "broadcast_object_list", "init_process_group"):
        monkeypatch.setattr(dist, name, gone)
    two, layer = Ranks(rank=0, size=2), torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    summed = torch.ones(2, requires_grad=True)
    for together in (
        lambda: two.add_gradients(layer.parameters()),
        lambda: two.copy_from_first(layer),
        lambda: two.from_first(1),
        lambda: two.gather(torch.ones(2, 2), 4),
        lambda: SumOverRanks.apply(summed),
    ):
        with pytest.raises(ConnectionError, match=r"lost each other.*--resume.*\(Read error .* reset by peer\)$"):
            together()
