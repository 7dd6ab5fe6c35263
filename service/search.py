"""gRPC adapter of SearchService: parse, ask the engine, format. No model, index or threshold logic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from embedding.errors import LookalikeError
from index import MAX_K
from lookalike.v1 import search_pb2 as pb
from lookalike.v1 import search_pb2_grpc
from service import errors, parse, questions, wire
from service.errors import translated_errors
from service.serving import Serving

MAX_QUERIES = 1024
"""Most images of one BatchSearch."""

DEFAULT_K = 10

Context = grpc.aio.ServicerContext[Any, Any]


class SearchService(search_pb2_grpc.SearchServiceServicer):
    """What in my gallery matches this image?"""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        async with translated_errors(context):
            question = questions.Search(
                gallery=parse.gallery_name(request.gallery, "gallery"),
                query=parse.image(request.query, "query"),
                k=parse.count(request.k, default=DEFAULT_K, most=MAX_K, path="k"),
                point=parse.operating_point(request.operating_point),
            )
            return await self._serving.current.ask(
                question, lambda found: pb.SearchResponse(neighbors=wire.neighbors(found, question.gallery))
            )

    async def BatchSearch(self, request: pb.BatchSearchRequest, context: Context) -> pb.BatchSearchResponse:
        async with translated_errors(context):
            parse.check_batch(request.queries, most=MAX_QUERIES, path="queries")
            question = questions.SearchBatch(
                gallery=parse.gallery_name(request.gallery, "gallery"),
                queries=[parse.image(query, f"queries[{i}]") for i, query in enumerate(request.queries)],
                k=parse.count(request.k, default=DEFAULT_K, most=MAX_K, path="k"),
                point=parse.operating_point(request.operating_point),
            )
            return await self._serving.current.ask(
                question, lambda outcomes: _batch_response(outcomes, question.gallery)
            )


def _batch_response(
    outcomes: Sequence[questions.Neighbors | LookalikeError], gallery_id: str
) -> pb.BatchSearchResponse:
    return pb.BatchSearchResponse(
        results=[
            pb.SearchResult(error=errors.status(outcome))
            if isinstance(outcome, LookalikeError)
            else pb.SearchResult(neighbors=pb.Neighbors(neighbors=wire.neighbors(outcome, gallery_id)))
            for outcome in outcomes
        ]
    )
