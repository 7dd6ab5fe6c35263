"""Domain errors as gRPC statuses: one table, and one place that ends a call with an error.

Statuses follow google.rpc: an ErrorInfo with the stable reason, a BadRequest with the path of the wrong field, and
for errors of ours a RequestInfo that finds the log line; a RetryInfo and a QuotaFailure where there is too much of
something. AIP-193.
"""

from __future__ import annotations

import errno
import sqlite3
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from embedding import errors as domain
from service.call import request_id

DOMAIN = "lookalike"
"""The `domain` of every ErrorInfo."""

MAX_MESSAGE = 1000
"""Longest message, in characters: it travels in headers, which are small, and may quote what the caller sent."""

MAX_RESOURCE = 400
"""Longest name of a resource, in characters, that a status or the audit log takes over from a request; the name of an
item has 336 at most."""

MAX_VIOLATIONS = 5
"""Most wrong fields that one status names; with the message they must fit into headers of 8 KiB."""

RETRY_SECONDS = {grpc.StatusCode.UNAVAILABLE: 1, grpc.StatusCode.RESOURCE_EXHAUSTED: 10}
"""When to try again, where an error does not know better itself."""

MAX_GALLERIES = 50
"""Most galleries that one status names; it travels in headers."""

_CODES: dict[type[domain.LookalikeError], grpc.StatusCode] = {
    domain.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    domain.NotFound: grpc.StatusCode.NOT_FOUND,
    domain.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    domain.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    domain.GalleriesIncompatible: grpc.StatusCode.FAILED_PRECONDITION,
    domain.ModelActive: grpc.StatusCode.FAILED_PRECONDITION,
    domain.ModelAmbiguous: grpc.StatusCode.FAILED_PRECONDITION,
    domain.NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    domain.Busy: grpc.StatusCode.UNAVAILABLE,
    domain.DamagedData: grpc.StatusCode.DATA_LOSS,
    domain.StorageFailed: grpc.StatusCode.INTERNAL,  # RESOURCE_EXHAUSTED when the disk is full
    domain.StaleEtag: grpc.StatusCode.ABORTED,
    domain.GalleryNotEmpty: grpc.StatusCode.FAILED_PRECONDITION,
    domain.GalleryAliased: grpc.StatusCode.FAILED_PRECONDITION,
    domain.ImagesNeeded: grpc.StatusCode.FAILED_PRECONDITION,
    domain.JobChanged: grpc.StatusCode.FAILED_PRECONDITION,
    domain.NotReady: grpc.StatusCode.UNAVAILABLE,
    domain.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    domain.Cancelled: grpc.StatusCode.CANCELLED,
    domain.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    domain.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    domain.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    domain.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""A class stands for its subclasses too, unless they have a line of their own."""

_ENDED = (grpc.aio.AbortError, grpc.aio.InternalError)
"""What a call ends with that has been ended already: by us, or by its caller, who has gone and gets no status."""

_log = structlog.get_logger(__name__)


class translated_errors:  # noqa: N801  # used as a context manager; a generator takes five times as long
    """Ends the call with the status of whatever is raised within: the only place that aborts an RPC."""

    __slots__ = ("_context",)

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, _ENDED):
            return
        # The boundary: everything is answered, and what nobody foresaw is logged.
        if isinstance(error, domain.Overloaded) and not error.field:
            made = _refusal(str(error), error.subject, error.retry_seconds)
        else:
            made = _made(status(error))
        trailing = (
            *made.trailing,
            *(self._context.trailing_metadata() or ()),
            *_challenge(error),
            *_pushback(made.retry_milliseconds, self._context.time_remaining()),
        )
        if isinstance(error, domain.LookalikeError):
            # gRPC keeps the error in a circle with the call, until the collector finds them: without its frames, which
            # hold what was read and formed, a hundred megabytes of an answer that was too large.
            error.__context__ = None
            _forget_frames(error)
            del traceback
        await self._context.abort(made.code, made.details, trailing)  # abort forgets what was set before


def _forget_frames(error: BaseException) -> None:
    """Also of what caused it, and of what else was found wrong."""
    error.__traceback__ = None
    for other in (error.__cause__, *(error.also if isinstance(error, domain.InvalidInput) else ())):
        if other is not None:
            _forget_frames(other)


@dataclass(frozen=True, slots=True)
class _Made:
    """A status as gRPC takes it."""

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str | bytes], ...]
    retry_milliseconds: int | None
    """Of its RetryInfo; None without."""


def _made(found: status_pb2.Status) -> _Made:
    rich = rpc_status.to_status(found)
    retry = error_details_pb2.RetryInfo()
    has_retry = any(detail.Unpack(retry) for detail in found.details)
    milliseconds = retry.retry_delay.ToMilliseconds() if has_retry else None
    return _Made(rich.code, rich.details, tuple(rich.trailing_metadata), milliseconds)


@lru_cache(maxsize=1024)
def _refusal(message: str, subject: str, retry_seconds: float) -> _Made:
    """Of a full server, which has better to do than to make the same status again: a quarter of what refusing costs."""
    return _made(status(domain.Overloaded(message, subject=subject, retry_seconds=retry_seconds)))


def status(error: BaseException, *, operation: str = "") -> status_pb2.Status:
    """The status of an error. Of one that nobody foresaw the caller learns only the request's id, under which it is
    logged; or that of the operation that failed with it, which has logged it."""
    code = code_of(error)
    if code is None or not isinstance(error, domain.LookalikeError):
        if operation and not isinstance(error, domain.LookalikeError):
            return _internal("operation", operation)
        _log.error("unforeseen error", request_id=request_id(), exc_info=error)
        return _internal("request", request_id())
    message = shortened(str(error), MAX_MESSAGE)
    metadata = {"field": error.field} if error.field else {}
    if isinstance(error, domain.InvalidFilter) and error.position is not None:
        metadata["position"] = str(error.position)
    if isinstance(error, domain.PermissionDenied):
        metadata |= {name: shortened(value, MAX_RESOURCE) for name, value in error.needed.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, domain.InvalidInput) and (violations := _violations(error)):
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if isinstance(error, domain.GalleriesIncompatible) and error.galleries:
        details.append(_incompatible(error))
    if isinstance(error, domain.Overloaded | domain.RateLimited):
        details += _when_to_retry(error, message)
    if isinstance(error, domain.StorageFailed) and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        full = error_details_pb2.QuotaFailure.Violation(subject="disk", description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[full]))
    if code in RETRY_SECONDS and not any(isinstance(detail, error_details_pb2.RetryInfo) for detail in details):
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=RETRY_SECONDS[code])))
    return _status(code, message, details)


def _violations(error: domain.InvalidInput) -> list[error_details_pb2.BadRequest.FieldViolation]:
    """Everything that is wrong with the request, as far as a field has a name."""
    return [
        error_details_pb2.BadRequest.FieldViolation(
            field=each.field, description=shortened(str(each), MAX_MESSAGE), reason=each.reason
        )
        for each in (error, *error.also[: MAX_VIOLATIONS - 1])
        if each.field
    ]


def _incompatible(error: domain.GalleriesIncompatible) -> error_details_pb2.PreconditionFailure:
    return error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(
                type="MODEL", subject=f"galleries/{gallery}", description=f"holds embeddings of models/{model}"
            )
            for gallery, model in list(error.galleries.items())[:MAX_GALLERIES]
        ]
    )


def shortened(text: str, most: int) -> str:
    """The text, or where it is longer than `most` characters its beginning and an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _challenge(error: BaseException) -> tuple[tuple[str, str], ...]:
    """How to authenticate, as HTTP says it: RFC 6750, section 3."""
    if not isinstance(error, domain.Unauthenticated):
        return ()
    invalid = ', error="invalid_token"' if isinstance(error, domain.CredentialsInvalid) else ""
    return (("www-authenticate", f'Bearer realm="{DOMAIN}"{invalid}'),)


def _pushback(milliseconds: int | None, seconds_left: float | None) -> tuple[tuple[str, str], ...]:
    """RetryInfo for clients that repeat by a service config, which read no details: gRFC A6.

    Negative, which forbids it, where the deadline comes first: they would sleep through it and never tell their caller
    what this call ended with.
    """
    if milliseconds is None:
        return ()
    late = seconds_left is not None and seconds_left * 1000 <= milliseconds
    return (("grpc-retry-pushback-ms", "-1" if late else str(milliseconds)),)


def _when_to_retry(error: domain.Overloaded | domain.RateLimited, message: str) -> list[Message]:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(1e9 * error.retry_seconds))
    violation = error_details_pb2.QuotaFailure.Violation(subject=error.subject, description=message)
    return [
        error_details_pb2.RetryInfo(retry_delay=delay),
        error_details_pb2.QuotaFailure(violations=[violation]),
    ]


def code_of(error: BaseException) -> grpc.StatusCode | None:
    """The code of a domain error; None for an error that nobody foresaw."""
    if isinstance(error, domain.StorageFailed) and _disk_is_full(error):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), None)


def _internal(kind: str, logged_as: str) -> status_pb2.Status:
    return _status(
        grpc.StatusCode.INTERNAL,
        f"internal error; the server's log has it under {kind} {logged_as}",
        [
            error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN),
            error_details_pb2.RequestInfo(request_id=logged_as),
        ],
    )


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def _disk_is_full(error: BaseException) -> bool:
    cause = error.__cause__
    while isinstance(cause, domain.LookalikeError):  # the same error, with the field that it is about
        cause = cause.__cause__
    if isinstance(cause, OSError):
        return cause.errno in {errno.ENOSPC, errno.EDQUOT}
    return isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
