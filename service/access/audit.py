"""The audit log: who changed or administered what, and who was refused; a line of JSON each, appended.

A line has names and never content: no image, vector, metadata or filter. Lines are written by a thread, in the order in
which calls ended; each is one write to a file opened for appending, so that none is torn. A file that is moved away, as
log rotation does, is opened anew under its own name.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from embedding.errors import InvalidInput, RateLimited
from service.access.principal import Principal
from service.access.rate_limits import RateLimits
from service.access.rights import RULES
from service.call import Call
from service.calls import Hook
from service.errors import MAX_RESOURCE, shortened
from service.workers.passed_on import peer_of

_REFUSALS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
_STRANGERS = Principal(name="strangers", per_second=10, burst=100)
"""How many calls of nobody in particular are told of one by one: they must not be able to fill the disk."""

MOST_WAITING = 100_000
"""Lines that wait for a disk that hangs; further ones are counted in the next that is written, and not kept."""

_log = structlog.get_logger(__name__)


class Audit(Hook):
    """Appends to the file at `path`. Raises InvalidInput when it cannot be written to.

    Later failures are logged and do not end calls: the lines that could not be written are in the log, as errors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._strangers = RateLimits()
        self._left_out = 0
        self._unwritten = 0
        self._torn = False  # whether the last line was written in part
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise InvalidInput(f"audit_log: cannot write {path}: {error.strerror}", field="audit_log") from error
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._writer.start()

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        rule = RULES.get(call.method)
        if rule is not None and rule.scope == "read" and code not in _REFUSALS:
            return
        if code is grpc.StatusCode.UNAUTHENTICATED:
            try:
                self._strangers.admit(_STRANGERS)
            except RateLimited:
                self._left_out += 1
                return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "caller": call.caller,
            "peer": peer_of(call.context),
            "method": call.method,
            "scope": rule.scope if rule else "",
            "resources": [shortened(name, MAX_RESOURCE) for name in call.names],
            "requests": call.requests,
            "code": code.name,
            "request_id": call.request_id,
        }
        if self._lines.qsize() >= MOST_WAITING:
            if not self._unwritten:
                _log.error("audit log not written", reason="the disk does not take it as fast as calls end", line=line)
            self._unwritten += 1
            return
        if self._left_out:
            line["refusals_left_out"] = self._left_out
            self._left_out = 0
        if self._unwritten:
            line["lines_left_out"] = self._unwritten
            self._unwritten = 0
        self._lines.put(json.dumps(line))

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._writer.is_alive():
            self._lines.put(None)
            self._writer.join()
            os.close(self._descriptor)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if _moved(self._descriptor, self._path):
                    opened = _open(self._path)
                    os.close(self._descriptor)
                    self._descriptor = opened
                    self._torn = False
                # What was cut off ends here: other processes append too, and it cannot be taken back.
                before = b"\n" if self._torn else b""
                written = os.write(self._descriptor, before + f"{line}\n".encode()) - len(before)
                self._torn = 0 < written <= len(line.encode()) or (self._torn and written < 0)
                if written <= len(line.encode()):
                    _log.error("audit log not written", reason="the disk took a part of it", line=line)
            except OSError as error:
                _log.error("audit log not written", reason=error.strerror, line=line)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _moved(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return True
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)
