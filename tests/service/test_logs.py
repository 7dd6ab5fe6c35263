"""Log lines: what stands in them, whose they are, and that nothing private ever does."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from lookalike.v1 import match_pb2
from service.call import CURRENT, Call
from service.telemetry import logs
from tests.service.harness import Stubs, encoded

VERIFY = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs._Plain, "stream", None)
    root = logging.getLogger()
    handlers, level, before = root.handlers, root.level, structlog.get_config()
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)
    structlog.configure(**before)


pytestmark = pytest.mark.usefixtures("_restored")


def configured(level: logs.Level, form: logs.Format, stream: io.StringIO) -> io.StringIO:
    logs.configure(level=level, form=form, stream=stream)
    return stream


def fail(secret: str) -> None:
    private = f"{secret}-of-an-image"
    raise RuntimeError("the reason " + str(len(private)))


@pytest.mark.parametrize(("form", "stream"), [("json", Terminal()), ("auto", io.StringIO())])
def test_a_line_of_json_has_level_time_logger_and_traceback(form: logs.Format, stream: io.StringIO) -> None:
    configured("info", form, stream)
    try:
        fail("pixels")
    except RuntimeError as error:
        structlog.get_logger("ours").error("it\nbroke", exc_info=error, size=3)
    logging.getLogger("theirs").warning("%s of %d", "one", 2)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["level"], first["logger"], first["size"]) == ("it\nbroke", "error", "ours", 3)
    assert first["timestamp"].endswith("Z")
    assert first["exception"].splitlines()[-1] == "RuntimeError: the reason 18"
    assert (second["event"], second["level"], second["logger"]) == ("one of 2", "warning", "theirs")


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_text_shows_the_traceback_without_the_values_of_variables(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    configured("info", "auto" if stream.isatty() else "console", stream)
    try:
        fail("pixels")
    except RuntimeError as error:
        structlog.get_logger("ours").error("broken", exc_info=error)
    text = stream.getvalue()
    assert "RuntimeError: the reason 18" in text
    assert "pixels-of-an-image" not in text
    assert ("\x1b[" in text) == stream.isatty()


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_none(variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable)
    stream = configured("info", "auto", Terminal())
    structlog.get_logger("ours").info("begun")
    assert "begun" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_level_holds_for_both_kinds_of_records() -> None:
    stream = configured("warning", "json", io.StringIO())
    structlog.get_logger("ours").info("no")
    logging.getLogger("theirs").info("no")
    structlog.get_logger("ours").warning("yes")
    logging.getLogger("theirs").warning("yes")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes", "yes"]


def test_warnings_are_logged() -> None:
    stream = configured("info", "json", io.StringIO())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", stacklevel=1)
    assert json.loads(stream.getvalue())["logger"] == "py.warnings"


@pytest.mark.parametrize("wished", ["abc-123", "0b1f/4:x_1.2+3=", "a" * 128])
def test_a_caller_names_its_request(stubs: Stubs, wished: str) -> None:
    with capture_logs() as lines:
        _, call = stubs.match.Verify.with_call(VERIFY, metadata=[("x-request-id", wished)])
    assert dict(call.trailing_metadata())["x-request-id"] == wished
    assert [line["request_id"] for line in lines if line["event"] == "call"] == [wished]


@pytest.mark.parametrize("wished", ["", "a" * 129, "a b", 'x" level="error', "-flag"])
def test_an_id_that_is_not_sane_is_replaced(stubs: Stubs, wished: str) -> None:
    _, call = stubs.match.Verify.with_call(VERIFY, metadata=[("x-request-id", wished)])
    given = dict(call.trailing_metadata())["x-request-id"]
    assert given != wished
    assert len(given) == 32


def test_a_failed_call_tells_its_id_too(stubs: Stubs) -> None:
    bad = match_pb2.VerifyRequest(a=encoded(1))
    with pytest.raises(grpc.RpcError) as caught:
        stubs.match.Verify(bad, metadata=[("x-request-id", "mine")])
    trailing = dict(caught.value.trailing_metadata())
    assert trailing["x-request-id"] == "mine"
    assert trailing["grpc-status-details-bin"]


def test_a_call_has_the_line_that_any_logger_would_write() -> None:
    stream = configured("info", "json", io.StringIO())
    said: dict[str, Any] = {"method": "/a/B", "code": "OK", "ms": 1.5, "request_id": "a-b:c/d+e=", "caller": 'a"\nb'}
    token = CURRENT.set(Call("/a/B", cast("Any", None), request_id="a-b:c/d+e=", trace_id="0" * 32))
    try:
        logs.call(structlog.get_logger("service.calls"), **said)
        structlog.get_logger("service.calls").info("call", **said)
    finally:
        CURRENT.reset(token)
    plain, other = map(json.loads, stream.getvalue().splitlines())
    assert len(plain.pop("timestamp")) == len(other.pop("timestamp"))
    assert plain == other


@pytest.mark.parametrize(("level", "form", "lines"), [("warning", "json", 0), ("info", "console", 1)])
def test_a_call_is_logged_as_configured(level: logs.Level, form: logs.Format, lines: int) -> None:
    stream = configured(level, form, io.StringIO())
    logs.call(structlog.get_logger("service.calls"), method="/a/B", code="OK", ms=1.5, request_id="abc", caller="")
    assert len(stream.getvalue().splitlines()) == lines
    assert "{" not in stream.getvalue()


def test_a_call_is_answered_where_the_disk_takes_no_log(stubs: Stubs) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  # closing it fails too
    try:
        logs.configure(level="info", form="json", stream=full)
        assert stubs.match.Verify(VERIFY).decision.threshold > 0
        with pytest.raises(grpc.RpcError) as caught:
            stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        with suppress(OSError):
            full.close()
    stream = configured("info", "json", io.StringIO())
    said = {"method": "/a/B", "code": "OK", "request_id": "abc", "caller": ""}
    logs.call(structlog.get_logger("service.calls"), ms=1.5, **said)
    call, told = map(json.loads, stream.getvalue().splitlines())
    assert call["event"] == "call"
    assert told["lines"] >= 1
    assert told["level"] == "warning"
