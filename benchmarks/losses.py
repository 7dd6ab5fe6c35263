"""Every loss and miner that pytorch-metric-learning has too, side by side with it in one process.

    python -m benchmarks.losses [--quick] [--json FILE]

A row is forward and backward of one batch of B unit embeddings of width 128, ours through the module that recipes
build, with the figures that training reports beside the loss. Miners have no backward. Processor time of one thread,
medians of calls in turn. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_metric_learning
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as peer_losses
from pytorch_metric_learning import miners as peer_miners
from torch import Tensor

from benchmarks.measure import (
    Bar,
    Step,
    alternating_medians,
    apart,
    give_back_what_is_freed,
    limit_memory,
    machine,
    peak_bytes,
    say_bars,
)
from embedding.runtime import tune_malloc
from training import mining
from training.losses import Comparison, MetricLoss
from training.losses.combined import ThresholdConsistentLoss
from training.losses.pairs import ContrastiveLoss, MarginLoss
from training.losses.proxies import ArcFaceLoss, ProxyAnchorLoss
from training.losses.similarity import CircleLoss, MultiSimilarityLoss
from training.losses.softmax import InfoNCELoss, NPairLoss, NTXentLoss, SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss

WIDTH, IMAGES_PER_IDENTITY = 128, 4
SIZES = (256, 1024, 2048)
STEP_BYTES = {False: 8_000_000_000, True: 4_000_000_000}
"""What a step may ask for, by `quick`; one that asks for more counts as out of memory."""

SHARED_BAR = 1.0
"""How many times the peer's speed every loss and miner must reach that has no bar of its own."""

BARS = {
    ("NT-Xent", 256): 100.0,
    ("triplet semi-hard", 1024): 10.0,
    ("triplet semi-hard", 2048): 3.0,
    ("triplet all", 1024): 10.0,
    ("triplet all", 2048): 3.0,
    ("multi-similarity", 1024): 3.0,
    ("triplet batch-hard", 1024): 3.0,
    ("contrastive", 1024): 2.0,
    ("supervised contrastive", 1024): 2.0,
}
"""Times the peer's speed to reach, by row and batch size."""

RUNS_WHERE_THE_PEER_DOES_NOT = ("NT-Xent", 2048)
SEMI_HARD_BYTES = 300e6
"""Peak memory that semi-hard mining must stay under at a batch of 2048."""
GROWTH = 5.0
"""Times the peak memory of half the batch that a batch may take: 4 is quadratic, 8 cubic."""
LEAST_BYTES = 4 * 1024**2
"""What takes less at half the batch counts as this much: pages are counted whole."""

PeerLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One loss or miner at one batch size; None where it ran out of memory or, of bytes, was not measured."""

    name: str
    batch: int
    ours_ms: float | None
    peer_ms: float | None
    ours_bytes: int | None
    peer_bytes: int | None
    is_timed: bool
    """Whether time was measured, rather than memory alone."""

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.batch

    @property
    def times_faster(self) -> float | None:
        return None if self.ours_ms is None or self.peer_ms is None else self.peer_ms / self.ours_ms


@dataclass(frozen=True)
class Case:
    """One row's two sides, made anew for each batch size."""

    ours: Callable[[int], MetricLoss]
    peer: Callable[[int], PeerLoss]
    images_per_identity: int = IMAGES_PER_IDENTITY


def _mined(loss: Any, miner: Any) -> PeerLoss:
    def mined_loss(emb_BD: Tensor, labels_B: Tensor) -> Tensor:
        value: Tensor = loss(emb_BD, labels_B, miner(emb_BD, labels_B))
        return value

    return mined_loss


def _with_consistency(loss: Any) -> PeerLoss:
    consistency = peer_losses.ThresholdConsistentMarginLoss()

    def sum_of_both(emb_BD: Tensor, labels_B: Tensor) -> Tensor:
        value: Tensor = loss(emb_BD, labels_B) + consistency(emb_BD, labels_B)
        return value

    return sum_of_both


def _triplets_of(kind: str) -> Any:
    return peer_miners.TripletMarginMiner(margin=0.2, type_of_triplets=kind)


def _queries_and_keys(loss: Any) -> PeerLoss:
    of_two = peer_losses.SelfSupervisedLoss(loss, symmetric=False)

    def of_pairs(emb_BD: Tensor, _: Tensor) -> Tensor:
        value: Tensor = of_two(emb_BD[::2], emb_BD[1::2])
        return value

    return of_pairs


_TRIPLET, _BATCH_HARD = peer_losses.TripletMarginLoss, peer_miners.BatchHardMiner

LOSSES: dict[str, Case] = {
    "contrastive": Case(lambda _: ContrastiveLoss(), lambda _: peer_losses.ContrastiveLoss()),
    "supervised contrastive": Case(lambda _: SupervisedContrastiveLoss(), lambda _: peer_losses.SupConLoss()),
    "NT-Xent": Case(lambda _: NTXentLoss(), lambda _: peer_losses.NTXentLoss(temperature=0.1), images_per_identity=2),
    "InfoNCE": Case(
        lambda _: InfoNCELoss(temperature=0.1, symmetric=False),
        lambda _: _queries_and_keys(peer_losses.NTXentLoss(temperature=0.1)),
        images_per_identity=2,
    ),
    "N-pair": Case(lambda _: NPairLoss(), lambda _: peer_losses.NPairsLoss()),
    "triplet semi-hard": Case(
        lambda _: TripletLoss(mining="semi-hard"), lambda _: _mined(_TRIPLET(margin=0.2), _triplets_of("semihard"))
    ),
    "triplet all": Case(lambda _: TripletLoss(mining="all"), lambda _: _TRIPLET(margin=0.2)),
    "triplet hard": Case(
        lambda _: TripletLoss(mining="hard"), lambda _: _mined(_TRIPLET(margin=0.2), _triplets_of("hard"))
    ),
    "triplet batch-hard": Case(lambda _: TripletLoss(), lambda _: _mined(_TRIPLET(margin=0.2), _BATCH_HARD())),
    "triplet soft-margin": Case(
        lambda _: SoftMarginTripletLoss(),
        lambda _: _mined(_TRIPLET(margin=0.0, smooth_loss=True), _BATCH_HARD()),
    ),
    "triplet distance-weighted": Case(
        lambda _: TripletLoss(mining="distance-weighted"),
        lambda _: _mined(_TRIPLET(margin=0.2), peer_miners.DistanceWeightedMiner()),
    ),
    "margin-based": Case(
        lambda _: MarginLoss(),
        lambda _: _mined(peer_losses.MarginLoss(learn_beta=True), peer_miners.DistanceWeightedMiner()),
    ),
    "multi-similarity": Case(lambda _: MultiSimilarityLoss(epsilon=None), lambda _: peer_losses.MultiSimilarityLoss()),
    "multi-similarity, mined": Case(
        lambda _: MultiSimilarityLoss(),
        lambda _: _mined(peer_losses.MultiSimilarityLoss(), peer_miners.MultiSimilarityMiner()),
    ),
    "circle": Case(lambda _: CircleLoss(), lambda _: peer_losses.CircleLoss()),
    "proxy-anchor": Case(
        lambda identities: ProxyAnchorLoss(identities=identities, width=WIDTH),
        lambda identities: peer_losses.ProxyAnchorLoss(identities, WIDTH),
    ),
    "ArcFace": Case(
        lambda identities: ArcFaceLoss(identities=identities, width=WIDTH),
        lambda identities: peer_losses.ArcFaceLoss(identities, WIDTH),
    ),
    "contrastive + consistency": Case(
        lambda _: ThresholdConsistentLoss(ContrastiveLoss()), lambda _: _with_consistency(peer_losses.ContrastiveLoss())
    ),
    "contrastive, memory of 1024": Case(
        lambda _: CrossBatchMemoryLoss(ContrastiveLoss(), size=1024, width=WIDTH),
        # The peer's memory holds the batch as well: four images of each identity.
        lambda identities: peer_losses.CrossBatchMemory(
            peer_losses.ContrastiveLoss(), WIDTH, memory_size=1024 + IMAGES_PER_IDENTITY * identities
        ),
    ),
}

Miner = Callable[[Comparison], object]


def _matrices(comparison: Comparison) -> tuple[Tensor, Tensor, Tensor]:
    return comparison.dist_AR, comparison.is_positive_AR, comparison.is_negative_AR


MINERS: dict[str, tuple[Miner, Callable[[], Any]]] = {
    "miner all": (lambda c: mining.triplets(*_matrices(c), kind="all"), lambda: _triplets_of("all")),
    "miner easy": (lambda c: mining.triplets(*_matrices(c), kind="easy"), lambda: _triplets_of("easy")),
    "miner hard": (lambda c: mining.triplets(*_matrices(c), kind="hard"), lambda: _triplets_of("hard")),
    "miner semi-hard": (lambda c: mining.triplets(*_matrices(c), kind="semi-hard"), lambda: _triplets_of("semihard")),
    "miner batch-hard": (lambda c: mining.batch_hard(*_matrices(c)), _BATCH_HARD),
    "miner distance-weighted": (
        lambda c: mining.distance_weighted(*_matrices(c), width=WIDTH),
        peer_miners.DistanceWeightedMiner,
    ),
    "miner multi-similarity": (
        lambda c: mining.multi_similarity(c.cosine_AR, c.is_positive_AR, c.is_negative_AR),
        peer_miners.MultiSimilarityMiner,
    ),
}


def batch_of(size: int, images_per_identity: int) -> tuple[Tensor, Tensor]:
    """Unit embeddings [B, 128] around a centre for each identity, as in the midst of a training, and identities."""
    generator = torch.Generator().manual_seed(size)
    labels_B = torch.arange(size) // images_per_identity
    centre_ID = F.normalize(torch.randn(size // images_per_identity, WIDTH, generator=generator), dim=1)
    noise_BD = 0.06 * torch.randn(size, WIDTH, generator=generator)
    return F.normalize(centre_ID[labels_B] + noise_BD, dim=1), labels_B


def steps_of_loss(case: Case, size: int) -> tuple[Step, Step]:
    """Ours and the peer's forward and backward."""
    emb_BD, labels_B = batch_of(size, case.images_per_identity)
    emb_BD.requires_grad_()
    identities = size // case.images_per_identity
    ours, peer = case.ours(identities), case.peer(identities)

    def our_step() -> None:
        emb_BD.grad = None
        torch.autograd.backward(ours(emb_BD, labels_B).loss)

    def peer_step() -> None:
        emb_BD.grad = None
        torch.autograd.backward(peer(emb_BD, labels_B))

    return our_step, peer_step


def steps_of_miner(ours: Miner, make_peer: Callable[[], Any], size: int) -> tuple[Step, Step]:
    """Ours and the peer's mining, from embeddings on."""
    emb_BD, labels_B = batch_of(size, IMAGES_PER_IDENTITY)
    peer = make_peer()
    return lambda: ours(Comparison.within(emb_BD, labels_B)), lambda: peer(emb_BD, labels_B)


def measure(*, quick: bool) -> list[Row]:
    """Memory first, where it is given back, then time as training has it; each row in a process of its own."""
    rows = []
    memory = apart(_memory, quick=quick)
    tune_malloc()
    for name, size in _all():
        ours_s, peer_s = None, None
        is_timed = not quick or _is_quick(name, size)
        if is_timed:
            ours_s, peer_s = apart(_times, name, size, quick=quick)
        ours_bytes, peer_bytes = memory.get((name, size), (None, None))
        row = Row(
            name=name,
            batch=size,
            ours_ms=_milliseconds(ours_s),
            peer_ms=_milliseconds(peer_s),
            ours_bytes=ours_bytes,
            peer_bytes=peer_bytes,
            is_timed=is_timed,
        )
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _is_quick(name: str, size: int) -> bool:
    """Whether the quick form takes the time of a row: of the smallest batch, or of one with a bar of its own."""
    row = (name, size)
    return size == SIZES[0] or (row in BARS and size == SIZES[1]) or row == RUNS_WHERE_THE_PEER_DOES_NOT


def _all() -> list[tuple[str, int]]:
    return [(name, size) for name in (*LOSSES, *MINERS) for size in SIZES]


def _memory(*, quick: bool) -> dict[tuple[str, int], tuple[int | None, int | None]]:
    """Bytes of ours and of the peer's, by row."""
    found: dict[tuple[str, int], tuple[int | None, int | None]] = {}
    give_back_what_is_freed()
    for name, size in _all():
        if size > SIZES[0]:
            ours, peer = steps_of(name, size)
            # A peer's slowest calls are made once, to time them.
            found[name, size] = peak_bytes(ours), None if quick or size > SIZES[1] else peak_bytes(peer)
    return found


def _times(name: str, size: int, *, quick: bool) -> list[float | None]:
    """Seconds of ours and of the peer's."""
    seconds, least = (0.05, 5) if quick else (0.6, 9)
    return alternating_medians(list(steps_of(name, size)), seconds=seconds, least=least)


def steps_of(name: str, size: int) -> tuple[Step, Step]:
    """Ours and the peer's, by the name of a row."""
    return steps_of_loss(LOSSES[name], size) if name in LOSSES else steps_of_miner(*MINERS[name], size)


def bars(rows: list[Row]) -> list[Bar]:
    """Every bar that the rows speak to: of speed, then of memory."""
    return [*(_speed_bar(row) for row in rows if row.is_timed), *_memory_bars({row.key: row for row in rows})]


def _speed_bar(row: Row) -> Bar:
    if row.key == RUNS_WHERE_THE_PEER_DOES_NOT:
        runs = row.ours_ms is not None
        return Bar(name=f"{row.name} at B = {row.batch} runs", value=float(runs), reach=1, holds=runs)
    reach, value = BARS.get(row.key, SHARED_BAR), row.times_faster
    holds = row.ours_ms is not None and (value is None or value >= reach)
    return Bar(name=f"{row.name} at B = {row.batch}, x peer", value=value, reach=reach, holds=holds)


def _memory_bars(rows: dict[tuple[str, int], Row]) -> list[Bar]:
    semi_hard = rows["triplet semi-hard", 2048].ours_bytes
    grown = {
        row.name: row.ours_bytes / max(rows[row.name, 1024].ours_bytes or 0, LEAST_BYTES)
        for row in rows.values()
        if row.batch == 2048 and row.ours_bytes is not None
    }
    worst = max(grown, key=lambda name: grown[name])
    return [
        Bar(
            name="triplet semi-hard at B = 2048, peak bytes at most",
            value=semi_hard,
            reach=SEMI_HARD_BYTES,
            holds=semi_hard is not None and semi_hard < SEMI_HARD_BYTES,
        ),
        Bar(
            name=f"peak memory at B = 2048 over that at 1024 at most, all losses and miners; most: {worst}",
            value=grown[worst],
            reach=GROWTH,
            holds=grown[worst] <= GROWTH and len(grown) == len(LOSSES) + len(MINERS),
        ),
    ]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


_HEAD = """\
| loss or miner | B | ours, ms | peer, ms | times faster | ours, peak MB | peer, peak MB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def _line(row: Row) -> str:
    figures = [
        _figure(row.ours_ms, "out of memory" if row.is_timed else ""),
        _figure(row.peer_ms, "out of memory" if row.is_timed else ""),
        _figure(row.times_faster, ""),
        _figure(None if row.ours_bytes is None else row.ours_bytes / 1e6, ""),
        _figure(None if row.peer_bytes is None else row.peer_bytes / 1e6, ""),
    ]
    return f"| {row.name} | {row.batch} | {' | '.join(figures)} |"


def _figure(value: float | None, absent: str) -> str:
    if value is None:
        return absent
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="batches of 256, of 1024 where a bar is stated for them, fewer turns, memory of ours alone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine(f"pytorch-metric-learning {pytorch_metric_learning.__version__}")
    where += f", {limit_memory(STEP_BYTES[options.quick]) / 1e9:.0f} GB for a step"
    print(f"{where}\n\n{_HEAD}", flush=True)
    rows = measure(quick=options.quick)
    verdicts = bars(rows)
    say_bars(verdicts)
    if options.json is not None:
        report = {
            "machine": where,
            "rows": [{**asdict(row), "times_faster": row.times_faster} for row in rows],
            "bars": [asdict(bar) for bar in verdicts],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
