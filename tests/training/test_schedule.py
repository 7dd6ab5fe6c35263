"""Learning rates and groups of parameters."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from embedding.networks import Architecture, NetworkName, build
from training.config import OptimizerConfig
from training.layers import layers
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


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("small_cnn", 4, "0.first.weight", "3.second_norm.bias"),
        ("residual_cnn", 9, "0.weight", "10.second_norm.bias"),
        ("resnet18", 9, "conv1.weight", "layer4.1.bn2.bias"),
        ("resnet50", 17, "conv1.weight", "layer4.2.bn3.bias"),
        ("mobilenet_v2", 19, "features.0.0.weight", "features.18.1.bias"),
        ("mobilenet_v3_small", 13, "features.0.0.weight", "features.12.1.bias"),
        ("mobilenet_v3_large", 17, "features.0.0.weight", "features.16.1.bias"),
        ("efficientnet_b0", 18, "features.0.0.weight", "features.8.1.bias"),
        ("convnext_tiny", 22, "features.0.0.weight", "classifier.0.bias"),
        ("vit_b_16", 13, "class_token", "encoder.ln.bias"),
    ],
)
def test_the_layers_of_every_backbone(name: Any, count: int, first: str, last: str) -> None:
    with torch.device("meta"):
        backbone = build(Architecture(network=name, image_size=64)).backbone
    found = layers(backbone)
    assert len(found) == count
    assert (found[0][0], found[-1][-1]) == (first, last)
    assert sorted(key for names in found for key in names) == sorted(dict(backbone.named_parameters()))


def test_every_backbone_has_its_layers_tested() -> None:
    tested = next(mark for mark in test_the_layers_of_every_backbone.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {case[0] for case in tested.args[1]} == set(get_args(NetworkName))


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    with torch.device("meta"):
        network = build(Architecture(network="resnet18", image_size=64))
    config = OptimizerConfig(learning_rate=0.1, backbone_learning_rate=0.01, layer_decay=0.5, weight_decay=0.5)
    optimizer = build_optimizer(network, nn.Identity(), config)
    set_learning_rate(optimizer, 0, warmup_steps=0, total_steps=1)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: (rate_of[id(p)], decay_of[id(p)]) for name, p in network.named_parameters()}
    assert named["projection.weight"] == (0.1, 0.5)
    assert named["backbone.layer4.1.conv2.weight"] == (pytest.approx(0.01 * 0.5), 0.5)
    assert named["backbone.layer4.1.bn2.weight"] == (pytest.approx(0.01 * 0.5), 0)
    assert named["backbone.layer4.0.downsample.0.weight"] == (pytest.approx(0.01 * 0.25), 0.5)
    assert named["backbone.conv1.weight"] == (pytest.approx(0.01 * 0.5**9), 0.5)
    assert named["backbone.bn1.weight"] == (pytest.approx(0.01 * 0.5**9), 0)
    assert optimizer.param_groups[-1]["lr"] == 0.1  # the projection's, which is reported
