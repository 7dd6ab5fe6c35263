"""The precision of a network's arithmetic on a device."""

from __future__ import annotations

from typing import Literal

import torch

from embedding.errors import InvalidRecipe

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype of the network's arithmetic; None for float32.

    "auto" is bf16 on GPUs that have it, fp16 on other GPUs, and fp32 elsewhere: not every CPU has bf16 instructions.
    Raises InvalidRecipe for fp16 without a GPU.
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if precision == "fp16" and device.type != "cuda":
        raise InvalidRecipe(
            f"training.precision fp16 needs a CUDA device and this one is {device.type}; use bf16 or fp32",
            field="training.precision",
        )
    if precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16
