"""Errors that only a running service can meet; the rest of the tree stands in `embedding.errors`."""

from __future__ import annotations

from embedding.errors import LookalikeError


class StaleEtag(LookalikeError):
    """The item has changed since the caller read it."""

    reason = "STALE_ETAG"


class GalleryNotEmpty(LookalikeError):
    """A gallery that still holds items is deleted only by force."""

    reason = "GALLERY_NOT_EMPTY"


class NotReady(LookalikeError):
    """The model is still loading."""

    reason = "NOT_READY"
