"""TIFF files that Pillow reads and does not write."""

from __future__ import annotations

import struct
import zlib


def tiled(
    width: int, height: int, tile: tuple[int, int], tiles: list[bytes], *, samples: int = 1, bits: int = 8
) -> bytes:
    """A TIFF of tiles, each deflated: grey, or CMYK for four samples."""
    packed = [zlib.compress(each) for each in tiles]
    count, start = len(packed), 8 + 2 + 12 * 11 + 4
    sizes, places = start, start + 4 * count
    offsets = [places + 4 * count + sum(map(len, packed[:i])) for i in range(count)]
    if count == 1:
        sizes, places = len(packed[0]), offsets[0]  # a single value stands in place of its offset
    tags = (
        (256, width),
        (257, height),
        (258, bits),
        (259, 8),
        (262, 1 if samples == 1 else 5),
        (277, samples),
        (284, 1),
        (322, tile[0]),
        (323, tile[1]),
    )
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries += [struct.pack("<HHII", 324, 4, count, places), struct.pack("<HHII", 325, 4, count, sizes)]
    values = struct.pack(f"<{2 * count}I", *map(len, packed), *offsets)
    return b"II*\0" + struct.pack("<IH", 8, 11) + b"".join(entries) + bytes(4) + values + b"".join(packed)
