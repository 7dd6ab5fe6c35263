"""gRPC adapter of ModelService: describes models, and swaps which of them answers."""

from __future__ import annotations

from typing import Any

import grpc

from index.items import name_of_page_token
from lookalike.v1 import model_pb2 as pb
from lookalike.v1 import model_pb2_grpc
from service.errors import translated_errors
from service.messages import parse, wire
from service.once import Once
from service.rollout.swap import Rollout
from service.servicers import pages
from service.serving import Serving

Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """The models that answer, and those that could."""

    def __init__(self, rollout: Rollout, serving: Serving, once: Once) -> None:
        self._rollout = rollout
        self._serving = serving
        self._once = once

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with translated_errors(context):
            found = await self._rollout.model(
                parse.model_name(request.name, "name"), parse.calibration(request.calibration, "calibration")
            )
            return pb.GetModelResponse(model=wire.model(found))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with translated_errors(context):
            size, after = parse.page_size(request.page_size), name_of_page_token(request.page_token, "models")
            found = [model for model in await self._rollout.models() if model.described.name > after]
            shown, following = pages.page(
                "models", found, size, wire.model, lambda model: model.described.name, most=pages.most_bytes()
            )
            return pb.ListModelsResponse(models=shown, next_page_token=following)

    async def ActivateModel(self, request: pb.ActivateModelRequest, context: Context) -> pb.ActivateModelResponse:
        async with translated_errors(context):
            wrong = parse.Violations()
            with wrong:
                name = parse.model_name(request.name, "name")
            with wrong:
                calibration = parse.calibration(request.calibration, "calibration")
            wrong.check()

            async def activate(_: bool) -> pb.ActivateModelResponse:
                changed = await self._rollout.activate(
                    name,
                    calibration,
                    keep_previous=request.keep_previous,
                    force=request.force,
                    validate_only=request.validate_only,
                )
                return pb.ActivateModelResponse(
                    model=wire.model(changed.model),
                    incompatible_galleries=map(wire.gallery_name, changed.incompatible),
                )

            return await self._once.done(request, pb.ActivateModelResponse, self._serving.current, activate)

    async def DeactivateModel(self, request: pb.DeactivateModelRequest, context: Context) -> pb.DeactivateModelResponse:
        async with translated_errors(context):
            name = parse.model_name(request.name, "name")

            async def deactivate(_: bool) -> pb.DeactivateModelResponse:
                changed = await self._rollout.deactivate(name, force=request.force, validate_only=request.validate_only)
                return pb.DeactivateModelResponse(
                    model=wire.model(changed.model),
                    incompatible_galleries=map(wire.gallery_name, changed.incompatible),
                )

            return await self._once.done(request, pb.DeactivateModelResponse, self._serving.current, deactivate)
