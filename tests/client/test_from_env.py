"""A client by the environment, as the command line reads it."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest

from lookalike import AsyncClient, Client
from lookalike._secure import from_environment
from lookalike.cli import connection
from service.server import Server
from service.settings_sources import OF_OTHERS
from tests.client.test_secure import Guarded, guarded
from tests.service.harness import png

__all__ = ["guarded"]  # the fixture


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_OTHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_target_is_all_it_takes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKALIKE_TARGET", server.address)
    with Client.from_env(timeout=7) as client:
        assert client.verify(png(1), png(1)).distance == 0
        assert (client.target, client.timeout) == (server.address, 7)

    async def ask() -> float:
        async with AsyncClient.from_env() as client:
            return (await client.verify(png(1), png(1))).distance

    assert asyncio.run(ask()) == 0


def test_tls_a_certificate_and_a_key(guarded: Guarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate, key = guarded.files
    monkeypatch.setenv("LOOKALIKE_TARGET", guarded.address)
    monkeypatch.setenv("LOOKALIKE_TLS_CA", str(guarded.ca))
    monkeypatch.setenv("LOOKALIKE_TLS_SERVER_NAME", "localhost")
    monkeypatch.setenv("LOOKALIKE_CLIENT_CERTIFICATE", str(certificate))
    monkeypatch.setenv("LOOKALIKE_CLIENT_KEY", str(key))
    monkeypatch.setenv("LOOKALIKE_API_KEY", guarded.key)
    with Client.from_env() as client:
        assert client.get_model().active
    (tmp_path / "key").write_text(f"{guarded.key}\n")
    monkeypatch.setenv("LOOKALIKE_API_KEY", "another")
    monkeypatch.setenv("LOOKALIKE_API_KEY_FILE", str(tmp_path / "key"))
    with Client.from_env() as client:
        assert client.get_model().active


def test_what_is_missing_or_senseless_is_named() -> None:
    with pytest.raises(ValueError, match="LOOKALIKE_TARGET is not set"):
        from_environment({"LOOKALIKE_TARGET": ""})
    with pytest.raises(ValueError, match=r"LOOKALIKE_TLS is 1 or 0.*'perhaps'"):
        from_environment({"LOOKALIKE_TARGET": "a:1", "LOOKALIKE_TLS": "perhaps"})
    with pytest.raises(OSError, match="nowhere"):
        from_environment({"LOOKALIKE_TARGET": "a:1", "LOOKALIKE_API_KEY_FILE": "nowhere"})
    assert from_environment({"LOOKALIKE_TARGET": "a:1", "LOOKALIKE_TLS": "Yes"})["tls"] is True
    assert from_environment({"LOOKALIKE_TARGET": "a:1", "LOOKALIKE_ALLOW_INSECURE_KEY": "off"}) == {
        "target": "a:1",
        "tls": False,
        "api_key": None,
        "allow_insecure_key": False,
    }


def test_it_reads_what_the_command_line_reads() -> None:
    read = {name for name in OF_OTHERS if name.removeprefix("LOOKALIKE_") in inspect.getsource(from_environment)}
    assert {name for name in OF_OTHERS if name in inspect.getsource(connection)} <= read
    assert all(name in (Client.from_env.__doc__ or "") for name in read)
