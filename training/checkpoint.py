"""Checkpoints: where a run stands, as one safetensors file of tensors with JSON in its header; never pickle."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from embedding.durable import replace_file
from embedding.errors import Busy, DamagedData, NotFound, StorageFailed

FILE = "checkpoint.safetensors"

_HEADER = "lookalike.checkpoint"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint of `folder`, made if absent, in one step: after a crash the old or the new one is there.

    `state` is anything JSON can hold. Raises StorageFailed when the disk refuses.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {_HEADER: json.dumps(state)})
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()  # of the first checkpoint; one that holds anything stays
        raise StorageFailed(
            f"cannot write the checkpoint {path} ({error.strerror}); free space, or set training.checkpoint_every to 0"
        ) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder of checkpoints, made if absent, from other runs until the block ends; then it goes if empty.

    Raises Busy when another run holds it, and StorageFailed when the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageFailed(f"the disk refused {folder}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"another training holds {folder}; wait for it, or choose another place for the bundle"
            ) from error
        try:
            yield
        finally:
            with suppress(OSError):  # of a run that wrote none; one with a checkpoint stays, or is gone
                folder.rmdir()
    finally:
        os.close(descriptor)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint's file. Raises NotFound when there is none."""
    path = folder / FILE
    if not path.is_file():
        raise NotFound(f"no checkpoint {path} to resume from; train without --resume")
    return path


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the state. Raises NotFound when there is none, DamagedData when it is not whole."""
    path = checkpoint_in(folder)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return tensors, json.loads(header[_HEADER])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DamagedData(f"the checkpoint {path} is damaged ({error}); train again without --resume") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, by the rest of their name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as `parameter.key` → tensor; its hyperparameters are the recipe's."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{at}.{key}": tensor for at, of_parameter in state.items() for key, tensor in of_parameter.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the state that `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        at, key = name.split(".")
        state.setdefault(int(at), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def differing_keys(mine: Mapping[str, Any], theirs: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Dotted keys, sorted, at which two nested tables differ."""
    keys: list[str] = []
    for key in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            keys += differing_keys(one, other, prefix=f"{prefix}{key}.")
        elif one != other:
            keys.append(f"{prefix}{key}")
    return keys
