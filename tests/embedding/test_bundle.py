"""Bundles: whole or absent, verified on every load."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedding.bundle import Bundle
from embedding.calibration import Calibration
from embedding.errors import AlreadyExists, DamagedData, NotFound, StorageFailed

MakeBundle = Callable[..., Bundle]
DATA_FILES = ("bundle.json", "calibration.json", "weights.safetensors", "SHA256SUMS")


def test_a_bundle_reads_back_as_written(tmp_path: Path, make_bundle: MakeBundle, calibration: Calibration) -> None:
    written = make_bundle(tmp_path / "b", extra_files={"README.md": b"# card", "card/roc.png": b"png"})
    bundle = Bundle.load(tmp_path / "b")
    assert bundle == written
    assert bundle.calibration == calibration
    assert bundle.name == f"toy-{bundle.fingerprint[:12]}"
    assert (tmp_path / "b/card/roc.png").read_bytes() == b"png"
    first, second = bundle.network(), bundle.network()
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_reading_a_network_leaves_the_random_state_alone(tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(tmp_path / "b")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bundle.network()
    assert torch.equal(torch.rand(3), expected)


def test_the_fingerprint_follows_weights_and_preprocessing(tmp_path: Path, make_bundle: MakeBundle) -> None:
    prints = {
        make_bundle(tmp_path / "a").fingerprint,
        make_bundle(tmp_path / "b", seed=1).fingerprint,
        make_bundle(tmp_path / "c", image_size=17).fingerprint,
    }
    assert len(prints) == 3
    assert make_bundle(tmp_path / "again").fingerprint in prints


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_any_damage_is_noticed(tmp_path: Path, make_bundle: MakeBundle, name: str, damage: str) -> None:
    make_bundle(tmp_path / "b")
    file = tmp_path / "b" / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises((DamagedData, NotFound)) as raised:
        Bundle.load(tmp_path / "b")
    assert "\n" not in str(raised.value)


def test_an_edited_margin_is_noticed(tmp_path: Path, make_bundle: MakeBundle) -> None:
    make_bundle(tmp_path / "b")
    file = tmp_path / "b/calibration.json"
    edited = json.loads(file.read_text()) | {"learned_margin": 1.9}
    file.write_text(json.dumps(edited))
    with pytest.raises(DamagedData, match=r"calibration\.json was truncated or edited"):
        Bundle.load(tmp_path / "b")


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="lookalike train"):
        Bundle.load(tmp_path)


def test_a_file_that_the_system_does_not_read_is_named_without_numbers(tmp_path: Path, make_bundle: MakeBundle) -> None:
    path = make_bundle(tmp_path / "b").path
    (path / "calibration.json").unlink()
    (path / "calibration.json").mkdir()
    with pytest.raises(StorageFailed, match=r"cannot read the bundle at .*: calibration\.json: Is a directory$"):
        Bundle.load(path)


def test_an_existing_bundle_is_replaced_only_when_asked(tmp_path: Path, make_bundle: MakeBundle) -> None:
    old = make_bundle(tmp_path / "b", extra_files={"old.txt": b""})
    with pytest.raises(AlreadyExists):
        make_bundle(tmp_path / "b", seed=1)
    assert Bundle.load(tmp_path / "b") == old
    new = make_bundle(tmp_path / "b", seed=1, overwrite=True)
    assert new.fingerprint != old.fingerprint
    assert not (tmp_path / "b/old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, OSError])
def test_stopped_between_the_old_bundle_and_the_new_the_old_one_stays(
    tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, stopped_by: type[BaseException]
) -> None:
    old, rename = make_bundle(tmp_path / "b"), Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.startswith(".b.partial-") and not self.name.endswith(".replaced"):
            raise stopped_by
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(StorageFailed if stopped_by is OSError else stopped_by):
        make_bundle(tmp_path / "b", seed=1, overwrite=True)
    assert Bundle.load(tmp_path / "b") == old
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes through resource.setrlimit")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, make_bundle: MakeBundle) -> None:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # weights are larger than this
    try:
        with pytest.raises(StorageFailed, match="nothing was left"):
            make_bundle(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_embedding_imports_neither_faiss_nor_the_packages_above_it() -> None:
    above = "'faiss', 'index', 'service', 'training', 'lookalike'"
    code = f"import sys, embedding.encoder; print([name for name in ({above}) if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
