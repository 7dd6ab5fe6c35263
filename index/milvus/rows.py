"""What a gallery looks like in Milvus: its rows, and the record that says which of them count.

Each version of an item is a row with a key of its own, never changed but for the generation that it died in; each
gallery is a collection of such rows. One more collection holds a record a gallery. A write adds rows of the next
generation, marks the rows that die in it, and is carried out by replacing the record, in one step: until then readers
ask for the generation before, and what a crash leaves behind is cleared away by the next opening. Milvus has no
transactions; this is how several rows change together.
"""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from embedding.decision import Vectors
from embedding.errors import DamagedData, InvalidInput
from index.engine import IndexSettings
from index.items import JSON, MAX_NAME, Item, ModelRef
from index.milvus.filters import literal
from index.milvus.link import Row
from index.schema import as_datetime, now_us

NEVER = 2**52
"""The generation in which a living row dies."""

MAX_THUMBNAIL = 48_000
"""Largest thumbnail, in bytes: Milvus has no blobs, and its strings hold 65,535 bytes."""

BEFORE_ORIGIN = "@"
"""Between a thumbnail in base64 and the item's origin, which share a field: collections of earlier versions have no
other for it, and Milvus refuses a field that a collection lacks."""

SEARCHED = ("key", "name", "vector")
WHOLE = ("key", "name", "identity", "metadata", "vector", "born", "updated_us")
STORED = (*WHOLE, "died", "thumbnail")
RECORD = ("id", "state")

_TEXT_BYTES = 4 * MAX_NAME
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 2_000
_INT64 = range(-(2**63), 2**63)
_WIDTHS = range(2, 32_769)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known of a gallery as a whole; immutable, replaced by every write."""

    id: str
    model: ModelRef
    collection: str
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_us: int = field(default_factory=now_us)
    generation: int = 0
    next_key: int = 1
    size: int = 0
    settings: IndexSettings = field(default_factory=IndexSettings)

    def row(self) -> Row:
        return {"id": self.id, "state": asdict(self), "nothing": [0.0, 0.0]}

    @classmethod
    def of(cls, row: Row) -> Record:
        """Raises DamagedData."""
        try:
            held = row["state"]
            state = json.loads(held) if isinstance(held, str | bytes) else dict(held)
            settings = IndexSettings(**state.pop("settings"))
            return cls(model=ModelRef(**state.pop("model")), settings=settings, **state)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedData(
                f"Milvus holds a record of gallery {row.get('id')!r} that cannot be read ({error}); delete the "
                "gallery, or open it with the version that wrote it"
            ) from error

    def etag(self, key: int) -> str:
        return f"{self.uid[:8]}-{key:x}"

    def item(self, row: Row) -> Item:
        """The item of a row with the fields of `WHOLE`."""
        return Item(
            name=row["name"],
            embedding=np.array(row["vector"], np.float32),
            identity=row["identity"] or None,
            metadata=metadata_of(row),
            etag=self.etag(row["key"]),
            generation=row["born"],
            update_time=as_datetime(row["updated_us"]),
        )


def metadata_of(row: Row) -> Mapping[str, JSON]:
    held = row["metadata"]
    found: Mapping[str, JSON] = json.loads(held) if isinstance(held, str | bytes) else held
    return found


def living(generation: int) -> str:
    """The rows that count in a generation."""
    return f"born <= {generation} and died > {generation}"


def both(*conditions: str) -> str:
    """All of these conditions, those that are empty left out."""
    return " and ".join(f"({condition})" for condition in conditions if condition)


def one_of(column: str, values: Sequence[int] | Sequence[str]) -> str:
    listed = ", ".join(literal(value) if isinstance(value, str) else str(value) for value in values)
    return f"{column} in [{listed}]"


def born_rows(items: Sequence[Item], vectors_ND: Vectors, *, first_key: int, generation: int) -> list[Row]:
    """Rows for checked items. Raises InvalidInput for what Milvus cannot hold."""
    rows: list[Row] = []
    written_us = now_us()
    for at, (item, vector_D) in enumerate(zip(items, vectors_ND, strict=True)):
        if item.thumbnail and len(item.thumbnail) > MAX_THUMBNAIL:
            raise InvalidInput(
                f"the thumbnail of item {item.name!r} takes {len(item.thumbnail):,} bytes, and Milvus holds "
                f"{MAX_THUMBNAIL:,}; make thumbnails smaller",
                field=f"items[{at}].thumbnail",
            )
        if not _fits(item.metadata):
            raise InvalidInput(
                f"the metadata of item {item.name!r} has a whole number beyond 64 bits, which Milvus cannot hold; "
                "write it as a string",
                field=f"items[{at}].metadata",
            )
        rows.append(
            {
                "key": first_key + at,
                "name": item.name,
                "identity": item.identity or "",
                "metadata": dict(item.metadata),
                "vector": vector_D,
                "born": generation,
                "died": NEVER,
                "updated_us": written_us,
                "thumbnail": _packed(item),
            }
        )
    return rows


def with_death(row: Row, generation: int) -> Row:
    """A stored row, dying in a generation; NEVER brings it back."""
    return {**row, "metadata": metadata_of(row), "died": generation}


def batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """As many rows at a time as one message holds."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        takes = 4 * len(row["vector"]) + len(row["thumbnail"]) + len(json.dumps(row["metadata"])) + 1_000
        if batch and (size + takes > _BATCH_BYTES or len(batch) == _BATCH_ROWS):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += takes
    if batch:
        yield batch


def gallery_schema(client: MilvusClient, model: ModelRef) -> Any:
    """Of one gallery's collection. Raises InvalidInput for a width that Milvus does not have."""
    if model.embedding_dim not in _WIDTHS:
        raise InvalidInput(
            f"Milvus holds vectors of 2 to {_WIDTHS[-1]:,} values; {model.name} has {model.embedding_dim}",
            field="embedding_dim",
        )
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.INT64, is_primary=True)
    schema.add_field("name", DataType.VARCHAR, max_length=_TEXT_BYTES)
    schema.add_field("identity", DataType.VARCHAR, max_length=_TEXT_BYTES)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=model.embedding_dim)
    schema.add_field("born", DataType.INT64)
    schema.add_field("died", DataType.INT64)
    schema.add_field("updated_us", DataType.INT64)
    schema.add_field("thumbnail", DataType.VARCHAR, max_length=65_535)
    return schema


def records_schema(client: MilvusClient) -> Any:
    """Of the collection of records; Milvus has none without a vector."""
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=256)
    schema.add_field("state", DataType.JSON)
    schema.add_field("nothing", DataType.FLOAT_VECTOR, dim=2)
    return schema


def collection_name(prefix: str, gallery_id: str, uid: str) -> str:
    """Of a gallery's own collection: no later gallery of the name has the same."""
    readable = "".join(letter if letter.isalnum() else "_" for letter in gallery_id)
    return f"{prefix}_{readable}_{hashlib.sha256(uid.encode()).hexdigest()[:12]}"


def _packed(item: Item) -> str:
    thumbnail = base64.b64encode(item.thumbnail or b"").decode("ascii")
    return f"{thumbnail}{BEFORE_ORIGIN}{item.origin}" if item.origin else thumbnail


def _fits(value: JSON) -> bool:
    if isinstance(value, Mapping):
        return all(map(_fits, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_fits, value))
    return not isinstance(value, int) or value in _INT64
