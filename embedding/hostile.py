"""Image files made to be slow: recognised from their structure, before a decoder sees them.

The cap on pixels does not help against these: they promise few pixels, or repeat the work for each. Limits lie far
above what any camera or program writes. What a check costs is linear in the file, and stops at its limit.

Times are of Pillow 13 on one core, before the checks.
"""

from __future__ import annotations

import re

from embedding.errors import InvalidImage

MAX_SCANS = 100
"""Scans of a JPEG, thumbnails included; a progressive one has about ten. Each is a pass over all pixels: of 49 million,
20 ms and more for a hundred bytes."""

MAX_CHUNKS = 50_000
"""Chunks of a PNG, or blocks of a GIF before its first picture. Pillow reads each in Python: 330,000 empty chunks,
which are 4 MB, took 2.8 s."""

MAX_PLAIN_BYTES = 4 * 2**20
"""Size of a PBM, PGM or PPM whose samples are written out as text: 4 MB took 1.8 s, and 4 MB of comments 32 s more."""

MAX_HEADER_BYTES = 4096
"""Size of the header of a binary PBM, PGM or PPM, comments included."""

_PNG = b"\x89PNG\r\n\x1a\n"
_COMMENT = re.compile(rb"#[^\r\n]*")


def checked(data: bytes) -> bytes:
    """The file, comments of a plain PPM left out. Raises InvalidImage when decoding it would take absurdly long."""
    if data.startswith(b"\xff\xd8"):
        # In compressed data FF is followed by 00, so that this is a marker wherever it stands.
        if data.count(b"\xff\xda") > MAX_SCANS:
            raise InvalidImage(f"a JPEG of more than {MAX_SCANS} scans is not decoded; save the image anew")
    elif data.startswith(_PNG):
        _check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(data)
    elif data[:2] in {b"P1", b"P2", b"P3"}:
        if len(data) > MAX_PLAIN_BYTES:
            raise InvalidImage(
                f"a PPM in plain text has at most {MAX_PLAIN_BYTES:,} bytes; got {len(data):,}: save it as binary"
            )
        if b"#" in data:
            return _COMMENT.sub(b"", data)
    elif data[:2] in {b"P4", b"P5", b"P6"}:
        words = 3 if data[:2] == b"P4" else 4
        header = data[:MAX_HEADER_BYTES]
        if len(data) > MAX_HEADER_BYTES and len(_COMMENT.sub(b"", header).split(None, words)) < words:
            raise InvalidImage(f"the header of a PPM has at most {MAX_HEADER_BYTES:,} bytes; leave out its comments")
    return data


def _check_png(data: bytes) -> None:
    at, end = len(_PNG), len(data)
    for _ in range(MAX_CHUNKS):
        if at + 8 > end or data[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(data[at : at + 4])
    raise InvalidImage(f"a PNG of more than {MAX_CHUNKS:,} chunks is not decoded; save the image anew")


def _check_gif(data: bytes) -> None:
    at, end = 13, len(data)
    if end > 10 and data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    blocks = 0
    while at < end and data[at] != ord(",") and data[at] != ord(";"):  # a picture, or the end
        if data[at] != ord("!"):
            at += 1  # as Pillow does: it skips what it does not know
            blocks += 1
        else:
            at += 2
            while at < end and data[at]:
                at += 1 + data[at]
                blocks += 1
            at += 1
            blocks += 1
        if blocks > MAX_CHUNKS:
            raise InvalidImage(f"a GIF of more than {MAX_CHUNKS:,} blocks before its picture is not decoded")
