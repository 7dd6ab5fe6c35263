"""The API's methods, each defined once for both clients.

A descriptor binds a function of `_calls.py` to a client. Bound to a synchronous client it gives a function that
returns the result, bound to an asynchronous one a function whose result is awaited or iterated asynchronously.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from google.protobuf.message import Message

from lookalike import _calls
from lookalike._calls import Batch, Call, Collected, Page, Stream
from lookalike._transport import AsyncTransport, Transport

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Message)


class Unary(Generic[P, R]):
    """One call, one result."""

    def __init__(self, build: Callable[P, Call[R]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaitable[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(lambda *args, **kwargs: client.unary(self._build(*args, **kwargs)))


class Collecting(Generic[P, R]):
    """One call whose answer comes in parts, one result."""

    def __init__(self, build: Callable[P, Collected[R]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaitable[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(lambda *args, **kwargs: client.collected(self._build(*args, **kwargs)))


class Streamed(Generic[P, R]):
    """One call that sends and receives as it goes, iterated over its results."""

    def __init__(self, build: Callable[P, Stream[R]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, Iterator[R]]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, AsyncIterator[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(lambda *args, **kwargs: client.stream(self._build(*args, **kwargs)))


class Paged(Generic[P, R]):
    """A listing, iterated over all its pages."""

    def __init__(self, build: Callable[Concatenate[str, P], Call[Page[R]]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, Iterator[R]]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, AsyncIterator[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(lambda *args, **kwargs: client.pages(lambda token: self._build(token, *args, **kwargs)))


class Batched(Generic[P, E, R]):
    """Many elements, one result for each, in as many calls as the limits ask for."""

    def __init__(self, build: Callable[P, Batch[E, R]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, list[R]]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaitable[list[R]]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(lambda *args, **kwargs: client.batch(self._build(*args, **kwargs)))


class _Shown:
    """Name, docstring and parameters of a call, for `help` and editors."""

    def __init__(self, build: Callable[..., Any]) -> None:
        parameters = inspect.signature(build).parameters.values()
        self._name, self._doc = build.__name__, build.__doc__
        self._signature = inspect.Signature([given for given in parameters if given.name != "page_token"])

    def on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__, function.__doc__ = self._name, self._doc
        function.__signature__ = self._signature  # type: ignore[attr-defined]
        return function


class Methods:
    """Every call of the API."""

    verify = Unary(_calls.verify)
    verify_batch = Batched(_calls.verify_batch)
    verify_stream = Streamed(_calls.verify_stream)
    embed = Unary(_calls.embed)
    embed_batch = Batched(_calls.embed_batch)
    search = Unary(_calls.search)
    search_batch = Batched(_calls.search_batch)
    search_matches = Collecting(_calls.search_matches)
    search_stream = Streamed(_calls.search_stream)
    create_gallery = Unary(_calls.create_gallery)
    get_gallery = Unary(_calls.get_gallery)
    list_galleries = Paged(_calls.list_galleries)
    update_gallery = Unary(_calls.update_gallery)
    delete_gallery = Unary(_calls.delete_gallery)
    get_item = Unary(_calls.get_item)
    list_items = Paged(_calls.list_items)
    update_items = Batched(_calls.update_items)
    update_item = Unary(_calls.update_item)
    import_items = Streamed(_calls.import_items)
    delete_item = Unary(_calls.delete_item)
    delete_items = Unary(_calls.delete_items)
    purge_items = Unary(_calls.purge_items)
    put_alias = Unary(_calls.put_alias)
    get_alias = Unary(_calls.get_alias)
    list_aliases = Paged(_calls.list_aliases)
    delete_alias = Unary(_calls.delete_alias)
    reindex_gallery = Unary(_calls.reindex_gallery)
    migrate_gallery = Unary(_calls.migrate_gallery)
    create_snapshot = Unary(_calls.create_snapshot)
    list_snapshots = Paged(_calls.list_snapshots)
    delete_snapshot = Unary(_calls.delete_snapshot)
    restore_gallery = Unary(_calls.restore_gallery)
    get_operation = Unary(_calls.get_operation)
    wait_operation = Unary(_calls.wait_operation)
    cancel_operation = Unary(_calls.cancel_operation)
    list_operations = Paged(_calls.list_operations)
    get_model = Unary(_calls.get_model)
    list_models = Paged(_calls.list_models)
    activate_model = Unary(_calls.activate_model)
    deactivate_model = Unary(_calls.deactivate_model)
    record_feedback = Batched(_calls.record_feedback)
    list_feedback = Paged(_calls.list_feedback)
    delete_feedback = Unary(_calls.delete_feedback)
    is_serving = Unary(_calls.is_serving)
