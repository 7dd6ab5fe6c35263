"""gRPC adapter of SearchService: parse, ask the engine, format. No model, index or threshold logic.

Answers are formed as the bytes that travel, since they may hold many thousands of neighbours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from index import MAX_K, MAX_MATCHES, Deadline, Found, Telling, metadata_bytes
from lookalike.v1 import search_pb2 as pb
from lookalike.v1 import search_pb2_grpc
from service import questions
from service.call import answer_held, limits
from service.errors import translated_errors
from service.messages import columns, encoded, parse, wire
from service.servicers.search_elements import Searching
from service.servicers.streams import Elements
from service.serving import Serving
from service.sources import Names, naming, under

MAX_QUERIES = 1024
"""Most images of one BatchSearch."""

DEFAULT_K = 10

MAX_STREAM_K = 1000
"""Most neighbours of one image of a StreamSearch."""

STREAM_WINDOW = 64
"""Elements of one StreamSearch that are worked on at once."""

MATCHES_AT_ONCE = 500
"""Matches that are formed together, and the most of one message."""

MATCHES_BYTES = 128 * 1024
"""A message of matches is cut where it would grow beyond this; metadata may be large."""

ENTRY_BYTES = 600
"""What an item found takes in memory beside its metadata."""

Context = grpc.aio.ServicerContext[Any, Any]


class SearchService(search_pb2_grpc.SearchServiceServicer):
    """What in my gallery matches this image?"""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Search(self, request: pb.SearchRequest, context: Context) -> Any:
        async with translated_errors(context):
            names = self._names()
            scope, fields, k = self._parsed(request, context, names, request.k, DEFAULT_K, most=MAX_K, path="k")
            question = questions.Search(
                scope=scope,
                query=names.placed(parse.image(request.query, "query")),
                k=k,
                exclude=parse.excluded(request.exclude, scope.gallery, names.__getitem__),
            )
            serving = await self._serving.of(scope.gallery)
            return await serving.search(
                question,
                encoded.search_responses(scope.gallery, fields, most_bytes=limits().message_bytes),
                deadline=scope.deadline,
            )

    async def BatchSearch(self, request: pb.BatchSearchRequest, context: Context) -> Any:
        async with translated_errors(context):
            parse.check_batch(request.queries, most=MAX_QUERIES, path="queries")
            parse.layout(request.layout, "layout")
            names = self._names()
            scope, fields, k = self._parsed(request, context, names, request.k, DEFAULT_K, most=MAX_K, path="k")
            in_columns = request.layout == pb.BATCH_LAYOUT_COLUMNS
            question = questions.SearchBatch(
                scope=replace(scope, many=in_columns),
                queries=names.all_placed(parse.images(request.queries, "queries")),
                k=k,
            )
            serving = await self._serving.of(scope.gallery)
            form = partial(
                columns.batch_response if in_columns else encoded.batch_response,
                gallery_id=scope.gallery,
                fields=fields,
                most_bytes=limits().message_bytes,
            )
            return await serving.ask(question, form, deadline=scope.deadline)

    async def SearchMatches(self, request: pb.SearchMatchesRequest, context: Context) -> AsyncIterator[Any]:
        async with translated_errors(context):
            names = self._names()
            scope, fields, limit = self._parsed(
                request, context, names, request.limit, MAX_MATCHES, most=MAX_MATCHES, path="limit"
            )
            scope = replace(scope, most_bytes=_most_matched())
            question = questions.SearchMatches(
                scope=scope,
                query=names.placed(parse.image(request.query, "query")),
                limit=limit,
                exclude=parse.excluded(request.exclude, scope.gallery, names.__getitem__),
            )
            serving = await self._serving.of(scope.gallery)
            form_held = partial(_held, telling=scope.telling("limit"))
            found, size = await serving.ask(question, form_held, deadline=scope.deadline)
            with answer_held(size):
                for start in range(0, len(found.neighbors), MATCHES_AT_ONCE):
                    some = found.neighbors[start : start + MATCHES_AT_ONCE]
                    # Formed as they are sent: a slow reader holds some back, not the messages of a hundred thousand.
                    form = partial(encoded.match_responses, most_bytes=MATCHES_BYTES)
                    for response in await serving.run(form, some, scope.gallery, fields):
                        yield response
                yield pb.SearchMatchesResponse(summary=wire.matches_summary(found))

    async def StreamSearch(
        self, request_iterator: AsyncIterator[pb.StreamSearchRequest], context: Context
    ) -> AsyncIterator[Any]:
        async with translated_errors(context), Elements(request_iterator, window=STREAM_WINDOW) as elements:
            first = await elements.config()
            wrong = parse.Violations()
            with wrong:
                scope = parse.scope(first.config, path="config.")
            with wrong:
                k = parse.count(first.config.k, default=DEFAULT_K, most=MAX_STREAM_K, path="config.k")
            with wrong:
                fields = parse.neighbor_mask(first.config.read_mask, "config.read_mask")
            wrong.check()
            serving = await self._serving.of(scope.gallery)
            with under("config"):
                await serving.run(scope.begin, serving.engine)  # says at once when the gallery cannot be searched
            searching = Searching(begun=serving, serving=self._serving, scope=scope, k=k, fields=fields)
            async for some in elements.batches():
                async for response in searching.answers(some):
                    yield response

    def _parsed(
        self,
        request: pb.SearchRequest | pb.BatchSearchRequest | pb.SearchMatchesRequest,
        context: Context,
        names: Names,
        wanted: int,
        default: int,
        *,
        most: int,
        path: str,
    ) -> tuple[questions.Scope, frozenset[str], int]:
        """Where to search, which fields to return, and how many; all that is wrong with these is raised together.

        An alias is looked up once: it may move while the call lasts, and items are named as what was searched.
        """
        wrong = parse.Violations()
        with wrong:
            scope = parse.scope(request, deadline=_deadline(context))
        with wrong:
            fields = parse.neighbor_mask(request.read_mask)
        with wrong:
            count = parse.count(wanted, default=default, most=most, path=path)
        wrong.check()
        with naming("gallery"):
            gallery = names[scope.gallery] = self._serving.current.engine.names.resolved(scope.gallery)
        return replace(scope, gallery=gallery), fields, count

    def _names(self) -> Names:
        return Names(self._serving.current.engine.names.aliases.resolve)


def _most_matched() -> int | None:
    """Bytes of metadata, as JSON, that all matches of one call may hold until they are sent, in many messages."""
    room = limits().answers
    return None if room is None or room.most_bytes is None else room.most_bytes // 2


def _held(found: Found, telling: Telling) -> tuple[Found, int]:
    """And the bytes that it takes before it is formed. Raises ResponseTooLarge, whatever was remembered of it."""
    size = sum(metadata_bytes(item.metadata) for item in found.neighbors.items)
    telling.read(size)
    return found, size + ENTRY_BYTES * len(found.neighbors)


def _deadline(context: Context) -> Deadline:
    return Deadline(context.time_remaining())
