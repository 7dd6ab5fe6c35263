"""Structured logs on stderr: one JSON object a line, or text for a person on a terminal.

Records of structlog and of the standard library go through one formatter; those made while a call is served carry its
request id. Tracebacks never show the values of variables, which hold images and vectors.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

from service.call import CURRENT

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]


_NOBODY = '""'

_log = structlog.get_logger(__name__)


class _Plain:
    """Lines of calls, written without the way through the formatter.

    What is in them needs no escaping: our methods' names, codes, numbers, and ids that `service.call` has found sane.
    """

    stream: TextIO | None = None
    """None where they are not JSON, or not written."""
    lost: int = 0
    """Lines that were refused since the last that was written."""


def configure(*, level: Level = "info", form: Format = "auto", stream: TextIO | None = None) -> None:
    """Send all records from `level` on to `stream`, by default stderr; for a process of our own.

    "auto" is text on a terminal and JSON elsewhere.
    """
    stream = stream or sys.stderr
    threshold = logging.getLevelNamesMapping()[level.upper()]
    common: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_ids,
    ]
    structlog.configure(
        processors=[
            *common,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(form, stream)],
        )
    )
    _Plain.stream = stream if threshold <= logging.INFO and not _is_text(form, stream) else None
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(threshold)
    logging.captureWarnings(True)


def call(logger: Any, *, method: str, code: str, ms: float, request_id: str, caller: str) -> None:
    """Log the end of a call: one line like any other, at a tenth of its price, for there is one for every call."""
    if _Plain.stream is None or not structlog.is_configured():
        logger.info("call", method=method, code=code, ms=ms, request_id=request_id, caller=caller)
        return
    seconds, rest = divmod(time.time_ns(), 10**9)
    served = CURRENT.get()
    trace = f', "trace_id": "{served.trace_id}"' if served is not None and served.trace_id else ""
    _write(
        _Plain.stream,
        f'{{"method": "{method}", "code": "{code}", "ms": {ms}, "request_id": "{request_id}", '
        f'"caller": {json.dumps(caller) if caller else _NOBODY}, "event": "call", "level": "info", '
        f'"logger": "service.calls", "timestamp": "{_written(seconds)}.{rest // 1000:06}Z"{trace}}}\n',
    )


def _write(stream: TextIO, line: str) -> None:
    """Write it, or count it: a call has not failed because the disk takes no more of the log, or nobody reads it."""
    try:
        stream.write(line)
    except OSError:
        _Plain.lost += 1
        return
    if _Plain.lost:
        lost, _Plain.lost = _Plain.lost, 0
        _log.warning("lines of calls are missing in this log, which could not be written", lines=lost)


@lru_cache(maxsize=4)
def _written(seconds: int) -> str:
    """Whole seconds since 1970 as a timestamp begins; writing it anew takes as long as the rest of a line."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _is_text(form: Format, stream: TextIO) -> bool:
    return form == "console" or (form == "auto" and stream.isatty())


def _takes_colors(stream: TextIO) -> bool:
    """NO_COLOR: https://no-color.org"""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _rendering(form: Format, stream: TextIO) -> list[Processor]:
    if _is_text(form, stream):
        # The renderer's own choice of traceback prints every local variable.
        return [
            structlog.dev.ConsoleRenderer(
                colors=_takes_colors(stream), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
            )
        ]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)]


def add_ids(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Of the call that is served, if any."""
    call = CURRENT.get()
    if call is not None:
        event.setdefault("request_id", call.request_id)
        if call.trace_id:
            event.setdefault("trace_id", call.trace_id)
    return event
