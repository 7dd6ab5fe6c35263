"""Bad input by name: each ends with the right status, one line that says what to do, and the path of the field."""

from __future__ import annotations

import gc
import struct
import time
import zlib
from pathlib import Path
from types import FrameType

import grpc
import numpy as np
import pytest

import embedding
import service
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, search_pb2
from service.sources import EncodedImage
from tests.service.harness import DIM, MAX_MESSAGE_BYTES, Stubs, encoded, fields, info, png, refused, rich, stored, unit


def huge_header() -> bytes:
    """A PNG whose header promises 50,000 × 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


WITH_NAN = np.frombuffer(unit(1), "<f4").copy()
WITH_NAN[3] = np.nan

IMAGES = {
    "not an image": (common_pb2.ImageInput(encoded=b"just some text"), "encoded", "INVALID_IMAGE"),
    "truncated": (common_pb2.ImageInput(encoded=png(1)[:-40]), "encoded", "INVALID_IMAGE"),
    "0 bytes": (common_pb2.ImageInput(encoded=b""), "encoded", "INVALID_IMAGE"),
    "huge header": (common_pb2.ImageInput(encoded=huge_header()), "encoded", "IMAGE_TOO_LARGE"),
    "NaN": (common_pb2.ImageInput(embedding=WITH_NAN.tobytes()), "embedding", "INVALID_VECTOR"),
    "infinite": (common_pb2.ImageInput(embedding=floats(np.inf, *[0] * (DIM - 1))), "embedding", "INVALID_VECTOR"),
    "too wide": (common_pb2.ImageInput(embedding=unit(1) + bytes(4)), "embedding", "INVALID_VECTOR"),
    "not whole": (common_pb2.ImageInput(embedding=unit(1)[:-1]), "embedding", "INVALID_VECTOR"),
    "empty vector": (common_pb2.ImageInput(embedding=b""), "embedding", "INVALID_VECTOR"),
    "not unit": (common_pb2.ImageInput(embedding=floats(*[1] * DIM)), "embedding", "INVALID_VECTOR"),
    "malformed item": (common_pb2.ImageInput(item="galleries/x/item/y"), "item", "INVALID_INPUT"),
    "path traversal": (common_pb2.ImageInput(item="galleries/../items/y"), "item", "INVALID_INPUT"),
    "nothing": (common_pb2.ImageInput(), "", "INVALID_INPUT"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_unusable_image_is_named_wherever_it_stands(stubs: Stubs, gallery: str, name: str) -> None:
    image, source, reason = IMAGES[name]
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    for call, request, path in (
        (stubs.match.Verify, match_pb2.VerifyRequest(a=image, b=encoded(1)), "a"),
        (stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1), b=image), "b"),
        (stubs.match.Embed, match_pb2.EmbedRequest(image=image), "image"),
        (stubs.search.Search, search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=image), "query"),
    ):
        error = refused(call, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(rich(error)) == [f"{path}.{source}" if source else path]
        assert info(rich(error)).reason == reason
        assert info(rich(error)).domain == "lookalike"
        assert "\n" not in error.details()


def embedding_of(size: int) -> match_pb2.EmbedRequest:
    """A request of so many bytes."""
    request = match_pb2.EmbedRequest(image=common_pb2.ImageInput(encoded=bytes(size)))
    request.image.encoded = bytes(2 * size - request.ByteSize())
    assert request.ByteSize() == size
    return request


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 1, 2 * MAX_MESSAGE_BYTES])
def test_a_message_over_the_limit_is_refused_with_both_sizes(stubs: Stubs, size: int) -> None:
    error = refused(stubs.match.Embed, embedding_of(size))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info(rich(error)).reason == "REQUEST_TOO_LARGE"
    assert f"{size:,} bytes, and one message carries {MAX_MESSAGE_BYTES:,}" in (error.details() or "")


def test_a_message_of_the_largest_size_is_read(stubs: Stubs) -> None:
    error = refused(stubs.match.Embed, embedding_of(MAX_MESSAGE_BYTES))
    assert info(rich(error)).reason == "INVALID_IMAGE"


def test_an_element_over_the_limit_ends_its_stream(stubs: Stubs) -> None:
    large = match_pb2.ImagePair(a=common_pb2.ImageInput(encoded=bytes(MAX_MESSAGE_BYTES)), b=encoded(1))
    elements = [
        match_pb2.StreamVerifyRequest(config=match_pb2.StreamVerifyConfig()),
        match_pb2.StreamVerifyRequest(pair=large),
    ]
    error = refused(lambda _: stubs.match.StreamVerify(iter(elements)), elements[0])
    assert info(rich(error)).reason == "REQUEST_TOO_LARGE"


def test_a_message_over_twice_the_limit_is_refused_before_it_is_taken_in(stubs: Stubs) -> None:
    """By gRPC, which takes in no more, and says so in its own words."""
    error = refused(stubs.match.Embed, embedding_of(2 * MAX_MESSAGE_BYTES + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (error.details() or "")


def test_an_unknown_item_or_gallery_is_not_found(stubs: Stubs, gallery: str) -> None:
    name = f"galleries/{gallery}"
    item = stored(gallery, "nobody")

    def all_ends() -> list[tuple[grpc.StatusCode, str]]:
        errors = [
            refused(stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1), b=item)),
            refused(stubs.search.Search, search_pb2.SearchRequest(gallery=name, query=item)),
            refused(stubs.galleries.GetItem, gallery_pb2.GetItemRequest(name=item.item)),
            refused(
                stubs.galleries.BatchDeleteItems, gallery_pb2.BatchDeleteItemsRequest(parent=name, names=[item.item])
            ),
        ]
        return [(error.code(), info(rich(error)).metadata["field"]) for error in errors]

    lost = grpc.StatusCode.NOT_FOUND
    assert all_ends() == [(lost, "b.item"), (lost, "gallery"), (lost, "name"), (lost, "parent")]
    for call, request, path in (
        (stubs.galleries.GetGallery, gallery_pb2.GetGalleryRequest(name=name), "name"),
        (stubs.galleries.DeleteGallery, gallery_pb2.DeleteGalleryRequest(name=name), "name"),
        (stubs.galleries.DeleteGallery, gallery_pb2.DeleteGalleryRequest(name=name, force=True), "name"),
        (stubs.galleries.ListItems, gallery_pb2.ListItemsRequest(parent=name), "parent"),
    ):
        error = refused(call, request)
        assert (error.code(), info(rich(error)).metadata["field"]) == (lost, path)
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    assert all_ends() == [(lost, "b.item"), (lost, "query.item"), (lost, "name"), (lost, "names")]


def test_a_required_name_that_is_missing_is_named(stubs: Stubs) -> None:
    for call, request, path in (
        (stubs.search.Search, search_pb2.SearchRequest(query=encoded(1)), "gallery"),
        (stubs.search.BatchSearch, search_pb2.BatchSearchRequest(queries=[encoded(1)]), "gallery"),
        (stubs.galleries.GetGallery, gallery_pb2.GetGalleryRequest(), "name"),
        (stubs.galleries.GetItem, gallery_pb2.GetItemRequest(), "name"),
        (stubs.galleries.ListItems, gallery_pb2.ListItemsRequest(), "parent"),
        (stubs.galleries.BatchDeleteItems, gallery_pb2.BatchDeleteItemsRequest(names=["x"]), "parent"),
    ):
        error = refused(call, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(rich(error)) == [path]


def test_an_item_of_another_gallery_cannot_be_deleted_through_this_one(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": encoded(1)})
    request = gallery_pb2.BatchDeleteItemsRequest(
        parent="galleries/elsewhere", names=[f"galleries/{gallery}/items/one"]
    )
    assert fields(rich(refused(stubs.galleries.BatchDeleteItems, request))) == ["names[0]"]


@pytest.mark.parametrize("size", [1_000, 100_000])  # decoded by the thread that embeds, and by one of its own
def test_bad_images_are_freed_as_soon_as_their_calls_have_ended(stubs: Stubs, gallery: str, size: int) -> None:
    """Not when the collector comes by, which may be after hundreds of them, of some megabytes each."""
    data = b"not an image" * (size // 12)
    image = common_pb2.ImageInput(encoded=data)
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    item = gallery_pb2.Item(name=f"galleries/{gallery}/items/x")
    gc.collect()
    gc.disable()
    try:
        for call, request in (
            (stubs.match.Verify, match_pb2.VerifyRequest(a=image, b=encoded(1))),
            (stubs.match.Verify, match_pb2.VerifyRequest(a=image)),
            (stubs.match.Embed, match_pb2.EmbedRequest(image=image)),
            (stubs.search.Search, search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=image)),
            (stubs.galleries.UpdateItem, gallery_pb2.UpdateItemRequest(item=item, image=image, allow_missing=True)),
        ):
            refused(call, request)
        patience = time.monotonic() + 10
        while any(type(each) is EncodedImage and each.data == data for each in gc.get_objects()):
            assert time.monotonic() < patience
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = {Path(service.__file__).parent, Path(embedding.__file__).parent}
        frames = [each.f_code for each in gc.garbage if isinstance(each, FrameType)]
        assert [code for code in frames if Path(code.co_filename).parent in ours] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
