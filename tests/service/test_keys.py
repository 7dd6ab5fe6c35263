"""The file of keys: what it holds, how it changes, and that a running server follows."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedding.errors import AlreadyExists, CredentialsInvalid, DamagedData, InvalidInput, NotFound, RateLimited
from lookalike.__main__ import main
from lookalike.v1 import model_pb2
from service.access.key_ring import KeyRing
from service.access.keys import KeyFile, Keys, read
from service.access.principal import Principal
from service.access.rate_limits import RateLimits
from service.server import Server
from service.settings import Settings
from tests.authority import Authority, replace
from tests.service.harness import Loop, Stubs, connected, info, rich, served

MODELS = model_pb2.ListModelsRequest()


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at by each call, and not once a second."""
    monkeypatch.setattr("service.access.watched.LOOK_SECONDS", 0.0)


def made(ring: KeyRing, name: str = "shop", **rights: Any) -> str:
    rights = {"scopes": ["read"], "galleries": ["*"], **rights}
    return ring.create(name, **rights)[1]


def test_the_file_has_a_hash_and_never_the_key(ring: KeyRing, tmp_path: Path) -> None:
    key = made(ring)
    text = (tmp_path / "keys.json").read_text()
    secret = key.rpartition("_")[2] if key.count("_") == 2 else key.split("_", 2)[2]
    assert secret not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    assert len({made(ring, f"n{i}") for i in range(50)}) == 50
    assert len(secret) >= 43, "256 bits"


def test_a_key_is_its_holder_and_nobody_elses(ring: KeyRing, tmp_path: Path) -> None:
    key, other = made(ring, galleries=["shop-*"]), made(ring, "other")
    keys = Keys(tmp_path / "keys.json")
    assert (keys.of_key(key).name, keys.of_key(other).name) == ("shop", "other")
    for wrong in ("", "lk_", key[:-1], key + "A", key.upper(), key[:20] + other[20:], " " + key, key + "\n", "ü" * 63):
        with pytest.raises(CredentialsInvalid):
            keys.of_key(wrong)
    assert [keys.of_key(key).allows(name) for name in ("shop-a", "shop-", "shop", "a-shop-a")] == [
        True,
        True,
        False,
        False,
    ]


@given(st.lists(st.text("ab*-", min_size=1, max_size=6), max_size=3), st.text("ab-\n", max_size=8))
def test_patterns_agree_with_the_standard_librarys(patterns: list[str], name: str) -> None:
    from fnmatch import fnmatchcase

    assert Principal(name="", galleries=tuple(patterns)).allows(name) == any(
        fnmatchcase(name, pattern) for pattern in patterns
    )


def test_rotation_lets_both_keys_count_until_the_old_one_expires(ring: KeyRing, tmp_path: Path) -> None:
    old = made(ring, per_second=5, burst=7)
    record, new = ring.rotate("shop", overlap=timedelta(hours=1))
    keys = Keys(tmp_path / "keys.json")
    a, b = keys.of_key(old), keys.of_key(new)
    assert (a.name, a.scopes, a.galleries, a.burst) == (b.name, b.scopes, b.galleries, b.burst)
    assert a.expires is not None
    assert abs(a.expires - time.time() - 3600) < 60
    assert b.expires is None
    newest, _ = ring.rotate("shop", overlap=timedelta(hours=100))
    assert newest.expires is None, "of the keys of a name, the newest is rotated"
    ring.revoke(record.id)
    ring.revoke(newest.id)
    assert keys.of_key(old).name == "shop"
    with pytest.raises(CredentialsInvalid):
        keys.of_key(new)
    assert keys.of_key(old).expires == a.expires


def test_a_key_with_an_end_is_rotated_into_one_that_lives_as_long(ring: KeyRing, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    made(ring, days=10)
    (old,) = ring.all()
    assert old.expires is not None
    days_ago = {"created": old.created - timedelta(days=4), "expires": old.expires - timedelta(days=4)}
    file = KeyFile(keys=(old.model_copy(update=days_ago),))
    replace(tmp_path / "keys.json", file.model_dump_json().encode())
    (tmp_path / "keys.json").chmod(0o600)
    record, _ = ring.rotate("shop", overlap=timedelta(days=50))
    assert record.expires is not None
    assert timedelta(days=10) <= record.expires - now < timedelta(days=10, hours=1)
    assert ring.all()[0].expires == days_ago["expires"], "an overlap makes no life longer"
    with pytest.raises(NotFound):
        ring.rotate("nobody", overlap=timedelta(0))


def test_a_certificate_is_not_rotated(ring: KeyRing) -> None:
    ring.create("shop", scopes=["read"], galleries=["*"], certificate="CN=shop")
    with pytest.raises(InvalidInput, match="issue another one"):
        ring.rotate("shop", overlap=timedelta(0))


@pytest.mark.parametrize(("per_second", "burst"), [(None, 1), (0.2, 1), (7.6, 8)])
def test_a_rate_lets_a_second_s_calls_come_at_once(ring: KeyRing, per_second: float | None, burst: int) -> None:
    made(ring, per_second=per_second)
    assert [record.burst for record in ring.all()] == [burst]


def test_a_change_is_on_the_disk_before_the_caller_has_it(
    ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the content before the name, the name before the answer: a revocation stays one when the power fails."""
    steps = []
    fsync, renamed = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        state = os.fstat(descriptor)
        steps.append(state.st_ino if stat.S_ISDIR(state.st_mode) else state.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda path, target: steps.append(target) or renamed(path, target))
    made(ring)
    file = tmp_path / "keys.json"
    assert steps == [file.stat().st_size, file, tmp_path.stat().st_ino]


@pytest.mark.parametrize("overlap", ["-1", "nan", "inf", "876001", "1e12"])
def test_an_overlap_that_no_clock_reaches_is_refused_in_one_line(
    ring: KeyRing, tmp_path: Path, capsys: pytest.CaptureFixture[str], overlap: str
) -> None:
    made(ring)
    before = (tmp_path / "keys.json").read_text()
    assert main(["keys", "rotate", "shop", "--overlap", overlap, "--file", str(tmp_path / "keys.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "overlap" in line
    for each in (timedelta(days=36_501), timedelta.max, timedelta(seconds=-1)):
        with pytest.raises(InvalidInput, match="100 years"):
            ring.rotate("shop", overlap=each)
    assert (tmp_path / "keys.json").read_text() == before


@pytest.mark.parametrize(
    ("name", "rights", "field"),
    [
        ("", {}, "name"),
        ("a b", {}, "name"),
        ("jwt:x", {}, "name"),
        ("a", {"scopes": ["root"]}, "scopes"),
        ("a", {"scopes": []}, "scopes"),
        ("a", {"galleries": []}, "galleries"),
        ("a", {"galleries": ["UPPER"]}, "galleries"),
        ("a", {"galleries": ["a|b"]}, "galleries"),
        ("a", {"per_second": 0.0}, "per_second"),
        ("a", {"burst": 5}, "burst"),
        ("a", {"days": 0.0}, "expires"),
    ],
)
def test_rights_that_make_no_sense_are_refused(
    ring: KeyRing, tmp_path: Path, name: str, rights: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        made(ring, name, **rights)
    assert caught.value.field == field
    assert not (tmp_path / "keys.json").exists()


def test_a_name_has_one_key_until_that_has_expired(ring: KeyRing) -> None:
    made(ring, days=1)
    with pytest.raises(AlreadyExists, match="rotate or revoke"):
        made(ring)
    ring.rotate("shop", overlap=timedelta(0), days=1e-10)
    made(ring)


def test_changes_made_at_the_same_time_are_all_kept(ring: KeyRing, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        made(KeyRing(tmp_path / "keys.json"), f"n{number}")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.name for record in ring.all()} == {f"n{number}" for number in range(8)}


@pytest.mark.parametrize("content", ["", "[]", '{"version": 2}', '{"keys": [{"id": "x"}]}', '{"kys": []}', "\x00"])
def test_a_damaged_file_is_told_without_its_content(tmp_path: Path, content: str) -> None:
    replace(tmp_path / "keys.json", content.encode())
    (tmp_path / "keys.json").chmod(0o600)
    with pytest.raises(DamagedData, match="no file of keys") as caught:
        Keys(tmp_path / "keys.json")
    assert "\n" not in str(caught.value)


def test_a_file_that_others_may_write_is_refused(ring: KeyRing, tmp_path: Path) -> None:
    made(ring)
    for mode in (0o666, 0o620, 0o602):
        (tmp_path / "keys.json").chmod(mode)
        with pytest.raises(InvalidInput, match="chmod 600"):
            read(tmp_path / "keys.json")
    with pytest.raises(InvalidInput, match="keys create"):
        read(tmp_path / "none.json")


def test_a_new_key_counts_at_once_and_a_revocation_within_a_second(
    ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.access.watched.LOOK_SECONDS", 1.0)
    now = [100.0]
    monkeypatch.setattr("service.access.watched.time.monotonic", lambda: now[0])
    first = made(ring)
    keys = Keys(tmp_path / "keys.json")
    second = made(ring, "second")
    assert keys.of_key(second).name == "second"
    ring.revoke("shop")
    now[0] += 0.9
    assert keys.of_key(first).name == "shop"
    now[0] += 0.1
    with pytest.raises(CredentialsInvalid):
        keys.of_key(first)


def test_a_holder_whose_stream_lasts_has_the_rights_of_now(ring: KeyRing, tmp_path: Path) -> None:
    key = made(ring)
    keys = Keys(tmp_path / "keys.json")
    holder = keys.of_key(key)
    assert keys.still(holder) == holder
    ring.rotate("shop", overlap=timedelta(hours=1))
    now = keys.still(holder)
    assert now is not None
    assert now.expires is not None
    ring.revoke("shop")
    assert keys.still(holder) is None


def test_a_damaged_file_under_a_running_server_locks_nobody_out(ring: KeyRing, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = made(ring)
    keys = Keys(path)
    with capture_logs() as logs:
        replace(path, b"{")
        assert [keys.of_key(key).name for _ in range(3)] == ["shop"] * 3
        path.unlink()
        assert keys.of_key(key).name == "shop"
    assert [line["log_level"] for line in logs] == ["error", "error"], "one for each state of the file"
    made(ring, "new")
    with pytest.raises(CredentialsInvalid):
        keys.of_key(key)


def test_a_file_whose_rights_are_mended_counts_without_being_written_again(ring: KeyRing, tmp_path: Path) -> None:
    """What stands in it may be a revocation."""
    path = tmp_path / "keys.json"
    key = made(ring)
    keys = Keys(path)
    ring.revoke("shop")
    path.chmod(0o666)
    with capture_logs() as logs:
        assert [keys.of_key(key).name for _ in range(3)] == ["shop"] * 3
    assert [line["log_level"] for line in logs] == ["error"]
    path.chmod(0o600)
    with pytest.raises(CredentialsInvalid):
        keys.of_key(key)


def test_a_file_that_could_not_be_read_once_is_read_again(
    ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = made(ring)
    keys = Keys(tmp_path / "keys.json")
    ring.revoke("shop")

    def refuse(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(Path, "read_bytes", refuse)
        assert [keys.of_key(key).name for _ in range(3)] == ["shop"] * 3
    assert [line["log_level"] for line in logs] == ["error"], "said once"
    with pytest.raises(CredentialsInvalid):
        keys.of_key(key)


def test_limits_hold_in_the_long_run_and_batches_are_paid_for_afterwards() -> None:
    now = [0.0]
    limits, caller = RateLimits(lambda: now[0]), Principal(name="a", per_second=2, burst=4)
    for _ in range(4):
        limits.admit(caller)
    with pytest.raises(RateLimited) as caught:
        limits.admit(caller)
    assert (caught.value.retry_seconds, caught.value.subject) == (0.5, "caller:a")
    limits.admit(Principal(name="b", per_second=2, burst=4))
    limits.admit(Principal(name="c"))
    now[0] += 0.5
    limits.admit(caller)
    assert limits.charge(caller, 10) == 5.0
    with pytest.raises(RateLimited) as caught:
        limits.admit(caller)
    assert caught.value.retry_seconds == 5.5
    now[0] += 5.5
    limits.admit(caller)
    admitted = 0
    for _ in range(1000):
        now[0] += 0.125
        try:
            limits.admit(caller)
            admitted += 1
        except RateLimited:
            pass
    assert admitted == 250


@pytest.fixture
def guarded(loop: Loop, settings: Settings, ring: KeyRing, tmp_path: Path) -> Iterator[Server]:
    made(ring, "first")
    own = settings.model_copy(update={"galleries": tmp_path / "galleries", "keys": tmp_path / "keys.json"})
    with served(loop, own) as server:
        yield server


def ask(stubs: Stubs, key: str) -> grpc.StatusCode:
    call = stubs.models.ListModels.with_call
    try:
        call(MODELS, metadata=(("authorization", f"Bearer {key}"),))
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_running_server_follows_the_file(guarded: Server, ring: KeyRing) -> None:
    with connected(guarded.address) as stubs:
        key = made(ring)
        assert ask(stubs, key) is grpc.StatusCode.OK
        _, new = ring.rotate("shop", overlap=timedelta(hours=1))
        assert ask(stubs, key) is ask(stubs, new) is grpc.StatusCode.OK
        ring.revoke("shop")
        assert ask(stubs, key) is ask(stubs, new) is grpc.StatusCode.UNAUTHENTICATED
        late = made(ring, "late", days=1 / 86_400)
        deadline = time.monotonic() + 10
        while ask(stubs, late) is not grpc.StatusCode.UNAUTHENTICATED:  # it lives for a second
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_caller_over_its_rate_is_told_when_to_come_again(guarded: Server, ring: KeyRing) -> None:
    from google.rpc import error_details_pb2

    key = made(ring, per_second=0.01, burst=2)
    metadata = (("authorization", f"Bearer {key}"),)
    with connected(guarded.address) as stubs:
        for _ in range(2):
            stubs.models.ListModels(MODELS, metadata=metadata)
        with pytest.raises(grpc.RpcError) as caught:
            stubs.models.ListModels(MODELS, metadata=metadata)
    status = rich(caught.value)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert info(status).reason == "RATE_LIMITED"
    retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert any(detail.Unpack(quota) for detail in status.details)
    assert 90 < retry.retry_delay.seconds <= 100
    assert quota.violations[0].subject == "caller:shop"


def test_a_client_certificate_that_is_registered_needs_no_key(
    loop: Loop, settings: Settings, ring: KeyRing, tmp_path: Path
) -> None:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    replace(tmp_path / "ca.crt", authority.root)
    ring.create("robot", scopes=["read"], galleries=["*"], certificate="spiffe://example.org/robot")
    ring.create("named", scopes=["write"], galleries=["*"], certificate="CN=named")
    own = settings.model_copy(
        update={
            "galleries": tmp_path / "galleries",
            "keys": tmp_path / "keys.json",
            "tls_certificate": certificate,
            "tls_key": key,
            "tls_client_ca": tmp_path / "ca.crt",
        }
    )
    pairs = {
        "robot": authority.issue("anything", uri="spiffe://example.org/robot"),
        "named": authority.issue("named"),
        "stranger": authority.issue("stranger", uri="spiffe://example.org/stranger"),
    }
    codes = {}
    with served(loop, own) as server:
        for who, pair in pairs.items():
            credentials = grpc.ssl_channel_credentials(authority.root, pair.key, pair.certificate)
            with connected(server.address, credentials) as stubs:
                call = stubs.models.ListModels.future(MODELS)
                error = call.exception()
                codes[who] = "OK" if error is None else info(rich(error)).reason  # type: ignore[arg-type]
    assert codes == {"robot": "OK", "named": "SCOPE_MISSING", "stranger": "CREDENTIALS_MISSING"}


def test_the_command_makes_lists_rotates_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKALIKE_KEYS", str(tmp_path / "keys.json"))
    assert main(["keys", "create", "shop", "--scope", "read", "--scope", "write", "--gallery", "shop-*"]) == 0
    key = capsys.readouterr().out.strip()
    holder = Keys(tmp_path / "keys.json").of_key(key)
    assert (holder.name, holder.scopes, holder.galleries) == ("shop", {"read", "write"}, ("shop-*",))
    assert main(["keys", "list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], "digest" in listed) == ("shop", False)
    assert main(["keys", "rotate", "shop", "--overlap", "1"]) == 0
    assert Keys(tmp_path / "keys.json").of_key(capsys.readouterr().out.strip()).name == "shop"
    assert main(["keys", "revoke", "shop"]) == 0
    assert capsys.readouterr().out.count("revoked") == 2
    assert main(["keys", "list"]) == 0
    assert main(["keys", "revoke", "shop"]) == 2
    assert "keys list" in capsys.readouterr().err
