"""What was activated, remembered: no byte that changes on the disk lets another model or calibration answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedding.errors import DamagedData
from service.rollout.standing import FILE, Standing, kept, read, write
from service.rollout.stock import Choice

GIVEN = (Choice("shapes-0123456789ab", 1), Choice("shapes-ba9876543210", 1))
STANDING = Standing(given=GIVEN, active=Choice("shapes-0123456789ab", 3), others=(GIVEN[1],))


def test_it_is_remembered(tmp_path: Path) -> None:
    assert kept(tmp_path) is None
    write(tmp_path, STANDING)
    assert kept(tmp_path) == read(tmp_path, GIVEN) == STANDING


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, STANDING)
    path = tmp_path / FILE
    whole = path.read_bytes()
    noticed = 0
    damages = [
        whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(len(whole)) for flip in (1, 2, 32)
    ]
    damages += [whole[:length] for length in range(len(whole))]
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            assert kept(tmp_path) == STANDING, damaged  # white space is not summed
        except DamagedData:
            noticed += 1
            assert read(tmp_path, GIVEN) == Standing(given=GIVEN, active=GIVEN[0], others=GIVEN[1:])
    assert noticed > 0.9 * len(damages)
    assert "the bundles of the settings answer" in caplog.text


def test_a_file_without_a_sum_is_read(tmp_path: Path) -> None:
    write(tmp_path, STANDING)
    written = json.loads((tmp_path / FILE).read_text())
    del written["sha256"]
    (tmp_path / FILE).write_text(json.dumps(written))
    with pytest.raises(DamagedData):
        kept(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({**written, "format": 1}))
    found = kept(tmp_path)
    assert found is not None
    assert (found.given, found.active, found.others) == (STANDING.given, STANDING.active, STANDING.others)
    assert read(tmp_path, GIVEN).active == STANDING.active
