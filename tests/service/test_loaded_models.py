"""Images that name a gallery of a loaded model are compared by that model, and `model` is checked for every image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from embedding.bundle import Bundle
from embedding.decision import Judge, OperatingPoint
from embedding.errors import InvalidOperatingPoint
from lookalike.v1 import common_pb2, match_pb2, model_pb2
from service.engine import Engine
from service.settings import Settings
from tests.service.harness import (
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    info,
    make_bundle,
    refused,
    rich,
    served,
    stored,
)


@dataclass
class Place:
    """A server whose model `two` answers, with a gallery of it and one of the loaded model `one`."""

    stubs: Stubs
    one: Bundle
    two: Bundle


@pytest.fixture(scope="module")
def place(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("loaded")
    one, two = make_bundle(folder / "one", seed=0), make_bundle(folder / "two", seed=1, margin=0.5)
    own = settings.model_copy(update={"bundle": one.path, "galleries": folder / "galleries", "models": folder})
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.fill("of-one", {"x": encoded(1), "y": encoded(2)})
        stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=f"models/{two.name}", keep_previous=True))
        stubs.fill("of-two", {"x": encoded(1), "y": encoded(2)})
        yield Place(stubs, one, two)


def verified(place: Place, a: common_pb2.ImageInput, b: common_pb2.ImageInput) -> common_pb2.Decision:
    return place.stubs.match.Verify(match_pb2.VerifyRequest(a=a, b=b)).decision


def test_a_pair_is_decided_by_the_model_of_its_items(place: Place) -> None:
    for gallery, bundle in (("of-one", place.one), ("of-two", place.two)):
        both = verified(place, stored(gallery, "x"), stored(gallery, "y"))
        assert both.model == f"models/{bundle.name}"
        assert both.threshold == bundle.calibration.learned_margin
        assert verified(place, encoded(1), stored(gallery, "y")) == both  # the image is embedded by the same
        embedding = place.stubs.match.Embed(match_pb2.EmbedRequest(image=stored(gallery, "x")))
        assert embedding.model == both.model
        kept = common_pb2.ImageInput(embedding=embedding.embedding, model=embedding.model)
        assert verified(place, stored(gallery, "y"), kept) == both
        together = place.stubs.match.BatchEmbed(match_pb2.BatchEmbedRequest(images=[encoded(2), stored(gallery, "x")]))
        assert together.model == both.model
        assert together.results[1].embedding == embedding.embedding
    assert verified(place, encoded(1), encoded(2)).model == f"models/{place.two.name}"


def test_items_of_two_models_are_not_compared(place: Place) -> None:
    request = match_pb2.VerifyRequest(a=stored("of-one", "x"), b=stored("of-two", "x"))
    status = rich(refused(place.stubs.match.Verify, request))
    assert (info(status).reason, info(status).metadata["field"]) == ("MODEL_MISMATCH", "b.item")


def test_each_pair_of_a_batch_is_decided_as_alone(place: Place) -> None:
    pairs = [
        (stored("of-one", "x"), encoded(2)),
        (encoded(1), encoded(2)),
        (stored("of-one", "x"), stored("of-two", "x")),
        (stored("of-two", "x"), stored("of-two", "y")),
        (stored("nowhere", "x"), encoded(2)),
        (stored("of-one", "x"), stored("of-one", "y")),
    ]
    asked = [match_pb2.ImagePair(a=a, b=b) for a, b in pairs]

    def stream(point: common_pb2.OperatingPoint) -> Iterator[match_pb2.StreamVerifyRequest]:
        yield match_pb2.StreamVerifyRequest(config=match_pb2.StreamVerifyConfig(operating_point=point))
        for pair in asked:
            yield match_pb2.StreamVerifyRequest(pair=pair)

    for point in (common_pb2.OperatingPoint(), common_pb2.OperatingPoint(threshold=0.75)):
        batch = match_pb2.BatchVerifyRequest(pairs=asked, operating_point=point)
        for results in (
            list(place.stubs.match.BatchVerify(batch).results),
            list(place.stubs.match.StreamVerify(stream(point))),
        ):
            assert [result.WhichOneof("result") for result in results] == [
                *2 * ["decision"],
                "error",
                "decision",
                "error",
                "decision",
            ]
            for result, (a, b) in zip(results, pairs, strict=True):
                if result.HasField("decision"):
                    alone = match_pb2.VerifyRequest(a=a, b=b, operating_point=point)
                    assert result.decision == place.stubs.match.Verify(alone).decision


def test_a_point_that_one_model_lacks_fails_for_its_pairs_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Engine.judge

    def without(engine: Engine, point: OperatingPoint | None) -> Judge:
        if engine.bundle.name == place.one.name:
            raise InvalidOperatingPoint("not known", field="operating_point.name")
        return judge(engine, point)

    monkeypatch.setattr(Engine, "judge", without)
    pairs = [(encoded(1), encoded(2)), (stored("of-one", "x"), encoded(2))]
    batch = match_pb2.BatchVerifyRequest(pairs=[match_pb2.ImagePair(a=a, b=b) for a, b in pairs])
    first, second = place.stubs.match.BatchVerify(batch).results
    assert (first.WhichOneof("result"), info(second.error).reason) == ("decision", "INVALID_OPERATING_POINT")


def test_a_model_is_checked_whatever_the_source(place: Place) -> None:
    one, two = f"models/{place.one.name}", f"models/{place.two.name}"

    def image(source: common_pb2.ImageInput, model: str) -> common_pb2.ImageInput:
        made = common_pb2.ImageInput()
        made.CopyFrom(source)
        made.model = model
        return made

    assert verified(place, image(encoded(1), two), image(stored("of-two", "y"), two)).model == two
    assert verified(place, image(encoded(1), one), image(stored("of-one", "y"), one)).model == one
    for a, b, field in (
        (image(encoded(1), one), encoded(2), "a.encoded"),
        (encoded(1), image(stored("of-two", "y"), one), "b.item"),
        (encoded(1), image(stored("of-one", "y"), two), "b.item"),
    ):
        status = rich(refused(place.stubs.match.Verify, match_pb2.VerifyRequest(a=a, b=b)))
        assert (info(status).reason, info(status).metadata["field"]) == ("MODEL_MISMATCH", field)
    request = match_pb2.VerifyRequest(a=image(encoded(1), "two"), b=encoded(2))
    assert fields(rich(refused(place.stubs.match.Verify, request))) == ["a.model"]
