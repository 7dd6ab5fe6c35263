"""The Milvus engine keeps the contract of gallery engines on a real server: `make test-milvus`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.errors import Busy
from index import GalleryCatalog
from index.milvus import MilvusCatalog
from tests.index.milvus_contract import MilvusContract, closing_catalog

COMMAND = os.environ.get("LOOKALIKE_MILVUS_SERVER", "")
FASTER = "proxy.timeTickInterval=20"  # ms, a tenth of the default: each consistent read waits for a tick
STARTS_WITHIN = 120  # seconds
FIXED_PORTS = (2379, 2380, 9091)  # of its own etcd and metrics, which no option moves

pytestmark = [
    pytest.mark.milvus,
    pytest.mark.skipif(not COMMAND, reason="LOOKALIKE_MILVUS_SERVER names no milvus-server; run `make test-milvus`"),
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own on a free port of this machine. Where it cannot start, the tests are skipped and say why."""
    for fixed in FIXED_PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", fixed)) == 0:
                pytest.skip(f"port {fixed}, which a Milvus server needs, is taken: stop what listens there")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("milvus")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [COMMAND, "--data", str(folder / "data"), "--proxy-port", str(port), "--extra-config", FASTER],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                MilvusCatalog(address, prefix="started").close()
                break
            except Busy:
                if server.poll() is not None or time.monotonic() > ends:
                    pytest.skip(f"milvus-server did not start: {(folder / 'log').read_text()[-500:]}")
                time.sleep(1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


class TestServer(MilvusContract):
    examples = 15

    @pytest.fixture
    def catalog(self, uri: str) -> Iterator[GalleryCatalog]:
        yield from closing_catalog(uri, f"t{uuid.uuid4().hex[:8]}")

    def beside(self, catalog: MilvusCatalog) -> MilvusCatalog:
        return MilvusCatalog(catalog._link.uri, prefix=catalog._prefix)


def test_the_server_is_what_this_run_is_about(uri: str, tmp_path: Path) -> None:
    with MilvusCatalog(uri, prefix="version") as catalog:
        assert "2.3.5" in str(catalog._link.client.get_server_version())
