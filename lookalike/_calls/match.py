"""The calls of MatchService: do images match, and what are their embeddings."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable

from lookalike import _messages as messages
from lookalike._calls.kinds import Batch, Call, Stream, call, in_place
from lookalike.errors import CallFailed, from_status
from lookalike.types import Decision, Embedding, ImageLike, OperatingPoint
from lookalike.v1 import common_pb2, match_pb2

MATCH = "lookalike.v1.MatchService"

MAX_PAIRS = 256
MAX_IMAGES = 256


def verify(a: ImageLike, b: ImageLike, *, operating_point: OperatingPoint | None = None) -> Call[Decision]:
    """Decide whether two images match."""
    return call(
        f"{MATCH}/Verify",
        match_pb2.VerifyRequest(
            a=messages.image_input(a),
            b=messages.image_input(b),
            operating_point=messages.operating_point(operating_point),
        ),
        match_pb2.VerifyResponse,
        lambda response: messages.decision(response.decision),
    )


def verify_batch(
    pairs: Iterable[tuple[ImageLike, ImageLike]], *, operating_point: OperatingPoint | None = None
) -> Batch[match_pb2.ImagePair, Decision | CallFailed]:
    """Decide many pairs: for each, in order, the decision, or the error that this pair alone met."""
    point = messages.operating_point(operating_point)
    return Batch(
        (match_pb2.ImagePair(a=messages.image_input(a), b=messages.image_input(b)) for a, b in pairs),
        MAX_PAIRS,
        lambda chunk: call(
            f"{MATCH}/BatchVerify",
            match_pb2.BatchVerifyRequest(pairs=chunk, operating_point=point),
            match_pb2.BatchVerifyResponse,
            lambda response: [
                from_status(result.error) if result.HasField("error") else messages.decision(result.decision)
                for result in response.results
            ],
        ),
        in_place,
    )


def verify_stream(
    pairs: Iterable[tuple[ImageLike, ImageLike]] | AsyncIterable[tuple[ImageLike, ImageLike]],
    *,
    operating_point: OperatingPoint | None = None,
) -> Stream[Decision | CallFailed]:
    """Decide any number of pairs over one call: for each, in order and as soon as it is there, the decision, or the
    error that this pair alone met. At most a window of pairs is read ahead of the answers. It has no time limit."""
    config = match_pb2.StreamVerifyConfig(operating_point=messages.operating_point(operating_point))

    def pack(images: tuple[ImageLike, ImageLike]) -> bytes:
        a, b = images
        pair = match_pb2.ImagePair(a=messages.image_input(a), b=messages.image_input(b))
        return match_pb2.StreamVerifyRequest(pair=pair).SerializeToString()

    def parse(data: bytes) -> list[Decision | CallFailed]:
        response = match_pb2.StreamVerifyResponse.FromString(data)
        return [from_status(response.error) if response.HasField("error") else messages.decision(response.decision)]

    return Stream(
        f"{MATCH}/StreamVerify", match_pb2.StreamVerifyRequest(config=config).SerializeToString(), pairs, pack, parse
    )


def embed(image: ImageLike) -> Call[Embedding]:
    """The unit embedding [D] of an image, float32."""
    return call(
        f"{MATCH}/Embed",
        match_pb2.EmbedRequest(image=messages.image_input(image)),
        match_pb2.EmbedResponse,
        lambda response: messages.embedding(response.embedding),
    )


def embed_batch(images: Iterable[ImageLike]) -> Batch[common_pb2.ImageInput, Embedding | CallFailed]:
    """Embed many images: for each, in order, its unit embedding [D], or the error that this image alone met."""
    return Batch(
        (messages.image_input(image) for image in images),
        MAX_IMAGES,
        lambda chunk: call(
            f"{MATCH}/BatchEmbed",
            match_pb2.BatchEmbedRequest(images=chunk),
            match_pb2.BatchEmbedResponse,
            lambda response: [
                from_status(result.error) if result.HasField("error") else messages.embedding(result.embedding)
                for result in response.results
            ],
        ),
        in_place,
    )
