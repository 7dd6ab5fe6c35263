"""Feedback of simulated users of another population than the one that was held out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding.calibration import Calibration
from embedding.decision import distances
from embedding.errors import InvalidDataset
from embedding.feedback import Feedback
from training.calibration import calibrate
from training.recalibration import Reviewed, effective_pairs, feedback_rates, recalibrate, reviewed

PRINT = "a" * 64
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
TARGETS = (0.1, 0.01)

Pairs = tuple[NDArray[np.float32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Population:
    """People whose images lie around a point of their own, the points around a common one."""

    spread: float
    """Of a person's images."""
    alike: float
    """How much people have in common."""

    def people(
        self, count: int, images: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        centre_GD = rng.normal(size=(count, 12)) + self.alike * np.ones(12)
        emb_ND = np.repeat(centre_GD, images, axis=0) + self.spread * rng.normal(size=(count * images, 12))
        emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
        return emb_ND.astype(np.float32), np.repeat(np.arange(count), images)

    def pairs(self, count: int, rng: np.random.Generator) -> Pairs:
        """Independent pairs, one in five matching."""
        (emb_ND, _), is_match_F = self.people(2 * count, 2, rng), rng.random(count) < 0.2
        other_F = np.where(is_match_F, 1, 2)
        return np.array(
            [distances(emb_ND[4 * i], emb_ND[4 * i + other][None])[0] for i, other in enumerate(other_F)], np.float32
        ), is_match_F


HELD_OUT = Population(spread=0.45, alike=0.0)
LIVE = Population(spread=0.6, alike=0.7)


@pytest.fixture(scope="module")
def base() -> Calibration:
    return calibrate(*HELD_OUT.people(60, 4, np.random.default_rng(0)), protocol="identity-disjoint")


def margin_of(population: Population) -> float:
    emb_ND, labels_N = population.people(300, 4, np.random.default_rng(9))
    return calibrate(emb_ND, labels_N, protocol="identity-disjoint").learned_margin


def reviews(pairs: Pairs, threshold: float, rng: np.random.Generator, *, rate: float = 0.2) -> list[Feedback]:
    """All that was accepted is reviewed, and of what was rejected a share."""
    cases = []
    for i, (distance, is_match) in enumerate(zip(*pairs, strict=True)):
        is_accepted = bool(distance <= threshold)
        if is_accepted or rng.random() < rate:
            cases.append(
                Feedback(
                    case_id=f"{i}",
                    fingerprint=PRINT,
                    model="toy",
                    calibration=1,
                    distance=float(distance),
                    threshold=threshold,
                    verdict="match" if is_accepted else "non-match",
                    is_match=bool(is_match),
                    review_rate=1.0 if is_accepted else rate,
                    time=WHEN,
                )
            )
    return cases


def test_held_out_pairs_are_kept_as_they_were(base: Calibration) -> None:
    assert base.held_out is not None
    for histogram, pairs in (
        (base.held_out.matching, base.matching_pairs),
        (base.held_out.impostor, base.impostor_pairs),
    ):
        assert sum(histogram.counts) == pairs
        assert 60 < histogram.effective < pairs, "of sixty people"
    assert base.held_out.impostor.effective < base.impostor_pairs / 10
    again = Calibration.model_validate_json(base.model_dump_json())
    assert again == base


def test_the_margin_moves_to_the_population_that_is_served(base: Calibration) -> None:
    truth = margin_of(LIVE)
    assert abs(truth - base.learned_margin) > 0.05
    rng = np.random.default_rng(1)
    learned = []
    for count, times in ((1600, 4), (12_000, 1)):
        margins = []
        for _ in range(times):
            cases = reviews(LIVE.pairs(count, rng), base.learned_margin, rng)
            margins.append(recalibrate(base, reviewed(cases, PRINT)).learned_margin)
        learned.append(np.mean(margins))
    errors = [abs(margin - truth) for margin in (base.learned_margin, *learned)]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.5 * errors[0], "much feedback counts more than sixty people"


def test_the_same_population_leaves_the_margin_where_it_is(base: Calibration) -> None:
    rng = np.random.default_rng(2)
    cases = reviews(HELD_OUT.pairs(2000, rng), base.learned_margin, rng)
    assert recalibrate(base, reviewed(cases, PRINT)).learned_margin == pytest.approx(base.learned_margin, abs=0.02)


def test_selection_by_the_verdict_is_undone_by_its_rate(base: Calibration) -> None:
    """Rates of the weighted feedback are those of all pairs; counted plainly they are several times too high."""
    rng = np.random.default_rng(3)
    pairs = LIVE.pairs(6000, rng)
    cases = reviews(pairs, base.learned_margin, rng, rate=0.1)
    distance_F, is_match_F = pairs
    thresholds_T = np.array([base.learned_margin - 0.2, base.learned_margin, base.learned_margin + 0.2], np.float32)
    far_T, _, frr_T, _ = feedback_rates(reviewed(cases, PRINT), thresholds_T)
    plain_far_T, *_ = feedback_rates(
        reviewed([case.model_copy(update={"review_rate": 1.0}) for case in cases], PRINT), thresholds_T
    )
    for t, threshold in enumerate(thresholds_T):
        far, frr = (distance_F[~is_match_F] <= threshold).mean(), (distance_F[is_match_F] > threshold).mean()
        assert far_T[t] == pytest.approx(far, rel=0.15, abs=0.002)
        assert frr_T[t] == pytest.approx(frr, rel=0.25, abs=0.01)
    assert plain_far_T[1] > 3 * far_T[1]


def test_bounds_never_get_tighter_and_hold_for_the_population_that_is_served(base: Calibration) -> None:
    rng = np.random.default_rng(4)
    distance_P, is_match_P = LIVE.pairs(40_000, rng)
    impostor_P = np.sort(distance_P[~is_match_P])
    held, promised_before = [], []
    for _ in range(40):
        cases = reviews(LIVE.pairs(500, rng), base.learned_margin, rng)
        after = recalibrate(base, reviewed(cases, PRINT))
        for row in after.curve:
            before = base.rates_at(row.threshold)
            assert row.far >= before.far
            assert row.far_upper95 >= before.far_upper95
        for threshold in [after.learned_margin, *(after.threshold_for_far(target) for target in TARGETS)]:
            realised = np.searchsorted(impostor_P, np.float32(threshold), side="right") / len(impostor_P)
            held.append(realised <= after.rates_at(threshold).far_upper95)
        realised = np.searchsorted(impostor_P, np.float32(base.learned_margin), side="right") / len(impostor_P)
        promised_before.append(realised <= base.rates_at(base.learned_margin).far_upper95)
    assert np.mean(held) >= 0.95
    assert not any(promised_before), "the simulation is of a population for which the first promise breaks"


def test_a_target_never_gets_a_looser_threshold(base: Calibration) -> None:
    rng = np.random.default_rng(5)
    easy = Population(spread=0.2, alike=0.0)
    after = recalibrate(base, reviewed(reviews(easy.pairs(2000, rng), base.learned_margin, rng), PRINT))
    for target in TARGETS:
        assert after.threshold_for_far(target) <= base.threshold_for_far(target)
    assert after.named_points["far-1e-2"] <= base.named_points["far-1e-2"]


def test_cases_of_one_subject_are_not_independent(base: Calibration) -> None:
    rng = np.random.default_rng(6)
    cases = reviews(LIVE.pairs(600, rng), base.learned_margin, rng)
    alone = reviewed(cases, PRINT)
    together = reviewed([case.model_copy(update={"subject": f"user {i // 10}"}) for i, case in enumerate(cases)], PRINT)
    for of_matches in (True, False):
        assert effective_pairs(together, of_matches=of_matches) < effective_pairs(alone, of_matches=of_matches)
    assert effective_pairs(together, of_matches=False) <= len(cases) / 10 + 1
    thresholds_T = np.array([base.learned_margin], np.float32)
    # One user whose cases are all wrong: as many errors as before, and far less evidence.
    wrong = [i for i, case in enumerate(cases) if not case.is_match and case.distance <= base.learned_margin]
    assert len(wrong) > 30
    one = reviewed(
        [case.model_copy(update={"subject": "one" if i in wrong else ""}) for i, case in enumerate(cases)], PRINT
    )
    (far, alone_bounds, *_), (same, one_bounds, *_) = (feedback_rates(each, thresholds_T) for each in (alone, one))
    assert far == same
    assert one_bounds.upper_T[0] > 1.5 * alone_bounds.upper_T[0]


def test_a_subject_with_most_of_the_cases_tells_little_more_than_one(base: Calibration) -> None:
    """Simulated users, one of whom makes 90 % of the cases: another such lot keeps to the bound."""
    threshold = np.array([base.learned_margin], np.float32)

    def lot(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        subject_F = np.repeat(np.arange(31), [900] + [10] * 30)
        easily_S = rng.beta(1, 5, size=31)  # accepted though they do not match
        is_accepted_F = rng.random(len(subject_F)) < easily_S[subject_F]
        distance_F = np.where(is_accepted_F, threshold - 0.1, threshold + 0.1).astype(np.float32)
        found = Reviewed(
            distance_F=distance_F,
            is_match_F=np.arange(len(subject_F)) % 10 == 0,
            weight_F=np.ones(len(subject_F)),
            subject_F=subject_F,
            skipped={},
        )
        far_T, far, *_ = feedback_rates(found, threshold)
        return float(far_T[0]), float(far.upper_T[0])

    rates, uppers = np.array([lot(seed) for seed in range(60)]).T
    kept = (uppers[:, None] >= rates)[~np.eye(60, dtype=bool)]
    assert kept.mean() >= 0.93


def test_the_next_calibration_begins_with_the_held_out_pairs_again(base: Calibration) -> None:
    rng = np.random.default_rng(7)
    first, second = (reviewed(reviews(LIVE.pairs(600, rng), base.learned_margin, rng), PRINT) for _ in range(2))
    once = recalibrate(base, first)
    assert (once.version, once.feedback_pairs) == (2, len(first.distance_F))
    twice = recalibrate(once, second)
    assert twice == recalibrate(base, second).model_copy(update={"version": 3})


def test_what_cannot_be_learned_from_is_named(base: Calibration) -> None:
    rng = np.random.default_rng(8)
    cases = reviews(LIVE.pairs(400, rng), base.learned_margin, rng)
    with pytest.raises(InvalidDataset, match="before calibrations kept their held-out pairs"):
        recalibrate(base.model_copy(update={"held_out": None}), reviewed(cases, PRINT))
    with pytest.raises(InvalidDataset, match="0 pairs that were rejected"):
        reviewed([case for case in cases if case.verdict == "match"], PRINT)
    with pytest.raises(InvalidDataset, match=rf"all {len(cases)} cases are of other models than this one, .* bbbb"):
        reviewed(cases, "b" * 64)
    with pytest.raises(InvalidDataset, match=r"there is no feedback in it; record some"):
        reviewed([], PRINT)
    of_another = cases[0].model_copy(update={"fingerprint": "b" * 64})
    with pytest.raises(InvalidDataset, match=r"0 pairs that match.*left out: 1 of other models"):
        reviewed([of_another, *(case for case in cases if not case.is_match)], PRINT)
    with pytest.raises(InvalidDataset, match="picked by a search"):
        reviewed([case.model_copy(update={"candidates": 1000}) for case in cases], PRINT)
    unknown = [case.model_copy(update={"review_rate": None}) for case in cases]
    with pytest.raises(InvalidDataset, match="--accepted-rate and --rejected-rate"):
        reviewed(unknown, PRINT)
    with pytest.raises(InvalidDataset, match=r"in \(0, 1\]; got 20"):
        reviewed(unknown, PRINT, accepted_rate=1, rejected_rate=20)
    with pytest.raises(InvalidDataset, match=r"in \(0, 1\]; got 2"):
        reviewed(cases, PRINT, accepted_rate=2)  # though every case says its own
    with pytest.raises(InvalidDataset, match=r"reviewed at a rate of 1e-300; at least 1e-06 is taken"):
        reviewed(unknown, PRINT, accepted_rate=1e-300, rejected_rate=1)
    same = reviewed(unknown, PRINT, accepted_rate=1, rejected_rate=0.2)
    assert np.array_equal(same.weight_F, reviewed(cases, PRINT).weight_F)


def test_a_case_given_twice_counts_once_as_it_was_recorded_last(base: Calibration) -> None:
    rng = np.random.default_rng(9)
    cases = reviews(LIVE.pairs(400, rng), base.learned_margin, rng)
    expected = reviewed(cases, PRINT)
    doubled = reviewed([*cases, *cases], PRINT)  # two exports, one after the other
    assert recalibrate(base, doubled) == recalibrate(base, expected)
    assert doubled.skipped["given again"] == len(cases)
    before = [
        case.model_copy(update={"is_match": not case.is_match, "time": WHEN - timedelta(hours=1)}) for case in cases
    ]
    for both in ([*before, *cases], [*cases, *before]):
        assert recalibrate(base, reviewed(both, PRINT)) == recalibrate(base, expected)
    contrary = cases[5].model_copy(update={"is_match": not cases[5].is_match})
    with pytest.raises(InvalidDataset, match=rf"case '{cases[5].case_id}' is told to match and not to match"):
        reviewed([*cases, contrary], PRINT)
