"""Elements of a StreamSearch: one image each, or several that travel together; answered by few searches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

from embedding.errors import InvalidInput, LookalikeError, ModelMismatch, Overloaded, ResponseTooLarge
from index import Deadline, Found
from lookalike.v1 import search_pb2 as pb
from service import questions
from service.call import CURRENT, limits
from service.calls import LARGE
from service.messages import encoded, parse
from service.questions import MAX_RESULTS
from service.servicers.streams import answered_id, check_id
from service.serving import AsyncEngine, Serving
from service.sources import GivenEmbedding, Names, Source, Unusable

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

    begun: AsyncEngine
    """What answered when the stream began, and answers as long as its gallery is of that model."""
    serving: Serving
    """What answers where an alias has moved to a gallery of another."""
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
        engine = self.begun.engine
        names = Names(engine.names.aliases.resolve)
        gallery_id = names[self.scope.gallery] = engine.names.resolved(self.scope.gallery)
        queries = [names.placed(source) for element in elements for source in element.sources]
        serving = await self._answering(gallery_id)
        if serving is not self.begun:
            queries = [self._of_another(query, serving) for query in queries]
        deadline, most = Deadline(), limits().message_bytes
        question = questions.SearchBatch(
            scope=replace(self.scope, gallery=gallery_id, deadline=deadline), queries=queries, k=self.k
        )

        def form(outcomes: Sequence[Found | LookalikeError]) -> list[bytes]:
            shapes = [(element.id, len(element.sources) if element.several else None) for element in elements]
            return encoded.stream_responses(shapes, outcomes, gallery_id, self.fields, most_bytes=most)

        return await serving.ask(question, form, deadline=deadline)

    async def _answering(self, gallery_id: str) -> AsyncEngine:
        gallery = self.begun.engine.names.catalog.opened(gallery_id)
        if gallery is not None and gallery.model.fingerprint == self.begun.engine.model.fingerprint:
            return self.begun
        others = [each for each in self.serving.every if each is not self.begun]
        return await self.serving.of(gallery_id, (self.begun, *others))

    def _of_another(self, query: Source, serving: AsyncEngine) -> Source:
        """The query, when another model answers than did: an embedding that does not say its model is of that."""
        if not isinstance(query, GivenEmbedding) or query.model:
            return query
        told = (
            f"{self.scope.gallery!r} stands for a gallery of {serving.engine.bundle.name} since this stream began with "
            f"{self.begun.engine.bundle.name}; embed the image anew, and say by `model` what has embedded it"
        )
        return Unusable(error=ModelMismatch(told, field=query.path))

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
