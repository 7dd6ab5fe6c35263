"""From recipes to losses: every section builds its loss, with its own settings."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

from training.losses import MetricLoss
from training.losses.build import build_loss
from training.losses.combined import JointLoss, ThresholdConsistentLoss
from training.losses.config import LossConfig
from training.losses.pairs import (
    ContrastiveLoss,
    ContrastiveWithoutHalfLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
)
from training.losses.proxies import ArcFaceLoss, ProxyAnchorLoss
from training.losses.similarity import CircleLoss, MultiSimilarityLoss
from training.losses.softmax import InfoNCELoss, NPairLoss, NTXentLoss, SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss

PAIR = {"name": "contrastive", "margin": 0.5}

CASES: list[tuple[dict[str, Any], type[MetricLoss], dict[str, Any]]] = [
    (PAIR, ContrastiveLoss, {"margin": 0.5}),
    ({"name": "contrastive-without-half", "margin": 0.5}, ContrastiveWithoutHalfLoss, {"margin": 0.5}),
    ({"name": "contrastive-squared-margin", "margin": 3.0}, SquaredMarginContrastiveLoss, {"margin": 3.0}),
    (
        {"name": "triplet", "margin": 0.3, "mining": "semi-hard", "fallback": "skip"},
        TripletLoss,
        {"margin": 0.3, "mining": "semi-hard", "fallback": "skip"},
    ),
    (
        {"name": "triplet-soft-margin", "mining": "semi-hard", "fallback": "skip"},
        SoftMarginTripletLoss,
        {"mining": "semi-hard", "fallback": "skip"},
    ),
    ({"name": "supervised-contrastive", "temperature": 0.2}, SupervisedContrastiveLoss, {"temperature": 0.2}),
    ({"name": "nt-xent", "temperature": 0.2}, NTXentLoss, {"temperature": 0.2}),
    (
        {"name": "info-nce", "temperature": 0.2, "symmetric": False},
        InfoNCELoss,
        {"temperature": 0.2, "symmetric": False},
    ),
    ({"name": "n-pair"}, NPairLoss, {"temperature": 1.0, "symmetric": False}),
    (
        {"name": "margin-based", "margin": 0.1, "pressure": 0.5, "mining": "all"},
        MarginLoss,
        {"margin": 0.1, "pressure": 0.5, "mining": "all"},
    ),
    (
        {"name": "multi-similarity", "alpha": 3.0, "beta": 30.0, "base": 0.25, "epsilon": 0.2},
        MultiSimilarityLoss,
        {"alpha": 3.0, "beta": 30.0, "base": 0.25, "epsilon": 0.2},
    ),
    ({"name": "multi-similarity", "mining": "all"}, MultiSimilarityLoss, {"epsilon": None}),
    ({"name": "circle", "margin": 0.25, "scale": 64.0}, CircleLoss, {"margin": 0.25, "scale": 64.0}),
    ({"name": "proxy-anchor", "margin": 0.2, "scale": 16.0}, ProxyAnchorLoss, {"margin": 0.2, "scale": 16.0}),
    ({"name": "arcface", "margin": 0.25, "scale": 16.0}, ArcFaceLoss, {"margin": 0.25, "scale": 16.0}),
    (
        {"name": "cross-batch-memory", "pair": PAIR, "weight": 2.0, "start": 7},
        CrossBatchMemoryLoss,
        {"weight": 2.0, "start": 7},
    ),
    ({"name": "joint", "pair": PAIR, "alpha": 0.25}, JointLoss, {"alpha": 0.25}),
    (
        {"name": "threshold-consistent", "pair": PAIR, "weight": 2.0, "positive": 0.8, "negative": 0.4},
        ThresholdConsistentLoss,
        {"weight": 2.0, "positive": 0.8, "negative": 0.4},
    ),
]


def build(table: dict[str, Any], *, seed: int = 0) -> MetricLoss:
    return build_loss(TypeAdapter(LossConfig).validate_python(table), identities=6, width=4, seed=seed)


def test_every_loss_has_a_case_here() -> None:
    configs = get_args(get_args(LossConfig)[0])
    names = {name for config in configs for name in get_args(config.model_fields["name"].annotation)}
    assert {table["name"] for table, _, _ in CASES} == names


@pytest.mark.parametrize(("table", "kind", "settings"), CASES)
def test_recipes_build_their_loss(table: dict[str, Any], kind: type[MetricLoss], settings: dict[str, Any]) -> None:
    loss = build(table)
    assert type(loss) is kind
    assert settings.items() <= vars(loss).items()
    if "pair" in table:
        assert isinstance(loss, JointLoss | ThresholdConsistentLoss | CrossBatchMemoryLoss)
        assert type(loss.pair) is ContrastiveLoss
        assert loss.pair.margin == 0.5


@pytest.mark.parametrize("table", [table for table, _, _ in CASES])
def test_a_loss_computes_from_its_settings_alone(table: dict[str, Any]) -> None:
    emb_BD = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    one, same = build(table)(emb_BD, torch.arange(8) // 2), build(table)(emb_BD, torch.arange(8) // 2)
    assert one.loss == same.loss
    assert one.loss > 0


def test_boundaries_are_one_or_one_each() -> None:
    one = build({"name": "margin-based", "beta": 1.5})
    each = build({"name": "margin-based", "boundaries": "per-identity"})
    assert isinstance(one, MarginLoss)
    assert isinstance(each, MarginLoss)
    assert one.beta_I.tolist() == [1.5]
    assert len(each.beta_I) == 6


def test_the_memory_has_the_size_asked_for() -> None:
    loss = build({"name": "cross-batch-memory", "pair": PAIR, "size": 12})
    assert isinstance(loss, CrossBatchMemoryLoss)
    assert loss.emb_MD.shape == (12, 4)


@pytest.mark.parametrize("name", ["proxy-anchor", "arcface"])
def test_proxies_are_drawn_from_the_seed(name: str) -> None:
    one, same, other = (build({"name": name}, seed=seed) for seed in (1, 1, 2))
    assert isinstance(one, ProxyAnchorLoss | ArcFaceLoss)
    assert torch.equal(one.state_dict()["proxies_ID"], same.state_dict()["proxies_ID"])
    assert not torch.equal(one.state_dict()["proxies_ID"], other.state_dict()["proxies_ID"])
