"""What is wrong with who may call, and with what the settings ask of this machine beside files of models and galleries:
keys, tokens, the audit log, the clock that tokens are judged by, Milvus, traces.

Each is used as the server would use it at its start; nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embedding.errors import InvalidInput, LookalikeError
from embedding.extras import installing
from embedding.masking import masked
from service.access import keys
from service.access.tokens import Tokens
from service.doctor.finding import Finding
from service.settings import Settings
from service.storage import catalog_of

ENDING = timedelta(days=14)
"""Keys and roots that end so soon are told of."""

_SECONDS = 3.0
_UNSYNCHRONISED = 5  # adjtimex(2): TIME_ERROR


def access(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Who may call, and how it is written down."""
    yield from _keys(settings, now)
    yield from _tokens(settings)
    yield from _roots(settings.tls_client_ca, now)
    yield from _audit_log(settings.audit_log)


def _keys(settings: Settings, now: datetime) -> Iterator[Finding]:
    path = settings.keys
    if path is None:
        return
    try:
        records = keys.read(path).keys
    except LookalikeError as error:
        yield Finding(check="keys", state="fail", what=str(error), do="correct the file, or `keys` of the settings")
        return
    folder = path.resolve().parent
    mode = folder.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        yield Finding(
            check="keys",
            state="warn",
            what=f"others may write to {folder}, and put a file of their own in the place of {path.name}",
            do=f"run chmod go-w {folder}, or keep the file in a folder of its own",
        )
    counting = [record for record in records if not record.has_expired(now)]
    if not counting:
        yield Finding(
            check="keys",
            state="fail" if settings.jwt_keys is None else "warn",
            what=f"{path} holds no key that counts" + (f": all {len(records)} have expired" if records else ""),
            do=f"make one: lookalike keys create NAME --file {path}; a running server reads the file anew by itself",
        )
        return
    ending = [each for each in counting if each.expires is not None and each.expires < now + ENDING]
    if ending:
        names = ", ".join(f"{each.name} on {each.expires:%Y-%m-%d %H:%M} UTC" for each in ending[:5])
        yield Finding(
            check="keys",
            state="warn",
            what=f"{len(ending)} of {len(counting)} keys end soon: {names}",
            do=f"rotate those that are still used: lookalike keys rotate NAME --file {path}",
        )
    else:
        expired = len(records) - len(counting)
        yield Finding(check="keys", state="ok", what=f"{len(counting)} count, {expired} have expired")


def _tokens(settings: Settings) -> Iterator[Finding]:
    path = settings.jwt_keys
    if path is None:
        return
    try:
        Tokens(
            path,
            issuer=settings.jwt_issuer or "",
            audience=settings.jwt_audience or "",
            algorithms=settings.jwt_algorithms,
        )
    except LookalikeError as error:
        yield Finding(
            check="tokens",
            state="fail",
            what=str(error),
            do=f"correct {error.field or 'jwt_keys'}; the provider publishes its keys as a JWK set, at the jwks_uri of "
            "its /.well-known/openid-configuration",
        )
    else:
        yield Finding(check="tokens", state="ok", what=f"of {settings.jwt_issuer} for {settings.jwt_audience}")
    if _is_unsynchronised():
        yield Finding(
            check="clock",
            state="warn",
            what="the system says that nothing keeps its clock right, and tokens are judged by it, to "
            f"{settings.jwt_leeway_seconds:g} seconds",
            do="run an NTP client (chrony, systemd-timesyncd) on this machine, or the one that it is a guest of",
        )


def _is_unsynchronised() -> bool:
    """Whether the kernel says so; False where it says nothing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        # All zero it asks, and sets nothing; struct timex takes some 200 bytes.
        return bool(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024)) == _UNSYNCHRONISED)
    except (OSError, AttributeError):
        return False


def _roots(path: Path | None, now: datetime) -> Iterator[Finding]:
    """Of clients' certificates; a file that is none is told of with the server's own."""
    if path is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError):
        return
    for root in context.get_ca_certs():
        until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(root["notAfter"])), UTC)
        subject: Any = root.get("subject", ())  # pairs of a name and a value, in groups
        names = [value for part in subject for key, value in part if key == "commonName"]
        if until < now + ENDING:
            yield Finding(
                check="client CA",
                state="fail" if until <= now else "warn",
                what=f"the root {', '.join(names) or 'without a name'} in {path} "
                f"{'ended' if until <= now else 'ends'} on {until:%Y-%m-%d %H:%M} UTC: clients that lead to it are "
                "refused then",
                do="add the root that follows it, and issue clients' certificates by that; the file is read anew",
            )


def _audit_log(path: Path | None) -> Iterator[Finding]:
    if path is None:
        return
    try:
        there = path if path.exists() else path.parent
        wrong = path.is_dir() or not there.exists() or not os.access(there, os.W_OK | (os.X_OK if there != path else 0))
    except OSError:
        wrong = True
    if wrong:
        yield Finding(
            check="audit log",
            state="fail",
            what=f"{path} cannot be written to",
            do="make its folder, let the server's user write to it, or correct `audit_log`",
        )
    else:
        yield Finding(check="audit log", state="ok", what=f"{path}")


def surroundings(settings: Settings) -> Iterator[Finding]:
    """Milvus, traces and ports, as far as they can be told from here."""
    yield from _milvus(settings)
    if settings.otlp_endpoint is not None:
        yield from _traces()
    if settings.metrics_port and settings.metrics_port == settings.port:
        yield Finding(
            check="metrics",
            state="fail",
            what=f"port and metrics_port are both {settings.port}",
            do="choose another metrics_port",
        )


def _milvus(settings: Settings) -> Iterator[Finding]:
    if settings.engine != "milvus":
        return
    try:
        catalog_of(settings)
    except InvalidInput as error:
        yield Finding(check="Milvus", state="fail", what=str(error), do=f"do so, or correct {error.field}")
        return
    uri = settings.milvus_uri or ""
    if uri.endswith(".db"):
        yield Finding(check="Milvus", state="ok", what=f"Lite, in {masked(uri)}; its collections were not looked at")
        return
    try:
        found = urlsplit(uri)
        host, port = found.hostname, found.port or 19530
    except ValueError:
        host, port = None, 0
    if not host:
        yield Finding(
            check="Milvus",
            state="fail",
            what=f"milvus_uri {masked(uri)!r} is no address",
            do='give it as "http://host:19530", or the path of a Milvus Lite file, which ends in .db',
        )
        return
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        yield Finding(
            check="Milvus",
            state="fail",
            what=f"nothing answers on {host}:{port}: {error.strerror or error}",
            do="start Milvus, or correct milvus_uri",
        )
    else:
        yield Finding(check="Milvus", state="ok", what=f"{host}:{port} answers; its collections were not looked at")


def _traces() -> Iterator[Finding]:
    try:
        from service.telemetry import tracing  # noqa: F401
    except ModuleNotFoundError as error:
        yield Finding(
            check="traces",
            state="fail",
            what=f"otlp_endpoint is set, and {error.name} is not installed",
            do=f"{installing('otel')}, or leave otlp_endpoint out",
        )
