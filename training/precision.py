"""The precision of a network's arithmetic on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from embedding.errors import InvalidRecipe

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Used = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[Used, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def used(precision: Precision, device: torch.device) -> Used:
    """What the device computes in where a recipe asks for this precision.

    "auto" is bf16 on GPUs that have it, fp16 on other GPUs, and fp32 elsewhere. So is "bf16" on a device without
    instructions for it, where a step that emulates them takes ten times as long.
    Raises InvalidRecipe for fp16 without a GPU.
    """
    is_gpu = device.type == "cuda"
    if precision == "fp16" and not is_gpu:
        raise InvalidRecipe(
            f"training.precision fp16 needs a CUDA device and this one is {device.type}; use bf16 or fp32",
            field="training.precision",
        )
    if precision == "fp32" or (precision == "auto" and not is_gpu):
        return "fp32"
    if precision != "fp16" and has_bf16(device):
        return "bf16"
    return "fp16" if is_gpu else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    # An older torch does not tell, and trains in float32.
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(told.get(instructions, False) for instructions in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def autocast_dtype(precision: Used) -> torch.dtype | None:
    """The dtype for autocast; None for float32, without it."""
    return _DTYPES[precision]
