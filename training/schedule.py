"""What AdamW steps with: groups of parameters, and their learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from training.config import OptimizerConfig
from training.layers import layers

_PEAK = "peak_learning_rate"


def build_optimizer(network: nn.Module, loss: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups of the network's parameters, by layer of the backbone and decayed or not, and the loss's own.

    The backbone's layer l of L, counted from 0 at the input, has its rate times `layer_decay` to the power L − l.
    Biases and the gains of normalisation layers (parameters of fewer than two dimensions) get no weight decay, nor
    does anything that the loss learns: decay would pull a boundary to 0.
    """
    factor_of = layer_factors(network, config.layer_decay)
    backbone_rate = config.backbone_learning_rate or config.learning_rate
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        peak = backbone_rate * factor_of[name] if name in factor_of else config.learning_rate
        groups.setdefault((peak, parameter.ndim > 1), []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": config.weight_decay if is_decayed else 0.0, _PEAK: peak}
        for (peak, is_decayed), parameters in groups.items()
    ]
    if learned := list(loss.parameters()):
        loss_rate = config.loss_learning_rate or config.learning_rate
        # First, so that the last group stays the projection's, whose rate is reported.
        options.insert(0, {"params": learned, "weight_decay": 0.0, _PEAK: loss_rate})
    return torch.optim.AdamW(options, lr=config.learning_rate)


def layer_factors(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """Of each of the backbone's parameters, by its name in the network: what its learning rate is multiplied by."""
    of_layers = layers(network.get_submodule("backbone"))
    return {
        f"backbone.{name}": layer_decay ** (len(of_layers) - depth)
        for depth, names in enumerate(of_layers)
        for name in names
    }


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
