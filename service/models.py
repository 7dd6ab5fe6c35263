"""gRPC adapter of ModelService: describes the model that answers, its whole calibration included."""

from __future__ import annotations

from typing import Any

import grpc

from embedding.errors import InvalidInput
from lookalike.v1 import model_pb2 as pb
from lookalike.v1 import model_pb2_grpc
from service import parse, wire
from service.errors import translated_errors
from service.serving import AsyncEngine, Serving
from service.sources import naming

Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """The models that answer."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with translated_errors(context):
            name = parse.model_name(request.name, "name")
            with naming("name"):
                found = self._serving.named(name)
            return pb.GetModelResponse(model=self._described(found))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with translated_errors(context):
            parse.page_size(request.page_size)
            if request.page_token:
                raise InvalidInput(
                    "page_token is not one that this server gave: all its models fit on the first page; leave it out",
                    field="page_token",
                )
            found = sorted(self._serving.all, key=lambda each: each.engine.bundle.name)
            return pb.ListModelsResponse(models=[self._described(each) for each in found])

    def _described(self, found: AsyncEngine) -> pb.Model:
        return wire.model(found.engine.bundle, active=found is self._serving.current)
