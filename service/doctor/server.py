"""What a running server says of itself: whether it is reached, healthy, and answers with the model of the settings."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedding.errors import InvalidInput, LookalikeError
from lookalike.v1 import model_pb2, model_pb2_grpc
from service.doctor.finding import Finding
from service.doctor.galleries import holder
from service.rollout import standing
from service.rollout.stock import Choice, Stock
from service.settings import Settings
from service.transport import joined

_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a server is called: in plain text where there are no credentials."""

    credentials: grpc.ChannelCredentials | None = None
    options: Sequence[tuple[str, Any]] = ()
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def channel(self, address: str) -> grpc.Channel:
        """To close after use."""
        if self.credentials is None:
            return grpc.insecure_channel(address, options=self.options)
        return grpc.secure_channel(address, self.credentials, options=self.options)


PLAIN = Way()

_UNHEARD = (
    "something else listens there, it serves TLS (give --tls or --tls-ca before the command, or name tls_certificate), "
    "or it hangs: see its log"
)
_UNHEARD_ENCRYPTED = (
    "its certificate leads to no root of --tls-ca or is for another name (--tls-server-name), it asks for one of yours "
    "(--client-certificate), it serves no TLS, something else listens there, or it hangs: see its log"
)

_UNANSWERED = {
    grpc.StatusCode.UNAUTHENTICATED: "it asks for a key: give one that it knows, in LOOKALIKE_API_KEY or by "
    "--api-key-file before the command",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "it is full: look at LookalikeOverloaded in docs/operations.md, and ask again",
    grpc.StatusCode.CANCELLED: "it has more calls than it can look at: see LookalikeOverloaded in docs/operations.md",
    grpc.StatusCode.DEADLINE_EXCEEDED: "it is too busy to answer: look at LookalikeSlow in docs/operations.md",
}


def asked(
    settings: Settings,
    *,
    target: str | None = None,
    services: tuple[str, ...] = (),
    way: Callable[[str], Way] = lambda address: PLAIN,
) -> Iterator[Finding]:
    """What the server at `target`, by default the settings' own address, says; `services` are to be SERVING.

    `way` says how an address is called, and raises InvalidInput where it cannot be.
    """
    host, port = _address(target) if target else (_reachable(settings.host), settings.port)
    if not port:
        yield Finding(
            check="server",
            state="fail" if target else "warn",
            what=f"{target!r} names no port" if target else "the settings say port 0, so that any free one is taken",
            do="name the server as HOST:PORT with --target; its log says where it listens",
        )
        return
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        if not target and (process := holder(settings.galleries)) is not None:
            yield Finding(
                check="server",
                state="fail",
                what=f"nothing answers on {host}:{port}, and process {process} writes to {settings.galleries}",
                do="if that is this server, it listens elsewhere, loads or drains: look at its log, and correct "
                f"`host` and `port`; else stop it (kill -TERM {process}): one process writes to a folder of galleries",
            )
            return
        yield Finding(
            check="server",
            state="fail" if target else "warn",
            what=f"nothing answers on {host}:{port}: {error.strerror or error}",
            do="start it: lookalike serve; if it has been started, look at its log and at `host` and `port`",
        )
        if not target:
            yield from _bindable(settings)
        return
    yield from _called(host, port, settings, services, way)
    if settings.metrics_port:
        yield from _ready(_reachable(settings.metrics_host), settings.metrics_port)


def _called(
    host: str, port: int, settings: Settings, services: tuple[str, ...], way: Callable[[str], Way]
) -> Iterator[Finding]:
    """Of a server with a certificate nothing but this can be said, unless we were told how to call it."""
    try:
        found = way(joined(host, port))
    except InvalidInput as error:
        what = f"{host}:{port} is not called: {error}"
        yield Finding(
            check="server", state="fail", what=what, do="correct the options before the command, or variables"
        )
        return
    if settings.tls_certificate is not None:
        shown = _encrypted(host, port, settings)
        yield shown
        if shown.state != "ok" or found.credentials is None:
            return
    yield from _healthy(host, port, settings, services, found)


def _healthy(host: str, port: int, settings: Settings, services: tuple[str, ...], way: Way) -> Iterator[Finding]:
    with way.channel(joined(host, port)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
        for service in ("", *services):
            name = service or "server"
            try:
                request = health_pb2.HealthCheckRequest(service=service)
                status = stub.Check(request, timeout=_SECONDS, metadata=way.metadata).status
            except grpc.RpcError as error:
                yield Finding(
                    check=name,
                    state="fail",
                    what=f"{host}:{port} does not answer health checks: {error.code().name}",
                    do=_UNHEARD if way.credentials is None else _UNHEARD_ENCRYPTED,
                )
                return
            if status == health_pb2.HealthCheckResponse.SERVING:
                yield Finding(check=name, state="ok", what=f"SERVING on {host}:{port}")
            else:
                yield Finding(
                    check=name,
                    state="fail",
                    what=f"NOT_SERVING on {host}:{port}",
                    do="it loads its model, or drains: look at its log, and again in a minute",
                )
                return
        yield from _same_model(channel, settings, way)


def _same_model(channel: grpc.Channel, settings: Settings, way: Way) -> Iterator[Finding]:
    try:
        given = Stock((settings.bundle, *settings.other_bundles)).all()
        wanted = standing.read(settings.galleries, tuple(map(Choice.of, given))).active.model
        response = model_pb2_grpc.ModelServiceStub(channel).GetModel(
            model_pb2.GetModelRequest(name="models/active"), timeout=_SECONDS, metadata=way.metadata
        )
    except LookalikeError:
        return  # the bundle has its own finding
    except grpc.RpcError as error:
        yield Finding(
            check="model",
            state="warn",
            what=f"the server does not say which model answers: {error.code().name}",
            do=_UNANSWERED.get(error.code(), "look at its log for this call"),
        )
        return
    serving = response.model.name.removeprefix("models/")
    if serving == wanted:
        yield Finding(check="model", state="ok", what=f"{serving} answers")
    else:
        yield Finding(
            check="model",
            state="warn",
            what=f"{serving} answers, and by the settings, and what was activated, {wanted} would",
            do="the settings changed after the start, or are not this server's: restart it, or correct `bundle`",
        )


def _encrypted(host: str, port: int, settings: Settings) -> Finding:
    """Whether the certificate of the files is the one that is served; who may call is not known here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(settings.tls_certificate)
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            context.wrap_socket(connection).close()
    except (OSError, ValueError) as error:
        if getattr(error, "reason", "") in {"WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING"}:
            return Finding(
                check="server",
                state="fail",
                what=f"{host}:{port} does not speak TLS",
                do="it was started without tls_certificate: restart it with these settings; or something else listens",
            )
        return Finding(
            check="server",
            state="fail",
            what=f"{host}:{port} does not show the certificate {settings.tls_certificate}: {error}",
            do="if it was just renewed, look in the log for `certificates renewed`; else something else listens there",
        )
    return Finding(check="server", state="ok", what=f"{host}:{port} shows the certificate of the settings")


def _ready(host: str, port: int) -> Iterator[Finding]:
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        state = response.read(100).decode("ascii", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        yield Finding(
            check="metrics",
            state="fail",
            what=f"nothing answers on {host}:{port}: {error}",
            do="restart the server with these settings, or correct metrics_port",
        )
        return
    finally:
        connection.close()
    if response.status == http.client.OK:
        yield Finding(check="metrics", state="ok", what=f"http://{host}:{port}/readyz says {state}")
    else:
        yield Finding(
            check="metrics",
            state="fail",
            what=f"http://{host}:{port}/readyz says {response.status} {state}",
            do="it loads its model, or drains: look at its log, and again in a minute",
        )


def _bindable(settings: Settings) -> Iterator[Finding]:
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        yield Finding(
            check="port",
            state="fail",
            what=f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}",
            do="choose a free port above 1023 and an address of this machine",
        )
    else:
        yield Finding(check="port", state="ok", what=f"{settings.host}:{settings.port} is free")


def _reachable(host: str) -> str:
    """An address that reaches a server listening on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _address(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port) if port.isdigit() else 0
