"""What is said of what is not there, and which list shows what is."""

from __future__ import annotations

from embedding.errors import NotFound


def no_gallery(gallery_id: str) -> NotFound:
    return NotFound(
        f"no gallery {gallery_id!r} here; `lookalike gallery list` shows those there are", field="gallery_id"
    )


def no_item(name: str, gallery_id: str) -> NotFound:
    return NotFound(
        f"no item {name!r} in gallery {gallery_id!r}; `lookalike gallery list {gallery_id}` shows its items",
        field="name",
    )


def no_snapshot(snapshot_id: str, gallery_id: str) -> NotFound:
    return NotFound(
        f"no snapshot {snapshot_id!r} of gallery {gallery_id!r} here; `lookalike gallery snapshots {gallery_id}` shows "
        "those there are",
        field="name",
    )


def no_alias(alias: str) -> NotFound:
    return NotFound(f"no alias {alias!r} here; `lookalike gallery aliases` shows those there are", field="name")
