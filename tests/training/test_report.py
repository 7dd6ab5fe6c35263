"""The model card: every file is there and whole, every figure in it is the measured one."""

from __future__ import annotations

import io
import re
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.calibration import calibration_curve

from embedding.calibration import Calibration, IsotonicProbability, MatchProbability
from training import evaluation, report
from training.calibration import calibrate
from training.evaluation import VerificationCurve, evaluate, verification_curve
from training.measurement import measure
from training.pairs import HeldOut, distance_block, held_out
from training.reliability import reliability
from training.report import model_card, worst_pairs

PICTURES = {"distances", "errors", "reliability", "projection", "worst"}


def identities(count: int, images: int, *, spread: float = 0.5, width: int = 6, seed: int = 0) -> HeldOut:
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(count, width)), images, axis=0)
    emb = centres + spread * rng.normal(size=centres.shape)
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return held_out(emb, np.repeat(np.arange(count), images))


def card_of(
    test: HeldOut,
    *,
    calibration: Calibration | None = None,
    protocol: Literal["identity-disjoint", "closed-set"] = "identity-disjoint",
    channels: int = 1,
    names: dict[int, str] | None = None,
    learned: dict[str, float] | None = None,
) -> dict[str, bytes]:
    if calibration is None:
        seen = identities(30, 5, seed=1)
        calibration = calibrate(seen.embeddings, seen.identities, protocol=protocol)

    def image_of(row: int) -> NDArray[np.uint8]:
        return np.full((channels, 12, 9), row % 256, dtype=np.uint8)

    return model_card(
        name="digits-3fa9c1d2e4b7",
        recipe_text='[network]\nname = "small_cnn"  # {braces} and | bars',
        facts={"data": "8×8 digits | grey", "split": "by identity, seed 0"},
        measurement=measure(test.embeddings, test.identities, calibration),
        image_of=image_of,
        identity_names=names,
        learned=learned,
    )


@pytest.fixture
def text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures undrawn, for tests of the text."""
    for plot in ("distance_plot", "error_plot", "reliability_plot", "projection_plot", "pair_plot"):
        monkeypatch.setattr(report, plot, lambda *_: b"")


def test_card_holds_every_metric_and_every_picture_and_comes_out_the_same_again() -> None:
    test = identities(25, 5)
    files = card_of(test)
    text = files["README.md"].decode()
    for name, value in evaluate(test.embeddings, test.identities).metrics().items():
        assert f"| {name} | {value:.4f} |" in text
    assert "# digits-3fa9c1d2e4b7" in text
    assert 'name = "small_cnn"  # {braces} and | bars' in text
    assert r"| data | 8×8 digits \| grey |" in text
    assert "`learned-margin`" in text
    assert "`far-1e-2`" in text
    assert "expected calibration error" in text
    assert set(re.findall(r"\(card/(\w+)\.png\)", text)) == PICTURES
    assert set(files) == {"README.md", *(f"card/{picture}.png" for picture in PICTURES)}
    for picture in PICTURES:
        data = files[f"card/{picture}.png"]
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        image = Image.open(io.BytesIO(data))
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50, "not blank"
    assert card_of(test) == files


@pytest.mark.usefixtures("text_only")
def test_the_error_of_streamed_counts_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "counted to within" not in card_of(identities(10, 4))["README.md"].decode()
    monkeypatch.setattr(evaluation, "EXACT_PAIRS", 0)
    text = card_of(identities(10, 4))["README.md"].decode()
    assert re.search(r"counted to within 1.9e-06 of distance: .* right to \de[+-]\d\d", text)


@pytest.mark.usefixtures("text_only")
def test_searches_and_larger_galleries_have_their_tables() -> None:
    text = card_of(identities(25, 5))["README.md"].decode()
    assert re.search(r"\| `learned-margin` \| 100 \| [\d.]+ % \| [\d.]+ % \| [\d.]+ % \|", text)
    assert "| `far-1e-3` | 10,000 |" in text
    assert "## Searches of one part" not in text


@pytest.mark.usefixtures("text_only")
def test_what_the_loss_learned_stands_next_to_the_learned_margin() -> None:
    lines = card_of(identities(12, 4), learned={"boundary β, mean": 1.125})["README.md"].decode().splitlines()
    margin = next(row for row, line in enumerate(lines) if line.startswith("| learned margin |"))
    assert lines[margin + 1] == "| learned by the loss: boundary β, mean | 1.125000 |"
    assert "learned by the loss" not in card_of(identities(12, 4))["README.md"].decode()


@pytest.mark.usefixtures("text_only")
def test_promises_are_compared_with_the_test_side() -> None:
    kept = card_of(identities(25, 5))["README.md"].decode()
    assert kept.count("| yes |") == 3  # 10,875 non-matching calibration pairs support 1e-1, 1e-2 and 1e-3
    assert "**no**" not in kept
    seen = identities(30, 5, spread=0.05, seed=1)
    calibration = calibrate(seen.embeddings, seen.identities, protocol="identity-disjoint")
    broken = card_of(identities(25, 5, spread=0.05, width=2), calibration=calibration)["README.md"].decode()
    assert "| **no** |" in broken


@pytest.mark.usefixtures("text_only")
def test_closed_set_is_stated_first_and_last() -> None:
    text = card_of(identities(10, 4), protocol="closed-set")["README.md"].decode()
    assert "the same identities it was trained on (closed set)" in text.split("##")[0]
    assert "saw its images, though all know its identities" in text
    assert "**Closed set.**" in text.split("## Intended use and limits")[1]
    assert "on as many further images of these same identities, with 95 % confidence" in text.split("##")[0]
    assert "other identities" not in text.split("## Data, split")[0].replace("items of other identities", "")
    assert "among as many other identities" in card_of(identities(10, 4))["README.md"].decode().split("##")[0]
    assert "losed set" not in card_of(identities(10, 4))["README.md"].decode()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_smallest_set_has_a_card(channels: int) -> None:
    emb = np.array([[1, 0], [0.8, 0.6], [-1, 0], [-0.8, -0.6]], dtype=np.float32)
    test = held_out(emb, np.array([0, 0, 1, 1]))
    calibration = calibrate(test.embeddings, test.identities, protocol="identity-disjoint")
    files = card_of(test, calibration=calibration, channels=channels, names={0: "x" * 60 + "/字符", 1: "$_^{$"})
    text = files["README.md"].decode()
    assert "| TAR@FAR=1e-3 | too few pairs |" in text
    assert "too few non-matching pairs to promise" in text
    assert len(files) == 1 + len(PICTURES)


@pytest.mark.parametrize("block", [7, 10**6])
def test_worst_pairs_are_the_extremes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.pairs.BLOCK_DISTANCES", block * 24)
    data = identities(6, 4)
    dist = distance_block(data.embeddings, data.embeddings)
    is_match = data.identities[:, None] == data.identities
    upper = np.triu(np.ones_like(is_match), k=1)
    farthest, closest = worst_pairs(data, report.WORST)
    assert [dist[pair] for pair in farthest] == sorted(dist[is_match & upper], reverse=True)[:5]
    assert [dist[pair] for pair in closest] == sorted(dist[~is_match & upper])[:5]
    assert all(is_match[pair] for pair in farthest)
    assert not any(is_match[pair] for pair in closest)
    assert all(first < second for first, second in farthest + closest)


def test_reliability_equals_scikit_learns_with_classes_weighing_the_same() -> None:
    data = identities(12, 3)  # 36 matching pairs
    keep = np.triu(np.ones((36, 36), dtype=bool), k=1)
    dist = distance_block(data.embeddings, data.embeddings)[keep]
    is_match = (data.identities[:, None] == data.identities)[keep]
    probability = MatchProbability(midpoint=0.9, slope=4.0)
    measured = reliability(verification_curve(data), probability)
    # As many copies of each matching pair as there are non-matching pairs to one matching pair.
    copies = np.where(is_match, (~is_match).sum(), is_match.sum())
    predicted = np.repeat([probability.at(float(d)) for d in dist], copies)
    observed, mean_predicted = calibration_curve(np.repeat(is_match, copies), predicted, n_bins=10)
    np.testing.assert_allclose(measured.observed, observed, atol=1e-9)
    np.testing.assert_allclose(measured.predicted, mean_predicted, atol=1e-9)
    assert measured.weight.sum() == pytest.approx(1)
    # Naively, pair by pair: the gap of each tenth of probability, weighed by the pairs in it.
    expected, matches = 0.0, np.repeat(is_match, copies)
    for tenth in range(10):
        inside = (predicted >= tenth / 10) & (predicted < (tenth + 1) / 10)
        if inside.any():
            expected += inside.mean() * abs(predicted[inside].mean() - matches[inside].mean())
    assert measured.expected_calibration_error == pytest.approx(expected, abs=1e-9)
    assert 0.01 < expected < 0.5


def test_expected_calibration_error_by_hand() -> None:
    # Two matches given 0.9 and 0.6, two others given 0.6 and 0.2: tenths of 1, 2 and 1 pairs, off by 0.1, 0.1 and 0.2.
    probability = IsotonicProbability(
        midpoint=1.2, points=((0.0, 0.95), (0.5, 0.9), (1.0, 0.6), (1.2, 0.5), (1.5, 0.2), (2.0, 0.1))
    )
    curve = VerificationCurve(np.array([-1, 0.5, 1.0, 1.5]), np.array([0, 1, 2, 2]), np.array([0, 0, 1, 2]), 0.0)
    error = reliability(curve, probability).expected_calibration_error
    assert error == pytest.approx((0.1 + 2 * 0.1 + 0.2) / 4)
