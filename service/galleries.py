"""gRPC adapter of GalleryService: parse, call the engine or its catalog in the pool, format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from embedding.errors import DamagedData, LookalikeError
from index import Catalog, Gallery
from index.items import name_of_page_token, page_token_after
from lookalike.v1 import gallery_pb2 as pb
from lookalike.v1 import gallery_pb2_grpc
from service import errors, parse, wire, writes
from service.errors import translated_errors
from service.serving import Serving
from service.sources import naming

MAX_ITEMS = 1024
"""Most items of one BatchUpdateItems or BatchDeleteItems."""

Context = grpc.aio.ServicerContext[Any, Any]


class GalleryService(gallery_pb2_grpc.GalleryServiceServicer):
    """Named collections of items embedded by one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def CreateGallery(self, request: pb.CreateGalleryRequest, context: Context) -> pb.CreateGalleryResponse:
        async with translated_errors(context):
            serving = self._serving.current
            created = await serving.run(serving.engine.catalog.create, request.gallery_id, serving.engine.model)
            return pb.CreateGalleryResponse(gallery=wire.gallery(created))

    async def GetGallery(self, request: pb.GetGalleryRequest, context: Context) -> pb.GetGalleryResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.name, "name")
            serving = self._serving.current
            return pb.GetGalleryResponse(gallery=await serving.run(_described, serving.engine.catalog, gallery_id))

    async def ListGalleries(self, request: pb.ListGalleriesRequest, context: Context) -> pb.ListGalleriesResponse:
        async with translated_errors(context):
            size = parse.page_size(request.page_size)
            serving = self._serving.current
            return await serving.run(_page, serving.engine.catalog, size, name_of_page_token(request.page_token))

    async def DeleteGallery(self, request: pb.DeleteGalleryRequest, context: Context) -> pb.DeleteGalleryResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.name, "name")
            serving = self._serving.current
            await serving.run(serving.engine.delete_gallery, gallery_id, force=request.force)
            return pb.DeleteGalleryResponse()

    async def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:
        async with translated_errors(context):
            gallery_id, item_id = parse.item_name(request.name, "name")
            serving = self._serving.current

            def read() -> pb.GetItemResponse:
                stored = _opened(serving.engine.catalog, gallery_id, "name").get(item_id)
                return pb.GetItemResponse(item=wire.item(stored, gallery_id, with_embedding=True))

            return await serving.run(read)

    async def ListItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ListItemsResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.parent, "parent")
            size = parse.page_size(request.page_size)
            serving = self._serving.current

            def read() -> pb.ListItemsResponse:
                gallery = _opened(serving.engine.catalog, gallery_id, "parent")
                items, following = gallery.list(page_size=size, page_token=request.page_token)
                return pb.ListItemsResponse(
                    items=[wire.item(item, gallery_id) for item in items], next_page_token=following
                )

            return await serving.run(read)

    async def BatchUpdateItems(
        self, request: pb.BatchUpdateItemsRequest, context: Context
    ) -> pb.BatchUpdateItemsResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.parent, "parent")
            parse.check_batch(request.requests, most=MAX_ITEMS, path="requests")
            question = writes.UpdateItems(
                gallery=gallery_id,
                drafts=[parse.draft(item, gallery_id, f"requests[{i}]") for i, item in enumerate(request.requests)],
                allow_missing=request.allow_missing,
            )
            return await self._serving.current.ask(question, lambda outcomes: _batch_response(outcomes, gallery_id))

    async def BatchDeleteItems(
        self, request: pb.BatchDeleteItemsRequest, context: Context
    ) -> pb.BatchDeleteItemsResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.parent, "parent")
            parse.check_batch(request.names, most=MAX_ITEMS, path="names")
            names = [parse.item_in(gallery_id, name, f"names[{i}]") for i, name in enumerate(request.names)]
            serving = self._serving.current

            def delete() -> pb.BatchDeleteItemsResponse:
                gallery = _opened(serving.engine.catalog, gallery_id, "parent")
                with naming("names"):
                    deleted = gallery.delete(names, allow_missing=request.allow_missing)
                return pb.BatchDeleteItemsResponse(deleted_count=deleted)

            return await serving.run(delete)


def _opened(catalog: Catalog, gallery_id: str, path: str) -> Gallery:
    """A gallery of any model: its items can be read and deleted without comparing embeddings."""
    with naming(path):
        return catalog.get(gallery_id)


def _described(catalog: Catalog, gallery_id: str) -> pb.Gallery:
    try:
        return wire.gallery(_opened(catalog, gallery_id, "name"))
    except DamagedData as error:
        return wire.damaged_gallery(gallery_id, error)


def _page(catalog: Catalog, size: int, after: str) -> pb.ListGalleriesResponse:
    found = [gallery for gallery in wire.galleries(catalog) if gallery.name > after]
    return pb.ListGalleriesResponse(
        galleries=found[:size],
        next_page_token=page_token_after(found[size - 1].name) if len(found) > size else "",
    )


def _batch_response(outcomes: Sequence[writes.Stored], gallery_id: str) -> pb.BatchUpdateItemsResponse:
    return pb.BatchUpdateItemsResponse(
        results=[
            pb.UpdateItemResult(error=errors.status(outcome))
            if isinstance(outcome, LookalikeError)
            else pb.UpdateItemResult(item=wire.item(outcome, gallery_id))
            for outcome in outcomes
        ]
    )
