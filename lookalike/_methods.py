"""The API's methods, each defined once for both clients.

A descriptor binds a function of `_calls` to a client. Bound to a synchronous client it gives a function that
returns the result, bound to an asynchronous one a function whose result is awaited or iterated asynchronously.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeAlias, TypeVar, overload

from google.protobuf.message import Message

from lookalike import _messages as messages
from lookalike._calls import feedback, galleries, items, match, models, upkeep
from lookalike._calls import search as searches
from lookalike._calls.kinds import Batch, Call, Collected, Fitted, Page, Stream
from lookalike._transport import AsyncTransport, Transport

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Message)

Awaited: TypeAlias = Coroutine[object, None, R]
"""Without Any, at which mypy gives up on `asyncio.gather`."""


class Unary(Generic[P, R]):
    """One call, one result."""

    def __init__(self, build: Callable[P, Call[R] | Fitted[R]], *, images: Sequence[str] = ()) -> None:
        self._build = build
        self._shown = _Shown(build)
        self._images = _Images(build, images)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaited[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(self._images.asking(client, client.unary, self._build))


class Collecting(Generic[P, R]):
    """One call whose answer comes in parts, one result."""

    def __init__(self, build: Callable[P, Collected[R]], *, images: Sequence[str] = ()) -> None:
        self._build = build
        self._shown = _Shown(build)
        self._images = _Images(build, images)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaited[R]]: ...
    def __get__(self, client: Transport | AsyncTransport | None, owner: type) -> Any:
        if client is None:
            return self
        return self._shown.on(self._images.asking(client, client.collected, self._build))


class Streamed(Generic[P, R]):
    """One call that sends and receives as it goes, iterated over its results."""

    def __init__(self, build: Callable[P, Stream[R]]) -> None:
        self._build = build
        self._shown = _Shown(build)

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Transport, owner: type) -> Callable[P, Generator[R, None, None]]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, AsyncGenerator[R, None]]: ...
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
    def __get__(self, client: Transport, owner: type) -> Callable[P, Generator[R, None, None]]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, AsyncGenerator[R, None]]: ...
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
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaited[list[R]]]: ...
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


class _Images:
    """Where images stand among the arguments of a call."""

    def __init__(self, build: Callable[..., Any], names: Sequence[str]) -> None:
        parameters = list(inspect.signature(build).parameters)
        self._places = {name: parameters.index(name) for name in names}

    def asking(
        self, client: Transport | AsyncTransport, ask: Callable[..., Any], build: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The method of a client: one of asyncio makes a call in a thread where its images take long to read."""

        def method(*args: Any, **kwargs: Any) -> Any:
            if isinstance(client, AsyncTransport) and self._take_long(args, kwargs):
                return client._made_in_thread(lambda: build(*args, **kwargs), ask)
            return ask(build(*args, **kwargs))

        return method

    def _take_long(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
        given = (args[at] if at < len(args) else kwargs.get(name) for name, at in self._places.items())
        return any(map(messages.takes_long, given))


class Methods:
    """Every call of the API."""

    verify = Unary(match.verify, images=("a", "b"))
    verify_batch = Batched(match.verify_batch)
    verify_stream = Streamed(match.verify_stream)
    embed = Unary(match.embed, images=("image",))
    embed_batch = Batched(match.embed_batch)
    search = Unary(searches.search, images=("query",))
    search_batch = Batched(searches.search_batch)
    search_columns = Unary(searches.search_columns, images=("queries",))
    search_matches = Collecting(searches.search_matches, images=("query",))
    search_stream = Streamed(searches.search_stream)
    create_gallery = Unary(galleries.create_gallery)
    get_gallery = Unary(galleries.get_gallery)
    list_galleries = Paged(galleries.list_galleries)
    update_gallery = Unary(galleries.update_gallery)
    delete_gallery = Unary(galleries.delete_gallery)
    get_item = Unary(items.get_item)
    list_items = Paged(items.list_items)
    update_items = Batched(items.update_items)
    update_item = Unary(items.update_item, images=("item",))
    import_items = Streamed(items.import_items)
    delete_item = Unary(items.delete_item)
    delete_items = Unary(items.delete_items)
    purge_items = Unary(items.purge_items)
    put_alias = Unary(galleries.put_alias)
    get_alias = Unary(galleries.get_alias)
    list_aliases = Paged(galleries.list_aliases)
    delete_alias = Unary(galleries.delete_alias)
    reindex_gallery = Unary(upkeep.reindex_gallery)
    verify_gallery = Unary(upkeep.verify_gallery)
    migrate_gallery = Unary(upkeep.migrate_gallery)
    create_snapshot = Unary(upkeep.create_snapshot)
    list_snapshots = Paged(upkeep.list_snapshots)
    delete_snapshot = Unary(upkeep.delete_snapshot)
    restore_gallery = Unary(upkeep.restore_gallery)
    get_operation = Unary(upkeep.get_operation)
    wait_operation = Unary(upkeep.wait_operation)
    cancel_operation = Unary(upkeep.cancel_operation)
    list_operations = Paged(upkeep.list_operations)
    get_model = Unary(models.get_model)
    list_models = Paged(models.list_models)
    activate_model = Unary(models.activate_model)
    deactivate_model = Unary(models.deactivate_model)
    record_feedback = Batched(feedback.record_feedback)
    list_feedback = Paged(feedback.list_feedback)
    delete_feedback = Unary(feedback.delete_feedback)
    is_serving = Unary(models.is_serving)
