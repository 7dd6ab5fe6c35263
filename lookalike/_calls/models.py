"""The calls of ModelService, and the standard question whether the server is well."""

from __future__ import annotations

from lookalike import _messages as messages
from lookalike._calls.kinds import PAGE_SIZE, Call, Page, call, new_id
from lookalike.types import Model, ModelChange
from lookalike.v1 import model_pb2

MODEL = "lookalike.v1.ModelService"


def get_model(model: str = messages.ACTIVE_MODEL, *, calibration: int = 0) -> Call[Model]:
    """Describe a model, its whole calibration included; by default the one that answers."""
    return call(
        f"{MODEL}/GetModel",
        model_pb2.GetModelRequest(name=messages.model_name(model), calibration=calibration),
        model_pb2.GetModelResponse,
        lambda response: messages.model(response.model),
    )


def list_models(page_token: str) -> Call[Page[Model]]:
    """Every model that the server has loaded or could load, by name."""
    return call(
        f"{MODEL}/ListModels",
        model_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=page_token),
        model_pb2.ListModelsResponse,
        lambda response: Page([messages.model(found) for found in response.models], response.next_page_token),
    )


def activate_model(
    model: str, *, calibration: int = 0, keep_previous: bool = False, force: bool = False, validate_only: bool = False
) -> Call[ModelChange]:
    """Let a model answer from now on, under its newest calibration or the one given; no call fails meanwhile.

    Raises FailedPrecondition, naming them, when galleries would be left without the model of their embeddings:
    `keep_previous` keeps the model that is active now loaded for them, `force` leaves them. With `validate_only` all
    is checked and nothing changed. Loading takes its time: give the client a long `timeout`.
    """
    return call(
        f"{MODEL}/ActivateModel",
        model_pb2.ActivateModelRequest(
            name=messages.model_name(model),
            calibration=calibration,
            keep_previous=keep_previous,
            force=force,
            validate_only=validate_only,
            request_id=new_id(),
        ),
        model_pb2.ActivateModelResponse,
        messages.model_change,
    )


def deactivate_model(model: str, *, force: bool = False, validate_only: bool = False) -> Call[ModelChange]:
    """Unload a model that is not the active one; with `force` also one whose embeddings a gallery holds."""
    return call(
        f"{MODEL}/DeactivateModel",
        model_pb2.DeactivateModelRequest(
            name=messages.model_name(model), force=force, validate_only=validate_only, request_id=new_id()
        ),
        model_pb2.DeactivateModelResponse,
        messages.model_change,
    )


def is_serving() -> Call[bool]:
    """Whether the server says that it is SERVING: started, its model warm, and not shutting down."""
    # The standard health check in its two constants, so that the client needs no further package: asking for the
    # whole server is an empty HealthCheckRequest, and SERVING is the value 1 of the response's field 1.
    return Call("grpc.health.v1.Health/Check", b"", lambda response: response == b"\x08\x01")
