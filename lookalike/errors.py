"""What a call can fail with, as one tree.

CallFailed                  a call to the server failed
├── InvalidRequest          the server cannot use what was sent; `fields` says which part and why
├── NotFound                no such gallery, item or model
├── AlreadyExists           the name is taken
├── FailedPrecondition      not in this state: a gallery of another model, a gallery that still holds items
├── Conflict                an etag that is no longer current; read again and repeat
├── AccessDenied            not authenticated, or not allowed
├── ResourceExhausted       a full server, a message over the limit, or a full disk
├── Unavailable             no server there, or it is starting or stopping
├── DeadlineExceeded        no answer within the timeout
├── Cancelled               the call was given up
├── DamagedData             the server found stored data damaged
└── ServerError             anything else; the server's log says more
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class CallFailed(Exception):
    """A call failed; `str(error)` is one line that is fit to show to a user."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        fields: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        """Stable and machine-readable, for example INVALID_IMAGE; empty when the server gave none."""
        self.fields = dict(fields or {})
        """What was wrong, by path of the request field, for example `pairs[3].b.encoded`."""
        self.retry_after = retry_after
        """Seconds to wait before trying again, when the server said so."""

    def __reduce__(self) -> tuple[object, ...]:
        """As it is, to whoever awaits it in another process: an exception would be made anew of its message alone."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class InvalidRequest(CallFailed):
    pass


class NotFound(CallFailed):
    pass


class AlreadyExists(CallFailed):
    pass


class FailedPrecondition(CallFailed):
    pass


class Conflict(CallFailed):
    pass


class AccessDenied(CallFailed):
    pass


class ResourceExhausted(CallFailed):
    pass


class Unavailable(CallFailed):
    pass


class DeadlineExceeded(CallFailed):
    pass


class Cancelled(CallFailed):
    pass


class DamagedData(CallFailed):
    pass


class ServerError(CallFailed):
    pass


_BY_CODE: dict[grpc.StatusCode, type[CallFailed]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: DamagedData,
}

_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


_REFUSED_UNSEEN = ("RST_STREAM with error code 7", "RST_STREAM with error code 8")
"""In gRPC's words for calls that the server's own gRPC refused, before its program saw them: HTTP/2's REFUSED_STREAM,
which arrives as UNAVAILABLE, and CANCEL, which arrives as CANCELLED and mostly without these words."""

_HOST_ALONE = re.compile(r"[\w.-]+|\[[\da-fA-F:]+\]")

_HUNG_UP = ("Socket closed", "Connection reset by peer", "Broken pipe", "Endpoint closing")


class _EndedCall(Protocol):
    """What grpc.Call and grpc.aio.AioRpcError have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_call(call: _EndedCall, *, target: str, timeout: float, encrypted: bool = False) -> CallFailed:
    """The error of a call that ended with a status other than OK, over TLS where it was `encrypted`."""
    code = call.code()
    rich = next((value for key, value in call.trailing_metadata() or () if key == _DETAILS_KEY), None)
    if isinstance(rich, bytes):
        try:
            return from_status(status_pb2.Status.FromString(rich))
        except DecodeError:
            pass  # a proxy's own details; the plain status below says enough
    details = _one_line(call.details() or "")
    if is_refused_unseen(code, details):
        kind = ResourceExhausted if code is grpc.StatusCode.CANCELLED else Unavailable
        return kind(
            f"{target} has more calls than it can look at and gave this one up before it was begun; try again later, "
            "with fewer calls at once",
            code=code,
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        cause = details.rpartition(": ")[2].rstrip("]")  # gRPC strings the causes together, the first cause last
        message = not_understood(details, target, encrypted=encrypted) or (
            f"no server answers at {target} ({cause}); {_to_find_it(target)}"
        )
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"{target} did not answer within {timeout:g} s; give it longer or send less at once"
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        # gRPC's own words, with the two sizes in brackets at the end.
        message = (
            f"the message is over the size limit {details[details.rfind('(') :]}; send smaller images or fewer at once"
        )
    else:
        message = details or f"the call to {target} ended with {code.name}"
    return _BY_CODE.get(code, ServerError)(message, code=code)


def _to_find_it(target: str) -> str:
    """What to do where nothing answers."""
    scheme, is_url, rest = target.partition("://")
    if is_url and scheme.lower() in {"http", "https", "grpc", "grpcs"}:
        return f"give it as HOST:PORT, without {scheme}://: {rest.rstrip('/')}"
    if _HOST_ALONE.fullmatch(target):
        return f"give its port too, as in {target}:50051: without one port 443 is asked"
    return "start one with `lookalike serve`, or check the address"


def over_limit(size: int, limit: int) -> ResourceExhausted:
    """The error of an element whose message would take `size` bytes, of `limit`, without any other."""
    return ResourceExhausted(
        f"the element alone is over the size limit ({size} vs. {limit}), in bytes; send smaller images, or raise "
        "max_message_bytes here and on the server",
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


def is_refused_unseen(code: grpc.StatusCode, details: str) -> bool:
    """Whether a call without rich details was refused by the server's gRPC, its program being too busy to look at it.

    CANCELLED without a word of why is that too: calls that this side gives up say so.
    """
    if code is grpc.StatusCode.CANCELLED and details in {"", code.name}:
        return True
    refused = code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    return refused and any(sign in details for sign in _REFUSED_UNSEEN)


def not_understood(details: str, target: str, *, encrypted: bool) -> str:
    """What to do where somebody listens at `target` and no connection comes about; "" for other reasons.

    `details` are gRPC's words for a call that found no connection.
    """
    if "failed to connect" not in details:
        return ""
    if "WRONG_VERSION_NUMBER" in details:
        return (
            f"what listens at {target} does not speak TLS, and the client does; leave out tls (LOOKALIKE_TLS, "
            "LOOKALIKE_TLS_CA, --tls, --tls-ca) where the network is trusted, or give the server a certificate"
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"the certificate of {target} leads to no root that the client trusts; give its root as tls=Tls(ca=...) "
            "(LOOKALIKE_TLS_CA, --tls-ca)"
        )
    if "Hostname Verification" in details:
        return (
            f"the certificate of {target} is for another name; give that name as tls=Tls(server_name=...) "
            "(LOOKALIKE_TLS_SERVER_NAME, --tls-server-name) where you trust it"
        )
    if not any(sign in details for sign in _HUNG_UP):
        return ""
    if encrypted:
        return (
            f"{target} hangs up on the client; if it asks for a client certificate, give one as "
            "tls=Tls(certificate=..., key=...) (LOOKALIKE_CLIENT_CERTIFICATE and LOOKALIKE_CLIENT_KEY, "
            "--client-certificate and --client-key)"
        )
    return (
        f"{target} hangs up on the client, which does not speak TLS; if the server does, give tls=Tls(ca=...) "
        "(LOOKALIKE_TLS_CA, --tls-ca), or tls=True (LOOKALIKE_TLS, --tls) for a certificate of a public authority"
    )


def from_status(status: status_pb2.Status) -> CallFailed:
    """The error that a rich status describes; batches carry one for each element that failed."""
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif not detail.Unpack(info):
            detail.Unpack(bad_request)
    return _BY_CODE.get(code, ServerError)(
        _one_line(status.message) or code.name,
        code=code,
        reason=info.reason,
        fields={violation.field: violation.description for violation in bad_request.field_violations},
        retry_after=retry_after,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
