"""Checkpoint files: what is written is read back, and a write that fails leaves the last one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embedding.errors import Busy, DamagedData, InvalidRecipe, StorageFailed
from training.checkpoint import (
    FILE,
    checkpoint_in,
    differing_keys,
    held,
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    with_prefix,
    without_prefix,
    write_checkpoint,
)


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "run", {"image": image, "step": torch.tensor(3)}, {"losses": [0.1, 2], "at": {"a": 1}})
    tensors, state = read_checkpoint(tmp_path / "run")
    assert torch.equal(tensors["image"], image)
    assert tensors["step"].item() == 3
    assert state == {"losses": [0.1, 2], "at": {"a": 1}}


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(3)}, {"step": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailed, match="No space left on device"):
        write_checkpoint(tmp_path, {"w": torch.ones(3)}, {"step": 2})
    assert read_checkpoint(tmp_path)[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with pytest.raises(StorageFailed, match="No space left on device"):
        write_checkpoint(tmp_path / "first", {"w": torch.ones(3)}, {"step": 2})
    assert not (tmp_path / "first").exists()


def test_safetensors_of_another_kind_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / FILE)
    with pytest.raises(DamagedData, match="checkpoint"):
        read_checkpoint(tmp_path)


def test_an_optimizer_comes_back_even_where_only_some_parameters_have_stepped() -> None:
    frozen, free = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([frozen, free])
    free.grad = torch.ones(2)
    optimizer.step()
    other = torch.optim.AdamW([frozen, free])
    load_optimizer_tensors(other, optimizer_tensors(optimizer))
    assert other.state_dict()["state"].keys() == {1}
    assert torch.equal(other.state[free]["exp_avg"], optimizer.state[free]["exp_avg"])


def test_prefixes_are_undone() -> None:
    tensors = {"a": torch.zeros(1), "b.c": torch.ones(1)}
    both = with_prefix("x.", tensors) | with_prefix("y.", tensors)
    assert without_prefix("x.", both) == tensors


@pytest.mark.parametrize(
    ("theirs", "keys"),
    [
        ({"a": 1, "b": {"c": 2, "d": {"e": 3}}}, []),
        ({"a": 2, "b": {"c": 2, "d": {"e": 4}}}, ["a", "b.d.e"]),
        ({"b": {"c": 2, "d": 5}, "f": 1}, ["a", "b.d", "f"]),
    ],
)
def test_differing_keys_are_dotted(theirs: dict[str, object], keys: list[str]) -> None:
    assert differing_keys({"a": 1, "b": {"c": 2, "d": {"e": 3}}}, theirs) == keys


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run.checkpoint"
    with held(folder):
        with pytest.raises(Busy, match="another training holds"), held(folder):
            pass
        write_checkpoint(folder, {}, {})
    with pytest.raises(InvalidRecipe), held(folder):
        raise InvalidRecipe("whatever")
    assert checkpoint_in(folder).exists()
    with held(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
