"""Galleries moved to another model over the wire, by a server of two."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.longrunning import operations_pb2
from google.rpc import error_details_pb2

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2
from service import upkeep
from service.namespace import Namespace
from service.serving import AsyncEngine
from service.settings import Settings
from tests.service.harness import (
    Held,
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    finished,
    info,
    make_bundle,
    names_found,
    png,
    put_alias,
    refused,
    rich,
    served,
    stored,
    vector,
)


def gallery_of(operation: operations_pb2.Operation) -> gallery_pb2.Gallery:
    made = gallery_pb2.Gallery()
    assert operation.response.Unpack(made), operation
    return made


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("newer") / "toy", seed=1)


@pytest.fixture
def two(loop: Loop, settings: Settings, newer: Bundle, tmp_path: Path) -> Iterator[Stubs]:
    """A server with the model of `settings` and a newer one, which stores thumbnails."""
    own = settings.model_copy(
        update={"galleries": tmp_path / "galleries", "other_bundles": (newer.path,), "thumbnails": 32}
    )
    with served(loop, own) as server, connected(server.address) as stubs:
        yield stubs


def migration(alias: str = "", model: str = "") -> upkeep_pb2.MigrateGalleryRequest:
    return upkeep_pb2.MigrateGalleryRequest(
        name="galleries/old",
        gallery_id="new",
        alias=f"aliases/{alias}" if alias else "",
        model=f"models/{model}" if model else "",
    )


def embedding(stubs: Stubs, gallery: str, item: str) -> bytes:
    request = gallery_pb2.GetItemRequest(name=f"galleries/{gallery}/items/{item}")
    return stubs.galleries.GetItem(request).item.embedding


def test_each_gallery_is_answered_by_the_model_of_its_items(two: Stubs, newer: Bundle) -> None:
    models = two.models.ListModels(model_pb2.ListModelsRequest()).models
    assert [model.active for model in models].count(True) == 1
    assert newer.name in {model.name.removeprefix("models/") for model in models}
    two.fill("old", {"a": encoded(1), "b": encoded(2)})
    put_alias(two, "now", "old")
    finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)

    (a_D, b_D) = Encoder(newer, device="cpu").encode([png(1), png(2)])
    assert np.array_equal(np.frombuffer(embedding(two, "new", "a"), "<f4"), a_D)
    assert np.array_equal(np.frombuffer(embedding(two, "new", "b"), "<f4"), b_D)
    moved = two.search.Search(search_pb2.SearchRequest(gallery="galleries/now", query=encoded(1))).neighbors
    assert [neighbor.item for neighbor in moved] == ["galleries/new/items/a", "galleries/new/items/b"]
    assert {neighbor.decision.model for neighbor in moved} == {f"models/{newer.name}"}
    assert moved[0].decision.distance == 0
    assert moved[1].decision.distance == pytest.approx(float(np.linalg.norm(a_D - b_D)), abs=1e-6)
    old = two.search.Search(search_pb2.SearchRequest(gallery="galleries/old", query=encoded(1))).neighbors
    assert {neighbor.decision.model for neighbor in old}.isdisjoint({f"models/{newer.name}"})

    config = search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery="galleries/now"))
    (answer,) = two.search.StreamSearch(iter([config, search_pb2.StreamSearchRequest(query=encoded(1))]))
    assert list(answer.neighbors.neighbors) == list(moved)
    update = gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name="galleries/now/items/c"), image=encoded(3), allow_missing=True
    )
    two.galleries.UpdateItem(update)
    (c_D,) = Encoder(newer, device="cpu").encode([png(3)])
    assert np.array_equal(np.frombuffer(embedding(two, "new", "c"), "<f4"), c_D)
    assert two.match.Embed(match_pb2.EmbedRequest(image=encoded(3))).model != f"models/{newer.name}"


def test_a_migration_says_whose_images_it_needs_and_takes_those_imported(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"kept": encoded(1), "bare-1": vector(1), "bare-2": vector(0, 1)})
    put_alias(two, "now", "old")
    failed = finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)
    assert failed.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    reason = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(reason) for detail in failed.error.details)
    assert reason.reason == "IMAGES_NEEDED"
    assert "2 items" in failed.error.message
    assert "'bare-1', 'bare-2'" in failed.error.message
    listing = two.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries
    assert [gallery.name for gallery in listing] == ["galleries/old"]
    alias = two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/now")).alias
    assert alias.gallery == "galleries/old"

    # A gallery of the newer model, made by migrating an empty one, takes the images that are needed.
    two.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="empty"))
    seed = upkeep_pb2.MigrateGalleryRequest(name="galleries/empty", gallery_id="new", model=f"models/{newer.name}")
    finished(two, two.upkeep.MigrateGallery(seed).operation)
    imports = [
        gallery_pb2.ImportItemsRequest(config=gallery_pb2.ImportItemsConfig(parent="galleries/new")),
        *(
            gallery_pb2.ImportItemsRequest(
                item=gallery_pb2.UpdateItemRequest(
                    item=gallery_pb2.Item(name=f"galleries/new/items/bare-{i}", identity="sent"), image=encoded(i)
                )
            )
            for i in (1, 2)
        ),
    ]
    list(two.galleries.ImportItems(iter(imports)))
    done = finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)
    assert gallery_of(done).item_count == 3
    (first_D,) = Encoder(newer, device="cpu").encode([png(1)])
    for name in ("kept", "bare-1"):
        assert np.array_equal(np.frombuffer(embedding(two, "now", name), "<f4"), first_D)


def test_a_migration_to_the_same_model_or_a_third_is_refused(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"a": encoded(1)})
    error = refused(two.upkeep.MigrateGallery, migration())
    assert fields(rich(error)) == ["model"]
    two.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="new"))
    error = refused(two.upkeep.MigrateGallery, migration(model=newer.name))
    assert info(rich(error)).reason == "MODEL_MISMATCH"


def test_what_a_migration_is_refused_for_is_found_by_validating_it(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"a": encoded(1)})
    two.fill("other", {"a": encoded(1)})
    put_alias(two, "taken", "other")
    wrong = [migration(alias, newer.name) for alias in ("other", "old", "new")] + [migration("now", newer.name)]
    wrong[-1].gallery_id = "taken"
    told = []
    for request in wrong:
        seen = set()
        for request.validate_only in (True, False):
            error = refused(two.upkeep.MigrateGallery, request)
            field = info(rich(error)).metadata["field"]
            seen.add((error.code(), field, error.details()))
        (what,) = seen  # the same by validating as by doing
        told.append(what[:2])
    assert told == [
        (grpc.StatusCode.ALREADY_EXISTS, "alias"),
        (grpc.StatusCode.ALREADY_EXISTS, "alias"),
        (grpc.StatusCode.INVALID_ARGUMENT, "alias"),
        (grpc.StatusCode.ALREADY_EXISTS, "gallery_id"),
    ]
    listing = two.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries
    assert [gallery.name for gallery in listing] == ["galleries/old", "galleries/other"]
    moved = migration("taken", newer.name)
    moved.validate_only = True
    two.upkeep.MigrateGallery(moved)
    assert two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/taken")).alias.gallery == "galleries/other"
    moved.validate_only = False
    finished(two, two.upkeep.MigrateGallery(moved).operation)
    assert two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/taken")).alias.gallery == "galleries/new"


def behind_another(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Whatever is begun on the gallery now waits until this is let go."""
    verifying = Held(monkeypatch, upkeep, "verify")
    stubs.upkeep.VerifyGallery(upkeep_pb2.VerifyGalleryRequest(name="galleries/old"))
    verifying.wait()
    return verifying


def kept_for_a_migration(error: grpc.RpcError, operation: operations_pb2.Operation) -> None:
    """The change of models was refused for the sake of what this operation makes."""
    assert (error.code(), info(rich(error)).reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "GALLERIES_INCOMPATIBLE",
    )
    failure = error_details_pb2.PreconditionFailure()
    assert any(detail.Unpack(failure) for detail in rich(error).details)
    assert [violation.subject for violation in failure.violations] == ["galleries/new"]
    assert operation.name in error.details()


def alias_of(stubs: Stubs, alias: str) -> str:
    return stubs.aliases.GetAlias(alias_pb2.GetAliasRequest(name=f"aliases/{alias}")).alias.gallery


def test_a_model_that_a_migration_waits_to_use_is_not_unloaded(
    two: Stubs, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.fill("old", {"a": encoded(1)})
    put_alias(two, "now", "old")
    before = behind_another(two, monkeypatch)
    operation = two.upkeep.MigrateGallery(migration("now", newer.name)).operation
    unload = model_pb2.DeactivateModelRequest(name=f"models/{newer.name}")
    for unload.validate_only in (True, False):
        kept_for_a_migration(refused(two.models.DeactivateModel, unload), operation)
    before.let_go.set()
    gallery_of(finished(two, operation))
    assert alias_of(two, "now") == "galleries/new"
    assert names_found(two, "now", encoded(1)) == ["galleries/new/items/a"]


def test_a_model_that_a_cancelled_migration_waited_for_is_unloaded(
    two: Stubs, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.fill("old", {"a": encoded(1)})
    before = behind_another(two, monkeypatch)
    operation = two.upkeep.MigrateGallery(migration("", newer.name)).operation
    two.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
    unloaded = two.models.DeactivateModel(model_pb2.DeactivateModelRequest(name=f"models/{newer.name}"))
    assert list(unloaded.incompatible_galleries) == []
    before.let_go.set()


def test_the_active_model_that_a_migration_waits_to_use_is_not_swapped_out(
    two: Stubs, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = two.models.GetModel(model_pb2.GetModelRequest(name="models/active")).model.name
    swap = model_pb2.ActivateModelRequest(name=f"models/{newer.name}", keep_previous=True)
    two.models.ActivateModel(swap)
    two.fill("old", {"a": encoded(1)})  # of the newer model
    two.models.ActivateModel(model_pb2.ActivateModelRequest(name=active, keep_previous=True))
    before = behind_another(two, monkeypatch)
    operation = two.upkeep.MigrateGallery(migration()).operation
    swap.keep_previous = False
    kept_for_a_migration(refused(two.models.ActivateModel, swap), operation)
    swap.keep_previous = True
    two.models.ActivateModel(swap)
    before.let_go.set()
    assert gallery_of(finished(two, operation)).model == active


@pytest.mark.parametrize(
    ("owner", "step"),
    [(None, "waiting"), (upkeep.Migration, "check_images"), (Encoder, "encode_with_norms"), (Namespace, "put_alias")],
)
def test_a_migration_whose_model_is_unloaded_by_force_leaves_the_alias(
    two: Stubs, newer: Bundle, monkeypatch: pytest.MonkeyPatch, owner: type | None, step: str
) -> None:
    two.fill("old", {"a": encoded(1)})
    put_alias(two, "now", "old")
    held = behind_another(two, monkeypatch) if owner is None else Held(monkeypatch, owner, step)
    operation = two.upkeep.MigrateGallery(migration("now", newer.name)).operation
    held.wait()
    unload = model_pb2.DeactivateModelRequest(name=f"models/{newer.name}", force=True)
    assert list(two.models.DeactivateModel(unload).incompatible_galleries) == ["galleries/new"]
    held.let_go.set()
    failed = finished(two, operation)
    reason = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(reason) for detail in failed.error.details)
    assert (failed.error.code, reason.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION.value[0],
        "MODEL_MISMATCH",
    )
    assert alias_of(two, "now") == "galleries/old"
    assert names_found(two, "now", encoded(1)) == ["galleries/old/items/a"]

    # Loaded again, it goes on where it ended.
    active = two.models.GetModel(model_pb2.GetModelRequest(name="models/active")).model.name
    for name in (f"models/{newer.name}", active):
        two.models.ActivateModel(model_pb2.ActivateModelRequest(name=name, keep_previous=True))
    gallery_of(finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation))
    assert names_found(two, "now", encoded(1)) == ["galleries/new/items/a"]


@pytest.fixture
def migrated(two: Stubs, newer: Bundle) -> Stubs:
    """A gallery `old`, a gallery `new` of the same images by the newer model, and an alias `now` of the first."""
    two.fill("old", {f"item-{i}": encoded(i) for i in range(4)})
    finished(two, two.upkeep.MigrateGallery(migration(model=newer.name)).operation)
    put_alias(two, "now", "old")
    return two


def move_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the alias moves to the new gallery when a call has chosen its model and is about to be worked on."""

    def moves_first(function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(self: AsyncEngine, *args: Any, **options: Any) -> Any:
            self.engine.names.put_alias("now", "new")
            return function(self, *args, **options)

        return moved

    for name in ("ask", "search"):
        monkeypatch.setattr(AsyncEngine, name, moves_first(getattr(AsyncEngine, name)))


@pytest.mark.parametrize(
    "kind", ["verify", "batch verify", "stream verify", "embed", "batch embed", "search", "matches"]
)
def test_an_item_is_of_the_gallery_that_its_alias_stood_for_when_the_call_came(
    migrated: Stubs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its embedding was of the new model and was compared by the old, which refused it."""
    item = stored("now", "item-0")
    pair = match_pb2.ImagePair(a=item, b=stored("now", "item-1"))
    point = common_pb2.OperatingPoint(threshold=2)
    asked: dict[str, Callable[[], Any]] = {
        "verify": lambda: migrated.match.Verify(match_pb2.VerifyRequest(a=pair.a, b=pair.b)),
        "batch verify": lambda: migrated.match.BatchVerify(match_pb2.BatchVerifyRequest(pairs=[pair])),
        "stream verify": lambda: list(
            migrated.match.StreamVerify(
                iter(
                    [
                        match_pb2.StreamVerifyRequest(config=match_pb2.StreamVerifyConfig()),
                        match_pb2.StreamVerifyRequest(pair=pair),
                    ]
                )
            )
        ),
        "embed": lambda: migrated.match.Embed(match_pb2.EmbedRequest(image=item)),
        "batch embed": lambda: migrated.match.BatchEmbed(match_pb2.BatchEmbedRequest(images=[item])),
        "search": lambda: migrated.search.Search(search_pb2.SearchRequest(gallery="galleries/now", query=item)),
        "matches": lambda: list(
            migrated.search.SearchMatches(
                search_pb2.SearchMatchesRequest(gallery="galleries/now", query=item, operating_point=point)
            )
        ),
    }
    before = asked[kind]()

    move_first(monkeypatch)
    assert asked[kind]() == before
    assert migrated.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/now")).alias.gallery == "galleries/new"


def test_a_stream_of_searches_goes_on_when_its_alias_moves_to_a_gallery_of_another_model(
    migrated: Stubs, newer: Bundle
) -> None:
    moved = threading.Event()
    bare, named = vector(1), vector(1)
    named.model = f"models/{newer.name}"

    def sent() -> Iterator[search_pb2.StreamSearchRequest]:
        config = search_pb2.StreamSearchConfig(gallery="galleries/now", k=2)
        yield search_pb2.StreamSearchRequest(config=config)
        yield search_pb2.StreamSearchRequest(query=bare)
        assert moved.wait(timeout=20)
        for query in (encoded(1), bare, named, stored("now", "item-2")):
            yield search_pb2.StreamSearchRequest(query=query)

    responses = migrated.search.StreamSearch(sent())
    assert {each.item.split("/")[1] for each in next(responses).neighbors.neighbors} == {"old"}
    put_alias(migrated, "now", "new")
    moved.set()
    image, refusal, of_model, item = responses
    assert info(refusal.error).reason == "MODEL_MISMATCH"
    assert info(refusal.error).metadata["field"] == "query.embedding"
    alone = migrated.search.Search(search_pb2.SearchRequest(gallery="galleries/now", query=encoded(1), k=2))
    assert list(image.neighbors.neighbors) == list(alone.neighbors)
    for response in (image, of_model, item):
        assert {each.item.split("/")[1] for each in response.neighbors.neighbors} == {"new"}
        assert {each.decision.model for each in response.neighbors.neighbors} == {f"models/{newer.name}"}


def write_in(stubs: Stubs, kind: str, image: common_pb2.ImageInput) -> list[Any]:
    """What becomes of a new item of the gallery that the alias stands for."""
    update = gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name="galleries/now/items/more"),
        image=image,
        allow_missing=True,
        request_id=str(uuid.uuid4()) if kind == "one" else "",
    )
    match kind:
        case "one":
            return [stubs.galleries.UpdateItem(update).item]
        case "batch":
            batch = gallery_pb2.BatchUpdateItemsRequest(
                parent="galleries/now", requests=[update], allow_missing=True, request_id=str(uuid.uuid4())
            )
            return [result.item for result in stubs.galleries.BatchUpdateItems(batch).results]
        case _:
            config = gallery_pb2.ImportItemsConfig(parent="galleries/now")
            sent = [gallery_pb2.ImportItemsRequest(config=config), gallery_pb2.ImportItemsRequest(item=update)]
            (told,) = stubs.galleries.ImportItems(iter(sent))
            assert (told.stored_count, list(told.failures)) == (1, [])
            return []


@pytest.mark.parametrize("kind", ["one", "batch", "import"])
def test_an_image_written_while_its_alias_moves_is_embedded_by_the_model_of_the_new_gallery(
    migrated: Stubs, newer: Bundle, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It was refused for being embedded by the old one."""
    move_first(monkeypatch)
    for item in write_in(migrated, kind, encoded(9)):
        assert item.name == "galleries/new/items/more"
    (emb_D,) = Encoder(newer, device="cpu").encode([png(9)])
    assert np.array_equal(np.frombuffer(embedding(migrated, "new", "more"), "<f4"), emb_D)


@pytest.mark.parametrize("kind", ["one", "batch", "import"])
def test_an_embedding_written_while_its_alias_moves_is_refused(
    migrated: Stubs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    move_first(monkeypatch)
    with pytest.raises(grpc.RpcError) as caught:
        write_in(migrated, kind, vector(1))
    assert info(rich(caught.value)).reason == "MODEL_MISMATCH"
    missing = gallery_pb2.GetItemRequest(name="galleries/new/items/more")
    assert refused(migrated.galleries.GetItem, missing).code() is grpc.StatusCode.NOT_FOUND
