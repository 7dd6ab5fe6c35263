"""Distances and decisions: exact, symmetric, independent of the batch, never flattering."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedding.calibration import CELLS_PER_UNIT, Calibration, ErrorRates, Histogram, MatchProbability
from embedding.decision import (
    Judge,
    OperatingPoint,
    Vectors,
    Verdict,
    checked_embedding,
    checked_embeddings,
    distance,
    distances,
    distances_of_pairs,
)
from embedding.errors import InvalidOperatingPoint, InvalidVector


def unit(rows: int, width: int, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(width=st.integers(1, 300), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_distances_equal_the_float64_norm(width: int, rows: int, seed: int) -> None:
    items, query = unit(rows, width, seed), unit(1, width, seed + 1000)[0]
    exact = np.minimum(np.linalg.norm(items.astype(np.float64) - query.astype(np.float64), axis=1), 2)
    np.testing.assert_allclose(distances(query, items), exact, rtol=2e-6, atol=1e-7)


@given(
    width=st.sampled_from([1, 7, 16, 100, 128, 129]), rows=st.integers(1, 50), seed=st.integers(0, 99), cut=st.data()
)
def test_a_distance_depends_on_its_own_two_vectors_alone(width: int, rows: int, seed: int, cut: st.DataObject) -> None:
    items, query = unit(rows, width, seed), unit(1, width, seed + 1000)[0]
    whole = distances(query, items)
    row = cut.draw(st.integers(0, rows - 1))
    start = cut.draw(st.integers(0, row))
    unaligned = np.frombuffer(b"x" + items[row].tobytes(), np.uint8)[1:].copy().view(np.float32)
    assert distances(query, items[start:])[row - start] == whole[row]
    assert distance(query, unaligned) == whole[row]
    assert distance(items[row], query) == whole[row]


def test_rows_beyond_one_block_are_measured_alike() -> None:
    items, query = unit(5000, 24), unit(1, 24, 1)[0]
    assert (distances(query, items) == np.array([distance(query, item) for item in items])).all()
    others = items[::-1].copy()
    pairs_P = distances_of_pairs(items, others)
    assert all(pairs_P[row] == distance(items[row], others[row]) for row in range(0, 5000, 7))


def test_distances_leave_their_input_alone() -> None:
    items, query = unit(5, 8), unit(1, 8, 1)[0]
    before = items.copy()
    distances(query, items)
    assert (items == before).all()


def test_few_rows_are_measured_in_room_that_no_result_lies_in_and_no_two_threads_share() -> None:
    items, queries = unit(64, 128), unit(4, 128, 1)
    expected = [np.array([distance(query, item) for item in items]) for query in queries]
    together = Barrier(len(queries), timeout=10)

    def stays_right(at: int) -> bool:
        first = distances(queries[at], items)
        together.wait()
        return all((distances(queries[at], items) == expected[at]).all() for _ in range(100)) and bool(
            (first == expected[at]).all()
        )

    with ThreadPoolExecutor(len(queries)) as threads:
        assert all(threads.map(stays_right, range(len(queries))))
    kept = distances(queries[0], items)
    distances(queries[1], items)
    assert (kept == expected[0]).all()


def test_room_for_few_rows_is_kept_for_few_shapes() -> None:
    vectors = unit(64, 2048)
    tracemalloc.start()
    try:
        for rows in range(1, len(vectors) + 1):
            distances(vectors[0], vectors[:rows])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 9 * vectors.nbytes  # room for all of these shapes would be 32 times as large


def test_coinciding_and_opposite_vectors() -> None:
    a = unit(1, 64)[0]
    assert distance(a, a) == 0
    assert distance(a, -a) == pytest.approx(2)
    assert all(distance(each, -each) <= 2 for each in unit(100, 64)), "rounding adds up to more for some"


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.full(4, np.nan, np.float32), "NaN or infinite"),
        (np.array([np.inf, 0, 0, 0], np.float32), "NaN or infinite"),
        (np.zeros(4, np.float32), "length 0"),
        (np.ones(4, np.float32), "length 2"),
        (np.array([0, 1.0015, 0, 0], np.float32), "length 1"),
        (np.ones(3, np.float32), r"shape \(4,\)"),
        (b"\x00" * 12, "16 bytes"),
    ],
)
def test_a_bad_vector_is_named(vector: Vectors | bytes, message: str) -> None:
    with pytest.raises(InvalidVector, match=message):
        checked_embedding(vector, 4)


def test_a_good_vector_keeps_its_bits() -> None:
    vector = unit(1, 16)[0] * np.float32(1.0004)
    assert checked_embedding(vector.astype("<f4").tobytes(), 16).tobytes() == vector.tobytes()


@pytest.mark.parametrize(("length", "is_unit"), [(0.9989, False), (0.9991, True), (1.0009, True), (1.0011, False)])
def test_the_length_of_a_vector_may_be_off_by_a_thousandth(length: float, is_unit: bool) -> None:
    rows = unit(3, 16)
    rows[1] *= np.float32(length)
    for check in (lambda: checked_embedding(rows[1], 16), lambda: checked_embeddings(rows, 16)):
        if is_unit:
            check()
        else:
            with pytest.raises(InvalidVector, match="length"):
                check()


def test_the_default_threshold_is_the_learned_margin(calibration: Calibration) -> None:
    judge = Judge(calibration, model="m")
    at = judge.judge(0.75)
    assert (at.verdict, at.is_match, at.match_probability, at.signed_margin) == (Verdict.MATCH, True, 0.5, 0.0)
    above = judge.judge(float(np.nextafter(np.float32(0.75), np.float32(1))))
    assert above.verdict is Verdict.NON_MATCH
    assert above.match_probability < 0.5


def test_a_decision_tells_its_evidence(calibration: Calibration) -> None:
    second = calibration.model_copy(update={"version": 2})
    at = Judge(second, OperatingPoint(threshold=0.5, uncertain_within=0.1), model="m").judge(0.4375)
    assert (at.verdict, at.is_match) == (Verdict.UNCERTAIN, False)
    assert (at.far, at.far_upper95, at.frr) == (0.01, 0.03, 0.2)
    assert (at.distance, at.threshold, at.model, at.calibration) == (0.4375, 0.5, "m", 2)


def test_rates_between_rows_are_the_worse_of_both(calibration: Calibration) -> None:
    rates = calibration.rates_at(0.75)
    assert (rates.far, rates.far_upper95) == (0.1, 0.2)
    assert (rates.frr, rates.frr_upper95) == (0.2, 0.3)


def test_rates_below_the_first_row_reject_all(calibration: Calibration) -> None:
    rates = calibration.rates_at(0.1)
    assert (rates.far, rates.frr) == (0.0, 1.0)
    assert (rates.far_upper95, rates.frr_upper95) == (0.02, 1.0)


@given(t=st.floats(0, 2, width=32))
def test_rates_never_flatter_a_neighbouring_row(calibration: Calibration, t: float) -> None:
    rates = calibration.rates_at(t)
    for row in calibration.curve:
        if row.threshold <= t:
            assert rates.far >= row.far
            assert rates.frr <= row.frr
        if row.threshold >= t:
            assert rates.far <= row.far
            assert rates.frr >= row.frr


@pytest.mark.parametrize(
    ("point", "threshold"),
    [
        (OperatingPoint(), 0.75),
        (OperatingPoint(threshold=0.3), float(np.float32(0.3))),
        (OperatingPoint(threshold=0.0), 0.0),
        (OperatingPoint(threshold=2.0), 2.0),
        (OperatingPoint(name="far-1e-2"), 0.5),
        (OperatingPoint(target_far=3 / 600), 0.25),
        (OperatingPoint(target_far=0.01), 0.5),
        (OperatingPoint(target_far=0.09), 0.5),
        (OperatingPoint(target_far=0.1), 1.0),
        (OperatingPoint(target_far=1.0), 2.0),
    ],
)
def test_operating_points(calibration: Calibration, point: OperatingPoint, threshold: float) -> None:
    assert Judge(calibration, point, model="m").threshold == threshold


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (OperatingPoint(target_far=0.004), "smallest rate"),
        (OperatingPoint(target_far=0.0), r"\(0, 1\]"),
        (OperatingPoint(target_far=1.5), r"\(0, 1\]"),
        (OperatingPoint(target_far=float("nan")), r"\(0, 1\]"),
        (OperatingPoint(threshold=2.5), r"\[0, 2\]"),
        (OperatingPoint(threshold=float("nan")), r"\[0, 2\]"),
        (OperatingPoint(name="nope"), "far-1e-2, learned-margin"),
        (OperatingPoint(threshold=1.0, target_far=0.1), "one of"),
        (OperatingPoint(threshold=1.0, name="far-1e-2"), "one of"),
        (OperatingPoint(target_fpir=0.1, target_far=0.1), "one of"),
        (OperatingPoint(uncertain_within=-0.1), "uncertain_within"),
        (OperatingPoint(uncertain_within=2.1), "uncertain_within"),
    ],
)
def test_an_unsupported_point_is_refused(calibration: Calibration, point: OperatingPoint, message: str) -> None:
    with pytest.raises(InvalidOperatingPoint, match=message):
        Judge(calibration, point, model="m")


@pytest.mark.parametrize(
    ("rate", "among", "threshold"),
    [
        (0.09, 1, 0.5),
        (0.1, 1, 1.0),
        (0.1, 2, 0.5),
        (1.0, 10, 1.0),
        (1.0, 11, 0.5),
        (1.0, 100, 0.5),
        (0.09, 0, 0.5),
        (0.1, 0, 1.0),
        (1.0, 200, 0.25),
    ],
)
def test_a_rate_of_searches_tightens_the_threshold_with_the_gallery(
    calibration: Calibration, rate: float, among: int, threshold: float
) -> None:
    assert Judge(calibration, OperatingPoint(target_fpir=rate), model="m", among=among).threshold == threshold


@pytest.mark.parametrize(
    ("rate", "among", "message"),
    [
        (0.1, 21, r"among 21 items takes a false-accept rate of 0\.00476 .*; ask for 0\.105 or more, or learn"),
        (0.5, 200, r"ask for 1 or more, or learn"),
        (1.0, 201, r"600 impostor pairs support; learn the calibration"),
        (0.0, 5, r"target_fpir must lie in \(0, 1\]"),
        (float("nan"), 5, r"\(0, 1\]"),
        (0.5, None, "target_fpir is a rate of searches"),
    ],
)
def test_a_rate_of_searches_that_is_not_supported_is_refused(
    calibration: Calibration, rate: float, among: int | None, message: str
) -> None:
    with pytest.raises(InvalidOperatingPoint, match=message) as caught:
        Judge(calibration, OperatingPoint(target_fpir=rate), model="m", among=among)
    assert caught.value.field == "operating_point.target_fpir"


def test_a_rate_below_the_smallest_measured_is_refused(calibration: Calibration) -> None:
    """Where images of different identities coincide, even the smallest threshold accepts them."""
    coinciding = calibration.model_copy(update={"curve": calibration.curve[2:]})
    for point, among in ((OperatingPoint(target_far=0.05), None), (OperatingPoint(target_fpir=0.1), 2)):
        with pytest.raises(InvalidOperatingPoint, match=r"rate of 0\.05; the smallest measured is 0\.1") as caught:
            Judge(coinciding, point, model="m", among=among)
        assert caught.value.field == f"operating_point.{'target_fpir' if among else 'target_far'}"


@pytest.mark.parametrize("among", [10, 100, 400])
def test_at_most_the_wanted_share_of_strangers_finds_a_match(among: int) -> None:
    rng = np.random.default_rng(among)

    def people(count: int) -> Vectors:
        # Of two kinds, one of which is easily taken for others: errors crowd on few queries.
        centre_D = np.where(rng.random((count, 1)) < 0.3, 1.0, 0.0) * np.eye(12)[0]
        emb_ND = rng.normal(size=(count, 12)) / 3 + centre_D
        return (emb_ND / np.linalg.norm(emb_ND, axis=1, keepdims=True)).astype(np.float32)

    held_out_ND = people(1_000)
    of_pairs_P = np.concatenate([distances(held_out_ND[i], held_out_ND[i + 1 :]) for i in range(999)])
    thresholds = np.unique(np.quantile(of_pairs_P, np.geomspace(1e-4, 0.9, 60)).astype(np.float32))
    rows = [
        ErrorRates(threshold=float(t), far=float((of_pairs_P <= t).mean()), far_upper95=1.0, frr=0.0, frr_upper95=1.0)
        for t in (*thresholds, 2)
    ]
    measured = Calibration(
        protocol="identity-disjoint",
        identities=1_000,
        matching_pairs=1_000,
        impostor_pairs=len(of_pairs_P),
        learned_margin=0.5,
        probability=MatchProbability(midpoint=0.5, slope=8),
        curve=tuple(rows),
    )
    judge = Judge(measured, OperatingPoint(target_fpir=0.2), model="m", among=among)
    found = [bool((distances(query_D, people(among)) <= judge.threshold).any()) for query_D in people(600)]
    assert 0.02 < np.mean(found) <= 0.2
    assert judge.rates.far <= 0.2 / among


@example(d=0.5, band=0.25)  # its edge
@given(d=st.floats(0, 2, width=32), band=st.floats(0, 1, width=32))
def test_the_band_answers_uncertain_and_nothing_else_changes(calibration: Calibration, d: float, band: float) -> None:
    plain = Judge(calibration, model="m").judge(d)
    banded = Judge(calibration, OperatingPoint(uncertain_within=band), model="m").judge(d)
    inside = abs(0.75 - d) < band
    assert banded.verdict is (Verdict.UNCERTAIN if inside else plain.verdict)
    assert (banded.distance, banded.match_probability) == (plain.distance, plain.match_probability)


@settings(max_examples=50)
@given(arrays(np.float32, 2, elements=st.floats(0, 2, width=32)))
def test_a_closer_pair_is_never_less_probable(calibration: Calibration, pair: Vectors) -> None:
    assume(pair[0] < pair[1])
    judge = Judge(calibration, model="m")
    assert judge.judge(pair[0]).match_probability >= judge.judge(pair[1]).match_probability


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: {"threshold": 0.5}}, "rise strictly"),
        ({3: {"threshold": 1.9}}, "last row"),
        ({0: {"far": 0.02}}, "far must not fall"),
        ({0: {"frr": 0.1}}, "frr must not rise"),
        ({0: {"far_upper95": 0.04}}, "far_upper95 must not fall"),
        ({0: {"frr_upper95": 0.2}}, "frr_upper95 must not rise"),
    ],
)
def test_a_calibration_that_contradicts_itself_is_refused(
    calibration: Calibration, changed: dict[int, dict[str, float]], message: str
) -> None:
    body = calibration.model_dump()
    body["curve"] = [row | changed.get(at, {}) for at, row in enumerate(body["curve"])]
    with pytest.raises(ValueError, match=message):
        Calibration.model_validate(body)


def test_an_explicit_threshold_has_the_rates_of_the_row_that_it_is(calibration: Calibration) -> None:
    """Rows stand at float32 values: the nearest to 0.4 lies above it, that to 0.9 below."""
    for asked in (0.4, 0.9):
        body = calibration.model_dump()
        body["curve"][1]["threshold"] = asked
        judge = Judge(Calibration.model_validate(body), OperatingPoint(threshold=asked), model="m")
        assert (judge.rates.far, judge.rates.frr) == (0.01, 0.2)


def test_the_last_cell_of_a_histogram_is_that_of_distance_two() -> None:
    assert Histogram(cells=(0, 2 * CELLS_PER_UNIT), counts=(1, 1), effective=1)
    for cells, counts in (((2 * CELLS_PER_UNIT + 1,), (1,)), ((0,), (0,))):
        with pytest.raises(ValueError, match=r"less than or equal|greater than or equal"):
            Histogram(cells=cells, counts=counts, effective=1)


@pytest.mark.parametrize(("cells", "counts"), [((1, 1), (2, 3)), ((2, 1), (2, 3)), ((1, 2), (2,))])
def test_a_histogram_names_each_cell_once(cells: tuple[int, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rise strictly, with a count each"):
        Histogram(cells=cells, counts=counts, effective=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"probability": {"kind": "logistic", "midpoint": 0.75, "slope": float("inf")}}, "finite"),
        ({"probability": {"kind": "logistic", "midpoint": 0.75, "slope": 0.0}}, "greater than 0"),
        ({"probability": {"kind": "logistic", "midpoint": 0.5, "slope": 8.0}}, "must equal learned_margin"),
        ({"rates": ()}, "Extra inputs"),
    ],
)
def test_a_calibration_that_cannot_be_meant_is_refused(
    calibration: Calibration, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration.model_validate(calibration.model_dump() | changed)


def test_a_calibration_survives_json_bit_for_bit(calibration: Calibration) -> None:
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@given(
    dist=arrays(np.float32, st.integers(0, 40), elements=st.floats(0, 2, width=32)),
    band=st.sampled_from([0.0, 0.25]),
    cut=st.integers(0, 40),
)
def test_many_distances_are_judged_each_as_if_it_were_alone(
    calibration: Calibration, dist: Vectors, band: float, cut: int
) -> None:
    judge = Judge(calibration, OperatingPoint(uncertain_within=band), model="m")
    together = judge.judge_all(dist)
    assert list(together) == [judge.judge(float(each)) for each in dist]
    assert list(together[cut:]) == list(together)[cut:]
    assert together.signed_margins().tolist() == [each.signed_margin for each in together]


def test_many_embeddings_are_checked_as_one_is() -> None:
    good = unit(5, 16)
    assert checked_embeddings(good, 16) is good
    for wrong, message in ((np.nan, "NaN"), (1e38, "length|infinite"), (0.5, "length")):
        bad = good.copy()
        bad[3, 0] = wrong
        with pytest.raises(InvalidVector, match=message) as refused:
            checked_embeddings(bad, 16)
        assert refused.value.field == "embeddings[3]"
    for wrong_shape, width in ((good, 15), (good[0], 16), (good[None], 16)):
        with pytest.raises(InvalidVector, match="shape"):
            checked_embeddings(wrong_shape, width)
