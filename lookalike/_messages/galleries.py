"""Galleries, their items and aliases."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.field_mask_pb2 import FieldMask

from lookalike._messages.decisions import embedding
from lookalike._messages.names import dictionary, item_name, last_part, moment, struct
from lookalike._messages.questions import image_input
from lookalike.errors import from_status
from lookalike.types import (
    Alias,
    CurvePoint,
    Effort,
    Gallery,
    GalleryStats,
    Imported,
    IndexSettings,
    Item,
    ItemName,
    NewItem,
    NotStored,
    Purged,
    Segment,
)
from lookalike.v1 import alias_pb2, gallery_pb2

_FALLBACKS = {
    gallery_pb2.STRUCTURE_FALLBACK_FEW_ROWS: "few-rows",
    gallery_pb2.STRUCTURE_FALLBACK_ODD_WIDTH: "odd-width",
    gallery_pb2.STRUCTURE_FALLBACK_SEALED_BEFORE: "sealed-before",
}


def index_settings(settings: IndexSettings) -> gallery_pb2.IndexSettings:
    return gallery_pb2.IndexSettings(
        min_recall=settings.min_recall,
        structure=settings.structure,
        memory_bytes=settings.memory_bytes or 0,
        vectors=settings.vectors,
    )


def update_request(
    gallery: str, item: NewItem, *, fields: Iterable[str] = (), allow_missing: bool = False, request_id: str = ""
) -> gallery_pb2.UpdateItemRequest:
    return gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(
            name=str(ItemName(gallery, item.id)),
            identity=item.identity or "",
            metadata=struct(item.metadata),
            etag=item.etag,
        ),
        image=None if item.image is None else image_input(item.image),
        update_mask=FieldMask(paths=fields),
        allow_missing=allow_missing,
        request_id=request_id,
    )


def item(message: gallery_pb2.Item) -> Item:
    return Item(
        name=item_name(message.name),
        identity=message.identity or None,
        metadata=dictionary(message.metadata),
        etag=message.etag,
        generation=message.generation,
        update_time=moment(message.update_time),
        embedding=embedding(message.embedding) if message.embedding else None,
    )


def gallery(message: gallery_pb2.Gallery) -> Gallery:
    return Gallery(
        id=last_part(message.name),
        model=last_part(message.model),
        item_count=message.item_count,
        generation=message.generation,
        create_time=moment(message.create_time) if message.HasField("create_time") else None,
        damage=message.damage,
        index=_index(message.index) if message.HasField("index") else None,
        etag=message.etag,
        stats=_stats(message.stats) if message.HasField("stats") else None,
    )


def alias(message: alias_pb2.Alias) -> Alias:
    return Alias(id=last_part(message.name), gallery=last_part(message.gallery))


def purged(message: gallery_pb2.PurgeItemsResponse) -> Purged:
    return Purged(count=message.purge_count, sample=tuple(map(item_name, message.purge_sample)))


def imported(message: gallery_pb2.ImportItemsResponse) -> Imported:
    return Imported(
        acknowledged=message.acknowledged_count,
        stored=message.stored_count,
        failures=tuple(
            NotStored(index=failure.index, error=from_status(failure.error)) for failure in message.failures
        ),
    )


def _index(message: gallery_pb2.IndexSettings) -> IndexSettings:
    return IndexSettings(
        min_recall=message.min_recall,
        structure=message.structure,
        memory_bytes=message.memory_bytes or None,
        vectors=message.vectors or "float32",  # of a server that knows no other
    )


def _stats(message: gallery_pb2.GalleryStats) -> GalleryStats:
    return GalleryStats(
        fresh_items=message.fresh_items,
        dead_rows=message.dead_rows,
        disk_bytes=message.disk_bytes,
        memory_bytes=message.memory_bytes,
        segments=tuple(
            Segment(
                rows=segment.rows,
                dead_rows=segment.dead_rows,
                structure=segment.structure,
                curve=tuple(
                    CurvePoint(
                        k=point.k,
                        recall=point.recall,
                        match_recall=point.match_recall,
                        microseconds=point.microseconds,
                        effort=Effort(
                            nprobe=point.nprobe or None,
                            ef_search=point.ef_search or None,
                            rescore=point.rescore or None,
                        ),
                    )
                    for point in segment.curve
                ),
                fallback=_FALLBACKS.get(segment.fallback, ""),
            )
            for segment in message.segments
        ),
        busy=message.busy,
        last_failure=message.last_failure,
    )
