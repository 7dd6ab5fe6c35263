"""The doctor on deployments whose callers, clock, log, lock or surroundings are broken: each is named."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import service.telemetry
from embedding.bundle import Bundle
from index import Catalog, ModelRef
from index.catalog import LOCK
from index.items import Item
from index.live import SEGMENTS
from service.access.key_ring import KeyRing
from service.doctor import access as doctor_access
from service.doctor.deployment import looked_at
from service.doctor.finding import Finding
from service.doctor.server import asked
from service.settings import Settings
from tests.authority import Authority
from tests.processes import COMMAND, environment
from tests.service.deployed import referenced, whole, wrong
from tests.service.harness import DIM, Loop, served

__all__ = ["referenced", "whole"]  # fixtures of another module


def only(settings: Settings, check: str, **changes: Any) -> Finding:
    """The one finding that is not ok."""
    found = wrong(looked_at(settings.model_copy(update=changes)))
    assert set(found) == {check}
    return found[check]


def public_keys(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    made: dict[str, Any] = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    path.write_text(json.dumps({"keys": [{**made, "kid": "one"}]}))
    return path


@pytest.fixture(autouse=True)
def _kept_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_access, "_is_unsynchronised", lambda: False)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "there is no file of keys"),
        ("", 0o600, "is no file of keys"),
        ('{"keys": []}', 0o600, "holds no key that counts"),
        ('{"keys": [{}]}', 0o600, "is no file of keys"),
        ('{"keys": []}', 0o622, "others may write to"),
    ],
)
def test_a_file_of_keys_that_lets_nobody_in(
    whole: Settings, tmp_path: Path, content: str | None, mode: int, said: str
) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    finding = only(whole, "keys", keys=path)
    assert (finding.state, said in finding.what) == ("fail", True)


def test_keys_that_have_ended_or_will_soon(whole: Settings, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing(path)
    ring.create("old", scopes=["read"], galleries=["*"], days=1)
    told = whole.model_copy(update={"keys": path})
    assert "old on" in wrong(looked_at(told))["keys"].what
    later = datetime.now(UTC) + timedelta(days=2)
    expired = wrong(looked_at(told, now=later))["keys"]
    assert (expired.state, "all 1 have expired" in expired.what) == ("fail", True)
    ring.create("new", scopes=["read"], galleries=["*"])
    assert "keys" not in wrong(looked_at(told, now=later))


def test_a_folder_in_which_others_may_replace_the_keys(whole: Settings, tmp_path: Path) -> None:
    path = tmp_path / "shared" / "keys.json"
    KeyRing(path).create("old", scopes=["read"], galleries=["*"])
    path.parent.chmod(0o777)
    assert only(whole, "keys", keys=path).state == "warn"
    path.parent.chmod(0o1777)  # as /tmp: nobody replaces what is another's
    assert wrong(looked_at(whole.model_copy(update={"keys": path}))) == {}


def test_tokens_that_can_never_count(whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"jwt_keys": public_keys(tmp_path / "jwks.json"), "jwt_issuer": "i", "jwt_audience": "a"}
    assert wrong(looked_at(whole.model_copy(update=good))) == {}
    assert "cannot read" in only(whole, "tokens", **{**good, "jwt_keys": tmp_path / "none"}).what
    assert "jwt_issuer" in only(whole, "tokens", **{**good, "jwt_issuer": None}).do
    assert "HS256" in only(whole, "tokens", **{**good, "jwt_algorithms": ("HS256",)}).what
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    assert "no public key" in only(whole, "tokens", **good).what
    monkeypatch.setitem(sys.modules, "jwt", None)
    assert "pip install -c constraints.txt '.[jwt]'" in only(whole, "tokens", **good).what


def test_a_clock_that_nothing_keeps_right(whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are judged by it."""
    monkeypatch.setattr(doctor_access, "_is_unsynchronised", lambda: True)
    assert wrong(looked_at(whole)) == {}
    good = {"jwt_keys": public_keys(tmp_path / "jwks.json"), "jwt_issuer": "i", "jwt_audience": "a"}
    finding = only(whole, "clock", **good)
    assert (finding.state, "NTP" in finding.do) == ("warn", True)


def test_roots_of_clients_that_have_ended(whole: Settings, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    key.chmod(0o600)
    (tmp_path / "ca.crt").write_bytes(authority.root)
    told = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": tmp_path / "ca.crt"}
    later = datetime.now(UTC) + timedelta(days=3650)
    ended = wrong(looked_at(whole.model_copy(update=told), now=later))["client CA"]
    assert (ended.state, "test root" in ended.what) == ("fail", True)


@pytest.mark.parametrize("where", ["missing/audit.jsonl", "."])
def test_an_audit_log_that_cannot_be_written(whole: Settings, tmp_path: Path, where: str) -> None:
    assert only(whole, "audit log", audit_log=tmp_path / where).state == "fail"


def test_an_audit_log_that_can_be_written_is_not_made(whole: Settings, tmp_path: Path) -> None:
    assert wrong(looked_at(whole.model_copy(update={"audit_log": tmp_path / "audit.jsonl"}))) == {}
    assert not (tmp_path / "audit.jsonl").exists()


def test_milvus_that_is_not_there(whole: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    milvus = {"engine": "milvus"}
    assert "milvus_uri is not set" in only(whole, "Milvus", **milvus).what
    away = only(whole, "Milvus", **milvus, milvus_uri="http://127.0.0.1:9")
    assert "nothing answers on 127.0.0.1:9" in away.what
    for uri in ("nonsense", "http://[", "http://host:port"):
        assert "is no address" in only(whole, "Milvus", **milvus, milvus_uri=uri).what
    for uri in ("me:hunter2@host", "host?token=hunter2", "http://host?token=hunter2&file=x.db"):
        (told,) = [
            finding
            for finding in looked_at(whole.model_copy(update={**milvus, "milvus_uri": uri}))
            if finding.check == "Milvus"
        ]
        assert "host" in told.what
        assert "hunter2" not in told.what
    for module in [name for name in sys.modules if name.startswith("index.milvus")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    missing = only(whole, "Milvus", **milvus, milvus_uri="http://127.0.0.1:9")
    assert "pip install -c constraints.txt '.[milvus]'" in missing.what


def test_traces_without_their_extra(whole: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.telemetry.tracing", raising=False)
    monkeypatch.delattr(service.telemetry, "tracing", raising=False)  # where another test has imported it
    for name in [each for each in sys.modules if each.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert "pip install -c constraints.txt '.[otel]'" in only(whole, "traces", otlp_endpoint="http://127.0.0.1:9").do


def test_two_ports_that_are_one(whole: Settings) -> None:
    assert only(whole, "metrics", metrics_port=whole.port).state == "fail"


def test_a_device_that_is_not_here(whole: Settings) -> None:
    finding = only(whole, "encoder", device="gpu9")
    assert (finding.state, "correct device" in finding.do) == ("fail", True)


def test_a_folder_of_models_with_a_bundle_that_is_not_sound(whole: Settings, tmp_path: Path) -> None:
    assert only(whole, "models", models=tmp_path / "none").state == "fail"
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "bundle.json").write_text("{")
    assert "cannot be activated" in only(whole, "model broken", models=tmp_path / "models").what


def test_the_lock_of_a_dead_process_holds_nothing(loop: Loop, whole: Settings) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    (whole.galleries / LOCK).write_text(f"{dead.pid}\n")
    assert wrong(looked_at(whole)) == {}
    server = wrong(asked(whole))["server"]
    assert str(dead.pid) not in server.what
    assert server.do.startswith("start it")
    with served(loop, whole):
        assert wrong(asked(whole)) == {}


def test_a_lock_that_is_no_file(whole: Settings) -> None:
    (whole.galleries / LOCK).unlink()
    (whole.galleries / LOCK).mkdir()
    assert "no server can hold the folder" in only(whole, "galleries").what


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 200])
def test_a_manifest_that_is_damaged_is_named_without_reading_everything(
    whole: Settings, referenced: Bundle, damage: bytes
) -> None:
    model = ModelRef(name=referenced.name, fingerprint=referenced.fingerprint, embedding_dim=DIM)
    with Catalog(whole.galleries) as catalog:
        gallery = catalog.create("full", model)
        vectors = np.eye(DIM, dtype=np.float32)
        gallery.upsert([Item(name=f"i{i}", embedding=vector) for i, vector in enumerate(vectors)])
        gallery.seal()
    (manifest,) = (whole.galleries / "full" / SEGMENTS).glob("*/manifest.json")
    manifest.write_bytes(damage)
    finding = only(whole, "gallery full")
    assert (finding.state, "manifest.json" in finding.what) == ("warn", True)
    assert "from the store" in finding.do


@pytest.mark.filterwarnings("ignore:The RSA key")
def test_what_is_logged_is_not_among_the_findings(whole: Settings, tmp_path: Path) -> None:
    """Standard output is JSON and nothing else."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    made: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(small.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**made, "kid": "small", "key_ops": ["verify"]}]}))
    options = {
        "bundle": whole.bundle, "galleries": whole.galleries, "port": 0, "jwt_issuer": "i", "jwt_audience": "a",
        "jwt_keys": tmp_path / "jwks.json",
    }  # fmt: skip
    ran = subprocess.run(
        [*COMMAND, "doctor", "--json", *(f"--set={name}={value}" for name, value in options.items())],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert {each["check"]: each["state"] for each in json.loads(ran.stdout)}["tokens"] == "fail"
    assert (ran.returncode, ran.stderr) == (1, "")
