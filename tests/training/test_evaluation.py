"""Metrics against scikit-learn and naive loops, on embeddings whose ranking is neither perfect nor random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from embedding.decision import distances
from embedding.errors import InvalidDataset, InvalidVector
from training import evaluation, pairs
from training.evaluation import VerificationCurve, evaluate, verification_curve
from training.pairs import distance_block, held_out

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


def noisy_identities(
    sizes: list[int], *, width: int = 8, noise: float = 0.9, seed: int = 0, seed_of_centres: int = 0
) -> tuple[Array, Labels]:
    """Unit vectors scattered about one centre an identity, in shuffled order."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = np.random.default_rng(seed_of_centres).normal(size=(len(sizes), width))
    rng = np.random.default_rng(seed)
    emb = centres[labels] + noise * rng.normal(size=(len(labels), width))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    order = rng.permutation(len(labels))
    return emb[order].astype(np.float32), labels[order]


def all_pairs(emb: Array, labels: Labels) -> tuple[Array, NDArray[np.bool_]]:
    """Distances and matches of every unordered pair, by a loop."""
    found = [
        (np.linalg.norm(emb[i].astype(float) - emb[j]), labels[i] == labels[j])
        for i in range(len(emb))
        for j in range(i + 1, len(emb))
    ]
    return np.array([d for d, _ in found], dtype=np.float32), np.array([m for _, m in found])


def naive_retrieval(queries: Array, query_labels: Labels, gallery: Array, gallery_labels: Labels, itself: bool) -> dict:
    """Textbook definitions, one query at a time; among equal distances non-matching items come first."""
    values: dict[str, list[float]] = {
        "recall@1": [],
        "recall@5": [],
        "recall@10": [],
        "R-precision": [],
        "MAP@R": [],
        "mAP": [],
    }
    for row, query in enumerate(queries):
        candidates = [k for k in range(len(gallery)) if not (itself and k == row)]
        nearness = {
            k: (float(np.square(query.astype(float) - gallery[k]).sum()), gallery_labels[k]) for k in candidates
        }
        candidates.sort(key=lambda k: (nearness[k][0], nearness[k][1] == query_labels[row]))
        hits = [bool(gallery_labels[k] == query_labels[row]) for k in candidates]
        total = sum(hits)
        if total == 0:
            continue
        for k in (1, 5, 10):
            values[f"recall@{k}"].append(float(any(hits[:k])))
        values["R-precision"].append(sum(hits[:total]) / total)
        values["mAP"].append(average_precision_score(hits, -np.arange(len(hits))))
        values["MAP@R"].append(sum(sum(hits[: i + 1]) / (i + 1) for i in range(total) if hits[i]) / total)
    return {name: float(np.mean(each)) for name, each in values.items()}


def test_retrieval_equals_the_textbook() -> None:
    emb, labels = noisy_identities([1, 2, 3, 5, 8, 13, 2])
    metrics = evaluate(emb, labels).metrics()
    expected = naive_retrieval(emb, labels, emb, labels, itself=True)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 0.2 < expected["MAP@R"] < expected["R-precision"] < expected["recall@5"] < 1, "the data must tell them apart"


def test_ties_count_against_the_model_as_in_the_textbook() -> None:
    rng = np.random.default_rng(5)
    emb = np.repeat(np.eye(4), 2, axis=0)[rng.integers(0, 8, 60)].astype(np.float32)  # 60 items on 4 points
    labels = rng.integers(0, 6, 60)
    metrics = evaluate(emb, labels).metrics()
    hits = naive_retrieval(emb, labels, emb, labels, itself=True)
    for name in ("recall@1", "recall@5", "recall@10", "R-precision", "MAP@R"):
        assert metrics[name] == pytest.approx(hits[name]), name
    assert 0 < hits["MAP@R"] < hits["R-precision"] < hits["recall@10"], "ties must not hide everything"


def test_query_set_against_gallery_equals_the_textbook() -> None:
    gallery, gallery_labels = noisy_identities([3, 1, 4, 2, 6], seed=1)
    queries, labels = noisy_identities([2, 3, 1, 2, 2, 3], seed=2, seed_of_centres=0)
    result = evaluate(queries, labels, gallery=(gallery, gallery_labels))
    expected = naive_retrieval(queries, labels, gallery, gallery_labels, itself=False)
    assert {name: result.metrics()[name] for name in expected} == pytest.approx(expected)
    assert (result.retrieval.queries, result.retrieval.queries_left_out, result.retrieval.gallery) == (10, 3, 16)
    swapped = evaluate(gallery, gallery_labels, gallery=(queries, labels))
    assert swapped.metrics()["MAP@R"] != pytest.approx(expected["MAP@R"]), "query and gallery are not interchangeable"
    is_match = labels[:, None] == gallery_labels
    assert result.verification.roc_auc == pytest.approx(
        roc_auc_score(is_match.ravel(), -distance_block(queries, gallery).ravel())
    )


def test_verification_equals_scikit_learn() -> None:
    emb, labels = noisy_identities([1, 5, 10, 20, 30])
    dist, is_match = all_pairs(emb, labels)
    result = evaluate(emb, labels).verification
    far, tar, _ = roc_curve(is_match, -dist, drop_intermediate=False)
    assert result.roc_auc == pytest.approx(roc_auc_score(is_match, -dist), abs=1e-9)
    assert result.roc_auc != pytest.approx(roc_auc_score(~is_match, -dist), abs=1e-3)
    at_equality = np.interp(0, far + tar - 1, far)  # FAR − FRR rises along the curve
    assert result.equal_error_rate == pytest.approx(at_equality, abs=1e-9)
    assert result.tar_at_far_1e_2 == tar[far <= 1e-2].max()
    assert (result.identities, result.matching_pairs) == (5, is_match.sum())
    assert result.impostor_pairs == (~is_match).sum()


def test_true_accept_rate_is_read_at_the_last_threshold_that_keeps_the_promise() -> None:
    curve = VerificationCurve(
        thresholds=np.array([-1, 0.1, 0.2, 0.3, 0.4]),
        matching=np.array([0, 1, 2, 3, 4]),
        impostor=np.array([0, 0, 3, 4, 300]),
        resolution=0.0,
    )
    assert curve.tar_at_far(3 / 300) == 2 / 4
    assert curve.tar_at_far(3.9 / 300) == 2 / 4
    assert curve.tar_at_far(4 / 300) == 3 / 4


def test_rates_without_enough_pairs_are_none() -> None:
    emb, labels = noisy_identities([10, 29])
    assert evaluate(emb, labels).verification.tar_at_far_1e_2 is None  # 290 pairs, 300 needed
    emb, labels = noisy_identities([10, 30])
    result = evaluate(emb, labels)
    assert result.verification.tar_at_far_1e_2 is not None
    assert result.verification.tar_at_far_1e_3 is None
    assert result.metrics()["TAR@FAR=1e-3"] is None


def test_streamed_counts_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    emb, labels = noisy_identities([5, 40, 30, 20, 1])
    data = held_out(emb, labels)
    exact = verification_curve(data)
    monkeypatch.setattr(evaluation, "EXACT_PAIRS", 0)
    monkeypatch.setattr(pairs, "BLOCK_DISTANCES", 700)  # many small blocks, the last one ragged
    streamed = verification_curve(data)
    assert (streamed.matching_pairs, streamed.impostor_pairs) == (exact.matching_pairs, exact.impostor_pairs)
    assert exact.resolution == exact.area_error == 0
    assert abs(streamed.area - exact.area) <= streamed.area_error + 1e-12
    assert streamed.area_error < 1e-6
    assert exact.equal_error_rate_error == 0
    assert abs(streamed.equal_error_rate - exact.equal_error_rate) <= streamed.equal_error_rate_error + 1e-12


def test_stated_errors_of_coarse_counts_hold_and_are_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    emb, labels = noisy_identities([5, 40, 30, 20, 1])
    exact = verification_curve(held_out(emb, labels))
    monkeypatch.setattr(evaluation, "EXACT_PAIRS", 0)
    for bins in (4, 16, 64):
        monkeypatch.setattr(evaluation, "_BINS_PER_UNIT", bins)
        coarse = verification_curve(held_out(emb, labels))
        assert 0 < abs(coarse.area - exact.area) <= coarse.area_error < 0.2
        assert 0 < abs(coarse.equal_error_rate - exact.equal_error_rate) <= coarse.equal_error_rate_error < 0.3
        for far in (0.02, 0.1, 0.5, 1.0):
            measured, true = coarse.tar_at_far(far), exact.tar_at_far(far)
            assert measured is not None
            assert true is not None
            assert measured <= true <= measured + coarse.tar_at_far_error(far) + 1e-12
            assert exact.tar_at_far_error(far) == 0
    coarsest = VerificationCurve(np.array([-1, 0.5, 1.0]), np.array([0, 3, 4]), np.array([0, 2, 100]), 0.5)
    assert coarsest.tar_at_far_error(0.05) == 1 / 4  # an impostor may have been nearer than the last match, or not


def test_streamed_counts_are_those_of_each_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    emb, labels = noisy_identities([5, 40, 30, 20, 1])
    data = held_out(emb, labels)
    exact = verification_curve(data)
    monkeypatch.setattr(evaluation, "EXACT_PAIRS", 0)
    streamed = verification_curve(data)
    at = np.searchsorted(exact.thresholds, streamed.thresholds, side="right") - 1
    np.testing.assert_array_equal(streamed.matching, exact.matching[at])
    np.testing.assert_array_equal(streamed.impostor, exact.impostor[at])
    assert evaluate(emb, labels).retrieval.map_at_r == pytest.approx(
        naive_retrieval(emb, labels, emb, labels, itself=True)["MAP@R"]
    )


def test_a_collapsed_model_is_not_flattered() -> None:
    emb = np.zeros((20, 4), dtype=np.float32)
    emb[:, 0] = 1
    metrics = evaluate(emb, np.repeat(np.arange(4), 5)).metrics()
    assert metrics["recall@10"] == metrics["MAP@R"] == 0
    assert metrics["mAP"] == pytest.approx(np.mean(np.arange(1, 5) / np.arange(16, 20))), "all matches come last"
    assert metrics["ROC AUC"] == metrics["EER"] == 0.5


def test_a_perfect_model_is_perfect() -> None:
    emb = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    metrics = evaluate(emb, np.repeat(np.arange(4), 3)).metrics()
    assert metrics.pop("EER") == 0
    assert metrics.pop("TAR@FAR=1e-2") is None
    assert metrics.pop("TAR@FAR=1e-3") is None
    assert set(metrics.values()) == {1.0}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8).filter(lambda sizes: max(sizes) > 1), st.integers(0, 99))
def test_order_of_items_and_names_of_identities_do_not_matter(sizes: list[int], seed: int) -> None:
    emb, labels = noisy_identities(sizes, seed=seed)
    order = np.random.default_rng(seed).permutation(len(emb))
    reference = evaluate(emb, labels)
    other = evaluate(emb[order], 1000 - 7 * labels[order])
    assert other.metrics() == pytest.approx(reference.metrics())
    values = [value for value in reference.metrics().values() if value is not None]
    assert all(0 <= value <= 1 for value in values)
    assert reference.retrieval.map_at_r <= reference.retrieval.r_precision + 1e-12
    assert reference.retrieval.recall_at_1 <= reference.retrieval.recall_at_5 <= reference.retrieval.recall_at_10


def test_blocks_measure_what_decisions_measure() -> None:
    emb, _ = noisy_identities([30, 30], width=128, noise=0.01)
    emb[1], emb[3] = emb[0], emb[2]
    block = distance_block(emb, emb)
    expected = np.stack([distances(row, emb) for row in emb])
    np.testing.assert_allclose(block, expected, rtol=0, atol=1e-6)
    assert block[0, 1] == block[2, 3] == 0
    assert (np.diag(block) == 0).all()


@pytest.mark.parametrize(
    ("emb", "labels", "error", "message"),
    [
        (np.eye(3), [0, 0], InvalidVector, r"one label an item; got shapes \(3, 3\) and \(2,\)"),
        (np.eye(3)[0], [0], InvalidVector, "shape"),
        (np.eye(3) * 2, [0, 0, 1], InvalidVector, "3 of 3 embeddings are not finite unit vectors, the first in row 0"),
        (np.diag([1, np.nan, 1]), [0, 0, 1], InvalidVector, "1 of 3 .* first in row 1"),
        (np.eye(3), [0.0, 0.0, 1.0], InvalidDataset, "labels are integers"),
        (np.eye(3), [0, 0, 0], InvalidDataset, "at least two identities"),
        (np.eye(3), [0, 1, 2], InvalidDataset, "got 3 identities with at most 1 images"),
        (np.empty((0, 3)), np.empty(0, int), InvalidDataset, "got 0 identities"),
    ],
)
def test_unusable_input_is_named(emb: Array, labels: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(np.asarray(emb), np.asarray(labels))


def test_disjoint_queries_and_gallery_are_refused() -> None:
    emb, labels = noisy_identities([3, 3])
    with pytest.raises(InvalidDataset, match="0 matching"):
        evaluate(emb, labels, gallery=(emb, labels + 2))


@pytest.mark.parametrize(
    ("gallery", "error", "message"),
    [
        ((np.empty((0, 3)), np.empty(0, int)), InvalidDataset, "0 matching and 0 non-matching"),
        ((np.eye(4), np.arange(4)), InvalidVector, "queries are 3 wide and the gallery 4"),
    ],
)
def test_a_gallery_that_cannot_be_searched_is_named(
    gallery: tuple[Array, Labels], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(np.eye(3), np.array([0, 0, 1]), gallery=gallery)
