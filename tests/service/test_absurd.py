"""Every field of every request with absurd values: the call is answered, or refused with a reason."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2
from service.settings import Settings
from tests.service.absurd import mutants
from tests.service.harness import Loop, Stubs, connected, encoded, info, rich, served, vector

SEED = 20_261_125


@pytest.fixture(scope="module")
def stubs(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    own = {"galleries": tmp_path_factory.mktemp("absurd"), "thumbnails": 16, "max_queue_seconds": 600.0}
    with served(loop, settings.model_copy(update=own)) as server, connected(server.address) as stubs:
        stubs.fill("g", {name: encoded(ord(name)) for name in "abc"})
        yield stubs


def sensible(stubs: Stubs) -> list[tuple[Any, Message]]:
    """A method and a request that it answers, or would if what it names were there."""
    verify = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
    decision = stubs.match.Verify(verify).decision
    verify.operating_point.threshold = 0.5
    item = gallery_pb2.Item(name="galleries/g/items/a", identity="a")
    item.metadata["k"] = 1
    update = gallery_pb2.UpdateItemRequest(item=item, image=vector(1), allow_missing=True)
    settings = gallery_pb2.Gallery(name="galleries/g", index=gallery_pb2.IndexSettings(min_recall=0.5))
    alias = alias_pb2.Alias(name="aliases/a", gallery="galleries/g")
    case = feedback_pb2.Feedback(case_id="c", decision=decision, truth=feedback_pb2.TRUTH_MATCH)
    scoped: dict[str, Any] = {"gallery": "galleries/g", "query": vector(1)}
    asked: dict[str, Any] = {"gallery": "galleries/g", "filter": "identity = a"}
    return [
        (stubs.match.Verify, verify),
        (stubs.match.Embed, match_pb2.EmbedRequest(image=encoded(1))),
        (stubs.search.Search, search_pb2.SearchRequest(**asked, query=vector(1), k=3)),
        (stubs.search.BatchSearch, search_pb2.BatchSearchRequest(**asked, queries=[vector(1)], k=3)),
        (stubs.search.SearchMatches, search_pb2.SearchMatchesRequest(**scoped, limit=5)),
        (stubs.galleries.CreateGallery, gallery_pb2.CreateGalleryRequest(gallery_id="g")),
        (stubs.galleries.GetGallery, gallery_pb2.GetGalleryRequest(name="galleries/g")),
        (stubs.galleries.ListGalleries, gallery_pb2.ListGalleriesRequest(page_size=1)),
        (stubs.galleries.UpdateGallery, gallery_pb2.UpdateGalleryRequest(gallery=settings)),
        (stubs.galleries.GetItem, gallery_pb2.GetItemRequest(name="galleries/g/items/a")),
        (stubs.galleries.ListItems, gallery_pb2.ListItemsRequest(parent="galleries/g", page_size=2)),
        (stubs.galleries.UpdateItem, update),
        (
            stubs.galleries.BatchUpdateItems,
            gallery_pb2.BatchUpdateItemsRequest(parent="galleries/g", requests=[update], allow_missing=True),
        ),
        (stubs.galleries.PurgeItems, gallery_pb2.PurgeItemsRequest(parent="galleries/g", filter="identity = nobody")),
        (stubs.galleries.DeleteItem, gallery_pb2.DeleteItemRequest(name="galleries/g/items/none")),
        (
            stubs.galleries.BatchDeleteItems,
            gallery_pb2.BatchDeleteItemsRequest(parent="galleries/g", names=["galleries/g/items/none"]),
        ),
        (stubs.models.GetModel, model_pb2.GetModelRequest(name="models/active")),
        (stubs.models.ListModels, model_pb2.ListModelsRequest()),
        (stubs.models.ActivateModel, model_pb2.ActivateModelRequest(name="models/active", validate_only=True)),
        (stubs.models.DeactivateModel, model_pb2.DeactivateModelRequest(name="models/none", validate_only=True)),
        (stubs.aliases.UpdateAlias, alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True)),
        (stubs.aliases.GetAlias, alias_pb2.GetAliasRequest(name="aliases/a")),
        (stubs.aliases.ListAliases, alias_pb2.ListAliasesRequest()),
        (stubs.aliases.DeleteAlias, alias_pb2.DeleteAliasRequest(name="aliases/none")),
        (stubs.feedback.RecordFeedback, feedback_pb2.RecordFeedbackRequest(feedback=[case])),
        (stubs.feedback.ListFeedback, feedback_pb2.ListFeedbackRequest()),
        (stubs.feedback.DeleteFeedback, feedback_pb2.DeleteFeedbackRequest(name="feedback/77")),
        (stubs.upkeep.ReindexGallery, upkeep_pb2.ReindexGalleryRequest(name="galleries/g", validate_only=True)),
        (stubs.upkeep.VerifyGallery, upkeep_pb2.VerifyGalleryRequest(name="galleries/g", validate_only=True)),
        (
            stubs.upkeep.MigrateGallery,
            upkeep_pb2.MigrateGalleryRequest(name="galleries/g", gallery_id="h", validate_only=True),
        ),
        (
            stubs.upkeep.CreateSnapshot,
            upkeep_pb2.CreateSnapshotRequest(parent="galleries/g", snapshot_id="s", validate_only=True),
        ),
        (stubs.upkeep.ListSnapshots, upkeep_pb2.ListSnapshotsRequest(parent="galleries/g")),
        (stubs.upkeep.DeleteSnapshot, upkeep_pb2.DeleteSnapshotRequest(name="galleries/g/snapshots/none")),
        (
            stubs.upkeep.RestoreGallery,
            upkeep_pb2.RestoreGalleryRequest(snapshot="galleries/g/snapshots/none", gallery_id="q", validate_only=True),
        ),
        (stubs.operations.GetOperation, operations_pb2.GetOperationRequest(name="operations/none")),
        (stubs.operations.ListOperations, operations_pb2.ListOperationsRequest(name="operations")),
        (stubs.operations.CancelOperation, operations_pb2.CancelOperationRequest(name="operations/none")),
        (stubs.operations.DeleteOperation, operations_pb2.DeleteOperationRequest(name="operations/none")),
        (stubs.operations.WaitOperation, operations_pb2.WaitOperationRequest(name="operations/none")),
    ]


def is_named(error: grpc.RpcError) -> bool:
    """Whether it has a reason, and is no fault of the server's."""
    if error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}:
        return False
    return bool(info(rich(error)).reason) and "\n" not in (error.details() or "")


@pytest.mark.parametrize("share", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_whatever_stands_in_a_field_the_call_ends_with_a_reason(stubs: Stubs, share: float) -> None:
    draw, refused, answered = random.Random(SEED), 0, 0
    wrong: list[str] = []
    for call, request in sensible(stubs):
        for what, absurd in mutants(request):
            if draw.random() >= share:
                continue
            try:
                response = call(absurd, timeout=60)
                if isinstance(response, grpc.Call):
                    list(response)
                answered += 1
            except grpc.RpcError as error:
                refused += 1
                if not is_named(error):
                    wrong.append(f"{type(request).__name__}: {what}: {error.code()}: {error.details()}")
    print(f"{refused} refused, {answered} answered")
    assert not wrong
    assert refused > answered > 0
