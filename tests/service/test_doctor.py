"""The doctor on deployments broken in one way each, and on a whole one."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import structlog

from embedding.bundle import Bundle
from index import Catalog, aliases
from index.aliases import Aliases
from index.items import Item
from index.live import SEGMENTS, STORE
from index.receipts import Token
from index.schema import SCHEMA_VERSION
from index.shelf import FOLDER, Shelf
from lookalike.__main__ import main
from lookalike.v1 import gallery_pb2, model_pb2
from service import feedback_store, once
from service.access.key_ring import KeyRing
from service.doctor import deployment as doctor
from service.doctor.certificate_dates import NotValid, expiry
from service.doctor.deployment import looked_at
from service.doctor.server import asked
from service.feedback_store import FeedbackStore
from service.once import Ledger
from service.rollout import standing
from service.server import SERVICES
from service.settings import Settings
from tests.authority import Authority
from tests.processes import environment
from tests.service.deployed import referenced, whole, wrong
from tests.service.harness import DIM, Loop, connected, make_bundle, served
from tests.service.test_side_store import spoil

__all__ = ["referenced", "whole"]  # fixtures of another module


def test_nothing_is_found_where_nothing_is_wrong(whole: Settings) -> None:
    findings = list(looked_at(whole, full=True))
    assert wrong(iter(findings)) == {}
    assert {finding.check for finding in findings} == {
        "packages", "open files", "TLS", "bundle", "drift reference", "disk", "gallery kept", "memory", "clock"
    }  # fmt: skip


def test_a_bundle_that_was_edited(whole: Settings) -> None:
    file = whole.bundle / "calibration.json"
    file.write_text(file.read_text().replace('"version": 3', '"version": 4'))
    found = wrong(looked_at(whole))
    assert set(found) == {"bundle"}
    assert found["bundle"].state == "fail"
    assert "calibration.json" in found["bundle"].what


def test_a_bundle_that_is_not_there_or_truncated(whole: Settings, tmp_path: Path) -> None:
    assert wrong(looked_at(whole.model_copy(update={"bundle": tmp_path / "no"})))["bundle"].state == "fail"
    weights = whole.bundle / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "weights.safetensors" in wrong(looked_at(whole))["bundle"].what


def test_a_bundle_without_a_reference_is_a_warning(whole: Settings, bundle: Bundle) -> None:
    found = wrong(looked_at(whole.model_copy(update={"bundle": bundle.path})))
    assert set(found) == {"drift reference"}
    assert found["drift reference"].state == "warn"


def test_a_gallery_of_another_model(whole: Settings, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=9)
    swapped = whole.model_copy(update={"bundle": other.path})
    found = wrong(looked_at(swapped))
    assert found["gallery kept"].state == "fail"
    assert other.name in found["gallery kept"].what
    both = whole.model_copy(update={"other_bundles": (other.path,)})
    assert "gallery kept" not in wrong(looked_at(both))


def test_what_was_activated_counts(whole: Settings, loop: Loop, tmp_path: Path) -> None:
    """A server after an activation, with its new gallery and its old one, is well."""
    models = tmp_path / "models"
    newer = make_bundle(models / "newer", seed=9)
    own = whole.model_copy(update={"models": models, "port": 0})
    with served(loop, own) as server, connected(server.address) as stubs:
        activate = model_pb2.ActivateModelRequest(name=f"models/{newer.name}", keep_previous=True)
        stubs.models.ActivateModel(activate)
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="moved"))
        told = own.model_copy(update={"port": server.port})
        found = [*looked_at(told), *asked(told, services=SERVICES)]
        assert {f.check: f for f in found if f.state == "fail"} == {}
        assert "model" not in wrong(iter(found)), "it is the one that was activated"
        (said,) = [f for f in found if f.check == "models"]
        assert said.what.startswith(f"{newer.name} was activated and answers, beside ")
        former = Bundle.load(own.bundle).name
        stubs.models.DeactivateModel(model_pb2.DeactivateModelRequest(name=f"models/{former}", force=True))
        found = wrong(looked_at(told))
        assert set(found) - {"drift reference"} == {"gallery kept"}, "now its model is not loaded"
        assert newer.name in found["gallery kept"].what
    models.rename(tmp_path / "away")
    found = wrong(looked_at(own.model_copy(update={"models": tmp_path / "deployed"})))
    assert found["models"].state == "warn"
    assert newer.name in found["models"].what
    assert "gallery moved" in found
    (own.galleries / standing.FILE).write_text("{")
    assert standing.FILE in wrong(looked_at(own))["models"].what


@pytest.mark.parametrize(("version", "state"), [(1, "warn"), (SCHEMA_VERSION + 1, "fail")])
def test_a_store_of_another_version_is_not_damaged(whole: Settings, version: int, state: str) -> None:
    with closing(sqlite3.connect(whole.galleries / "kept" / STORE)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    found = wrong(looked_at(whole))
    assert {check: finding.state for check, finding in found.items()} == {"gallery kept": state}
    told = found["gallery kept"]
    assert "damaged" not in told.what
    assert ("brings it forward" if version == 1 else "install the version") in told.do


def test_a_damaged_store(whole: Settings) -> None:
    kept, cut = whole.galleries / "kept", whole.galleries / "cut"
    shutil.copytree(kept, cut)
    (cut / STORE).write_bytes((kept / STORE).read_bytes()[:1000])
    found = wrong(looked_at(whole))
    assert set(found) == {"gallery cut"}
    assert "restore" in found["gallery cut"].do


def test_a_damaged_segment_is_found_by_reading_it_all(whole: Settings) -> None:
    with Catalog(whole.galleries) as catalog:
        gallery = catalog.get("kept")
        vector = np.eye(DIM, dtype=np.float32)[0]
        gallery.upsert([Item(name="one", embedding=vector)])
        gallery.seal()
    assert wrong(looked_at(whole, full=True)) == {}
    (file,) = (whole.galleries / "kept" / SEGMENTS).rglob("*vectors*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert wrong(looked_at(whole))["gallery kept"].state == "warn", "it answers from the store"
    assert wrong(looked_at(whole, full=True))["gallery kept"].state == "fail"


def test_snapshots_that_are_damaged(whole: Settings) -> None:
    with Catalog(whole.galleries) as catalog:
        for name in ("sound", "cut", "flipped"):
            Shelf(whole.galleries).create(catalog.get("kept"), name)
    copies = whole.galleries / FOLDER / "kept"
    assert wrong(looked_at(whole, full=True)) == {}
    (copies / "cut" / STORE).write_bytes(b"")
    store = bytearray((copies / "flipped" / STORE).read_bytes())
    store[-1] ^= 1
    (copies / "flipped" / STORE).write_bytes(store)
    assert {check: finding.state for check, finding in wrong(looked_at(whole)).items()} == {"snapshot kept/cut": "warn"}
    assert set(wrong(looked_at(whole, full=True))) == {"snapshot kept/cut", "snapshot kept/flipped"}


def test_aliases_that_are_damaged(whole: Settings) -> None:
    Aliases(whole.galleries).put("team", "kept")
    assert wrong(looked_at(whole)) == {}
    sound = (whole.galleries / aliases.FILE).read_bytes()
    (whole.galleries / aliases.FILE).write_bytes(sound.replace(b"kept", b"kepu"))
    assert "checksum" in wrong(looked_at(whole))["aliases"].what
    (whole.galleries / aliases.FILE).write_text("{")
    found = wrong(looked_at(whole))
    assert {check: finding.state for check, finding in found.items()} == {"aliases": "warn"}
    assert aliases.COPY in found["aliases"].what
    Aliases(whole.galleries)
    assert "set aside" in wrong(looked_at(whole))["aliases"].what
    for name in (aliases.FILE, aliases.COPY):
        (whole.galleries / name).write_text("{")
    assert "fail" in [finding.state for finding in looked_at(whole) if finding.check == "aliases"]


@pytest.mark.parametrize("damage", ["garbage", "cut", "another's tables"])
def test_stores_beside_the_galleries_that_are_damaged(whole: Settings, damage: str) -> None:
    ledger, feedback = Ledger(whole.galleries), FeedbackStore(whole.galleries)
    ledger.begin(Token(str(uuid.uuid4()), b"digest"))
    feedback.page(0, 1)
    assert wrong(looked_at(whole)) == {}  # beside those who write
    ledger.close()
    feedback.close()
    for name in (once.FILE, feedback_store.FILE):
        spoil(whole.galleries / name, damage)
    found = wrong(looked_at(whole))
    assert {check: finding.state for check, finding in found.items()} == {"requests": "warn", "feedback": "fail"}
    ledger.begin(Token(str(uuid.uuid4()), b"digest"))
    ledger.close()
    found = wrong(looked_at(whole))
    assert found["requests"].state == "warn"
    assert "set aside" in found["requests"].what
    assert "delete" in found["requests"].do


def test_a_folder_that_cannot_be_made(whole: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = wrong(looked_at(whole.model_copy(update={"galleries": tmp_path / "file"})))
    assert found["galleries"].state == "fail"
    new = tmp_path / "new" / "deep"
    assert "galleries" not in wrong(looked_at(whole.model_copy(update={"galleries": new})))
    assert not new.exists()


@pytest.mark.parametrize(("free", "state"), [(10**9, "warn"), (10**8, "fail")])
def test_a_disk_that_is_nearly_full(whole: Settings, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10 - free, free))  # type: ignore[attr-defined]
    assert wrong(looked_at(whole))["disk"].state == state


@pytest.mark.parametrize(("soft", "state"), [(512, "warn"), (128, "fail")])
def test_too_few_open_files(whole: Settings, monkeypatch: pytest.MonkeyPatch, soft: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 4096))
    found = wrong(looked_at(whole))["open files"]
    assert found.state == state
    assert "4096" in found.do


def test_too_little_memory(whole: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_memory", lambda: 1000)
    assert wrong(looked_at(whole))["memory"].state == "warn"


def test_a_clock_that_is_wrong(whole: Settings) -> None:
    found = wrong(looked_at(whole, now=datetime(2020, 1, 1, tzinfo=UTC)))
    assert found["clock"].state == "fail"


def test_packages_that_are_missing_or_too_old() -> None:
    required = [
        'faiss-cpu>=1.15; extra == "serve"', 'grpcio>=1.71', 'tensorboard>=2; extra == "tensorboard"',
        'lookalike[cli]; extra == "serve"', "numpy>=1.26",
    ]  # fmt: skip
    versions = {"grpcio": "1.8.0", "numpy": "2.0.0rc1"}
    assert list(doctor._outdated(required, versions.get)) == [
        "faiss-cpu is not installed",
        "grpcio is 1.8.0, and at least 1.71 is needed",
    ]


def test_certificates(whole: Settings, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    key.chmod(0o600)
    secure = whole.model_copy(update={"tls_certificate": certificate, "tls_key": key})
    found = wrong(looked_at(secure))  # valid for a day
    assert found["TLS"].state == "warn"
    assert "ends on" in found["TLS"].what
    key.chmod(0o644)
    assert "others may read" in [f.what for f in looked_at(secure) if f.check == "TLS"][0]  # noqa: RUF015
    _, other_key = authority.issue("other").write(tmp_path, "other")
    assert wrong(looked_at(secure.model_copy(update={"tls_key": other_key})))["TLS"].state == "fail"
    assert wrong(looked_at(whole.model_copy(update={"host": "0.0.0.0"})))["TLS"].state == "fail"


def test_when_a_certificate_ends(tmp_path: Path) -> None:
    certificate, key = Authority().issue("server").write(tmp_path, "server")
    left = expiry(certificate, key) - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(days=1)


def test_an_expired_certificate(whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.authority as authority_module

    class Past(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - timedelta(days=10)

    monkeypatch.setattr(authority_module, "datetime", Past)
    certificate, key = Authority().issue("server").write(tmp_path, "server")
    with pytest.raises(NotValid, match="expired"):
        expiry(certificate, key)
    secure = whole.model_copy(update={"tls_certificate": certificate, "tls_key": key})
    assert [f.state for f in looked_at(secure) if f.check == "TLS"][-1] == "fail"


def test_a_store_that_may_not_be_read(whole: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.is_file

    def refused(path: Path) -> bool:
        if path.name == STORE:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_file", refused)
    found = wrong(looked_at(whole))
    assert {check: f.state for check, f in found.items()} == {"gallery kept": "fail"}
    assert "rights" in found["gallery kept"].do


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """The command, in this process, with no variable that it reads."""
    for variable in os.environ.keys() - environment().keys():
        monkeypatch.delenv(variable)

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["doctor", *arguments])
        out, err = capfd.readouterr()
        assert not err, err
        return code, out

    before = structlog.get_config()
    yield run
    logging.disable(logging.NOTSET)  # it is the command's process, and here it is not
    structlog.configure(**before)


@pytest.mark.usefixtures("run")
def test_a_server_is_called_as_by_the_other_commands(
    loop: Loop, whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    authority = Authority()
    certificate, key = authority.issue("localhost").write(tmp_path, "server")
    my_certificate, my_key = authority.issue("me").write(tmp_path, "me")
    (tmp_path / "root.pem").write_bytes(authority.root)
    secret = KeyRing(tmp_path / "keys.json").create("somebody", scopes=["read"], galleries=["*"])[1]
    secure = whole.model_copy(
        update={
            "tls_certificate": certificate,
            "tls_key": key,
            "tls_client_ca": tmp_path / "root.pem",
            "keys": tmp_path / "keys.json",
            "port": 0,
        }
    )
    given = ["--bundle", str(whole.bundle), "--data", str(whole.galleries), "--json"]

    def told(*more: str) -> dict[str, dict[str, str]]:
        capfd.readouterr()  # of the server in this process
        main(["doctor", *given, *more])
        return {each["check"]: each for each in json.loads(capfd.readouterr().out)}

    with served(loop, secure) as server:
        target = ["--target", f"localhost:{server.port}"]
        assert "--tls-ca" in told(*target)["server"]["do"]
        monkeypatch.setenv("LOOKALIKE_TLS_CA", str(tmp_path / "root.pem"))
        assert "--client-certificate" in told(*target)["server"]["do"]
        monkeypatch.setenv("LOOKALIKE_CLIENT_CERTIFICATE", str(my_certificate))
        monkeypatch.setenv("LOOKALIKE_CLIENT_KEY", str(my_key))
        found = told(*target)
        assert (found["server"]["state"], found["model"]["state"]) == ("ok", "warn")
        assert "LOOKALIKE_API_KEY" in found["model"]["do"]
        monkeypatch.setenv("LOOKALIKE_API_KEY", secret)
        assert [found["state"] for check, found in told(*target).items() if check in {"server", "model"}] == ["ok"] * 2
        whole_settings = ["--set", f"port={server.port}", "--set", f"tls_certificate={certificate}"]
        found = told(*whole_settings, "--set", f"tls_key={key}")
        assert "SERVING" in found["server"]["what"]
        assert found["model"]["state"] == "ok"
        monkeypatch.setenv("LOOKALIKE_TLS_CA", str(tmp_path / "none.pem"))
        assert f"cannot read {tmp_path / 'none.pem'}" in told(*target)["server"]["what"]


def test_the_command(whole: Settings, tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'bundle = "{whole.bundle}"\ngalleries = "{whole.galleries}"\nport = {whole.port}\n')
    code, text = run("--settings", str(file))
    assert code == 0, text
    assert text.splitlines()[-1].endswith("0 failed, 1 with a warning")  # no server runs
    file.write_text(file.read_text() + "prot = 3\n")
    code, text = run("--settings", str(file), "--json")
    assert code == 1
    (finding,) = json.loads(text)
    assert (finding["check"], finding["state"]) == ("settings", "fail")
    assert "did you mean port?" in finding["what"]
