from __future__ import annotations

import asyncio
import errno
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from structlog.testing import capture_logs

from embedding import errors as domain
from lookalike.v1 import common_pb2, match_pb2
from service import errors
from service.errors import translated_errors
from tests.client.flaky import Context, Flaky, serving
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, Stubs, encoded, info, refused, rich


def kinds(root: type[domain.LookalikeError]) -> Iterator[type[domain.LookalikeError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from kinds(kind)


OF_TRAINING = {domain.TrainingDiverged}
"""Errors that no call to a server can meet."""


@pytest.mark.parametrize(
    "kind", sorted(set(kinds(domain.LookalikeError)) - OF_TRAINING, key=lambda kind: kind.__name__)
)
def test_every_domain_error_has_a_status(kind: type[domain.LookalikeError]) -> None:
    status = errors.status(kind("what was wrong", field="a.b"))
    assert status.code not in {grpc.StatusCode.OK.value[0], grpc.StatusCode.UNKNOWN.value[0]}
    assert status.message == "what was wrong"
    assert (info(status).reason, info(status).domain) == (kind.reason, "lookalike")
    assert info(status).metadata["field"] == "a.b"


def caused(cause: Exception) -> domain.StorageFailed:
    error = domain.StorageFailed("the disk refused")
    error.__cause__ = cause
    return error


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("refused")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (OSError(errno.ENOSPC, "no space"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (OSError(errno.EDQUOT, "quota"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (sqlite_error(sqlite3.SQLITE_FULL), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (OSError(errno.EROFS, "read-only"), grpc.StatusCode.INTERNAL),
        (sqlite_error(sqlite3.SQLITE_IOERR_READ), grpc.StatusCode.INTERNAL),
    ],
)
def test_a_full_disk_is_told_from_a_broken_one(cause: Exception, code: grpc.StatusCode) -> None:
    assert errors.status(caused(cause)).code == code.value[0]


def test_an_etag_conflict_is_aborted() -> None:
    assert errors.status(domain.StaleEtag("changed")).code == grpc.StatusCode.ABORTED.value[0]


def test_a_message_that_quotes_a_long_input_still_fits_into_headers(stubs: Stubs) -> None:
    point = common_pb2.OperatingPoint(name="x" * 100_000)
    error = refused(stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1), b=encoded(2), operating_point=point))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(error.details()) == errors.MAX_MESSAGE
    assert info(rich(error)).reason == "INVALID_OPERATING_POINT"


def test_an_unforeseen_error_is_logged_and_never_shown(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr("service.engine.Engine.judge", broken)
    request = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
    with capture_logs() as logs:
        error = refused(stubs.match.Verify, request)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    told = error_details_pb2.RequestInfo()
    assert any(detail.Unpack(told) for detail in rich(error).details)
    (line,) = [line for line in logs if line["event"] == "unforeseen error"]
    assert line["request_id"] == told.request_id
    assert "a secret path" in repr(line["exc_info"])


TOO_LARGE = match_pb2.EmbedRequest(image=common_pb2.ImageInput(encoded=bytes(MAX_MESSAGE_BYTES)))


@pytest.mark.parametrize("wrong", [match_pb2.EmbedRequest(), TOO_LARGE], ids=["without an image", "too large"])
def test_every_call_is_one_log_line_without_content(stubs: Stubs, wrong: match_pb2.EmbedRequest) -> None:
    with capture_logs() as captured:
        stubs.match.Embed(match_pb2.EmbedRequest(image=encoded(1)))
        refused(stubs.match.Embed, wrong)
        deadline = time.monotonic() + 10
        # A refusal is sent before its line is written; that of another test may still be on its way.
        while len(logs := [line for line in captured if line.get("method", "").endswith("/Embed")]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [(line["event"], line["method"], line["code"]) for line in logs] == [
        ("call", "/lookalike.v1.MatchService/Embed", "OK"),
        ("call", "/lookalike.v1.MatchService/Embed", "INVALID_ARGUMENT"),
    ]
    for line in logs:
        assert line.keys() == {"event", "method", "code", "ms", "request_id", "caller", "log_level"}
        assert line["ms"] > 0
        assert line["request_id"]


@pytest.mark.parametrize(
    ("error", "timeout", "told"),
    [
        (domain.Busy("another"), 20, "1000"),
        (domain.Busy("another"), None, "1000"),
        (domain.Busy("another"), 0.9, "-1"),
        (domain.NotFound("nothing"), 20, None),
    ],
)
def test_clients_that_read_no_details_are_told_when_to_repeat(
    loop: Loop, error: Exception, timeout: float | None, told: str | None
) -> None:
    async def refuse(before: int, request: bytes, context: Context) -> bytes:
        async with errors.translated_errors(context):
            raise error

    with (
        serving(loop, Flaky(refuse)) as address,
        grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/a.B/C")(b"", timeout=timeout)
    assert dict(caught.value.trailing_metadata()).get("grpc-retry-pushback-ms") == told


class Gone:
    """The context of a call whose caller has gone: gRPC does not get the status through."""

    def __init__(self) -> None:
        self.aborted: list[grpc.StatusCode] = []

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float:
        return -0.001

    async def abort(self, code: grpc.StatusCode, details: str, trailing: object) -> None:
        self.aborted.append(code)
        raise grpc.aio.InternalError('Failed "execute_batch"')


def test_a_caller_who_has_gone_is_no_error_of_ours() -> None:
    """It was logged as unforeseen, with a traceback, for each call whose deadline had just passed."""
    gone = Gone()

    async def ended() -> None:
        context: Any = gone
        async with translated_errors(context), translated_errors(context):
            raise domain.DeadlineExceeded("the time limit passed")

    with capture_logs() as logs, pytest.raises(grpc.aio.InternalError):
        asyncio.run(ended())
    assert (logs, gone.aborted) == ([], [grpc.StatusCode.DEADLINE_EXCEEDED])
