"""What AdamW steps with: groups of parameters, and their learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from training.config import OptimizerConfig

_PEAK = "peak_learning_rate"


def build_optimizer(network: nn.Module, loss: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over up to four groups of the network's, backbone or not and decayed or not, and the loss's own.

    Biases and the gains of normalisation layers (parameters of fewer than two dimensions) get no weight decay, nor
    does anything that the loss learns: decay would pull a boundary to 0.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault((name.startswith("backbone."), parameter.ndim > 1), []).append(parameter)
    backbone_rate = config.backbone_learning_rate or config.learning_rate
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            _PEAK: backbone_rate if is_backbone else config.learning_rate,
        }
        for (is_backbone, is_decayed), parameters in groups.items()
    ]
    if learned := list(loss.parameters()):
        loss_rate = config.loss_learning_rate or config.learning_rate
        # First, so that the last group stays the projection's, whose rate is reported.
        options.insert(0, {"params": learned, "weight_decay": 0.0, _PEAK: loss_rate})
    return torch.optim.AdamW(options, lr=config.learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, *, warmup_steps: int, total_steps: int) -> None:
    """Give every group its rate for `step`, counted from 0."""
    factor = warmup_cosine(step, warmup_steps=warmup_steps, total_steps=total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group[_PEAK] * factor


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak rate at `step`, counted from 0: a line up to 1 at the last warm-up step, then half a cosine.

    The cosine would reach 0 at `total_steps`, one step after the last, so that no step is wasted.
    Loshchilov, Hutter 2017, eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
