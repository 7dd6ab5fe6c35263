"""gRPC adapter of MatchService: parse, ask the engine, format. No model, index or threshold logic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc

from embedding.decision import Decision
from embedding.errors import InvalidInput, InvalidOperatingPoint, LookalikeError
from lookalike.v1 import match_pb2 as pb
from lookalike.v1 import match_pb2_grpc
from service import errors, questions
from service.errors import translated_errors
from service.messages import parse, wire
from service.servicers.streams import Elements, answered_id, check_id
from service.serving import AsyncEngine, Serving
from service.sources import Embedded, Names, Source, StoredItem, Unusable, under

MAX_PAIRS = 256
"""Most pairs of one BatchVerify."""

MAX_IMAGES = 256
"""Most images of one BatchEmbed."""

STREAM_WINDOW = 64
"""Pairs of one StreamVerify that are decided at once."""

R = TypeVar("R")

Context = grpc.aio.ServicerContext[Any, Any]


class MatchService(match_pb2_grpc.MatchServiceServicer):
    """Are these two images a match?"""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:
        async with translated_errors(context):
            names = self._names()
            question = questions.Verify(
                a=names.placed(parse.image(request.a, "a")),
                b=names.placed(parse.image(request.b, "b")),
                point=parse.operating_point(request.operating_point),
            )
            serving = await self._serving.of_items(question.sources)
            return await serving.ask(question, lambda decided: pb.VerifyResponse(decision=wire.decision(decided)))

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: Context) -> pb.BatchVerifyResponse:
        async with translated_errors(context):
            parse.check_batch(request.pairs, most=MAX_PAIRS, path="pairs")
            names = self._names()
            question = questions.VerifyBatch(
                pairs=[
                    (
                        names.placed(parse.image(pair.a, f"pairs[{i}].a")),
                        names.placed(parse.image(pair.b, f"pairs[{i}].b")),
                    )
                    for i, pair in enumerate(request.pairs)
                ],
                point=parse.operating_point(request.operating_point),
            )
            return await self._verified(question, self._serving.taken, _batch_response)

    async def StreamVerify(
        self, request_iterator: AsyncIterator[pb.StreamVerifyRequest], context: Context
    ) -> AsyncIterator[pb.StreamVerifyResponse]:
        async with translated_errors(context), Elements(request_iterator, window=STREAM_WINDOW) as elements:
            first = await elements.config()
            point = parse.operating_point(first.config.operating_point)
            line_up = self._serving.taken  # one read: the answers of a stream can be compared
            with under("config"):
                line_up[0].engine.judge(point)  # says at once when the threshold cannot be put there
            async for some in elements.batches():
                names = self._names()
                question = questions.VerifyBatch(pairs=[_pair(request, names) for request in some], point=point)
                for response in await self._verified(question, line_up, partial(_stream_responses, some)):
                    yield response

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        async with translated_errors(context):
            question = questions.Embed(image=self._names().placed(parse.image(request.image, "image")))
            # One read: a swap cannot pair an embedding with another model's name.
            serving = await self._serving.of_items(question.sources)
            model = wire.model_name(serving.engine.bundle.name)
            return await serving.ask(
                question,
                lambda emb_D: pb.EmbedResponse(embedding=wire.embedding(emb_D), model=model),
            )

    async def BatchEmbed(self, request: pb.BatchEmbedRequest, context: Context) -> pb.BatchEmbedResponse:
        async with translated_errors(context):
            parse.check_batch(request.images, most=MAX_IMAGES, path="images")
            question = questions.EmbedBatch(
                images=self._names().all_placed(
                    [parse.image(image, f"images[{i}]") for i, image in enumerate(request.images)]
                )
            )
            serving = await self._serving.of_items(question.sources)
            model = wire.model_name(serving.engine.bundle.name)
            return await serving.ask(
                question,
                lambda outcomes: pb.BatchEmbedResponse(results=map(_embed_result, outcomes), model=model),
            )

    def _names(self) -> Names:
        return Names(self._serving.current.engine.names.aliases.resolve)

    async def _verified(
        self,
        question: questions.VerifyBatch,
        line_up: Sequence[AsyncEngine],
        form: Callable[[Sequence[Decision | LookalikeError]], R],
    ) -> R:
        """Each pair decided as Verify would: by the model of the galleries that its items lie in."""
        rows: dict[AsyncEngine, list[int]] = {}
        known: dict[str, AsyncEngine] = {}
        for row, pair in enumerate(question.pairs) if len(line_up) > 1 else ():
            gallery = next((source.gallery for source in pair if isinstance(source, StoredItem)), "")
            if gallery not in known:
                known[gallery] = await self._serving.of(gallery, line_up) if gallery else line_up[0]
            rows.setdefault(known[gallery], []).append(row)
        if len(rows) < 2:
            return await next(iter(rows), line_up[0]).ask(question, form)
        outcomes: dict[int, Decision | LookalikeError] = {}
        for serving, of_model in rows.items():
            some = replace(question, pairs=[question.pairs[row] for row in of_model])
            try:
                outcomes |= zip(of_model, await serving.ask(some, list), strict=True)
            except InvalidOperatingPoint as error:  # which another model may know
                outcomes |= dict.fromkeys(of_model, error)
        return form([outcomes[row] for row in range(len(question.pairs))])


def _pair(request: pb.StreamVerifyRequest, names: Names) -> tuple[Source, Source]:
    try:
        check_id(request.id)
        if request.WhichOneof("element") == "config":
            raise InvalidInput("only the first element is a config; open another stream for another", field="config")
        if request.WhichOneof("element") is None:
            raise InvalidInput("pair is required: set its two images", field="pair")
    except InvalidInput as error:
        return Unusable(error=error), Unusable(error=error)
    pair = request.pair
    return names.placed(parse.image(pair.a, "pair.a")), names.placed(parse.image(pair.b, "pair.b"))


def _stream_responses(
    requests: Sequence[pb.StreamVerifyRequest], outcomes: Sequence[Decision | LookalikeError]
) -> list[pb.StreamVerifyResponse]:
    return [
        pb.StreamVerifyResponse(id=answered_id(request.id), error=errors.status(outcome))
        if isinstance(outcome, LookalikeError)
        else pb.StreamVerifyResponse(id=request.id, decision=wire.decision(outcome))
        for request, outcome in zip(requests, outcomes, strict=True)
    ]


def _embed_result(outcome: Embedded) -> pb.EmbedResult:
    if isinstance(outcome, LookalikeError):
        return pb.EmbedResult(error=errors.status(outcome))
    return pb.EmbedResult(embedding=wire.embedding(outcome))


def _batch_response(outcomes: Sequence[Decision | LookalikeError]) -> pb.BatchVerifyResponse:
    return pb.BatchVerifyResponse(
        results=[
            pb.VerifyResult(error=errors.status(outcome))
            if isinstance(outcome, LookalikeError)
            else pb.VerifyResult(decision=wire.decision(outcome))
            for outcome in outcomes
        ]
    )
