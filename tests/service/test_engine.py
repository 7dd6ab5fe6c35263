"""The engine's synchronous face: the same questions without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding.bundle import Bundle
from embedding.decision import Judge, OperatingPoint, Verdict, distance
from embedding.encoder import Encoder
from embedding.errors import (
    Busy,
    GalleryNotEmpty,
    InvalidImage,
    InvalidInput,
    InvalidVector,
    LookalikeError,
    NotFound,
    StaleEtag,
    StorageFailed,
)
from index import Item
from service.engine import Engine
from service.questions import Embed, Scope, Search, SearchBatch, Verify, VerifyBatch
from service.sources import EncodedImage, GivenEmbedding, StoredItem
from service.writes import Draft, UpdateItems
from tests.service.harness import DIM, png


def image(seed: int) -> EncodedImage:
    return EncodedImage(data=png(seed))


@pytest.fixture
def engine(bundle: Bundle, tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(bundle.path, tmp_path / "galleries", device="cpu") as engine:
        engine.names.catalog.create("g", engine.model)
        drafts = [Draft(name=f"item-{seed}", image=image(seed), identity=str(seed)) for seed in range(5)]
        stored = engine.ask(UpdateItems(gallery="g", drafts=drafts))
        assert all(isinstance(item, Item) for item in stored)
        yield engine


def test_verify_is_the_decision_on_the_two_embeddings(engine: Engine, bundle: Bundle) -> None:
    a_D, b_D = Encoder(bundle, device="cpu").encode([png(1), png(2)])
    point = OperatingPoint(name="strict", uncertain_within=0.01)
    expected = Judge(bundle.calibration, point, model=bundle.name).judge(float(distance(a_D, b_D)))
    assert engine.ask(Verify(a=image(1), b=image(2), point=point)) == expected
    assert engine.ask(Verify(a=GivenEmbedding(values=b_D), b=StoredItem(gallery="g", item="item-1"), point=point)) == (
        expected
    )


def test_search_leaves_the_item_itself_out(engine: Engine) -> None:
    whole = engine.ask(Search(scope=Scope(gallery="g"), query=image(3))).neighbors
    assert (whole[0].item.name, whole[0].decision.verdict) == ("item-3", Verdict.MATCH)
    others = engine.ask(Search(scope=Scope(gallery="g"), query=StoredItem(gallery="g", item="item-3"))).neighbors
    assert [(n.item.name, n.decision) for n in others] == [(n.item.name, n.decision) for n in whole[1:]]


def test_batches_hold_an_outcome_for_each(engine: Engine) -> None:
    bad = EncodedImage(data=b"no image", path="somewhere")
    found, error = engine.ask(SearchBatch(scope=Scope(gallery="g"), queries=[image(1), bad], k=1))
    assert not isinstance(found, LookalikeError)
    assert found.neighbors[0].item.name == "item-1"
    assert isinstance(error, InvalidImage)
    assert error.field == "somewhere"
    decision, error = engine.ask(VerifyBatch(pairs=[(image(1), image(1)), (image(1), bad)]))
    assert not isinstance(decision, LookalikeError)
    assert decision.is_match
    assert isinstance(error, InvalidImage)


def test_identical_images_of_one_question_are_embedded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    prepare = Encoder.prepare
    monkeypatch.setattr(Encoder, "prepare", lambda self, data: (decoded.append(data), prepare(self, data))[1])
    engine.ask(VerifyBatch(pairs=[(image(1), image(1)), (image(2), image(1))]))
    assert decoded == [png(1), png(2)]


def test_errors_are_raised(engine: Engine) -> None:
    with pytest.raises(InvalidVector, match=str(4 * DIM)):
        engine.ask(Embed(image=GivenEmbedding(values=b"1234")))
    with pytest.raises(NotFound, match="nobody"):
        engine.ask(Embed(image=StoredItem(gallery="g", item="nobody")))
    with pytest.raises(NotFound, match="nowhere"):
        engine.ask(Search(scope=Scope(gallery="nowhere"), query=image(1)))
    with pytest.raises(InvalidInput, match="k must"):
        engine.ask(Search(scope=Scope(gallery="g"), query=image(1), k=0))


def test_conditional_writes(engine: Engine) -> None:
    etag = engine.gallery("g").get("item-1").etag
    drafts = [
        Draft(name="item-1", image=image(7), etag=etag),
        Draft(name="item-2", image=image(7), etag=etag),
        Draft(name="new", image=image(7)),
    ]
    stored, stale, unknown = engine.ask(UpdateItems(gallery="g", drafts=drafts, allow_missing=False))
    assert isinstance(stored, Item)
    assert stored.etag != etag
    assert isinstance(stale, StaleEtag)
    assert isinstance(unknown, NotFound)
    assert np.array_equal(engine.gallery("g").get("item-1").embedding, engine.ask(Embed(image=image(7))))


def test_a_gallery_goes_with_its_items_only_by_force(engine: Engine) -> None:
    with pytest.raises(GalleryNotEmpty, match="5 items"):
        engine.names.delete_gallery("g")
    engine.names.delete_gallery("g", force=True)
    with pytest.raises(NotFound):
        engine.names.delete_gallery("g")


def test_one_engine_writes_and_others_read(engine: Engine, bundle: Bundle) -> None:
    root = engine.names.catalog.root
    with pytest.raises(Busy):
        Engine.open(bundle.path, root, device="cpu")
    with Engine.open(bundle.path, root, read_only=True, device="cpu") as reader:
        assert reader.ask(Search(scope=Scope(gallery="g"), query=image(3), k=1)).neighbors[0].item.name == "item-3"
        with pytest.raises(StorageFailed, match="read-only"):
            reader.ask(UpdateItems(gallery="g", drafts=[Draft(name="x", image=image(1))]))
