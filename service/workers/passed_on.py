"""Who made a call that one worker has passed on to another: the address, and the names of the certificate.

The worker that answers has only a connection of the other one, over a socket that no other user reaches. What is said
there counts; over any other connection it is a stranger's word, and does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

PREFIX = "lookalike-passed-on-"
"""Of the metadata that says it; what callers send under such names is not passed on."""

MAX_NAMES = 16
"""Most names of one certificate that are passed on: they share the bound on metadata."""

_PEER = PREFIX + "peer"
_NAMES = PREFIX + "names-bin"
_SOCKET = "unix:"


def said_of(context: Context) -> list[tuple[str, str | bytes]]:
    """The metadata that says who made this call."""
    said: list[tuple[str, str | bytes]] = [(_PEER, peer_of(context))]
    if names := certificate_names(context)[:MAX_NAMES]:
        said.append((_NAMES, json.dumps(names).encode()))
    return said


def peer_of(context: Context) -> str:
    """The address that the call was made from, as gRPC writes it."""
    peer: str = context.peer()
    said = _said(context, _PEER) if peer.startswith(_SOCKET) else None
    return said if isinstance(said, str) else peer


def certificate_names(context: Context) -> Sequence[str]:
    """What the caller's certificate says it is: alternative names, then `CN=` and its common name."""
    if context.peer().startswith(_SOCKET):
        said = _said(context, _NAMES)
        with suppress(ValueError):
            return [str(name) for name in json.loads(said)] if said else []
    shown: dict[str, Iterable[bytes]] = dict(context.auth_context())
    return [
        *(name.decode("utf-8", "replace") for name in shown.get("x509_subject_alternative_name", ())),
        *(f"CN={name.decode('utf-8', 'replace')}" for name in shown.get("x509_common_name", ())),
    ]


def _said(context: Context, name: str) -> str | bytes | None:
    return next((value for key, value in context.invocation_metadata() or () if key == name), None)
