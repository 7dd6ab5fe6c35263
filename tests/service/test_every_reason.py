"""docs/errors.md and the errors themselves say the same, and each reason can be met over the wire."""

from __future__ import annotations

import errno
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from embedding import errors as domain
from embedding.bundle import WEIGHTS, Bundle
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2
from service import errors, operations
from service.admission import Room
from service.server import Server
from service.settings import Settings
from tests.service.harness import (
    MAX_MESSAGE_BYTES,
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    info,
    make_bundle,
    png,
    refused,
    rich,
    served,
)
from tests.service.test_error_table import kinds

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"

UNMET = {
    "CANCELLED": "gRPC answers a caller who leaves itself; an operation's status is tested with operations",
    "DEADLINE_EXCEEDED": "gRPC ends the call at its deadline itself",
    **dict.fromkeys(
        ("CREDENTIALS_MISSING", "CREDENTIALS_INVALID", "SCOPE_MISSING", "GALLERY_FORBIDDEN", "RATE_LIMITED"),
        "of servers that ask who calls: tested by every method in test_rights.py, and in test_keys.py",
    ),
    "UNAUTHENTICATED": "stands for the more exact ones",
    "PERMISSION_DENIED": "stands for the more exact ones",
    "NOT_SUPPORTED": "of galleries in Milvus, and tested with them",
    "JOB_CHANGED": "of commands",
    "INVALID_RECIPE": "of commands",
    "INVALID_DATASET": "of commands",
    "TRAINING_DIVERGED": "of commands",
}
"""Why no call to this server ends with it."""


def documented() -> dict[str, str]:
    """Codes by reason, from the table."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+|none) \| [^|]+ \| [^|]+ \|$", DOCUMENT.read_text("utf-8"), re.M)
    assert len({reason for reason, _ in rows}) == len(rows), "a reason stands twice"
    return dict(rows)


def test_every_reason_is_documented_with_its_code() -> None:
    real = {"INTERNAL": grpc.StatusCode.INTERNAL.name}
    for kind in kinds(domain.LookalikeError):
        code = errors.code_of(kind("what was wrong"))
        real[kind.reason] = code.name if code else "none"
    assert documented() == real


def test_every_reason_is_provoked_below_or_cannot_be() -> None:
    assert {*PROVOKED, *UNMET} == set(documented())


@dataclass
class Place:
    """A server with a gallery `g` of its active model, and what is needed to go wrong."""

    server: Server
    stubs: Stubs
    bundle: Bundle
    other: Bundle
    folder: Path

    def ask(self, service: str, method: str, request: Message) -> status_pb2.Status:
        return rich(refused(getattr(getattr(self.stubs, service), method), request))


@pytest.fixture(scope="module")
def place(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("reasons")
    bundle = make_bundle(folder / "one", seed=0)
    other = make_bundle(folder / "models" / "two", seed=1)
    own = settings.model_copy(
        update={
            "bundle": bundle.path,
            "galleries": folder / "galleries",
            "models": folder / "models",
            "max_pixels": 1000,
        }
    )
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        alias = alias_pb2.Alias(name="aliases/a", gallery="galleries/g")
        stubs.aliases.UpdateAlias(alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True))
        yield Place(server, stubs, bundle, other, folder)


def verify(place: Place, a: common_pb2.ImageInput, **options: Any) -> status_pb2.Status:
    return place.ask("match", "Verify", match_pb2.VerifyRequest(a=a, b=encoded(1), **options))


def image(data: bytes) -> common_pb2.ImageInput:
    return common_pb2.ImageInput(encoded=data)


def reused(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    request = gallery_pb2.DeleteItemRequest(
        name="galleries/g/items/none", allow_missing=True, request_id=str(uuid.uuid4())
    )
    place.stubs.galleries.DeleteItem(request)
    request.etag = "other"
    return place.ask("galleries", "DeleteItem", request)


def mismatch(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    name = f"models/{place.other.name}"
    place.stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=name, force=True))
    try:
        return place.ask("search", "Search", search_pb2.SearchRequest(gallery="galleries/g", query=encoded(1)))
    finally:
        back = model_pb2.ActivateModelRequest(name=f"models/{place.bundle.name}")
        place.stubs.models.ActivateModel(back)


def ambiguous(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    for name, margin in (("three", 0.25), ("four", 0.5)):
        made = make_bundle(place.folder / "models" / name, seed=3, margin=margin)
    return place.ask("models", "ActivateModel", model_pb2.ActivateModelRequest(name=f"models/{made.name}"))


def damaged(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    bundle = make_bundle(place.folder / "models" / "five", seed=5)
    (bundle.path / WEIGHTS).write_bytes(b"nothing")
    return place.ask(
        "models", "ActivateModel", model_pb2.ActivateModelRequest(name=f"models/{bundle.name}", force=True)
    )


def images_needed(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    name = f"models/{place.other.name}"
    place.stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=name, keep_previous=True))
    try:
        request = upkeep_pb2.MigrateGalleryRequest(name="galleries/g", gallery_id="h", validate_only=True)
        return place.ask("upkeep", "MigrateGallery", request)
    finally:
        place.stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=f"models/{place.bundle.name}"))


def busy(place: Place, monkeypatch: pytest.MonkeyPatch) -> status_pb2.Status:
    monkeypatch.setattr(operations, "MAX_WAITING", 0)
    return place.ask("upkeep", "ReindexGallery", upkeep_pb2.ReindexGalleryRequest(name="galleries/g"))


def overloaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> status_pb2.Status:
    monkeypatch.setattr(Room, "_is_full", lambda *_: True)
    return verify(place, encoded(1))


def not_ready(place: Place, monkeypatch: pytest.MonkeyPatch) -> status_pb2.Status:
    monkeypatch.setattr(place.server._serving, "_line_up", ())
    return verify(place, encoded(1))


def disk_is_full(place: Place, monkeypatch: pytest.MonkeyPatch) -> status_pb2.Status:
    def full(*_: object, **__: object) -> None:
        raise domain.StorageFailed("the disk refused") from OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("index.gallery.Gallery.delete", full)
    return place.ask("galleries", "DeleteItem", gallery_pb2.DeleteItemRequest(name="galleries/g/items/item"))


def bug(place: Place, monkeypatch: pytest.MonkeyPatch) -> status_pb2.Status:
    monkeypatch.setattr("service.engine.Engine.judge", lambda *_: 1 / 0)
    return verify(place, encoded(1))


def delete_gallery(place: Place, name: str) -> status_pb2.Status:
    return place.ask("galleries", "DeleteGallery", gallery_pb2.DeleteGalleryRequest(name=f"galleries/{name}"))


def not_empty(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    place.stubs.fill("full", {"item": encoded(1)})
    return delete_gallery(place, "full")


def filtered(place: Place, text: str) -> status_pb2.Status:
    return place.ask("galleries", "ListItems", gallery_pb2.ListItemsRequest(parent="galleries/g", filter=text))


def too_large(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    name = "galleries/large/items/one"
    place.stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="large"))
    item = gallery_pb2.Item(name=name)
    item.metadata["note"] = "x" * 60_000
    place.stubs.galleries.UpdateItem(gallery_pb2.UpdateItemRequest(item=item, image=encoded(1), allow_missing=True))
    queries = [common_pb2.ImageInput(item=name), *[encoded(2)] * 5]
    return place.ask("search", "BatchSearch", search_pb2.BatchSearchRequest(gallery="galleries/large", queries=queries))


def stale(place: Place, _: pytest.MonkeyPatch) -> status_pb2.Status:
    request = gallery_pb2.DeleteItemRequest(name="galleries/g/items/item", etag="another")
    return place.ask("galleries", "DeleteItem", request)


PROVOKED = {
    "INVALID_INPUT": lambda place, _: verify(place, common_pb2.ImageInput()),
    "INVALID_IMAGE": lambda place, _: verify(place, image(png(1)[:50])),
    "IMAGE_TOO_LARGE": lambda place, _: verify(place, image(png(1, size=(100, 100)))),
    "INVALID_VECTOR": lambda place, _: verify(place, common_pb2.ImageInput(embedding=b"1234")),
    "INVALID_OPERATING_POINT": lambda place, _: verify(
        place, encoded(1), operating_point=common_pb2.OperatingPoint(target_far=1e-9)
    ),
    "REQUEST_TOO_LARGE": lambda place, _: verify(place, image(bytes(MAX_MESSAGE_BYTES))),
    "RESPONSE_TOO_LARGE": too_large,
    "INVALID_FILTER": lambda place, _: filtered(place, "name ="),
    "REQUEST_ID_REUSED": reused,
    "NOT_FOUND": lambda place, _: delete_gallery(place, "nowhere"),
    "ALREADY_EXISTS": lambda place, _: place.ask(
        "galleries", "CreateGallery", gallery_pb2.CreateGalleryRequest(gallery_id="g")
    ),
    "MODEL_MISMATCH": mismatch,
    "GALLERIES_INCOMPATIBLE": lambda place, _: place.ask(
        "models", "ActivateModel", model_pb2.ActivateModelRequest(name=f"models/{place.other.name}")
    ),
    "MODEL_ACTIVE": lambda place, _: place.ask(
        "models", "DeactivateModel", model_pb2.DeactivateModelRequest(name="models/active")
    ),
    "MODEL_AMBIGUOUS": ambiguous,
    "STALE_ETAG": stale,
    "GALLERY_NOT_EMPTY": not_empty,
    "GALLERY_ALIASED": lambda place, _: delete_gallery(place, "g"),
    "IMAGES_NEEDED": images_needed,
    "BUSY": busy,
    "OVERLOADED": overloaded,
    "NOT_READY": not_ready,
    "DAMAGED_DATA": damaged,
    "STORAGE_FAILED": disk_is_full,
    "INTERNAL": bug,
}


@pytest.mark.parametrize("reason", PROVOKED)
def test_a_reason_over_the_wire(place: Place, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    status = PROVOKED[reason](place, monkeypatch)
    assert (info(status).reason, info(status).domain) == (reason, "lookalike")
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    expected = "RESOURCE_EXHAUSTED" if reason == "STORAGE_FAILED" else documented()[reason]
    assert code.name == expected
    details = {detail.type_url.rpartition(".")[2] for detail in status.details}
    assert ("BadRequest" in details) == (code is grpc.StatusCode.INVALID_ARGUMENT and reason != "REQUEST_TOO_LARGE")
    assert ("RetryInfo" in details) == (code.name in {"UNAVAILABLE", "RESOURCE_EXHAUSTED"})
    assert ("QuotaFailure" in details) == (code.name == "RESOURCE_EXHAUSTED")
    assert ("PreconditionFailure" in details) == (reason == "GALLERIES_INCOMPATIBLE")
    assert ("RequestInfo" in details) == (reason == "INTERNAL")
    assert "\n" not in status.message


def test_all_that_is_wrong_is_told_at_once(place: Place) -> None:
    request = search_pb2.SearchRequest(gallery="Bad", k=-1, filter="name =", effort=search_pb2.Effort(recall=2))
    request.read_mask.paths.append("colour")
    status = place.ask("search", "Search", request)
    assert fields(status) == ["gallery", "filter", "effort.recall", "read_mask", "k"]
    assert status.message.startswith("gallery must be")
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [violation.reason for violation in bad.field_violations][1] == "INVALID_FILTER"
    pair = match_pb2.VerifyRequest(a=image(b"no image"))
    assert fields(place.ask("match", "Verify", pair)) == ["a.encoded", "b"]
    index = gallery_pb2.IndexSettings(min_recall=2, structure="none", memory_bytes=-1, vectors="int8")
    update = gallery_pb2.UpdateGalleryRequest(gallery=gallery_pb2.Gallery(name="g", index=index))
    named = fields(place.ask("galleries", "UpdateGallery", update))
    assert named == [
        "gallery.name",
        *(f"gallery.index.{name}" for name in ("min_recall", "structure", "memory_bytes", "vectors")),
    ]


def test_a_status_that_names_much_still_fits_into_headers(place: Place) -> None:
    request = search_pb2.SearchRequest(gallery="g" * 9000, k=-1, filter="x" * 5000, effort=search_pb2.Effort(recall=2))
    request.read_mask.paths.append("c" * 9000)
    assert len(fields(place.ask("search", "Search", request))) == 5
