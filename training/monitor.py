"""What a run reports: its figures, and in words what goes wrong and what to try.

Shapes: S steps, B items of a batch, D embedding width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.errors import TrainingDiverged
from training.losses import LossOutput, MetricLoss
from training.losses.combined import JointLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss

COLLAPSED_SPREAD = 0.05
"""An embedding of less spread has collapsed; random initial weights have more."""

STUCK_WITHIN = 0.01
"""How near, relatively, a loss must come to that of a collapsed embedding to count as stuck there."""

LEAST_LOSS_SCALE = 1e-4
"""Below this factor of the loss fp16 has no step left to take, as in fairseq; it begins at 65,536."""

PATIENCE = 3
"""Reports in a row that must agree before a warning is given."""


Mode = Literal["supervised", "self-supervised"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Remedies:
    of_collapse: str
    of_standstill: str


_REMEDIES: dict[Mode, _Remedies] = {
    "supervised": _Remedies(
        of_collapse="a lower learning_rate, semi-hard mining instead of batch-hard, or supervised-contrastive loss",
        of_standstill="another learning_rate, semi-hard mining instead of batch-hard, or more identities a batch",
    ),
    "self-supervised": _Remedies(
        of_collapse="a lower learning_rate, nt-xent loss, which pushes other images away, or images that differ more",
        of_standstill="another learning_rate, a lower temperature, more images a batch, or milder augmentation, under "
        "which two views of an image still look alike",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Means over the steps since the report before."""

    step: int
    """Steps done so far."""
    loss: float
    active_fraction: float
    """Share of the loss's terms that pass a gradient."""
    d_ap: float
    """Mean distance of matching pairs, in [0, 2]."""
    d_an: float
    """Mean distance of non-matching pairs, in [0, 2]."""
    spread: float
    """Root mean square distance of embeddings from their batch's centre: 0 when all coincide, at most 1."""
    learning_rate: float
    """Of the projection, at the last of these steps."""
    images: int
    """Images trained on, counted as often as they were."""
    seconds: float
    """Wall time, without that of evaluations and checkpoints."""
    cpu_seconds: float
    """Time of all threads on all cores together, in the same span; in the record of a run, of all its processes."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def brief(self) -> str:
        """What fits beside a progress bar on a terminal of 80 columns."""
        return f"loss {self.loss:.4f}  active {self.active_fraction:.0%}  {self.images_per_second:,.0f} images/s"

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  active {self.active_fraction:.0%}  d_ap {self.d_ap:.3f}  d_an {self.d_an:.3f}  "
            f"spread {self.spread:.2f}  {self.images_per_second:,.0f} images/s"
        )


class Meter:
    """Collects the figures of steps on their device, and fetches them in one transfer when a report is due."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._images = 0
        self._began = _clocks()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the next report."""
        if self._steps:
            self._steps[-1].cpu()  # waits for the device, whose time belongs to the steps
        paused = _clocks()
        yield
        self._began = [began + now - then for began, now, then in zip(self._began, _clocks(), paused, strict=True)]

    def add(self, output: LossOutput, emb_BD: Tensor) -> None:
        figures = (output.loss, output.active_fraction, output.d_ap, output.d_an, spread(emb_BD))
        self._steps.append(torch.stack([figure.detach().float() for figure in figures]))
        self._images += len(emb_BD)

    def checked(self, step: int) -> Tensor:
        """The figures of the S steps since the last report, [S, 5] on the CPU; `step` is the last of them.

        Raises TrainingDiverged when a loss was NaN or infinite.
        """
        figures_S5 = torch.stack(self._steps).cpu()
        is_bad_S = ~figures_S5[:, 0].isfinite()
        if is_bad_S.any():
            first = step - len(figures_S5) + int(is_bad_S.int().argmax()) + 1
            raise _diverged(f"the loss became {figures_S5[is_bad_S][0, 0].item()} at step {first}")
        return figures_S5

    def report(self, step: int, *, learning_rate: float) -> Report:
        """The figures since the last call. Raises TrainingDiverged when a loss was NaN or infinite."""
        figures_S5 = self.checked(step)  # waits for the device, so that the time below is whole
        seconds, cpu_seconds = (now - began for now, began in zip(_clocks(), self._began, strict=True))
        images = self._images
        self._steps, self._images, self._began = [], 0, _clocks()
        loss, active_fraction, d_ap, d_an, spread_ = figures_S5.nanmean(0).tolist()
        return Report(
            step=step,
            loss=loss,
            active_fraction=active_fraction,
            d_ap=d_ap,
            d_an=d_an,
            spread=spread_,
            learning_rate=learning_rate,
            images=images,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )


def _clocks() -> list[float]:
    """Wall time and processor time, in seconds."""
    return [time.perf_counter(), time.process_time()]


def _diverged(what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what}; try a lower optimizer.learning_rate, more warmup_steps, optimizer.gradient_clip = 1.0, or "
        'training.precision = "fp32"'
    )


def check_weights(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises TrainingDiverged when a weight or a batch statistic is NaN or infinite after `step` steps.

    The loss of a step is that of the weights before it: only the next one would show what it did to them.
    """
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
    if not torch.stack([tensor.isfinite().all().cpu() for tensor in floating]).all():
        raise _diverged(f"weights became NaN or infinite by step {step}")


def check_loss_scale(scale: float, step: int) -> None:
    """Raises TrainingDiverged when fp16's factor of the loss has fallen below `LEAST_LOSS_SCALE` after `step` steps.

    Each step whose gradients overflow is left out and halves it: by then dozens were, and no weight has moved.
    """
    if scale < LEAST_LOSS_SCALE:
        raise _diverged(f"gradients overflow float16 however little the loss is scaled ({scale:.1e} at step {step})")


class CollapseWatch:
    """Warns, once for each cause, when the embedding collapses to a point or the loss does not leave that level."""

    def __init__(self, loss: MetricLoss, labels_B: Tensor, *, warmup_steps: int, mode: Mode = "supervised") -> None:
        """`labels_B`: the identities of a batch like those to come; `mode` as in a recipe's [training]."""
        self.collapsed_loss = loss_of_collapse(loss, labels_B)
        self._remedies = _REMEDIES[mode]
        self._warmup_steps = warmup_steps
        self._collapsed_reports = 0
        self._stuck_reports = 0

    def warning(self, report: Report) -> str | None:
        """What to say about this report; the rates of the warm-up are too small to judge by."""
        if report.step <= self._warmup_steps:
            return None
        is_collapsed = report.spread < COLLAPSED_SPREAD
        is_stuck = not is_collapsed and math.isclose(report.loss, self.collapsed_loss, rel_tol=STUCK_WITHIN)
        self._collapsed_reports = self._collapsed_reports + 1 if is_collapsed else 0
        self._stuck_reports = self._stuck_reports + 1 if is_stuck else 0
        if self._collapsed_reports == PATIENCE:
            return (
                f"step {report.step}: the embedding has collapsed: images lie {report.spread:.3f} from their common "
                f"centre on average, so that all look alike; try {self._remedies.of_collapse}"
            )
        if self._stuck_reports == PATIENCE:
            return (
                f"step {report.step}: the loss stays at {report.loss:.4g}, that of an embedding that tells no image "
                f"from another; try {self._remedies.of_standstill}"
            )
        return None


def spread(emb_BD: Tensor) -> Tensor:
    """Root mean square distance of unit embeddings from their centre c: √(1 − |c|²)."""
    return (1 - emb_BD.detach().float().mean(0).square().sum()).clamp_min(0).sqrt()


@torch.no_grad()
def loss_of_collapse(loss: MetricLoss, labels_B: Tensor) -> float:
    """The loss when every image has one and the same embedding: the margin of a triplet loss, ln(B − 1) of SupCon.

    Of a joint loss, with ln(I) as the cross-entropy over its I identities.

    Of a memory from its start on, where the level is the same whatever the images: triplets, each at its margin.

    NaN, which equals nothing, of a loss without such a level, since it learns or remembers something itself.
    """
    if isinstance(loss, JointLoss):  # the best that a classifier can say of one point: all identities are as likely
        identities = len(loss.bias_I)
        return loss.alpha * math.log(identities) + (1 - loss.alpha) * loss_of_collapse(loss.pair, labels_B)
    if isinstance(loss, CrossBatchMemoryLoss):
        is_fixed = isinstance(loss.pair, SoftMarginTripletLoss | TripletLoss)  # others' depends on how many compare
        return (1 + loss.weight) * loss_of_collapse(loss.pair, labels_B) if is_fixed else math.nan
    if not loss.tells_collapse:
        return math.nan
    same_B2 = F.one_hot(torch.zeros_like(labels_B), 2).float()
    output: LossOutput = loss(same_B2, labels_B)
    return output.loss.item()
