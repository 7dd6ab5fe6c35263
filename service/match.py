"""gRPC adapter of MatchService: parse, ask the engine, format. No model, index or threshold logic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from embedding.decision import Decision
from embedding.errors import LookalikeError
from lookalike.v1 import match_pb2 as pb
from lookalike.v1 import match_pb2_grpc
from service import errors, parse, questions, wire
from service.errors import translated_errors
from service.serving import Serving

MAX_PAIRS = 256
"""Most pairs of one BatchVerify."""

Context = grpc.aio.ServicerContext[Any, Any]


class MatchService(match_pb2_grpc.MatchServiceServicer):
    """Are these two images a match?"""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:
        async with translated_errors(context):
            question = questions.Verify(
                a=parse.image(request.a, "a"),
                b=parse.image(request.b, "b"),
                point=parse.operating_point(request.operating_point),
            )
            return await self._serving.current.ask(
                question, lambda decided: pb.VerifyResponse(decision=wire.decision(decided))
            )

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: Context) -> pb.BatchVerifyResponse:
        async with translated_errors(context):
            parse.check_batch(request.pairs, most=MAX_PAIRS, path="pairs")
            question = questions.VerifyBatch(
                pairs=[
                    (parse.image(pair.a, f"pairs[{i}].a"), parse.image(pair.b, f"pairs[{i}].b"))
                    for i, pair in enumerate(request.pairs)
                ],
                point=parse.operating_point(request.operating_point),
            )
            return await self._serving.current.ask(question, _batch_response)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        async with translated_errors(context):
            serving = self._serving.current  # one read: a swap cannot pair an embedding with another model's name
            model = wire.model_name(serving.engine.bundle.name)
            return await serving.ask(
                questions.Embed(image=parse.image(request.image, "image")),
                lambda emb_D: pb.EmbedResponse(embedding=wire.embedding(emb_D), model=model),
            )


def _batch_response(outcomes: Sequence[Decision | LookalikeError]) -> pb.BatchVerifyResponse:
    return pb.BatchVerifyResponse(
        results=[
            pb.VerifyResult(error=errors.status(outcome))
            if isinstance(outcome, LookalikeError)
            else pb.VerifyResult(decision=wire.decision(outcome))
            for outcome in outcomes
        ]
    )
