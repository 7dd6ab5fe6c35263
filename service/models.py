"""gRPC adapter of ModelService: describes the model that answers, its whole calibration included."""

from __future__ import annotations

from typing import Any

import grpc

from embedding.errors import InvalidInput, NotFound
from lookalike.v1 import model_pb2 as pb
from lookalike.v1 import model_pb2_grpc
from service import parse, wire
from service.errors import translated_errors
from service.serving import Serving

Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """The models that answer."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with translated_errors(context):
            bundle = self._serving.current.engine.bundle
            name = parse.model_name(request.name, "name")
            if name not in {bundle.name, parse.ACTIVE_MODEL}:
                raise NotFound(f"no model {name!r} is loaded; this server answers with {bundle.name!r}", field="name")
            return pb.GetModelResponse(model=wire.model(bundle, active=True))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with translated_errors(context):
            parse.page_size(request.page_size)
            if request.page_token:
                raise InvalidInput(
                    "page_token is not one that this server gave: all its models fit on the first page; leave it out",
                    field="page_token",
                )
            return pb.ListModelsResponse(models=[wire.model(self._serving.current.engine.bundle, active=True)])
