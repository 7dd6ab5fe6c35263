"""Drift: the index against known distributions, the window against a clock in hand, and both over the wire."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chi2, norm

from embedding.bundle import Bundle, write_bundle
from embedding.encoder import Encoder
from embedding.errors import DamagedData
from embedding.reference import Reference
from lookalike.v1 import common_pb2, match_pb2
from service.settings import Settings
from service.telemetry.drift import LEAST_SAMPLES, SLICES, Drift, Window, match_share, psi
from tests.service.harness import DIM, Loop, connected, png, served
from tests.service.test_metrics import Series, get, scraped
from training.reference import reference_of

MATCHING, IMPOSTOR, NORMS = norm(0.5, 0.1), norm(1.2, 0.15), norm(10, 2)
Z = norm.ppf(np.arange(1, 10) / 10)


def reference() -> Reference:
    """Ten bins of known normal distributions."""
    distance_edges = np.linspace(0.3, 1.6, 9)
    norm_edges = 10 + 2 * Z

    def shares(distribution: object, edges: NDArray[np.float64]) -> tuple[float, ...]:
        return tuple(np.diff(distribution.cdf(np.concatenate([[-np.inf], edges, [np.inf]]))).tolist())  # type: ignore[attr-defined]

    return Reference(
        images=1000,
        distance_edges=tuple(distance_edges.tolist()),
        matching=shares(MATCHING, distance_edges),
        impostor=shares(IMPOSTOR, distance_edges),
        norm_edges=tuple(norm_edges.tolist()),
        norms=shares(NORMS, norm_edges),
    )


def drift(clock: list[float] | None = None) -> Drift:
    clock = [0.0] if clock is None else clock
    return Drift(reference(), window_seconds=1200, clock=lambda: clock[0])


def pairs(share: float, count: int, *, shift: float = 0.0, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    matches = int(share * count)
    drawn = np.concatenate([MATCHING.rvs(matches, random_state=rng), IMPOSTOR.rvs(count - matches, random_state=rng)])
    return list(np.clip(drawn + shift, 0.01, 2))


def test_the_index_is_that_of_its_formula() -> None:
    live, expected = np.array([600.0, 300.0, 100.0]), np.array([0.5, 0.3, 0.2])
    by_hand = sum(
        ((count + 0.5) / 1001.5 - share) * np.log((count + 0.5) / 1001.5 / share)
        for count, share in zip(live, expected, strict=True)
    )
    assert psi(live, expected) == pytest.approx(by_hand, rel=1e-12)


def test_without_drift_it_is_distributed_as_theory_has_it() -> None:
    """n · PSI is chi-squared with B − 1 degrees of freedom for many values (Yurdakul 2018)."""
    rng = np.random.default_rng(0)
    shares = np.full(10, 0.1)
    values = [2000 * psi(rng.multinomial(2000, shares).astype(float), shares) for _ in range(500)]
    assert np.mean(values) == pytest.approx(9, rel=0.1)
    assert np.quantile(values, 0.95) == pytest.approx(chi2(9).ppf(0.95), rel=0.15)


def test_an_empty_bin_of_the_reference_keeps_it_finite() -> None:
    assert np.isfinite(psi(np.array([10.0, 0.0]), np.array([0.0, 1.0])))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_any_share_of_matches_is_no_drift_and_is_estimated(share: float) -> None:
    seen = drift()
    seen.verified(pairs(share, 4000))
    reading = seen.readings()["verify"]
    assert reading.psi is not None
    assert reading.psi < 0.02
    assert reading.match_share == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_no_share_explains_is_drift(share: float) -> None:
    seen = drift()
    seen.verified(pairs(share, 4000, shift=0.25))
    reading = seen.readings()["verify"]
    assert reading.psi is not None
    assert reading.psi > 0.25


def test_the_share_is_the_most_likely_one() -> None:
    rng = np.random.default_rng(1)
    matching, impostor = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    counts = rng.multinomial(500, 0.4 * matching + 0.6 * impostor).astype(float)
    grid = np.linspace(0, 1, 10_001)
    likelihoods = [counts @ np.log(s * matching + (1 - s) * impostor) for s in grid]
    assert match_share(counts, matching, impostor) == pytest.approx(grid[np.argmax(likelihoods)], abs=2e-4)


def test_few_values_say_nothing() -> None:
    seen = drift()
    seen.verified(pairs(0.5, LEAST_SAMPLES - 1))
    assert seen.readings()["verify"].psi is None
    assert seen.readings()["verify"].samples == LEAST_SAMPLES - 1
    seen.verified([0.5])
    assert seen.readings()["verify"].psi is not None


def test_an_image_compared_with_itself_does_not_count() -> None:
    seen = drift()
    seen.verified([0.0, 0.0, 0.7])
    emb = np.tile(np.eye(DIM, dtype=np.float32)[:1], (3, 1))
    seen.embedded(emb, np.full(3, 10, np.float32))
    readings = seen.readings()
    assert (readings["verify"].samples, readings["images"].samples, readings["norms"].samples) == (1, 0, 3)


def test_images_are_compared_with_the_one_before_across_batches() -> None:
    seen = drift()
    emb = np.eye(4, dtype=np.float32)
    seen.embedded(emb[:1], np.ones(1, np.float32))
    seen.embedded(emb[1:], np.ones(3, np.float32))
    assert seen.readings()["images"].samples == 3
    at_sqrt2 = int(np.searchsorted(reference().distance_edges, 2**0.5))
    assert seen._windows["images"].counts()[at_sqrt2] == 3


def test_norms_that_move_are_drift() -> None:
    seen = drift()
    rng = np.random.default_rng(0)
    seen.embedded(rng.normal(size=(2000, 4)).astype(np.float32), NORMS.rvs(2000, random_state=rng).astype(np.float32))
    still = seen.readings()["norms"]
    seen.embedded(
        rng.normal(size=(4000, 4)).astype(np.float32), (NORMS.rvs(4000, random_state=rng) - 3).astype(np.float32)
    )
    moved = seen.readings()["norms"]
    assert still.psi is not None
    assert moved.psi is not None
    assert still.psi < 0.02 < 0.25 < moved.psi


def test_the_window_forgets() -> None:
    clock = [0.0]
    window = Window(2, 1200.0, lambda: clock[0])
    seconds = 1200 / SLICES
    for at in range(2 * SLICES):
        clock[0] = at * seconds
        window.add(np.array([1, 0]))
        assert window.counts().tolist() == [min(at + 1, SLICES), 0]
    clock[0] += 1200
    assert window.counts().tolist() == [0, 0]


@pytest.fixture
def referenced(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The bundle with a reference of noise images, as training would measure it."""
    encoder = Encoder(bundle, device="cpu")
    pixels = np.stack([encoder.prepare(png(seed)) for seed in range(400)])
    emb_ND, norm_N = encoder.encode_with_norms(pixels)
    made = reference_of(emb_ND, np.arange(400) // 2, norm_N)
    manifest = bundle.manifest
    return write_bundle(
        tmp_path / "referenced",
        name=manifest.name,
        network=bundle.network(),
        preprocessing=bundle.preprocessing,
        calibration=bundle.calibration,
        lineage=bundle.lineage,
        reference=made,
    )


def dark(seed: int) -> bytes:
    """A PNG of noise that hardly leaves black."""
    values = np.random.default_rng(seed).integers(0, 40, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_server_tells_drift(loop: Loop, settings: Settings, referenced: Bundle, tmp_path: Path) -> None:
    own = settings.model_copy(update={"bundle": referenced.path, "galleries": tmp_path / "g", "metrics_port": 0})
    of = f"model={referenced.name}"
    with served(loop, own) as server, connected(server.address) as stubs:
        assert scraped(server.metrics_port or 0)[f"lookalike_drift_samples{{{of},of=norms}}"] == 0

        def send(make: Callable[[int], bytes], first: int) -> Series:
            images = [common_pb2.ImageInput(encoded=make(seed)) for seed in range(first, first + 240)]
            pairs = [match_pb2.ImagePair(a=a, b=b) for a, b in zip(images[::2], images[1::2], strict=True)]
            stubs.match.BatchVerify(match_pb2.BatchVerifyRequest(pairs=pairs))
            return scraped(server.metrics_port or 0)

        like = send(png, 1000)
        assert like[f"lookalike_drift_reference{{{of}}}"] == 1
        assert like[f"lookalike_drift_samples{{{of},of=norms}}"] == 240
        assert like[f"lookalike_drift_samples{{{of},of=verify}}"] == 120
        assert like[f"lookalike_drift_psi{{{of},of=norms}}"] < 0.15
        assert f"lookalike_drift_psi{{{of},of=verify}}" not in like  # too few yet
        unlike = send(dark, 2000)
        assert unlike[f"lookalike_drift_psi{{{of},of=norms}}"] > 0.25
        assert unlike[f"lookalike_drift_psi{{{of},of=images}}"] > 0.25
        assert unlike[f"lookalike_drift_samples{{{of},of=verify}}"] == 240


def test_an_older_bundle_says_that_it_has_no_reference(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "g", "metrics_port": 0})
    with served(loop, own) as server:
        assert server.metrics_port
        status, text = get(server.metrics_port, "/metrics")
    assert status == 200
    assert 'lookalike_drift_reference{model="' in text
    assert "lookalike_drift_samples{" not in text


def test_the_reference_is_kept_with_the_bundle_and_checked(referenced: Bundle) -> None:
    again = Bundle.load(referenced.path)
    assert again.reference == referenced.reference is not None
    assert again.fingerprint == referenced.fingerprint
    file = referenced.path / "reference.json"
    file.write_text(file.read_text().replace('"images": 400', '"images": 401'))
    with pytest.raises(DamagedData, match=r"reference\.json"):
        Bundle.load(referenced.path)
    file.unlink()
    with pytest.raises(DamagedData, match=r"reference\.json"):
        Bundle.load(referenced.path)


def test_a_reference_counts_what_was_held_out() -> None:
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(300, 8))
    norm_N = np.linalg.norm(raw, axis=1)
    emb = (raw / norm_N[:, None]).astype(np.float32)
    labels = np.arange(300) // 3
    made = reference_of(emb, labels, norm_N)
    dist = np.linalg.norm(emb[:, None] - emb[None], axis=2)
    row, column = np.triu_indices(300, 1)
    matches = labels[row] == labels[column]
    edges = np.array([-np.inf, *made.distance_edges, np.inf])
    for shares, values in ((made.matching, dist[row, column][matches]), (made.impostor, dist[row, column][~matches])):
        expected = [((edges[at] < values) & (values <= edges[at + 1])).mean() for at in range(len(edges) - 1)]
        np.testing.assert_allclose(shares, expected, atol=2 / len(values))
    np.testing.assert_allclose(made.norms, 0.1, atol=0.005)
    np.testing.assert_allclose((np.array(made.matching) + made.impostor) / 2, 0.1, atol=0.01)


def test_coinciding_values_make_fewer_bins() -> None:
    emb = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)
    made = reference_of(emb, np.arange(8) // 2, np.ones(8))
    assert made.norm_edges == ()
    assert made.norms == (1.0,)
    assert made.matching[0] == 1.0
    with pytest.raises(ValueError, match="rise strictly"):
        Reference.model_validate({**made.model_dump(), "norm_edges": (2.0, 1.0), "norms": (0.2, 0.3, 0.5)})
    with pytest.raises(ValueError, match="add up"):
        Reference.model_validate({**made.model_dump(), "norms": (0.9,)})
