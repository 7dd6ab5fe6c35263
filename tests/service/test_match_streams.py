"""StreamVerify, which streams both ways, and BatchEmbed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest

from embedding.bundle import Bundle
from lookalike.v1 import common_pb2, match_pb2
from tests.service.harness import Stubs, encoded, fields, info, png, refused, rich, stored, vector

BAD = common_pb2.ImageInput(encoded=png(1)[:40])


def config(**point: object) -> match_pb2.StreamVerifyRequest:
    return match_pb2.StreamVerifyRequest(
        config=match_pb2.StreamVerifyConfig(operating_point=common_pb2.OperatingPoint(**point))
    )


def pair(a: common_pb2.ImageInput, b: common_pb2.ImageInput, id_: str = "") -> match_pb2.StreamVerifyRequest:
    return match_pb2.StreamVerifyRequest(id=id_, pair=match_pb2.ImagePair(a=a, b=b))


def test_a_stream_answers_in_order_and_as_verify_does(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": encoded(1)})
    images = [encoded(i % 7) if i % 3 else stored(gallery, "one") for i in range(150)]
    sent = [config(threshold=0.5), *(pair(image, encoded(1), str(i)) for i, image in enumerate(images))]
    responses = list(stubs.match.StreamVerify(iter(sent)))
    assert [response.id for response in responses] == [str(i) for i in range(150)]
    point = common_pb2.OperatingPoint(threshold=0.5)
    for response, image in zip(responses[:20], images, strict=False):
        alone = stubs.match.Verify(match_pb2.VerifyRequest(a=image, b=encoded(1), operating_point=point))
        assert response.decision == alone.decision
    assert responses[0].decision.threshold == 0.5


def test_a_bad_pair_is_answered_and_the_stream_goes_on(stubs: Stubs) -> None:
    sent = [
        config(),
        pair(vector(1), vector(1), "a"),
        pair(vector(1), BAD, "b"),
        match_pb2.StreamVerifyRequest(id="c"),
        config(),
        pair(stored("nowhere", "x"), vector(1), "e"),
        pair(vector(1), vector(1), "f" * 257),
        match_pb2.StreamVerifyRequest(id="g", pair=match_pb2.ImagePair(a=vector(1))),
        pair(vector(1), vector(0, 1), "h"),
    ]
    responses = list(stubs.match.StreamVerify(iter(sent)))
    assert [response.WhichOneof("result") for response in responses] == ["decision"] + 6 * ["error"] + ["decision"]
    assert [info(response.error).metadata["field"] for response in responses[1:7]] == [
        "pair.b.encoded",
        "pair",
        "config",
        "pair.a.item",
        "id",
        "pair.b",
    ]
    assert responses[4].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert responses[-1].id == "h"


def test_answers_come_before_the_stream_ends(stubs: Stubs) -> None:
    answered = threading.Event()

    def sent() -> Iterator[match_pb2.StreamVerifyRequest]:
        yield config()
        yield pair(encoded(1), encoded(2), "first")
        assert answered.wait(timeout=20)
        yield pair(encoded(1), encoded(2), "second")

    responses = stubs.match.StreamVerify(sent())
    assert next(responses).id == "first"
    answered.set()
    assert [response.id for response in responses] == ["second"]


@pytest.mark.parametrize(
    ("first", "field"),
    [
        (None, "config"),
        (pair(vector(1), vector(1)), "config"),
        (config(threshold=3), "config.operating_point.threshold"),
        (config(name="nowhere"), "config.operating_point.name"),
    ],
)
def test_a_stream_that_begins_wrongly_is_refused(
    stubs: Stubs, first: match_pb2.StreamVerifyRequest | None, field: str
) -> None:
    error = refused(stubs.match.StreamVerify, iter([] if first is None else [first]))  # type: ignore[arg-type]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(rich(error)) == [field]


def test_a_bad_image_of_a_batch_fails_alone_with_the_status_that_embed_gives(
    stubs: Stubs, gallery: str, bundle: Bundle
) -> None:
    stubs.fill(gallery, {"one": encoded(1)})
    images = [encoded(1), BAD, common_pb2.ImageInput(), stored(gallery, "one"), stored(gallery, "two"), encoded(2)]
    response = stubs.match.BatchEmbed(match_pb2.BatchEmbedRequest(images=images))
    assert response.model == f"models/{bundle.name}"
    kinds = [result.WhichOneof("result") for result in response.results]
    assert kinds == ["embedding", "error", "error", "embedding", "error", "embedding"]
    for i in (0, 3, 5):
        alone = stubs.match.Embed(match_pb2.EmbedRequest(image=images[i]))
        assert response.results[i].embedding == alone.embedding
    assert fields(response.results[1].error) == ["images[1].encoded"]
    assert fields(response.results[2].error) == ["images[2]"]
    assert response.results[4].error.code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize("count", [0, 257])
def test_a_batch_of_embeddings_has_a_size(stubs: Stubs, count: int) -> None:
    request = match_pb2.BatchEmbedRequest(images=[vector(1)] * count)
    assert fields(rich(refused(stubs.match.BatchEmbed, request))) == ["images"]
    if count:
        assert len(stubs.match.BatchEmbed(match_pb2.BatchEmbedRequest(images=[vector(1)] * 256)).results) == 256
