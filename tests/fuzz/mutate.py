"""Bytes that are nearly right: a seed, changed in a few places. The same number gives the same bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TOKENS = (
    b"\0",
    b"\xff\xda",
    b"IDAT",
    b"\x80\x80\x80\x80\x80\x01",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"{}",
    b'"',
    b"(",
    b"../",
)


def mutated(seeds: Sequence[bytes], count: int, *, seed: int) -> Iterator[bytes]:
    """`count` changed copies, after the seeds themselves."""
    yield from seeds
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            _change(data, seeds, chance)
        yield bytes(data)


def _change(data: bytearray, seeds: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    match chance.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(data):
            data[at] = chance.randrange(256)
        case 2:
            del data[at : at + chance.randrange(1, 9)]
        case 3:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        case 4:
            width = chance.choice((1, 2, 4))
            value = chance.choice(_INTERESTING) & ((1 << 8 * width) - 1)
            data[at : at + width] = value.to_bytes(width, chance.choice(("big", "little")))
        case 5:
            del data[at:]
        case 6:
            data[at:at] = chance.choice(_TOKENS)
        case _:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at : at + 16] = other[start : start + 16]
