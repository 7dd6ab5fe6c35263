"""Tokens of pages: each list takes its own alone, and goes on after what has gone meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.longrunning import operations_pb2

from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, upkeep_pb2
from service.servicers import pages
from tests.service.harness import Stubs, encoded, fields, finished, refused, rich

Ask = Callable[..., Any]


@pytest.fixture
def lists(stubs: Stubs, gallery: str) -> dict[str, Ask]:
    """Each list by what it lists, of two elements at least but for models, which may be one."""
    stubs.fill(gallery, {"a": encoded(1), "b": encoded(2)})
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=f"{gallery}-2"))
    name = f"galleries/{gallery}"
    for i in "ab":
        alias = alias_pb2.Alias(name=f"aliases/{gallery}-{i}", gallery=name)
        stubs.aliases.UpdateAlias(alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True))
        begun = stubs.upkeep.CreateSnapshot(upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id=i))
        finished(stubs, begun.operation)
        decision = stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))).decision
        case = feedback_pb2.Feedback(case_id=f"{gallery}-{i}", decision=decision, truth=feedback_pb2.TRUTH_MATCH)
        stubs.feedback.RecordFeedback(feedback_pb2.RecordFeedbackRequest(feedback=[case]))

    def ask(call: Any, request: type, **always: Any) -> Ask:
        return lambda **options: call(request(**{**always, **options}))

    return {
        "items": ask(stubs.galleries.ListItems, gallery_pb2.ListItemsRequest, parent=name),
        "galleries": ask(stubs.galleries.ListGalleries, gallery_pb2.ListGalleriesRequest),
        "aliases": ask(stubs.aliases.ListAliases, alias_pb2.ListAliasesRequest),
        "models": ask(stubs.models.ListModels, model_pb2.ListModelsRequest),
        "feedback": ask(stubs.feedback.ListFeedback, feedback_pb2.ListFeedbackRequest),
        "snapshots": ask(stubs.upkeep.ListSnapshots, upkeep_pb2.ListSnapshotsRequest, parent=name),
        "operations": ask(stubs.operations.ListOperations, operations_pb2.ListOperationsRequest),
    }


def test_a_list_takes_its_own_tokens_alone(lists: dict[str, Ask]) -> None:
    tokens = {kind: ask(page_size=1).next_page_token for kind, ask in lists.items()}
    assert [kind for kind, token in tokens.items() if not token] == ["models"]
    for kind, ask in lists.items():
        for of, token in tokens.items():
            if of == kind or not token:
                ask(page_token=token)
            else:
                status = rich(refused(lambda request, ask=ask: ask(**request), {"page_token": token}))  # type: ignore[misc, arg-type]
                assert fields(status) == ["page_token"]
                assert kind in status.message


def test_a_token_holds_for_one_parent_and_one_filter_alone(stubs: Stubs, lists: dict[str, Ask], gallery: str) -> None:
    stubs.fill(f"{gallery}-3", {"a": encoded(1), "b": encoded(2)})
    begun = stubs.upkeep.CreateSnapshot(
        upkeep_pb2.CreateSnapshotRequest(parent=f"galleries/{gallery}-3", snapshot_id="a")
    )
    finished(stubs, begun.operation)
    elsewhere = {"parent": f"galleries/{gallery}-3"}
    for kind, other in {
        "items": elsewhere,
        "snapshots": elsewhere,
        "operations": {"filter": "done = true"},
    }.items():
        token = lists[kind](page_size=1).next_page_token
        asked = {"page_token": token, **other}
        status = rich(refused(lambda request, ask=lists[kind]: ask(**request), asked))  # type: ignore[misc, arg-type]
        assert fields(status) == ["page_token"]
    filtered = lists["items"](page_size=1, filter="name >= 'a'")
    again = {"page_token": filtered.next_page_token}
    assert [item.name[-2:] for item in lists["items"](filter="name >= 'a'", **again).items] == ["/b"]
    status = rich(refused(lambda request: lists["items"](**request), again))  # type: ignore[arg-type]
    assert fields(status) == ["page_token"]
    by_alias = lists["items"](parent=f"galleries/{gallery}-a", page_token=lists["items"](page_size=1).next_page_token)
    assert len(by_alias.items) == 1, "an alias is another name of the same list"


def test_pages_end_by_bytes(lists: dict[str, Ask], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE_BYTES", 1)
    for kind, ask in lists.items():
        whole, token = [], ""
        while not whole or token:
            page = ask(page_token=token)
            elements = getattr(page, kind)
            assert len(elements) == 1
            whole += elements
            token = page.next_page_token
        assert len(whole) > 1 or kind == "models"


def test_a_list_of_operations_goes_on_after_one_that_is_forgotten(stubs: Stubs, lists: dict[str, Ask]) -> None:
    def names(**options: Any) -> tuple[list[str], str]:
        page = lists["operations"](**options)
        return [operation.name for operation in page.operations], page.next_page_token

    every, _ = names()
    first, token = names(page_size=1)
    assert first == every[:1]
    stubs.operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=first[0]))
    assert names(page_token=token)[0] == every[1:]
