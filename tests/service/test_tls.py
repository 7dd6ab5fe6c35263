"""TLS: which addresses may go without, who gets in, and certificates that are exchanged under a running server."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from embedding.errors import InvalidInput
from lookalike.v1 import model_pb2, model_pb2_grpc, search_pb2
from service.server import Server
from service.settings import Settings
from service.tls import Certificates, Files, certificates, is_loopback
from tests.authority import Authority, Pair, private_pem, replace
from tests.service.harness import Loop, connected, encoded, served

MODELS = model_pb2.ListModelsRequest()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def secured(settings: Settings, authority: Authority, tmp_path: Path) -> Settings:
    certificate, key = authority.issue("first").write(tmp_path, "server")
    return settings.model_copy(
        update={"galleries": tmp_path / "galleries", "tls_certificate": certificate, "tls_key": key}
    )


def trusting(authority: Authority, pair: Pair | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.root, pair.key if pair else None, pair.certificate if pair else None)


def shown(server: Server, authority: Authority) -> str:
    """The common name of the certificate that a new connection meets."""
    context = ssl.create_default_context(cadata=authority.root.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        met = wrapped.getpeercert()
    assert met is not None
    return dict(part for (part,) in met["subject"])["commonName"]  # type: ignore[misc, union-attr]


def refused_by_handshake(server: Server, credentials: grpc.ChannelCredentials | None) -> bool:
    made = grpc.secure_channel(server.address, credentials) if credentials else grpc.insecure_channel(server.address)
    with made as channel:
        error = model_pb2_grpc.ModelServiceStub(channel).ListModels.future(MODELS, timeout=10).exception()
    assert error is None or (isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE), error
    return error is not None


def test_calls_are_encrypted_and_the_server_is_known_by_its_root(
    loop: Loop, secured: Settings, authority: Authority
) -> None:
    with served(loop, secured) as server:
        with connected(server.address, trusting(authority)) as stubs:
            stubs.fill("g", {"a": encoded(1)})
        assert refused_by_handshake(server, None), "plain text was answered"
        assert refused_by_handshake(server, trusting(Authority("another root")))


def test_with_roots_for_clients_only_their_certificates_get_in(
    loop: Loop, secured: Settings, authority: Authority, tmp_path: Path
) -> None:
    clients, others = Authority("clients"), Authority("others")
    replace(tmp_path / "clients.crt", clients.root)
    with served(loop, secured.model_copy(update={"tls_client_ca": tmp_path / "clients.crt"})) as server:
        assert not refused_by_handshake(server, trusting(authority, clients.issue("me")))
        assert refused_by_handshake(server, trusting(authority))
        assert refused_by_handshake(server, trusting(authority, others.issue("me")))
        replace(tmp_path / "clients.crt", others.root)
        assert refused_by_handshake(server, trusting(authority, clients.issue("me")))
        assert not refused_by_handshake(server, trusting(authority, others.issue("me")))


def test_a_new_certificate_counts_without_a_restart_and_breaks_no_stream(
    loop: Loop, secured: Settings, authority: Authority, tmp_path: Path
) -> None:
    with served(loop, secured) as server, connected(server.address, trusting(authority)) as stubs:
        stubs.fill("g", {"a": encoded(1)})
        sent: SimpleQueue[search_pb2.StreamSearchRequest | None] = SimpleQueue()
        answers = stubs.search.StreamSearch(iter(sent.get, None))
        sent.put(search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery="galleries/g", k=1)))
        sent.put(search_pb2.StreamSearchRequest(id="before", query=encoded(1)))
        assert next(answers).id == "before"
        assert shown(server, authority) == "first"
        with capture_logs() as logs:
            authority.issue("second").write(tmp_path, "server")
            assert shown(server, authority) == "second"
            assert shown(server, authority) == "second"
        assert [line["event"] for line in logs if "certificate" in line["event"]] == ["certificates renewed"]
        sent.put(search_pb2.StreamSearchRequest(id="after", query=encoded(1)))
        assert next(answers).id == "after"  # on the connection of the first certificate
        sent.put(None)
        assert not refused_by_handshake(server, trusting(authority))


def test_half_a_renewal_changes_nothing_until_it_is_whole(
    loop: Loop, secured: Settings, authority: Authority, tmp_path: Path
) -> None:
    second = authority.issue("second")
    with served(loop, secured) as server:
        with capture_logs() as logs:
            replace(tmp_path / "server.crt", second.certificate)
            assert [shown(server, authority) for _ in range(3)] == ["first"] * 3
        (line,) = [line for line in logs if line["log_level"] == "error"]
        assert "those in use stay" in line["event"], "said once, not at every connection"
        replace(tmp_path / "server.key", second.key)
        assert shown(server, authority) == "second"
        (tmp_path / "server.key").unlink()
        assert shown(server, authority) == "second"


def test_a_renewal_that_the_disk_refused_is_tried_again(
    loop: Loop, secured: Settings, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key was written before the server was let read it, or too many files were open."""
    second = authority.issue("second")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with served(loop, secured) as server:
        with monkeypatch.context() as patched, capture_logs() as logs:
            replace(tmp_path / "server.key", second.key)
            replace(tmp_path / "server.crt", second.certificate)
            patched.setattr(Path, "read_bytes", refuse)
            assert [shown(server, authority) for _ in range(3)] == ["first"] * 3
        assert [line["log_level"] for line in logs] == ["error"]
        assert shown(server, authority) == "second"


def test_files_that_cannot_be_used_are_named_at_start(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    certificate, key = good.write(tmp_path, "good")
    _, other_key = other.write(tmp_path, "other")
    empty = tmp_path / "empty.pem"
    empty.write_bytes(b"")
    locked = tmp_path / "locked.key"
    locked.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), passphrase=b"secret"))
    for files, setting, words in (
        (Files(tmp_path / "none", key), "tls_certificate", "none: No such file"),
        (Files(certificate, tmp_path / "none"), "tls_key", "none: No such file"),
        (Files(certificate, key, tmp_path / "none"), "tls_client_ca", "none: No such file"),
        (Files(certificate, other_key), "tls_certificate", "fit together"),
        (Files(empty, key), "tls_certificate", "fit together"),
        (Files(certificate, locked), "tls_certificate", "passphrase"),
        (Files(certificate, key, empty), "tls_client_ca", "no PEM certificates"),
    ):
        with pytest.raises(InvalidInput, match=words) as caught:
            Certificates(files)
        assert caught.value.field == setting
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "2001:db8::1"])
def test_other_machines_are_not_served_without_tls_unless_that_is_said(settings: Settings, host: str) -> None:
    with pytest.raises(InvalidInput, match=r"--tls-certificate .* --insecure") as caught:
        certificates(settings.model_copy(update={"host": host}))
    assert caught.value.field == "host"
    assert certificates(settings.model_copy(update={"host": host, "insecure": True})) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_served_without_tls(settings: Settings, host: str) -> None:
    assert is_loopback(host)
    assert certificates(settings.model_copy(update={"host": host})) is None


def test_halves_and_contradictions_are_refused(secured: Settings) -> None:
    for update, field in (
        ({"tls_key": None}, "tls_key"),
        ({"tls_certificate": None}, "tls_certificate"),
        ({"tls_certificate": None, "tls_key": None, "tls_client_ca": secured.tls_key}, "tls_certificate"),
        ({"insecure": True}, "insecure"),
    ):
        with pytest.raises(InvalidInput) as caught:
            certificates(secured.model_copy(update=update))
        assert caught.value.field == field


def test_a_server_that_would_listen_in_plain_text_does_not_start(loop: Loop, settings: Settings) -> None:
    with pytest.raises(InvalidInput, match="--insecure"), served(loop, settings.model_copy(update={"host": "0.0.0.0"})):
        pass
