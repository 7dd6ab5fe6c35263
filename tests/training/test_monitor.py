"""Reports, and the words said when a run collapses or diverges."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from embedding.errors import TrainingDiverged
from training.losses import LossOutput, MetricLoss
from training.losses.combined import JointLoss
from training.losses.pairs import ContrastiveLoss, MarginLoss
from training.losses.softmax import SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss
from training.monitor import CollapseWatch, Meter, Report, check_loss_scale, loss_of_collapse, spread

LABELS_B = torch.arange(8) // 2
REPORT = Report(
    step=100,
    loss=0.1,
    active_fraction=0.5,
    d_ap=0.3,
    d_an=1.2,
    spread=0.9,
    learning_rate=1e-3,
    images=800,
    seconds=2.0,
    cpu_seconds=3.0,
)


def output(loss: float, d_ap: float = 0.5) -> LossOutput:
    return LossOutput(*(torch.tensor(value) for value in (loss, 0.25, d_ap, 1.5)))


def watch() -> CollapseWatch:
    return CollapseWatch(TripletLoss(margin=0.2), LABELS_B, warmup_steps=10)


def test_a_report_is_the_mean_since_the_last() -> None:
    meter, emb_BD = Meter(), F.one_hot(torch.arange(4), 4).float()
    meter.add(output(9.0), emb_BD)
    meter.report(1, learning_rate=0.1)
    for value in (1.0, 2.0):
        meter.add(output(value), emb_BD)
    report = meter.report(3, learning_rate=0.2)
    assert (report.step, report.loss, report.active_fraction, report.d_ap, report.d_an) == (3, 1.5, 0.25, 0.5, 1.5)
    assert report.spread == pytest.approx(math.sqrt(3 / 4))
    assert (report.learning_rate, report.images) == (0.2, 8)
    assert report.images_per_second == 8 / report.seconds


def test_a_batch_without_matches_does_not_spoil_the_mean() -> None:
    meter, emb_BD = Meter(), torch.eye(2)
    meter.add(output(1.0, d_ap=0.5), emb_BD)
    meter.add(output(1.0, d_ap=math.nan), emb_BD)
    assert meter.report(2, learning_rate=0.1).d_ap == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_names_the_step_and_what_to_try(value: float) -> None:
    meter, emb_BD = Meter(), torch.eye(2)
    for loss in (1.0, value, value):
        meter.add(output(loss), emb_BD)
    with pytest.raises(TrainingDiverged, match=r"the loss became (nan|inf) at step 9; try a lower optimizer.learning"):
        meter.report(10, learning_rate=0.1)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (TripletLoss(margin=0.3), 0.3),
        (TripletLoss(margin=0.3, mining="semi-hard"), 0.3),
        (TripletLoss(margin=0.3, mining="all"), 0.3),
        (SupervisedContrastiveLoss(), math.log(7)),
        (ContrastiveLoss(margin=0.5), 0.5 * 0.25 * 24 / 28),
        (
            JointLoss(SupervisedContrastiveLoss(), alpha=0.25, identities=20, width=8),
            0.25 * math.log(20) + 0.75 * math.log(7),
        ),
    ],
)
def test_the_loss_of_a_collapsed_embedding(loss: MetricLoss, value: float) -> None:
    assert loss_of_collapse(loss, LABELS_B) == pytest.approx(value)


@pytest.mark.parametrize("pair", [TripletLoss(margin=0.3), SoftMarginTripletLoss(), TripletLoss(mining="all")])
def test_a_memory_full_of_one_point_costs_what_was_foreseen(pair: TripletLoss | SoftMarginTripletLoss) -> None:
    loss = CrossBatchMemoryLoss(pair, size=12, width=2, weight=0.5)
    level = loss_of_collapse(loss, LABELS_B)
    assert level == pytest.approx(1.5 * loss_of_collapse(pair, LABELS_B))
    point_B2 = F.one_hot(torch.zeros_like(LABELS_B), 2).float()
    of_steps = [loss.train()(point_B2, LABELS_B).loss.item() for _ in range(3)]
    assert of_steps[1:] == [pytest.approx(level)] * 2
    assert math.isnan(loss_of_collapse(CrossBatchMemoryLoss(ContrastiveLoss(), size=12, width=2), LABELS_B))


def test_a_loss_that_learns_has_no_level_of_collapse() -> None:
    assert math.isnan(loss_of_collapse(MarginLoss(), LABELS_B))
    assert math.isnan(loss_of_collapse(JointLoss(MarginLoss(), alpha=0.5, identities=4, width=8), LABELS_B))


def test_time_in_a_pause_is_nobodys() -> None:
    meter, emb_BD = Meter(), torch.eye(2)
    meter.add(output(1.0), emb_BD)
    with meter.paused():
        began = time.process_time()
        while time.process_time() - began < 0.05:  # work, of which the report is to know nothing
            pass
    report = meter.report(1, learning_rate=0.1)
    assert 0 < report.cpu_seconds < 0.05


def test_spread_is_zero_at_a_point_and_one_around_the_origin() -> None:
    assert spread(torch.tensor([[0.6, 0.8]]).repeat(5, 1)) == pytest.approx(0, abs=1e-3)
    assert spread(torch.tensor([[0.6, 0.8], [-0.6, -0.8]])) == 1


def test_collapse_is_said_once_after_three_reports() -> None:
    watching = watch()
    said = [watching.warning(replace(REPORT, spread=0.01, loss=0.2)) for _ in range(5)]
    assert [text is not None for text in said] == [False, False, True, False, False]
    assert "collapsed" in str(said[2])
    assert "try" in str(said[2])


def test_a_loss_that_stays_at_the_margin_is_said() -> None:
    watching = watch()
    said = [watching.warning(replace(REPORT, loss=0.2005)) for _ in range(3)]
    assert said[:2] == [None, None]
    assert "the loss stays at 0.2005" in str(said[2])


def test_a_run_that_recovers_or_warms_up_is_left_alone() -> None:
    watching = watch()
    reports = [replace(REPORT, spread=0.01)] * 2 + [REPORT] + [replace(REPORT, spread=0.01)] * 2
    assert [watching.warning(report) for report in reports] == [None] * 5
    assert [watching.warning(replace(REPORT, spread=0.01, step=step)) for step in range(1, 11)] == [None] * 10


def test_gradients_that_always_overflow_are_told() -> None:
    scaler, weight = torch.amp.GradScaler("cpu"), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(29):
        weight.grad = torch.full((1,), math.inf) * scaler.scale(torch.ones(1))
        scaler.step(optimizer)
        scaler.update()
        check_loss_scale(scaler.get_scale(), step)
    assert weight.item() == 1
    with pytest.raises(TrainingDiverged, match=r"gradients overflow float16 .* at step 30\); .*fp32"):
        check_loss_scale(scaler.get_scale() / 2, 30)
