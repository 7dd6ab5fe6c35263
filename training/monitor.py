"""What a run reports: its figures, and in words what goes wrong and what to try.

Shapes: S steps, B items of a batch, D embedding width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.errors import TrainingDiverged
from training.losses import LossOutput, MetricLoss

COLLAPSED_SPREAD = 0.05
"""An embedding of less spread has collapsed; random initial weights have more."""

STUCK_WITHIN = 0.01
"""How near, relatively, a loss must come to that of a collapsed embedding to count as stuck there."""

PATIENCE = 3
"""Reports in a row that must agree before a warning is given."""


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
        self._began = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave the time since the last report out of the next."""
        self._began = time.perf_counter()

    def add(self, output: LossOutput, emb_BD: Tensor) -> None:
        figures = (output.loss, output.active_fraction, output.d_ap, output.d_an, spread(emb_BD))
        self._steps.append(torch.stack([figure.detach().float() for figure in figures]))
        self._images += len(emb_BD)

    def report(self, step: int, *, learning_rate: float) -> Report:
        """The figures since the last call. Raises TrainingDiverged when a loss was NaN or infinite."""
        figures_S5 = torch.stack(self._steps).cpu()  # waits for the device, so that the time below is whole
        seconds, images = time.perf_counter() - self._began, self._images
        self._steps, self._images, self._began = [], 0, time.perf_counter()
        is_bad_S = ~figures_S5[:, 0].isfinite()
        if is_bad_S.any():
            first = step - len(figures_S5) + int(is_bad_S.int().argmax()) + 1
            raise TrainingDiverged(
                f"the loss became {figures_S5[is_bad_S][0, 0].item()} at step {first}; try a lower "
                "optimizer.learning_rate, more warmup_steps, optimizer.gradient_clip = 1.0, or training.precision = "
                '"fp32"'
            )
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
        )


class CollapseWatch:
    """Warns, once for each cause, when the embedding collapses to a point or the loss does not leave that level."""

    def __init__(self, loss: MetricLoss, labels_B: Tensor, *, warmup_steps: int) -> None:
        """`labels_B`: the identities of a batch like those to come."""
        self.collapsed_loss = loss_of_collapse(loss, labels_B)
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
                "centre on average, so that all look alike; try a lower learning_rate, semi-hard mining instead of "
                "batch-hard, or supervised-contrastive loss"
            )
        if self._stuck_reports == PATIENCE:
            return (
                f"step {report.step}: the loss stays at {report.loss:.4g}, that of an embedding that tells no image "
                "from another; try another learning_rate, semi-hard mining instead of batch-hard, or more identities "
                "a batch"
            )
        return None


def spread(emb_BD: Tensor) -> Tensor:
    """Root mean square distance of unit embeddings from their centre c: √(1 − |c|²)."""
    return (1 - emb_BD.detach().float().mean(0).square().sum()).clamp_min(0).sqrt()


@torch.no_grad()
def loss_of_collapse(loss: MetricLoss, labels_B: Tensor) -> float:
    """The loss when every image has one and the same embedding: the margin of a triplet loss, ln(B − 1) of SupCon.

    NaN, which equals nothing, of a loss without such a level, since it learns or remembers something itself.
    """
    if not loss.tells_collapse:
        return math.nan
    same_B2 = F.one_hot(torch.zeros_like(labels_B), 2).float()
    output: LossOutput = loss(same_B2, labels_B)
    return output.loss.item()
