"""What is fuzzed: each target takes any bytes, and raises nothing but what its callers expect.

A target answers whether the bytes were accepted, so that a run can tell whether it only ever met the first check.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError, Message
from PIL import Image

from embedding.bundle import SUMS, Bundle
from embedding.decision import UNIT_TOLERANCE, checked_embedding
from embedding.errors import DamagedData, InvalidFilter, InvalidInput, LookalikeError
from embedding.images import FORMATS, decode
from index.filters import parse_filter
from index.segments import MANIFEST, open_segment, segment_path, write_segment
from index.structures import Plan
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, match_pb2, search_pb2, upkeep_pb2
from service.access.rights import RULES, elements, named
from service.messages import parse
from tests.service.harness import DIM, encoded, make_bundle, stored, unit
from tests.tiff import tiled

MAX_PIXELS = 100_000


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], bool]
    seeds: Callable[[], Sequence[bytes]]


def image(data: bytes) -> bool:
    """Any bytes as an image: pixels of one of two modes and no more than asked for, or an error that says why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd files; the server's log is not the caller's to fill
        try:
            found = decode(data, max_pixels=MAX_PIXELS)
        except InvalidInput as error:
            return _told(error)
    assert found.mode in {"L", "RGB"}
    assert 0 < found.width * found.height <= MAX_PIXELS
    assert len(found.tobytes()) == found.width * found.height * len(found.mode)
    return True


@cache
def images() -> Sequence[bytes]:
    rng = np.random.default_rng(0)
    seeds = []
    modes = {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "RGBA", "LA", "P", "1", "I;16"),
        "GIF": ("P",),
        "TIFF": ("RGB", "L", "RGBA", "CMYK"),
        "BMP": ("P",),
    }
    for name in FORMATS:
        for mode in modes.get(name, ("RGB", "L")):
            pixels = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8), "RGBA")
            made = pixels.convert("L").convert("I;16") if mode == "I;16" else pixels.convert(mode)
            exif = Image.Exif()
            exif[274] = 6
            for options in ({}, *_variants(name)):
                buffer = io.BytesIO()
                made.save(buffer, name, **({"exif": exif} if name in {"JPEG", "PNG", "WEBP"} else {}), **options)
                seeds.append(buffer.getvalue())
    seeds += [
        tiled(20, 9, (16, 16), [rng.bytes(256)] * 2),
        tiled(9, 7, (16, 16), [rng.bytes(2048)], samples=4, bits=16),
    ]
    return [*seeds, b"P3\n2 1\n# c\n255\n1 2 3 4 5 6\n", b"P1\n3 2\n101010\n"]


def _variants(name: str) -> Sequence[dict[str, object]]:
    return {
        "JPEG": [{"progressive": True}, {"subsampling": 2, "icc_profile": b"icc" * 50}],
        "PNG": [{"compress_level": 0}],
        "TIFF": [{"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"}],
        "WEBP": [{"lossless": True}],
        "GIF": [{"interlace": 1, "comment": b"hello"}],
    }.get(name, [])


def vector(data: bytes) -> bool:
    """Any bytes as an embedding: of unit length, or refused, and never a warning in the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = checked_embedding(data, DIM)
        except InvalidInput as error:
            return _told(error)
    assert found.shape == (DIM,)
    assert abs(np.linalg.norm(found.astype(np.float64)) - 1) <= UNIT_TOLERANCE
    return True


def vectors() -> Sequence[bytes]:
    return [unit(1), unit(3, -4), unit(*range(1, DIM + 1))]


REQUESTS: Sequence[tuple[str, Message]] = [
    ("MatchService/Verify", match_pb2.VerifyRequest(a=encoded(1), b=stored("g", "x"))),
    (
        "MatchService/BatchVerify",
        match_pb2.BatchVerifyRequest(
            pairs=[match_pb2.ImagePair(a=encoded(1), b=common_pb2.ImageInput(embedding=unit(1, 2)))],
            operating_point=common_pb2.OperatingPoint(target_far=0.01, uncertain_within=0.1),
        ),
    ),
    (
        "SearchService/Search",
        search_pb2.SearchRequest(
            gallery="galleries/g",
            query=encoded(1),
            k=3,
            filter='metadata.a = "b" OR NOT name:"x*"',
            effort=search_pb2.Effort(raw=search_pb2.RawEffort(nprobe=4)),
            exclude=["galleries/g/items/x"],
        ),
    ),
    (
        "SearchService/StreamSearch",
        search_pb2.StreamSearchRequest(
            id="1", config=search_pb2.StreamSearchConfig(gallery="galleries/g", k=3, filter="identity = a")
        ),
    ),
    (
        "GalleryService/BatchUpdateItems",
        gallery_pb2.BatchUpdateItemsRequest(
            parent="galleries/g",
            requests=[
                gallery_pb2.UpdateItemRequest(
                    item=gallery_pb2.Item(
                        name="galleries/g/items/x", identity="a", metadata={"n": 1, "l": [1, {"a": 2}]}
                    ),
                    image=stored("h", "y"),
                    update_mask={"paths": ["image", "metadata"]},
                )
            ],
        ),
    ),
    (
        "GalleryService/UpdateGallery",
        gallery_pb2.UpdateGalleryRequest(
            gallery=gallery_pb2.Gallery(
                name="galleries/g", index=gallery_pb2.IndexSettings(min_recall=0.9, structure="hnsw", memory_bytes=9)
            ),
            update_mask={"paths": ["index.min_recall"]},
        ),
    ),
    (
        "GalleryService/BatchDeleteItems",
        gallery_pb2.BatchDeleteItemsRequest(parent="galleries/g", names=["galleries/g/items/x"]),
    ),
    ("GalleryService/PurgeItems", gallery_pb2.PurgeItemsRequest(parent="galleries/g", filter="*", force=True)),
    ("GalleryService/ListItems", gallery_pb2.ListItemsRequest(parent="galleries/g", page_size=3, page_token="eA")),
    (
        "AliasService/UpdateAlias",
        alias_pb2.UpdateAliasRequest(alias=alias_pb2.Alias(name="aliases/a", gallery="galleries/g")),
    ),
    (
        "UpkeepService/RestoreGallery",
        upkeep_pb2.RestoreGalleryRequest(snapshot="galleries/g/snapshots/s", gallery_id="h"),
    ),
]


def request(data: bytes) -> bool:
    """A kind of request, and any bytes as its message: parsed as its servicer does, and read for its rights."""
    if not data:
        return False
    method, example = REQUESTS[data[0] % len(REQUESTS)]
    message = type(example)()
    try:
        message.ParseFromString(data[1:])
    except DecodeError:
        return False
    rule = RULES[f"/lookalike.v1.{method}"]
    for each in named(rule, message):
        assert each.gallery
        assert each.resource
    assert elements(rule, message) >= 1
    try:
        _parsed(message)
    except InvalidInput as error:
        return _told(error)
    return True


def _told(error: InvalidInput) -> bool:
    text = str(error)
    assert text
    assert "\n" not in text
    return False


def _parsed(message: Message) -> None:
    match message:
        case match_pb2.VerifyRequest():
            parse.image(message.a, "a"), parse.image(message.b, "b"), parse.operating_point(message.operating_point)
        case match_pb2.BatchVerifyRequest():
            parse.check_batch(message.pairs, most=256, path="pairs")
            [parse.image(pair.a, f"pairs[{i}].a") for i, pair in enumerate(message.pairs)]
            parse.operating_point(message.operating_point)
        case search_pb2.SearchRequest():
            scope = parse.scope(message)
            parse.image(message.query, "query"), parse.count(message.k, default=10, most=100, path="k")
            parse.excluded(message.exclude, scope.gallery, lambda name: name)
        case search_pb2.StreamSearchRequest():
            parse.scope(message.config, path="config.")
            parse.image(message.query, "query")
        case gallery_pb2.BatchUpdateItemsRequest():
            gallery = parse.gallery_name(message.parent, "parent")
            parse.check_batch(message.requests, most=1024, path="requests")
            [parse.draft(each, gallery, f"requests[{i}]") for i, each in enumerate(message.requests)]
        case gallery_pb2.UpdateGalleryRequest():
            parse.gallery_name(message.gallery.name, "gallery.name")
            parse.index_settings(message.gallery.index, "gallery.index")
            parse.index_mask(message.update_mask, "update_mask")
        case gallery_pb2.BatchDeleteItemsRequest():
            gallery = parse.gallery_name(message.parent, "parent")
            [parse.item_in(gallery, name, f"names[{i}]") for i, name in enumerate(message.names)]
        case gallery_pb2.PurgeItemsRequest():
            parse.purge_filter(message.filter)
        case gallery_pb2.ListItemsRequest():
            parse.gallery_name(message.parent, "parent"), parse.page_size(message.page_size)
            parse_filter(message.filter)
        case alias_pb2.UpdateAliasRequest():
            parse.alias_name(message.alias.name, "alias.name"), parse.gallery_name(message.alias.gallery, "g")
        case upkeep_pb2.RestoreGalleryRequest():
            parse.snapshot_name(message.snapshot, "snapshot")


def requests() -> Sequence[bytes]:
    return [bytes([number]) + example.SerializeToString() for number, (_, example) in enumerate(REQUESTS)]


@cache
def _items() -> sqlite3.Connection:
    items = sqlite3.connect(":memory:", check_same_thread=False)
    items.execute(
        "CREATE TABLE items (name TEXT, identity TEXT, generation INTEGER, updated_us INTEGER, metadata TEXT)"
    )
    items.execute("INSERT INTO items VALUES ('x', 'a', 3, 5, ?)", (json.dumps({"n": 1, "s": "t", "d": {"e": [1]}}),))
    return items


def filter_(data: bytes) -> bool:
    """Any text as a filter: SQL that SQLite takes, or an error at a position within the text."""
    text = data.decode("utf-8", "replace")
    try:
        found = parse_filter(text)
    except InvalidFilter as error:
        position = error.position
        assert position is None or 1 <= position <= len(text) + 1
        return False
    if found is None:
        return False
    condition, parameters = found.sql()
    with closing(_items().execute(f"SELECT count(*) FROM items WHERE {condition}", parameters)) as answer:
        assert answer.fetchone()[0] in {0, 1}
    return True


def filters() -> Sequence[bytes]:
    texts = (
        'metadata.brand = "acme" AND NOT (identity = p1 OR name:"shoe*")',
        "metadata.n >= -1.5e3 OR metadata.flag = true AND -metadata.x = 2",
        'update_time > "2026-01-02T03:04:05Z" AND generation <= 7 OR generation != 3',
        "metadata.\"a b\".'c d' != 'x' AND metadata.d.e:1",
    )
    return [text.encode() for text in texts]


@cache
def _bundle() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made = make_bundle(Path(folder) / "toy", seed=0)
        return {path.name: path.read_bytes() for path in made.path.iterdir()}


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"fuzz-{os.getpid()}-")  # removed at exit


def bundle(data: bytes) -> bool:
    """A bundle one of whose files is any bytes, with checksums that fit them: whoever made it wanted it read."""
    files = dict(_bundle())
    names = sorted(files)
    if not data:
        return False
    name = names[data[0] % len(names)]
    files[name] = data[1:]
    if name != SUMS:
        summed = [line.partition("  ")[2] for line in files[SUMS].decode().splitlines()]
        files[SUMS] = "".join(f"{hashlib.sha256(files[each]).hexdigest()}  {each}\n" for each in summed).encode()
    folder = Path(_own().name) / "bundle"
    folder.mkdir(exist_ok=True)
    for each, content in files.items():
        (folder / each).write_bytes(content)
    try:
        Bundle.load(folder).network()
    except LookalikeError:
        return False
    return True


def bundles() -> Sequence[bytes]:
    return [bytes([number]) + content for number, (_, content) in enumerate(sorted(_bundle().items()))]


@cache
def _segment() -> tuple[Path, str]:
    folder = Path(_own().name) / "segments"
    folder.mkdir(exist_ok=True)
    rows = [(np.arange(4), np.eye(4, 8, dtype=np.float32))]
    written = write_segment(
        folder, rows, gallery="g", model_fingerprint="f", generation=3, planned=lambda vectors_ND, path: Plan()
    )
    return folder, written


def segment(data: bytes) -> bool:
    """A segment whose manifest is any bytes, under the sum of these: only what it says can be wrong."""
    folder, original = _segment()
    digest = hashlib.sha256(data).hexdigest()
    path = segment_path(folder, digest)
    if digest != original:
        path.mkdir()
        for each in segment_path(folder, original).iterdir():
            (path / each.name).hardlink_to(each) if each.name != MANIFEST else None
        (path / MANIFEST).write_bytes(data)
    try:
        found = open_segment(folder, digest, decisive=lambda keys_R: np.zeros((len(keys_R), DIM), np.float32))
    except DamagedData:
        return False
    finally:
        if digest != original:
            for each in path.iterdir():
                each.unlink()
            path.rmdir()
    assert found.vectors_ND.shape == (len(found.keys_N), found.vectors_ND.shape[1])
    assert found.norms_N.shape == found.keys_N.shape
    float(found.vectors_ND.sum() + found.norms_N.sum())  # every byte that it claims is there
    return True


def segments() -> Sequence[bytes]:
    folder, digest = _segment()
    return [(segment_path(folder, digest) / MANIFEST).read_bytes()]


TARGETS = {
    "image": Target(image, images),
    "vector": Target(vector, vectors),
    "request": Target(request, requests),
    "filter": Target(filter_, filters),
    "bundle": Target(bundle, bundles),
    "segment": Target(segment, segments),
}
