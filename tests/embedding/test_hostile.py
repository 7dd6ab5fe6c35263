"""Image files made to be slow or large, and that honest files of their kind pass."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedding import images
from embedding.errors import ImageTooLarge, InvalidImage
from embedding.hostile import MAX_CHUNKS, MAX_HEADER_BYTES, MAX_PLAIN_BYTES, MAX_SCANS, checked
from embedding.images import decode
from tests.tiff import tiled

PNG = b"\x89PNG\r\n\x1a\n"
GIF = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
PICTURE = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 4, height: int = 4) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(5 * 4)))
    return b"".join((PNG, header, *chunks, pixels, chunk(b"IEND")))


def jpeg(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - whole.count(b"\xff\xda")) + whole[-2:]


def test_scans_chunks_and_blocks_are_counted() -> None:
    for allowed, refused, words in (
        (jpeg(MAX_SCANS), jpeg(MAX_SCANS + 1), "scans"),
        (png(*[chunk(b"prVt")] * 1000), png(*[chunk(b"prVt")] * MAX_CHUNKS), "chunks"),
        (GIF + b"\x21\xfe\x01a\0" * 1000 + PICTURE, GIF + b"\x21\xfe\x01a\0" * MAX_CHUNKS + PICTURE, "blocks"),
        (GIF + b"?" * 1000 + PICTURE, GIF + b"?" * (MAX_CHUNKS + 2) + PICTURE, "blocks"),
    ):
        assert decode(allowed).width > 0
        with pytest.raises(InvalidImage, match=words):
            decode(refused)


def test_plain_pixmaps_are_small_and_binary_ones_have_short_headers() -> None:
    many = b"# c\n" * 1000
    assert list(decode(b"P2\n2 1\n" + many + b"255\n" + many + b"7 " + many + b"9\n").tobytes()) == [7, 9]
    assert list(decode(b"P5\n# c\n2 1\n255\n\x23\x09").tobytes()) == [0x23, 9]
    with pytest.raises(InvalidImage, match="plain text"):
        decode(b"P3\n1 1\n255\n" + b" " * MAX_PLAIN_BYTES + b"1 1 1")
    for header in (b"P6\n#" + b"a" * MAX_HEADER_BYTES + b"\n10 10 255\n", b"P6\n10 10 " + b"#\n" * MAX_HEADER_BYTES):
        with pytest.raises(InvalidImage, match="header"):
            decode(header + bytes(300))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", PNG, PNG + b"\xff" * 9, GIF[:6], GIF, GIF + b"\x21", GIF + b"\x21\xfe\xff", b"P5", b"P1", b"?"],
)
def test_a_file_that_ends_early_is_left_to_the_decoder(data: bytes) -> None:
    assert checked(data) == data


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_a_thousand_times_its_size_is_refused(kind: bytes) -> None:
    packed = zlib.compress(bytes(50_000_000), 9)
    body = b"k\0\1\0\0\0" if kind == b"iTXt" else b"k\0\0"
    with pytest.raises(InvalidImage, match="too large"):
        decode(png(chunk(kind, body + packed)))


def noise(mode: str, size: tuple[int, int] = (13, 37)) -> Image.Image:
    rng = np.random.default_rng(3)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA").convert(mode)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("P", {"transparency": 3}),
        ("L", {"transparency": 7}),
        ("RGB", {"transparency": (1, 2, 3)}),
        ("I;16", {}),
    ],
)
def test_bands_give_the_same_pixels_as_the_whole(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    noise(mode).save(buffer, "PNG", **options)
    whole = decode(buffer.getvalue())
    for pixels in (1, 13 * 5, 13 * 36, 13 * 37):
        monkeypatch.setattr(images, "BAND_PIXELS", pixels)
        banded = decode(buffer.getvalue())
        assert (banded.mode, banded.size, banded.tobytes()) == (whole.mode, whole.size, whole.tobytes())


def test_no_more_pixels_are_decoded_at_once_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    noise("RGB", (10, 10)).save(buffer, "PNG")
    monkeypatch.setattr(images, "_ROOM", images._Room(250))
    inside, most, lock, met = [0], [0], threading.Lock(), threading.Barrier(2)
    plain = images._plain

    def counted(image: Image.Image) -> Image.Image:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        met.wait(timeout=10)  # two are inside at once, or this breaks
        with lock:
            inside[0] -= 1
        return plain(image)

    monkeypatch.setattr(images, "_plain", counted)
    threads = [threading.Thread(target=decode, args=(buffer.getvalue(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2]
    monkeypatch.setattr(images, "_ROOM", images._Room(50))
    monkeypatch.setattr(images, "_plain", plain)
    assert decode(buffer.getvalue()).size == (10, 10), "a larger one comes alone"
    with pytest.raises(InvalidImage):
        decode(buffer.getvalue()[:-30])
    assert images._ROOM._free == 50, "room is given back after a failure too"


def test_the_pixel_cap_holds_for_what_a_header_promises() -> None:
    with pytest.raises(ImageTooLarge):
        decode(png(width=50_000, height=50_000))
    assert decode(png(), max_pixels=4 * 4).size == (4, 4)
    with pytest.raises(ImageTooLarge, match="at most 15"):
        decode(png(), max_pixels=4 * 4 - 1)


@pytest.mark.parametrize(
    ("size", "side"), [((13, 37), 16), ((100, 70), 64), ((13, 37), 256), ((600, 300), 512), ((9, 9), 1024)]
)
def test_tiles_of_honest_tiffs_are_decoded(size: tuple[int, int], side: int) -> None:
    pixels_HW = np.asarray(noise("L", size))
    height, width = pixels_HW.shape
    padded = np.zeros((-(-height // side) * side, -(-width // side) * side), np.uint8)
    padded[:height, :width] = pixels_HW
    tiles = [
        padded[top : top + side, left : left + side].tobytes()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    decoded = decode(tiled(width, height, (side, side), tiles))
    np.testing.assert_array_equal(np.asarray(decoded), pixels_HW)


@pytest.mark.parametrize("side", [4096, 30_000, 46_336, 2**31])
def test_a_tile_that_is_much_larger_than_its_tiff_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it takes gigabytes"))
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lambda image: pytest.fail("it takes gigabytes"))
    with pytest.raises(InvalidImage, match="save the image anew"):
        decode(tiled(100, 100, (side, side), [bytes(100)]))


def test_a_tile_may_be_twice_as_large_as_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_TILE_PIXELS", 100)
    assert decode(tiled(16, 32, (32, 32), [bytes(32 * 32)])).size == (16, 32)
    with pytest.raises(InvalidImage, match="save the image anew"):
        decode(tiled(16, 31, (32, 32), [bytes(32 * 32)]))


def test_room_that_comes_free_is_offered_to_all_who_wait() -> None:
    """Not only to the first, for whom it may be too little."""
    room = images._Room(100)
    large, small = threading.Event(), threading.Event()

    def take(pixels: int, entered: threading.Event) -> None:
        with room.taken(pixels):
            entered.set()

    threads = [threading.Thread(target=take, args=wanted) for wanted in ((100, large), (60, small))]
    with room.taken(40):
        with room.taken(60):
            for waiting, thread in enumerate(threads, start=1):
                thread.start()
                while len(room._changed._waiters) < waiting:  # type: ignore[attr-defined]
                    threading.Event().wait(0.001)
        assert small.wait(10)
        assert not large.is_set()
    for thread in threads:
        thread.join()
    assert large.is_set()


def test_room_is_taken_for_what_a_decoder_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    room = images._ROOM.taken
    monkeypatch.setattr(images._ROOM, "taken", lambda pixels: taken.append(pixels) or room(pixels))
    buffer = io.BytesIO()
    noise("RGB", (10, 10)).save(buffer, "WEBP", lossless=True)
    decode(buffer.getvalue())
    decode(tiled(9, 9, (1024, 1024), [bytes(1024 * 1024)]))
    decode(png())
    assert taken == [200, 1024 * 1024, 16]


SIDE = 2048
HELD = """
import re, sys
from pathlib import Path
from embedding import images

def told(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

images.BAND_PIXELS = 2**16  # what bands take does not grow with the image
rooms, taken = [], images._ROOM.taken
images._ROOM.taken = lambda pixels: rooms.append(pixels) or taken(pixels)
data = Path(sys.argv[1]).read_bytes()
before = told("VmRSS")
images.decode(data)
print(told("VmHWM") - before, *rooms)
"""


def saved(mode: str, kind: str, **options: Any) -> Callable[[], bytes]:
    def save() -> bytes:
        buffer = io.BytesIO()
        noise("RGBA", (SIDE // 8, SIDE // 8)).resize((SIDE, SIDE)).convert(mode).save(buffer, kind, **options)
        return buffer.getvalue()

    return save


def deep() -> bytes:
    """Four samples of 16 bits, in one tile."""
    return tiled(SIDE, SIDE, (SIDE, SIDE), [bytes(SIDE * SIDE * 8)], samples=4, bits=16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what a process has held")
@pytest.mark.parametrize(
    "made",
    [
        saved("RGB", "JPEG", progressive=True, subsampling=0),
        saved("CMYK", "JPEG", progressive=True),
        saved("RGBA", "WEBP", lossless=True, method=0, quality=0),
        deep,
    ],
    ids=["JPEG", "JPEG of four channels", "WebP", "TIFF of four channels"],
)
def test_ten_bytes_of_each_pixel_that_room_is_taken_for_hold_what_a_decoder_does(
    tmp_path: Path, made: Callable[[], bytes]
) -> None:
    file = tmp_path / "image"
    file.write_bytes(made())
    asks = [sys.executable, "-c", HELD, file]
    # What is freed is given back at once: holes in the heap hold nothing.
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    told = subprocess.run(asks, env=at_once, check=True, capture_output=True, text=True)
    held, room = map(int, told.stdout.split())
    assert held <= 10 * room + 3_000_000
    assert held >= 4 * SIDE * SIDE, "it was not decoded"
