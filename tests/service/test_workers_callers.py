"""Who calls is known whichever of several processes took the connection, by certificate and address."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedding.bundle import Bundle
from lookalike.v1 import gallery_pb2
from service.access.key_ring import KeyRing
from service.workers import passed_on
from tests.authority import Authority, Pair
from tests.processes import serving
from tests.service.harness import connected, info, rich
from tests.service.test_metrics import scraped

ROBOT = "spiffe://example.org/robot"
CONNECTIONS = 24
"""So many that each of two processes takes some."""


@dataclass
class Secured:
    """Two workers that take certificates for keys."""

    address: str
    audit_log: Path
    log: Path
    authority: Authority

    def create(self, pair: Pair, metadata: Sequence[tuple[str, Any]] = ()) -> str:
        """The reason of the error that creating a gallery over a new connection ends with; empty when it is made."""
        credentials = grpc.ssl_channel_credentials(self.authority.root, pair.key, pair.certificate)
        request = gallery_pb2.CreateGalleryRequest(gallery_id=f"g-{uuid.uuid4().hex[:8]}")
        with connected(self.address, credentials) as stubs:
            try:
                stubs.galleries.CreateGallery(request, metadata=tuple(metadata))
            except grpc.RpcError as error:
                return info(rich(error)).reason
        return ""


@pytest.fixture(scope="module")
def secured(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder, authority = tmp_path_factory.mktemp("secured"), Authority()
    certificate, key = authority.issue("localhost").write(folder, "server")
    (folder / "ca.crt").write_bytes(authority.root)
    KeyRing(folder / "keys.json").create("robot", scopes=["admin"], galleries=["*"], certificate=ROBOT)
    options = [
        "--tls-certificate", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(folder / "ca.crt"),
        "--keys", str(folder / "keys.json"), "--audit-log", str(folder / "audit.jsonl"), "--set", "workers=2",
        "--set", "metrics_port=0",
    ]  # fmt: skip
    with serving(bundle.path, folder / "galleries", log=folder / "log", options=options) as (_, address):
        yield Secured(f"localhost:{address.rpartition(':')[2]}", folder / "audit.jsonl", folder / "log", authority)


def test_a_certificate_counts_whichever_process_takes_the_connection(secured: Secured) -> None:
    """The writer was told nothing of it, and refused what came through the other one."""
    robot = secured.authority.issue("robot", uri=ROBOT)
    assert [secured.create(robot) for _ in range(CONNECTIONS)] == [""] * CONNECTIONS
    lines = [json.loads(line) for line in secured.audit_log.read_text().splitlines()]
    assert {line["caller"] for line in lines} == {"robot"}
    assert {line["peer"].partition(":")[0] for line in lines} <= {"ipv4", "ipv6"}


def test_nobody_is_who_he_says_in_metadata_of_ours(secured: Secured) -> None:
    stranger = secured.authority.issue("stranger", uri="spiffe://example.org/stranger")
    made_up = [(passed_on._NAMES, json.dumps([ROBOT]).encode()), (passed_on._PEER, "ipv4:1.2.3.4:5")]
    reasons = {secured.create(stranger, made_up) for _ in range(CONNECTIONS)}
    assert reasons == {"CREDENTIALS_MISSING"}
    assert "1.2.3.4" not in secured.audit_log.read_text()


def test_who_is_refused_is_counted_logged_and_audited_by_the_process_that_took_the_connection(
    secured: Secured,
) -> None:
    stranger = secured.authority.issue("nobody", uri="spiffe://example.org/nobody")
    lines = secured.log.read_text().splitlines()
    (port,) = [json.loads(line)["port"] for line in lines if '"event": "metrics"' in line]

    def told() -> tuple[dict[str, float], int, int]:
        refused = {
            name: value
            for name, value in scraped(port).items()
            if name.startswith("lookalike_calls_total") and "UNAUTHENTICATED" in name and "CreateGallery" in name
        }
        return refused, *(
            sum("CreateGallery" in line and "UNAUTHENTICATED" in line for line in path.read_text().splitlines())
            for path in (secured.log, secured.audit_log)
        )

    before, logged, audited = told()
    assert {secured.create(stranger) for _ in range(CONNECTIONS)} == {"CREDENTIALS_MISSING"}
    patience = time.monotonic() + 20
    while (now := told()) and (now[1], now[2]) != (logged + CONNECTIONS, audited + CONNECTIONS):
        assert time.monotonic() < patience, now
    grown = {name: value - before.get(name, 0) for name, value in told()[0].items()}
    assert sum(grown.values()) == CONNECTIONS
    assert [sum(f"worker={number}" in name for name, value in grown.items() if value) for number in (0, 1)] == [1, 1]


class Told:
    """A call over some connection, as far as it is looked at."""

    def __init__(self, peer: str, metadata: Sequence[tuple[str, Any]] = (), **shown: list[bytes]) -> None:
        self._peer, self._metadata, self._shown = peer, metadata, shown

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Sequence[tuple[str, Any]]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._shown


def test_what_is_said_counts_over_the_socket_of_the_workers_alone() -> None:
    first: Any = Told(
        "ipv4:10.0.0.1:5", x509_subject_alternative_name=[b"spiffe://a", "é".encode()], x509_common_name=[b"a"]
    )
    said = passed_on.said_of(first)
    for peer, counts in (
        ("unix:", True),
        ("unix:/tmp/writer", True),
        ("ipv4:10.0.0.9:1", False),
        ("ipv6:[::1]:2", False),
    ):
        second: Any = Told(peer, said)
        assert passed_on.peer_of(second) == ("ipv4:10.0.0.1:5" if counts else peer)
        assert passed_on.certificate_names(second) == (["spiffe://a", "é", "CN=a"] if counts else [])
    for damaged in (b"", b"{", b"[", b"5x"):
        assert passed_on.certificate_names(Told("unix:", [(passed_on._NAMES, damaged)])) == []  # type: ignore[arg-type]
    many: Any = Told("ipv4:10.0.0.1:5", x509_subject_alternative_name=[b"n" * 100] * 1000)
    assert sum(len(value) for _, value in passed_on.said_of(many)) < 4096
