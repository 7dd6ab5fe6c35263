"""What a model was trained on, known by digests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from embedding.bundle import SEEN, Bundle, write_bundle
from embedding.errors import DamagedData
from embedding.seen import MAX_DIGESTS, Seen, digest
from tests.service.harness import make_bundle


def test_what_was_trained_on_is_known_and_nothing_else() -> None:
    seen = Seen.of(np.array([digest(b"a"), digest(b"b"), digest(b"a")], np.uint64), ["Jo", "élan"])
    asked = np.array([digest(b"b"), digest(b"c"), digest(b"a")], np.uint64)
    assert seen.has_images(asked).tolist() == [True, False, True]
    assert seen.has_identities(["jo", "élan", "Jo"]).tolist() == [False, True, True]
    assert seen.images == 3
    assert Seen.model_validate_json(seen.model_dump_json()) == seen


def test_of_many_images_a_fair_sample_is_kept() -> None:
    digests = np.array([digest(str(i).encode()) for i in range(4 * MAX_DIGESTS)], np.uint64)
    known = Seen.of(digests, []).has_images(digests)
    assert known.sum() == MAX_DIGESTS
    assert known[: len(known) // 2].sum() == pytest.approx(MAX_DIGESTS / 2, rel=0.05)


def test_no_whole_numbers_are_refused() -> None:
    for damaged in ("AAAA", "no base64!"):
        with pytest.raises(ValidationError):
            Seen(images=1, image_digests=damaged, identity_digests="")


def test_it_is_verified_with_the_bundle_and_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain", seed=0)
    assert plain.seen is None
    seen = Seen.of(np.array([1, 2], np.uint64), ["a"])
    knowing = write_bundle(
        tmp_path / "knowing",
        name=plain.manifest.name,
        network=plain.network(),
        preprocessing=plain.preprocessing,
        calibration=plain.calibration,
        lineage=plain.lineage,
        seen=seen,
    )
    assert (knowing.seen, knowing.fingerprint) == (seen, plain.fingerprint)
    (knowing.path / SEEN).write_text(Seen.of(np.array([1], np.uint64), []).model_dump_json())
    with pytest.raises(DamagedData, match=SEEN):
        Bundle.load(knowing.path)
    (knowing.path / SEEN).unlink()
    sums = knowing.path / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if SEEN not in line))
    assert Bundle.load(knowing.path).seen is None
