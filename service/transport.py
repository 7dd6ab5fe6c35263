"""Where gRPC listens and what it is told: how much a connection may carry, and when one that does nothing is closed."""

from __future__ import annotations

import errno
import socket

from embedding.errors import Busy, InvalidInput
from service.settings import MiB, Settings

_TAKEN_IN = 16 * MiB
"""Most bytes beyond `max_message_bytes` of requests that are taken in to be refused; it takes three times as many."""


def most_received(settings: Settings) -> int:
    """The largest message that gRPC's core takes in, in bytes: more than is accepted, which `Calls` refuses with a
    reason and counts. What is larger still the core refuses by its length, before our code hears of the call."""
    return min(settings.max_message_bytes + min(settings.max_message_bytes, _TAKEN_IN), 2**31 - 1)


def channel_options(settings: Settings, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """Options of the server, as gRPC's C core names them (grpc/impl/channel_arg_names.h)."""
    return [
        ("grpc.so_reuseport", int(shares_port)),  # or a second server would share the port unnoticed
        ("grpc.max_receive_message_length", most_received(settings)),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # Before our code sees them, so that those that are answered have not waited for longer than they could. By
        # default the core lets a thousand wait, and up to three by chance.
        ("grpc.server.max_pending_requests", settings.max_unseen_calls),
        ("grpc.server.max_pending_requests_hard_limit", settings.max_unseen_calls),
        # Between the two sizes the core refuses by chance, the more often the larger.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # Who has connected must speak HTTP/2 soon, and who is silent afterwards must answer a ping.
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_seconds)),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # The timeout above alone lets the core wait a minute for the answer.
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_seconds)),
        ("grpc.http2.max_ping_strikes", settings.max_ping_strikes),
        *_if_any("grpc.max_connection_idle_ms", settings.max_connection_idle_seconds),
        *_if_any("grpc.max_connection_age_ms", settings.max_connection_age_seconds),
        *_if_any("grpc.max_connection_age_grace_ms", settings.max_connection_age_seconds),
    ]


def check_free(host: str, port: int) -> None:
    """Raises Busy when another process listens there, InvalidInput when this machine has no such address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except PermissionError as error:
        raise InvalidInput(f"port {port} needs privileges; choose one above 1023", field="port") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Busy(
                f"port {port} of {host} is in use by another process; choose another port, or 0 for any free one",
                field="port",
            ) from error
        raise InvalidInput(
            f"cannot listen on {host}: {error.strerror}; give an address of this machine", field="host"
        ) from error


def joined(host: str, port: int) -> str:
    """An address as gRPC and people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _if_any(name: str, seconds: float) -> list[tuple[str, int]]:
    return [(name, _milliseconds(seconds))] if seconds else []


def _milliseconds(seconds: float) -> int:
    return min(round(1000 * seconds), 2**31 - 1)
