"""Calls of a server from a C client, h2load of nghttp2 (Debian: nghttp2-client): what Python clients do not hide."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile

CONNECTIONS = 4


def is_there() -> bool:
    return shutil.which("h2load") is not None


def rate(address: str, method: str, request: bytes, *, in_flight: int, seconds: float, cpus: str) -> float:
    """Unary calls answered a second. Raises RuntimeError when one failed."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0" + len(request).to_bytes(4, "big") + request)
        body.flush()
        clients = min(CONNECTIONS, in_flight)
        command = ["taskset", "-c", cpus, "h2load", "-D", str(max(1, round(seconds))), "--warm-up-time", "1"]
        command += ["-c", str(clients), "-m", str(-(-in_flight // clients)), "-d", body.name]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{method}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"finished in .*?, ([\d.]+) req/s", said)
    bad = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", said)
    statuses = re.search(r"(\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", said)
    if not found or not bad or any(map(int, bad.groups())) or not statuses or any(map(int, statuses.groups()[1:])):
        raise RuntimeError(f"h2load did not get its answers from {address}{method}:\n{said}")
    return float(found[1])
