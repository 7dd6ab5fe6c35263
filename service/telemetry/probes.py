"""An HTTP endpoint for machines: /metrics, /healthz and /readyz, on a port of its own.

It runs on the event loop that serves calls, so that /healthz says whether that loop still turns. It reads no bodies and
answers each connection once.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from embedding.errors import Busy, InvalidInput

_MOST_CONNECTIONS = 32
_MOST_HEAD = 8 * 1024
_PATIENCE_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class Probes:
    """The endpoint of one server."""

    def __init__(self, registry: CollectorRegistry, state: Callable[[], str]) -> None:
        """`state` says "serving", or what the server does instead."""
        self._registry = registry
        self._state = state
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises Busy or InvalidInput."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MOST_HEAD)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Busy(
                    f"port {port} of {host} is in use by another process; choose another metrics_port, or 0 for any",
                    field="metrics_port",
                ) from error
            raise InvalidInput(
                f"cannot listen on {host}:{port} for metrics: {error.strerror or error}", field="metrics_host"
            ) from error
        listening: int = self._server.sockets[0].getsockname()[1]
        return listening

    async def start_at(self, path: Path) -> None:
        """Listen on a socket of this machine instead."""
        self._server = await asyncio.start_unix_server(self._serve, path, limit=_MOST_HEAD)

    async def hanging(self) -> str:
        """What of the server no longer answers; empty while all is well."""
        return ""

    async def state(self) -> str:
        """ "serving", or what the server does instead."""
        return self._state()

    async def stop(self) -> None:
        """Close the port and what is connected to it."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._connections):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(writer)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            answer = await self._answer(head.decode("latin-1"))
            async with asyncio.timeout(_PATIENCE_SECONDS):
                writer.write(answer)
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a client that is slow, speaks something else, or has gone
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, head: str) -> bytes:
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if method not in {"GET", "HEAD"}:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"GET or HEAD\n")
        is_head = method == "HEAD"
        match path:
            case "/metrics":
                encode, content_type = choose_encoder(headers.get("accept", ""))
                try:
                    body = await asyncio.to_thread(encode, self._registry)
                except Exception as error:  # whatever a gallery or a disk may do: the endpoint stays up, and says so
                    _log.error("metrics cannot be collected", exc_info=error)
                    return _response(HTTPStatus.INTERNAL_SERVER_ERROR, b"see the server's log\n", is_head=is_head)
                return _response(HTTPStatus.OK, body, content_type=content_type, is_head=is_head)
            case "/healthz":
                if hanging := await self.hanging():
                    return _response(HTTPStatus.SERVICE_UNAVAILABLE, f"hangs: {hanging}\n".encode(), is_head=is_head)
                return _response(HTTPStatus.OK, b"alive\n", is_head=is_head)
            case "/readyz":
                state = await self.state()
                status = HTTPStatus.OK if state == "serving" else HTTPStatus.SERVICE_UNAVAILABLE
                return _response(status, f"{state}\n".encode(), is_head=is_head)
            case _:
                return _response(HTTPStatus.NOT_FOUND, b"/metrics, /healthz or /readyz\n", is_head=is_head)


def _response(
    status: HTTPStatus, body: bytes, *, content_type: str = "text/plain; charset=utf-8", is_head: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if is_head else body)
