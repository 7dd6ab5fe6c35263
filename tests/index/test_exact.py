"""The kernel against a full scan with `decision.distances`, on data made to expose rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding.decision import Vectors, distances
from index.deadline import Deadline
from index.exact import Span, nearest, slack, squared_lengths, within


def spans(vectors_ND: Vectors, *, first: int, dead: list[int]) -> list[Span]:
    """The rows in two parts, `first` of them in the first."""
    norms_N = squared_lengths(vectors_ND)
    norms_N[dead] = np.inf
    parts = (slice(None, first), slice(first, None))
    return [Span(vectors_ND=vectors_ND[part], norms_N=norms_N[part]) for part in parts]


@st.composite
def crowded(draw: st.DrawFn) -> tuple[Vectors, Vectors, int, list[int]]:
    """Queries, rows, how many of these are in the first part, and which are dead: many rows tie, or nearly."""
    width = draw(st.sampled_from([1, 2, 3, 17, 128]))
    rows = draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centres = rng.normal(size=(draw(st.integers(1, 6)), width))
    spread = draw(st.sampled_from([0.0, 1e-7, 1e-4, 0.3]))
    signs = rng.choice([-1, 1], size=(rows, 1))
    vectors = signs * centres[rng.integers(len(centres), size=rows)] + spread * rng.normal(size=(rows, width))
    lengths = 1 + 9e-4 * rng.uniform(-1, 1, size=(rows, 1))  # as far from 1 as an embedding may be
    vectors_ND = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * lengths).astype(np.float32)
    queries_QD = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
    dead = rng.permutation(rows)[: draw(st.integers(0, rows))].tolist()
    return queries_QD, vectors_ND, draw(st.integers(0, rows)), dead


@settings(deadline=None, max_examples=150)
@given(crowded(), st.one_of(st.integers(1, 400), st.integers(1, 8)), st.booleans())
def test_nearest_are_those_of_a_full_scan_and_all_that_tie_with_the_last(
    case: tuple[Vectors, Vectors, int, list[int]], k: int, hurried: bool
) -> None:
    queries_QD, vectors_ND, first, dead = case
    deadline = Deadline(60) if hurried else None  # makes the kernel go by steps
    found = list(nearest(spans(vectors_ND, first=first, dead=dead), queries_QD, k, deadline=deadline))
    living = np.setdiff1d(np.arange(len(vectors_ND)), dead)
    for query_D, (rows, dists) in zip(queries_QD, found, strict=True):
        exact = distances(query_D, vectors_ND[living])
        last = np.sort(exact)[:k][-1] if len(living) else 0
        expected = dict(zip(living.tolist(), exact.tolist(), strict=True))
        assert dict(zip(rows.tolist(), dists.tolist(), strict=True)) == {
            row: dist for row, dist in expected.items() if dist <= last
        }


@pytest.mark.parametrize("hurried", [False, True])
def test_a_batch_finds_all_ties_however_many(hurried: bool) -> None:
    """More rows tie, and nearly tie, than one matrix product returns candidates."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_000, 16))
    vectors_ND = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors_ND[100:400] = vectors_ND[0]
    vectors_ND[5000:5200] = vectors_ND[0]
    vectors_ND[5100:5200, 0] = np.nextafter(vectors_ND[0, 0], np.float32(2))
    queries_QD = np.concatenate([vectors_ND[:1], vectors_ND[5100:5101], vectors_ND[6000:6008]])
    deadline = Deadline(60) if hurried else None
    found = nearest(spans(vectors_ND, first=300, dead=[120, 5001]), queries_QD, 3, deadline=deadline)
    living = np.setdiff1d(np.arange(10_000), [120, 5001])
    for query_D, (rows, _) in zip(queries_QD, found, strict=True):
        exact = distances(query_D, vectors_ND[living])
        assert sorted(rows.tolist()) == living[exact <= np.sort(exact)[2]].tolist()


@settings(deadline=None, max_examples=150)
@given(crowded(), st.data())
def test_within_is_complete_at_a_threshold_that_rows_lie_on(
    case: tuple[Vectors, Vectors, int, list[int]], data: st.DataObject
) -> None:
    queries_QD, vectors_ND, first, dead = case
    living = np.setdiff1d(np.arange(len(vectors_ND)), dead)
    exact = distances(queries_QD[0], vectors_ND[living])
    threshold = data.draw(st.sampled_from([0.0, 2.0, *exact.tolist()]))
    rows, dists = within(spans(vectors_ND, first=first, dead=dead), queries_QD[0], threshold)
    assert rows.tolist() == living[exact <= threshold].tolist()
    assert dists.tolist() == exact[exact <= threshold].tolist()


@pytest.mark.parametrize("width", [1, 2, 16, 128, 768, 4096])
def test_kernel_stays_well_within_its_slack(width: int) -> None:
    rng = np.random.default_rng(width)
    vectors = rng.normal(size=(400, width))
    vectors_ND = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query_D = vectors_ND[0]
    kernel_N = np.float64(query_D @ query_D) + squared_lengths(vectors_ND) - 2 * (vectors_ND @ query_D)
    exact_N = distances(query_D, vectors_ND).astype(np.float64) ** 2
    assert np.abs(kernel_N - exact_N).max() < slack(width)
