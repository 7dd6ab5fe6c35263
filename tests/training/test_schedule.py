"""Learning rates and groups of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.config import OptimizerConfig
from training.schedule import build_optimizer, set_learning_rate, warmup_cosine


def test_the_rate_rises_by_a_line_and_falls_by_a_cosine() -> None:
    rates = [warmup_cosine(step, warmup_steps=4, total_steps=8) for step in range(8)]
    falling = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, *falling])


@given(total=st.integers(1, 50), data=st.data())
def test_no_step_is_wasted_and_none_exceeds_the_peak(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = [warmup_cosine(step, warmup_steps=warmup, total_steps=total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.projection = nn.Linear(2, 4)


def test_each_parameter_is_in_the_group_it_belongs_to() -> None:
    network = Network()
    config = OptimizerConfig(learning_rate=0.1, backbone_learning_rate=0.01, weight_decay=0.5, warmup_steps=2)
    optimizer = build_optimizer(network, nn.Identity(), config)
    set_learning_rate(optimizer, 0, warmup_steps=2, total_steps=4)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    conv, norm = network.backbone[0], network.backbone[1]
    expected = {
        conv.weight: (0.005, 0.5),
        conv.bias: (0.005, 0),
        norm.weight: (0.005, 0),
        norm.bias: (0.005, 0),
        network.projection.weight: (0.05, 0.5),
        network.projection.bias: (0.05, 0),
    }
    assert found == {id(parameter): settings for parameter, settings in expected.items()}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_without_a_rate_of_its_own_the_backbone_takes_the_common_one() -> None:
    optimizer = build_optimizer(Network(), nn.Identity(), OptimizerConfig(learning_rate=0.1))
    set_learning_rate(optimizer, 0, warmup_steps=0, total_steps=1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_what_the_loss_learns_has_its_own_rate_and_no_decay() -> None:
    loss = nn.Linear(2, 3)
    config = OptimizerConfig(learning_rate=0.1, loss_learning_rate=0.5, weight_decay=0.5)
    optimizer = build_optimizer(Network(), loss, config)
    set_learning_rate(optimizer, 0, warmup_steps=0, total_steps=1)
    own = [group for group in optimizer.param_groups if any(p is loss.weight for p in group["params"])]
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in own] == [(0.5, 0, 2)]
    assert optimizer.param_groups[-1]["lr"] == 0.1  # the projection's, which is reported
