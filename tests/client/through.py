"""One question through either client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from lookalike import AsyncClient, Client

Ask: TypeAlias = Callable[..., Any]


def blocking(address: str, ask: Ask, **settings: Any) -> Any:
    with Client(address, timeout=settings.pop("timeout", 20), **settings) as client:
        return ask(client)


def awaited(address: str, ask: Ask, **settings: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, timeout=settings.pop("timeout", 20), **settings) as client:
            answer = ask(client)
            return await answer if inspect.isawaitable(answer) else answer

    return asyncio.run(run())


both = pytest.mark.parametrize("through", [blocking, awaited])


def embed(client: Any) -> Any:
    return client.embed(b"image")
