"""Whether live images look to the model as those did that it was calibrated on: the index of population stability.

PSI = Σ (live − reference) · ln(live / reference) over bins (Siddiqi 2006): the symmetrised Kullback-Leibler divergence.
By convention below 0.1 nothing has changed, above 0.25 the calibration no longer describes what is served. Of n live
values in B bins it is about (B − 1) / n where nothing has changed (Yurdakul 2018), so that few values say nothing.

Live pairs match as often as their senders please, and a calibration's as often as it held out images of the same
identity. So the mixture of matching and non-matching reference pairs that fits the live distances best is what they are
compared with: its share is an estimate of how often live pairs match, and what no share explains is drift. B bins, N
values.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Vectors
from embedding.reference import Reference

Floats: TypeAlias = NDArray[np.float64]
Source: TypeAlias = Literal["verify", "images", "norms"]

LEAST_SAMPLES = 200
"""Values in the window below which no index is told: it would be about 0.05 without any drift."""

SLICES = 12
"""Parts of the window; it moves on by one at a time."""

_FLOOR = 1e-4
"""Least share of a reference bin: an index must stay finite where the reference was empty."""

_SAME = 1e-3
"""Distance below which two images are taken as one image sent twice, of which a calibration has none."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Live values of one kind against their reference."""

    samples: int
    """Values in the window."""
    psi: float | None
    """None with fewer than LEAST_SAMPLES."""
    match_share: float | None = None
    """Of distances: the share of matching pairs in the mixture that fits best; None without an index."""


class Drift:
    """Live values of one model, against its reference; every method may be called from any thread."""

    def __init__(
        self, reference: Reference, *, window_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reference = reference
        self._distance_edges = np.array(reference.distance_edges)
        self._norm_edges = np.array(reference.norm_edges)
        self._lock = threading.Lock()
        self._last_D: Vectors | None = None
        self._windows: dict[Source, Window] = {
            "verify": Window(len(reference.matching), window_seconds, clock),
            "images": Window(len(reference.matching), window_seconds, clock),
            "norms": Window(len(reference.norms), window_seconds, clock),
        }

    def embedded(self, emb_ND: Vectors, norm_N: Vectors) -> None:
        """Images were embedded: note their norms, and the distances [N] between each and the one before it.

        Images that come after each other are mostly of different identities, and tell how far apart the model puts
        them even where nobody asks for pairs.
        """
        with self._lock:
            before = [] if self._last_D is None else [self._last_D[None]]
            row_MD = np.concatenate([*before, emb_ND])
            self._last_D = emb_ND[-1].copy()
            # For statistics alone: decisions are measured by embedding.decision.
            dist_M = np.linalg.norm(np.diff(row_MD.astype(np.float64), axis=0), axis=1)
            self._add("images", dist_M[dist_M > _SAME], self._distance_edges)
            self._add("norms", norm_N.astype(np.float64), self._norm_edges)

    def verified(self, dist_N: list[float]) -> None:
        """Pairs were verified: note their distances."""
        values = np.array(dist_N, np.float64)
        with self._lock:
            self._add("verify", values[values > _SAME], self._distance_edges)

    def readings(self) -> dict[Source, Reading]:
        """Every kind of value against its reference, over the window."""
        with self._lock:
            counts = {source: window.counts() for source, window in self._windows.items()}
        matching, impostor = np.array(self._reference.matching), np.array(self._reference.impostor)
        readings: dict[Source, Reading] = {}
        for source, count_B in counts.items():
            samples = int(count_B.sum())
            if samples < LEAST_SAMPLES:
                readings[source] = Reading(samples=samples, psi=None)
            elif source == "norms":
                readings[source] = Reading(samples=samples, psi=psi(count_B, np.array(self._reference.norms)))
            else:
                share = match_share(count_B, matching, impostor)
                mixture_B = share * matching + (1 - share) * impostor
                readings[source] = Reading(samples=samples, psi=psi(count_B, mixture_B), match_share=share)
        return readings

    def _add(self, source: Source, values_N: Floats, edges: Floats) -> None:
        window = self._windows[source]
        window.add(np.bincount(np.searchsorted(edges, values_N, side="left"), minlength=len(edges) + 1))


class Window:
    """Counts [B] of the last while, forgotten slice by slice."""

    def __init__(self, bins: int, seconds: float, clock: Callable[[], float]) -> None:
        self._bins = bins
        self._slice_seconds = seconds / SLICES
        self._clock = clock
        self._slices: deque[tuple[int, Floats]] = deque()

    def add(self, count_B: NDArray[np.integer]) -> None:
        now = self._forget()
        if not self._slices or self._slices[-1][0] != now:
            self._slices.append((now, np.zeros(self._bins)))
        self._slices[-1][1][:] += count_B

    def counts(self) -> Floats:
        self._forget()
        return np.sum([count_B for _, count_B in self._slices], axis=0) if self._slices else np.zeros(self._bins)

    def _forget(self) -> int:
        now = int(self._clock() / self._slice_seconds)
        while self._slices and self._slices[0][0] <= now - SLICES:
            self._slices.popleft()
        return now


def psi(count_B: Floats, reference_B: Floats) -> float:
    """The index of population stability of live counts against reference shares; 0 where they agree.

    Half a value is added to each live bin, so that an empty one is rare and not impossible (Jeffreys' prior).
    """
    live_B = (count_B + 0.5) / (count_B.sum() + 0.5 * len(count_B))
    floored_B = np.maximum(reference_B, _FLOOR)
    floored_B = floored_B / floored_B.sum()
    return float(np.sum((live_B - floored_B) * np.log(live_B / floored_B)))


def match_share(count_B: Floats, matching_B: Floats, impostor_B: Floats) -> float:
    """The share s in [0, 1] for which s·matching + (1 − s)·impostor gives the counts the largest likelihood.

    The log-likelihood is concave in s: its derivative is bisected.
    """
    matching_B, impostor_B = np.maximum(matching_B, _FLOOR), np.maximum(impostor_B, _FLOOR)

    def slope(share: float) -> float:
        return float(np.sum(count_B * (matching_B - impostor_B) / (share * matching_B + (1 - share) * impostor_B)))

    low, high = 0.0, 1.0
    if slope(low) <= 0:
        return low
    if slope(high) >= 0:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2
