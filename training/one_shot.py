"""N-way one-shot classification: name a query by the nearest of N images, one for each of N identities.

Shapes: N items, D embedding width, W ways.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embedding.errors import InvalidDataset
from training.pairs import Ints, distance_block, held_out


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


def one_shot(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    groups_N: NDArray[np.generic],
    *,
    ways: int = 20,
    runs: int = 400,
    seed: int = 0,
) -> OneShot:
    """Within-group one-shot error, as Omniglot's within-alphabet task (Lake, Salakhutdinov, Tenenbaum 2015).

    Each run draws a group (an alphabet), `ways` of its identities (characters) and two images of each, one for the
    supports and one for the queries. Groups with fewer than `ways` identities of two images take no part.

    Raises InvalidVector as `held_out` does, and InvalidDataset when no group is large enough.
    """
    data, groups_N = held_out(emb_ND, labels_N), np.asarray(groups_N)
    members: list[list[Ints]] = []
    for group in np.unique(groups_N):
        inside = np.flatnonzero(groups_N == group)
        labels = data.identities[inside]
        several = [inside[labels == label] for label in np.unique(labels)]
        members.append([rows for rows in several if len(rows) > 1])
    eligible = [identities for identities in members if len(identities) >= ways]
    if not eligible:
        raise InvalidDataset(
            f"{ways}-way one-shot takes a group of at least {ways} identities with two images each; the largest of "
            f"{len(members)} groups has {max(map(len, members), default=0)}; ask for fewer ways"
        )

    rng = np.random.default_rng(seed)
    errors = np.empty(runs)
    for run in range(runs):
        identities = eligible[rng.integers(len(eligible))]
        chosen = rng.choice(len(identities), size=ways, replace=False)
        drawn_W2 = np.stack([rng.choice(identities[index], size=2, replace=False) for index in chosen])
        dist_WW = distance_block(data.embeddings[drawn_W2[:, 0]], data.embeddings[drawn_W2[:, 1]])
        right_W = np.diag(dist_WW).copy()
        np.fill_diagonal(dist_WW, np.inf)
        errors[run] = (dist_WW.min(axis=1) <= right_W).mean()
    return OneShot(
        ways=ways,
        runs=runs,
        error=float(errors.mean()),
        standard_error=float(errors.std(ddof=1) / np.sqrt(runs)) if runs > 1 else 0.0,
    )
