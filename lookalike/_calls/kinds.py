"""The kinds of calls, ready to be sent."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from lookalike._loop import is_cancelled
from lookalike.errors import CallFailed, ResourceExhausted

ResultT = TypeVar("ResultT")
ElementT = TypeVar("ElementT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
AnyT = TypeVar("AnyT")

PAGE_SIZE = 1000

BYTES_BEFORE_ELEMENT = 8
"""Most that tag and length of an element take in its message."""


@dataclass(frozen=True, slots=True)
class Call(Generic[ResultT]):
    """A call ready to be sent."""

    method: str
    """`package.Service/Method`."""
    request: bytes | Callable[[float, float], bytes]
    """For a call that waits on the server a function of the seconds that it has left, and of those that have gone."""
    parse: Callable[[bytes], ResultT]

    def sent(self, left: float, gone: float = 0.0) -> bytes:
        """The request of a call that has so many seconds left, after so many that earlier tries took."""
        return self.request if isinstance(self.request, bytes) else self.request(left, gone)


@dataclass(frozen=True, slots=True)
class Page(Generic[ResultT]):
    elements: list[ResultT]
    next_token: str


@dataclass(frozen=True, slots=True)
class Collected(Generic[ResultT]):
    """A call whose answer comes in parts, taken together."""

    method: str
    request: bytes
    parse: Callable[[Sequence[bytes]], ResultT]


@dataclass(frozen=True, slots=True)
class Fitted(Generic[ResultT]):
    """A call that leaves out what fits into no message."""

    call: Callable[[int], Call[ResultT]]
    """Made for the most bytes that a message takes."""


@dataclass(frozen=True, slots=True)
class Stream(Generic[ResultT]):
    """A call that sends any number of messages, and gives the results of each that comes back one by one."""

    method: str
    first: bytes
    """The message that precedes those of the elements."""
    elements: Iterable[Any] | AsyncIterable[Any]
    """Taken one at a time, as they are sent."""
    pack: Callable[[Any], bytes]
    """The message of an element."""
    parse: Callable[[bytes], Sequence[ResultT]]
    answered: Callable[[Sequence[ResultT], int], int] = lambda results, before: before + 1
    """How many elements are answered once results are there, from how many were before."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[ElementT, ResultT]):
    """Any number of elements, to be sent in as many calls as the limits on count and bytes ask for."""

    elements: Iterator[ElementT]
    """Made one at a time, so that images are read only when they are sent."""
    most: int
    """Elements that one call takes."""
    call: Callable[[Sequence[ElementT]], Call[list[ResultT]]]
    failed: Callable[[CallFailed], ResultT]
    """The result of an element that cannot be sent: `in_place` or `raised`."""

    def bytes_alone(self, element: ElementT) -> int:
        """Of the message that carries this element and no other."""
        return len(self.call([element]).sent(left=0))


@dataclass(frozen=True, slots=True)
class Part(Generic[ResultT]):
    """Elements of a batch that follow one another: those of one call, and between them those that fit into none."""

    call: Call[list[ResultT]] | None
    """None where none of them can be sent."""
    sent: int
    """How many the call carries."""
    failed: Mapping[int, ResultT]
    """Results of the others by their places, ascending."""

    def results(self, answered: list[ResultT]) -> list[ResultT]:
        """Of each element, in order, from what the call answered. Raises ResourceExhausted for a short answer, which
        would shift all that follow."""
        if len(answered) != self.sent:
            raise ResourceExhausted(
                f"the server answered {len(answered)} of {self.sent} elements; its version may not fit this client",
                code=grpc.StatusCode.UNKNOWN,
            )
        for place, result in self.failed.items():
            answered.insert(place, result)
        return answered


def in_place(error: CallFailed) -> CallFailed:
    """Of batches whose elements fail alone."""
    return error


def raised(error: CallFailed) -> NoReturn:
    """Of batches that are done as a whole or not at all."""
    raise error


def call(
    method: str, request: Message, response_type: type[ResponseT], parse: Callable[[ResponseT], ResultT]
) -> Call[ResultT]:
    def parse_bytes(data: bytes) -> ResultT:
        response = response_type()
        response.ParseFromString(data)
        return parse(response)

    return Call(method, request.SerializeToString(), parse_bytes)


def new_id() -> str:
    """Of a request that writes: made once, so that the server knows a repetition by it."""
    return str(uuid.uuid4())


def in_bundles(
    elements: Iterable[AnyT] | AsyncIterable[AnyT], most: int
) -> Iterator[list[AnyT]] | AsyncIterator[list[AnyT]]:
    """As many elements together, the last ones as many as are left, also before the elements fail; taken as they are
    asked for."""
    return _bundles_of_async(elements, most) if isinstance(elements, AsyncIterable) else _bundles(elements, most)


def _bundles(elements: Iterable[AnyT], most: int) -> Iterator[list[AnyT]]:
    bundle: list[AnyT] = []
    try:
        for element in elements:
            bundle.append(element)
            if len(bundle) == most:
                yield bundle
                bundle = []
    except (Exception, asyncio.CancelledError):
        if bundle:
            yield bundle
        raise
    if bundle:
        yield bundle


async def _bundles_of_async(elements: AsyncIterable[AnyT], most: int) -> AsyncIterator[list[AnyT]]:
    bundle: list[AnyT] = []
    try:
        async for element in elements:
            bundle.append(element)
            if len(bundle) == most:
                yield bundle
                bundle = []
    except (Exception, asyncio.CancelledError):
        if bundle and not is_cancelled():
            yield bundle
        raise
    if bundle:
        yield bundle
