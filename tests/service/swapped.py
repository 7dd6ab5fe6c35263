"""Models that take turns: a folder of them, changing which answers, and what is seen of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2

from embedding.bundle import Bundle
from lookalike.v1 import common_pb2, match_pb2, model_pb2, search_pb2
from service.settings import Settings
from tests.service.harness import Loop, Stubs, encoded, rich, served

AVAILABLE, LOADED, ACTIVE = (
    model_pb2.MODEL_STATE_AVAILABLE,
    model_pb2.MODEL_STATE_LOADED,
    model_pb2.MODEL_STATE_ACTIVE,
)


@dataclass
class Place:
    """A folder of models that holds two, one of them with two calibrations, and settings to serve it."""

    settings: Settings
    one: Bundle
    recalibrated: Bundle
    two: Bundle

    def served(self, loop: Loop, **changed: object) -> AbstractContextManager[Any]:
        return served(loop, self.settings.model_copy(update=changed))


def activate(stubs: Stubs, bundle: Bundle, **options: object) -> model_pb2.ActivateModelResponse:
    return stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=f"models/{bundle.name}", **options))


def deactivate(stubs: Stubs, bundle: Bundle, **options: object) -> model_pb2.DeactivateModelResponse:
    return stubs.models.DeactivateModel(model_pb2.DeactivateModelRequest(name=f"models/{bundle.name}", **options))


def states(stubs: Stubs) -> dict[str, tuple[int, int]]:
    """State and calibration of every model by name."""
    models = stubs.models.ListModels(model_pb2.ListModelsRequest()).models
    return {model.name.removeprefix("models/"): (model.state, model.calibration.version) for model in models}


def decided(stubs: Stubs) -> common_pb2.Decision:
    return stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))).decision


def search(stubs: Stubs, gallery: str) -> search_pb2.SearchResponse:
    return stubs.search.Search(search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=encoded(1)))


def subjects(error: grpc.RpcError) -> list[str]:
    failure = error_details_pb2.PreconditionFailure()
    assert any(detail.Unpack(failure) for detail in rich(error).details)
    return [violation.subject for violation in failure.violations]


def search_request(gallery: str) -> search_pb2.SearchRequest:
    return search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=encoded(1))
