"""Which images and identities a model was trained on, as digests (`seen.json`): rates measured on these flatter.

An image is known by its pixels as the network takes them, whatever file or archive they come from; one that was
cropped, resized or compressed anew is another. An identity is known by its name alone. Digests tell nobody what an
image shows; whoever has an image can tell by them whether it was trained on.
K digests kept, n asked about.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_DIGESTS = 16_384
"""Digests kept of each kind, 128 kB; of more, the smallest, which are a fair sample: of 160,000 images trained on,
one in ten is noticed when given again, and one is enough."""

Digests = NDArray[np.uint64]

_STORED = np.dtype("<u8")


def digest(data: bytes) -> int:
    """64 bits of BLAKE2b: two of 16,384 digests and a million others coincide once in a thousand million times."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def digests_of_names(names: Iterable[str]) -> Digests:
    """[n], of identities."""
    return np.array([digest(name.encode()) for name in names], np.uint64)


class Seen(BaseModel):
    """What a model was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    images: Annotated[int, Field(ge=1)]
    """Images trained on, of which at most MAX_DIGESTS are known by their digests."""
    image_digests: str
    """Base64 of little-endian 64-bit numbers, rising."""
    identity_digests: str

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for encoded in (self.image_digests, self.identity_digests):
            if len(base64.b64decode(encoded, validate=True)) % _STORED.itemsize:
                raise ValueError("digests must be whole 64-bit numbers")
        return self

    @classmethod
    def of(cls, image_digests_N: Digests, identities: Iterable[str]) -> Self:
        """From the digests of N images, and the names of their identities."""
        return cls(
            images=len(image_digests_N),
            image_digests=_encoded(image_digests_N),
            identity_digests=_encoded(digests_of_names(identities)),
        )

    @property
    def is_sampled(self) -> bool:
        """Whether some images trained on are not known by their digests."""
        return self.images > MAX_DIGESTS

    def has_images(self, digests_n: Digests) -> NDArray[np.bool_]:
        """[n], whether each is the digest of an image trained on."""
        return np.isin(digests_n, self._images)

    def has_identities(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """[n], whether each is the name of an identity trained on."""
        return np.isin(digests_of_names(names), self._identities)

    @cached_property
    def _images(self) -> Digests:
        return _decoded(self.image_digests)

    @cached_property
    def _identities(self) -> Digests:
        return _decoded(self.identity_digests)


def _encoded(digests_N: Digests) -> str:
    return base64.b64encode(np.unique(digests_N)[:MAX_DIGESTS].astype(_STORED).tobytes()).decode("ascii")


def _decoded(encoded: str) -> Digests:
    return np.frombuffer(base64.b64decode(encoded), _STORED).astype(np.uint64)
