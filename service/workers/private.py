"""Where the worker that writes answers the others: a server for them alone, which outlasts the public one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import grpc

from service.accepted import Accepted, drained
from service.settings import Settings
from service.transport import channel_options


class Private:
    """A second server of one process, at a socket that this user alone can open. For one event loop.

    While all drain, the others go on passing on to it what they have accepted.
    """

    def __init__(self, address: str, settings: Settings) -> None:
        self._address = address
        self._accepted = Accepted()
        self._server = grpc.aio.server(
            options=channel_options(settings), maximum_concurrent_rpcs=4 * settings.max_calls
        )
        self._server.add_generic_rpc_handlers([self._accepted])

    def beside(self, public: grpc.aio.Server) -> grpc.aio.Server:
        """What servicers are added to that answer here and there."""
        return cast("grpc.aio.Server", _Both(self._server, public))

    async def start(self) -> None:
        self._server.add_insecure_port(self._address)
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Refuse new calls, and give those accepted so many seconds."""
        await drained(self._server, self._accepted, seconds)


class _Both:
    """Takes servicers as a server does."""

    def __init__(self, *servers: grpc.aio.Server) -> None:
        self._servers = servers

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        for server in self._servers:
            server.add_generic_rpc_handlers(handlers)
