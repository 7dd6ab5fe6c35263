"""What answers tell of items, how much they may read for it, and metadata that is kept as it was written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping

from embedding.errors import ResponseTooLarge
from index.items import JSON


class Telling:
    """What one answer tells of its items. Make one for each question; threads may share it."""

    __slots__ = ("_counting", "_field", "_left", "_most", "many", "metadata")

    def __init__(
        self, *, metadata: bool = True, most_bytes: int | None = None, field: str = "k", many: bool = False
    ) -> None:
        """Without `metadata` none is read. `most_bytes` of it may be read from the disk, as JSON; None for any.

        `field` of the request is what asks for less. Of `many` questions, which take names and identities alone, most
        items are told in the end: `index.names` remembers them.
        """
        if many and metadata:
            raise ValueError("many answers tell no metadata; give metadata=False with many=True")
        self.metadata = metadata
        self.many = many
        self._field = field
        self._counting = threading.Lock()
        self._left = self._most = most_bytes

    def read(self, size: int) -> None:
        """Count `size` more bytes of metadata. Raises ResponseTooLarge."""
        if self._left is None:
            return
        with self._counting:
            self._left = left = self._left - size
        if left < 0:
            raise ResponseTooLarge(
                f"the metadata of the items found takes more than {self._most:,} bytes, and one answer carries less; "
                f"lower {self._field}, leave out metadata by read_mask, or split the batch",
                field=self._field,
            )


NAMES = Telling(metadata=False)
"""Identities and names alone."""
MANY_NAMES = Telling(metadata=False, many=True)
"""Those of a batch job."""


class Unparsed(Mapping[str, JSON]):
    """Metadata as its JSON text, a tenth or less of what Python makes of it.

    `parsed` reads it anew each time; who looks up a key keeps what was read.
    """

    __slots__ = ("_kept", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._kept: dict[str, JSON] | None = None

    def parsed(self) -> dict[str, JSON]:
        """All of it, the caller's own."""
        values: dict[str, JSON] = json.loads(self.text)
        return values

    def _whole(self) -> dict[str, JSON]:
        if self._kept is None:
            self._kept = self.parsed()
        return self._kept

    def __getitem__(self, key: str) -> JSON:
        return self._whole()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __repr__(self) -> str:
        return repr(self._whole())


def metadata_of(text: str) -> Mapping[str, JSON]:
    """What stored text says. Raises ValueError where it is no JSON."""
    if text == "{}":
        return {}
    values: dict[str, JSON] = json.loads(text)
    return values if len(text) <= _PARSED else Unparsed(text)


def metadata_bytes(metadata: Mapping[str, JSON]) -> int:
    """About what it takes beyond that of an entry with little of it."""
    return len(metadata.text) if isinstance(metadata, Unparsed) else 0


_PARSED = 256  # characters, up to which it is kept as values
