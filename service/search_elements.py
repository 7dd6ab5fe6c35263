"""Elements of a StreamSearch: one image each, or several that travel together; answered by few searches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

from embedding.errors import InvalidInput, LookalikeError, Overloaded, ResponseTooLarge
from index import Deadline, Found
from lookalike.v1 import search_pb2 as pb
from service import encoded, parse, questions
from service.call import CURRENT, limits
from service.calls import LARGE
from service.questions import MAX_RESULTS
from service.serving import AsyncEngine
from service.sources import Source, Unusable
from service.streams import answered_id, check_id

MAX_TOGETHER = 256
"""Most images of one element."""

SEARCHED_TOGETHER = 1024
"""Images of several elements, from which on they are searched apart."""


@dataclass(frozen=True, eq=False)
class Element:
    """What one element asks for."""

    id: str
    sources: Sequence[Source]
    several: bool = False
    """Whether it is answered with results, of which there may be one alone."""


@dataclass(frozen=True, kw_only=True)
class Searching:
    """How all elements of a stream are searched."""

    serving: AsyncEngine
    scope: questions.Scope
    k: int
    fields: frozenset[str]

    async def answers(self, requests: Sequence[pb.StreamSearchRequest]) -> AsyncIterator[bytes]:
        """StreamSearchResponses, one for each element.

        Those formed together take no more than one message may; what is not sent yet holds the next ones back.
        """
        for elements in self._searches([self._element(request) for request in requests]):
            async for response in self._sent(elements):
                yield response

    async def _sent(self, elements: Sequence[Element]) -> AsyncIterator[bytes]:
        try:
            responses = await self._answered(elements)
        except ResponseTooLarge as error:
            half = len(elements) // 2
            if half:
                for some in (elements[:half], elements[half:]):
                    async for response in self._sent(some):
                        yield response
                return
            error.field = "config.k"
            failed = Element(elements[0].id, [Unusable(error=error.with_traceback(None))])
            responses = await self._answered([failed])
        size = sum(map(len, responses))
        call, room = CURRENT.get(), limits().answers
        if size < LARGE or call is None or room is None:
            for response in responses:
                yield response
            return
        try:
            ticket = room.enter(call.payer, 1, size)
        except Overloaded:
            responses = []  # formed again when there is room: those who wait for it must not hold what it is for
            ticket = await room.enter_patiently(call.payer, size)
        with ticket:
            for response in responses or await self._answered(elements):
                yield response

    async def _answered(self, elements: Sequence[Element]) -> list[bytes]:
        gallery_id = self.serving.engine.resolved(self.scope.gallery)
        deadline, most = Deadline(), limits().message_bytes
        question = questions.SearchBatch(
            scope=replace(self.scope, gallery=gallery_id, deadline=deadline),
            queries=[source for element in elements for source in element.sources],
            k=self.k,
        )

        def form(outcomes: Sequence[Found | LookalikeError]) -> list[bytes]:
            shapes = [(element.id, len(element.sources) if element.several else None) for element in elements]
            return encoded.stream_responses(shapes, outcomes, gallery_id, self.fields, most_bytes=most)

        return await self.serving.ask(question, form, deadline=deadline)

    def _searches(self, elements: Sequence[Element]) -> Iterator[Sequence[Element]]:
        """Elements that are searched together: as many as one search may answer."""
        most = max(1, min(SEARCHED_TOGETHER, MAX_RESULTS // self.k))
        some: list[Element] = []
        images = 0
        for element in elements:
            if some and images + len(element.sources) > most:
                yield some
                some, images = [], 0
            some.append(element)
            images += len(element.sources)
        yield some

    def _element(self, request: pb.StreamSearchRequest) -> Element:
        element = answered_id(request.id)
        try:
            check_id(request.id)
            match request.WhichOneof("element"):
                case "config":
                    raise InvalidInput(
                        "only the first element is a config; open another stream for another", field="config"
                    )
                case "queries":
                    queries = request.queries.queries
                    most = min(MAX_TOGETHER, MAX_RESULTS // self.k)
                    parse.check_batch(queries, most=most, path="queries.queries")
                    return Element(element, parse.images(queries, "queries.queries"), several=True)
                case _:
                    return Element(element, [parse.image(request.query, "query")])
        except InvalidInput as error:
            return Element(element, [Unusable(error=error)])
