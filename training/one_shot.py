"""N-way one-shot classification: name a query by the nearest of N images, one for each of N identities.

Shapes: N items, D embedding width, W ways, R runs, G identities of a group, A drawers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embedding.errors import InvalidDataset
from training.pairs import Floats, Ints, distance_block, held_out

_OMNIGLOT_NAME = re.compile(r"\d{4}_(\d{2})")
"""The stem of an Omniglot file: character and drawer."""


class OneShot(BaseModel):
    """Error of N-way one-shot classification."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ways: int
    runs: int
    """Runs measured; each classifies as many queries as there are ways."""
    error: float
    """Share of queries whose nearest support is of another identity; a tie counts as an error."""
    standard_error: float
    """Of `error` over runs on these identities, 0 for a single run; other identities would add their own variation."""


@dataclass(frozen=True, eq=False)
class Run:
    """One classification task. Rows of N items; query w is of the identity of support w."""

    supports_W: Ints
    queries_W: Ints


def one_shot(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    groups_N: NDArray[np.generic],
    *,
    drawers_N: NDArray[np.generic] | None = None,
    ways: int = 20,
    runs: int = 400,
    seed: int = 0,
) -> OneShot:
    """Within-group one-shot error, as Omniglot's within-alphabet task (Lake, Salakhutdinov, Tenenbaum 2015).

    Raises InvalidVector as `held_out` does, and InvalidDataset as `draw_runs` does.
    """
    data = held_out(emb_ND, labels_N)
    drawn = draw_runs(data.identities, groups_N, drawers_N=drawers_N, ways=ways, runs=runs, seed=seed)
    return one_shot_of(run_errors(data.embeddings, drawn), ways=ways)


def run_errors(emb_ND: Floats, runs: Sequence[Run]) -> NDArray[np.float64]:
    """Share [R] of each run's queries whose nearest support is not their own."""
    errors_R = np.empty(len(runs))
    for at, run in enumerate(runs):
        dist_WW = distance_block(emb_ND[run.queries_W], emb_ND[run.supports_W])
        right_W = np.diag(dist_WW).copy()
        np.fill_diagonal(dist_WW, np.inf)
        errors_R[at] = (dist_WW.min(axis=1) <= right_W).mean()
    return errors_R


def one_shot_of(errors_R: NDArray[np.float64], *, ways: int) -> OneShot:
    """Mean and standard error over runs."""
    runs = len(errors_R)
    return OneShot(
        ways=ways,
        runs=runs,
        error=float(errors_R.mean()),
        standard_error=float(errors_R.std(ddof=1) / np.sqrt(runs)) if runs > 1 else 0.0,
    )


def draw_runs(
    labels_N: NDArray[np.generic],
    groups_N: NDArray[np.generic],
    *,
    drawers_N: NDArray[np.generic] | None = None,
    ways: int = 20,
    runs: int = 20,
    seed: int = 0,
) -> list[Run]:
    """Draw runs, each of `ways` identities (characters) of one group (an alphabet).

    Without drawers each run draws its group by lot, and for each identity two of its images. With drawers all supports
    of a run are of one drawer and all queries of another, and the groups take turns, as in Omniglot's own 20 runs: two
    for each of ten alphabets.

    Raises InvalidDataset when no group is large enough.
    """
    if ways < 2 or runs < 1:
        raise InvalidDataset(f"one-shot takes 2 ways or more and 1 run or more; got {ways} ways and {runs} runs")
    labels_N, groups_N = np.asarray(labels_N), np.asarray(groups_N)
    rng = np.random.default_rng(seed)
    rows_of_groups = [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]
    if drawers_N is None:
        groups = _large_enough([_Pairs(labels_N, rows) for rows in rows_of_groups], ways)
        return [groups[rng.integers(len(groups))].draw(ways, rng) for _ in range(runs)]
    groups = _large_enough([_Drawings(labels_N, np.asarray(drawers_N), rows) for rows in rows_of_groups], ways)
    order = rng.permutation(len(groups))
    return [groups[order[run % len(order)]].draw(ways, rng) for run in range(runs)]


def omniglot_drawers(names: Sequence[str]) -> Ints | None:
    """The drawer [N] of each image, by Omniglot's file names, 0709_01.png and so on; None where a name is another."""
    found = [_OMNIGLOT_NAME.fullmatch(PurePosixPath(name).stem) for name in names]
    return np.array([int(match[1]) for match in found if match], dtype=np.int64) if all(found) else None


class _Group(Protocol):
    most_ways: int

    def draw(self, ways: int, rng: np.random.Generator) -> Run: ...


class _Pairs:
    """The images of one group, two of an identity to be drawn."""

    def __init__(self, labels_N: NDArray[np.generic], rows: Ints) -> None:
        members = [rows[labels_N[rows] == label] for label in np.unique(labels_N[rows])]
        self._members = [images for images in members if len(images) > 1]
        self.most_ways = len(self._members)

    def draw(self, ways: int, rng: np.random.Generator) -> Run:
        chosen = rng.choice(len(self._members), size=ways, replace=False)
        drawn_W2 = np.stack([rng.choice(self._members[index], size=2, replace=False) for index in chosen])
        return Run(supports_W=drawn_W2[:, 1], queries_W=drawn_W2[:, 0])


class _Drawings:
    """The images of one group by identity and drawer."""

    def __init__(self, labels_N: NDArray[np.generic], drawers_N: NDArray[np.generic], rows: Ints) -> None:
        _, identity_n = np.unique(labels_N[rows], return_inverse=True)
        _, drawer_n = np.unique(drawers_N[rows], return_inverse=True)
        # Of several drawings of an identity by one drawer, the last is taken; -1 where there is none.
        self._row_GA = np.full((identity_n.max() + 1, drawer_n.max() + 1), -1, dtype=np.int64)
        self._row_GA[identity_n, drawer_n] = rows
        drew_GA = self._row_GA >= 0
        self._both_AA = drew_GA.T.astype(np.int64) @ drew_GA
        np.fill_diagonal(self._both_AA, 0)
        self.most_ways = int(self._both_AA.max())

    def draw(self, ways: int, rng: np.random.Generator) -> Run:
        pairs_P2 = np.argwhere(self._both_AA >= ways)
        supporter, asker = pairs_P2[rng.integers(len(pairs_P2))]
        drawn_by_both = np.flatnonzero((self._row_GA[:, supporter] >= 0) & (self._row_GA[:, asker] >= 0))
        chosen = rng.choice(drawn_by_both, size=ways, replace=False)
        return Run(supports_W=self._row_GA[chosen, supporter], queries_W=self._row_GA[chosen, asker])


def _large_enough(groups: Sequence[_Group], ways: int) -> list[_Group]:
    eligible = [group for group in groups if group.most_ways >= ways]
    if not eligible:
        raise InvalidDataset(
            f"{ways}-way one-shot takes a group of at least {ways} identities with two images each; the largest of "
            f"{len(groups)} groups has {max((group.most_ways for group in groups), default=0)}; ask for fewer ways"
        )
    return eligible
