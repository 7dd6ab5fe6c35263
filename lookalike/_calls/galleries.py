"""The calls of GalleryService that are about whole galleries, and those of AliasService."""

from __future__ import annotations

from lookalike import _messages as messages
from lookalike._calls.kinds import PAGE_SIZE, Call, Page, call, new_id
from lookalike.types import Alias, Gallery, IndexSettings
from lookalike.v1 import alias_pb2, gallery_pb2

GALLERY = "lookalike.v1.GalleryService"
ALIAS = "lookalike.v1.AliasService"


def create_gallery(gallery: str, *, index: IndexSettings | None = None) -> Call[Gallery]:
    """Create an empty gallery for the serving model."""
    settings = gallery_pb2.Gallery(index=messages.index_settings(index)) if index else None
    return call(
        f"{GALLERY}/CreateGallery",
        gallery_pb2.CreateGalleryRequest(gallery_id=gallery, gallery=settings, request_id=new_id()),
        gallery_pb2.CreateGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def get_gallery(gallery: str) -> Call[Gallery]:
    """Describe a gallery."""
    return call(
        f"{GALLERY}/GetGallery",
        gallery_pb2.GetGalleryRequest(name=messages.gallery_name(gallery)),
        gallery_pb2.GetGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def list_galleries(page_token: str) -> Call[Page[Gallery]]:
    """Every gallery, by name; pages are fetched as they are needed."""
    return call(
        f"{GALLERY}/ListGalleries",
        gallery_pb2.ListGalleriesRequest(page_size=PAGE_SIZE, page_token=page_token),
        gallery_pb2.ListGalleriesResponse,
        lambda response: Page([messages.gallery(found) for found in response.galleries], response.next_page_token),
    )


def update_gallery(gallery: str, index: IndexSettings, *, etag: str = "") -> Call[Gallery]:
    """Change how a gallery is indexed, from its next sealing on; `reindex_gallery` does it at once.

    With an `etag` it fails with Conflict unless the gallery still carries it.
    """
    return call(
        f"{GALLERY}/UpdateGallery",
        gallery_pb2.UpdateGalleryRequest(
            gallery=gallery_pb2.Gallery(
                name=messages.gallery_name(gallery), index=messages.index_settings(index), etag=etag
            ),
            request_id=new_id(),
        ),
        gallery_pb2.UpdateGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def delete_gallery(gallery: str, *, force: bool = False, validate_only: bool = False) -> Call[None]:
    """Delete a gallery; with `force` also one that holds items, with `validate_only` look whether it could be."""
    return call(
        f"{GALLERY}/DeleteGallery",
        gallery_pb2.DeleteGalleryRequest(
            name=messages.gallery_name(gallery), force=force, request_id=new_id(), validate_only=validate_only
        ),
        gallery_pb2.DeleteGalleryResponse,
        lambda response: None,
    )


def put_alias(alias: str, gallery: str, *, allow_missing: bool = True) -> Call[Alias]:
    """Let an alias stand for a gallery from now on; without `allow_missing` it must be there already."""
    return call(
        f"{ALIAS}/UpdateAlias",
        alias_pb2.UpdateAliasRequest(
            alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery=messages.gallery_name(gallery)),
            allow_missing=allow_missing,
            request_id=new_id(),
        ),
        alias_pb2.UpdateAliasResponse,
        lambda response: messages.alias(response.alias),
    )


def get_alias(alias: str) -> Call[Alias]:
    """Describe an alias."""
    return call(
        f"{ALIAS}/GetAlias",
        alias_pb2.GetAliasRequest(name=f"aliases/{alias}"),
        alias_pb2.GetAliasResponse,
        lambda response: messages.alias(response.alias),
    )


def list_aliases(page_token: str) -> Call[Page[Alias]]:
    """Every alias, by name; pages are fetched as they are needed."""
    return call(
        f"{ALIAS}/ListAliases",
        alias_pb2.ListAliasesRequest(page_size=PAGE_SIZE, page_token=page_token),
        alias_pb2.ListAliasesResponse,
        lambda response: Page([messages.alias(found) for found in response.aliases], response.next_page_token),
    )


def delete_alias(alias: str) -> Call[None]:
    """Delete an alias; the gallery stays."""
    return call(
        f"{ALIAS}/DeleteAlias",
        alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}", request_id=new_id()),
        alias_pb2.DeleteAliasResponse,
        lambda response: None,
    )
