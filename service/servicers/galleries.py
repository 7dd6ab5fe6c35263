"""gRPC adapter of GalleryService: parse, call the engine or its catalog in the pool, format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc

from embedding.errors import AlreadyExists, DamagedData, ModelMismatch
from index import GalleryCatalog, IndexSettings
from index.items import name_of_page_token
from index.receipts import Token
from lookalike.v1 import gallery_pb2 as pb
from service import writes
from service.access.principal import Principal
from service.call import principal
from service.engine import Engine
from service.errors import translated_errors
from service.messages import parse, wire
from service.once import gone_already, keeps_receipts, token_of
from service.servicers import pages
from service.servicers.gallery_items import ItemMethods

Context = grpc.aio.ServicerContext[Any, Any]


class GalleryService(ItemMethods):
    """Named collections of items embedded by one model; the methods on items stand in `gallery_items`."""

    async def CreateGallery(self, request: pb.CreateGalleryRequest, context: Context) -> pb.CreateGalleryResponse:
        async with translated_errors(context):
            settings = (
                parse.index_settings(request.gallery.index, "gallery.index")
                if request.gallery.HasField("index")
                else None
            )
            serving = self._serving.current
            if serving.engine.names.keeps_receipts:
                return await self._of_active(lambda engine: _created(engine, request, settings))

            async def create(again: bool) -> pb.CreateGalleryResponse:
                return await self._of_active(lambda engine: _created_once(engine, request, settings, again))

            return await self._once.done(request, pb.CreateGalleryResponse, serving, create)

    async def GetGallery(self, request: pb.GetGalleryRequest, context: Context) -> pb.GetGalleryResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.name, "name")
            serving = self._serving.current
            return pb.GetGalleryResponse(gallery=await serving.run(_described, serving.engine, gallery_id))

    async def UpdateGallery(self, request: pb.UpdateGalleryRequest, context: Context) -> pb.UpdateGalleryResponse:
        async with translated_errors(context):
            wrong = parse.Violations()
            with wrong:
                gallery_id = parse.gallery_name(request.gallery.name, "gallery.name")
            with wrong:
                settings = parse.index_settings(request.gallery.index, "gallery.index")
            with wrong:
                parts = parse.index_mask(request.update_mask, "update_mask")
            wrong.check()
            question = writes.UpdateGallery(
                gallery=gallery_id, settings=settings, parts=parts, etag=request.gallery.etag
            )
            serving = self._serving.current

            def update(token: Token | None) -> pb.UpdateGalleryResponse:
                updated = replace(question, token=token).write(serving.engine)
                return pb.UpdateGalleryResponse(gallery=wire.gallery(updated, with_stats=True))

            if serving.engine.names.keeps_receipts:
                # Its receipt says that it was done; the answer is the gallery as it stands.
                return await serving.run(lambda: update(token_of(request)))
            return await self._once.done(
                request, pb.UpdateGalleryResponse, serving, lambda _: serving.run(update, None)
            )

    async def ListGalleries(self, request: pb.ListGalleriesRequest, context: Context) -> pb.ListGalleriesResponse:
        async with translated_errors(context):
            size = parse.page_size(request.page_size)
            serving = self._serving.current
            after, most = name_of_page_token(request.page_token, "galleries"), pages.most_bytes()
            return await serving.run(_page, serving.engine.names.catalog, principal(), size, after, most)

    async def DeleteGallery(self, request: pb.DeleteGalleryRequest, context: Context) -> pb.DeleteGalleryResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.name, "name")
            serving = self._serving.current

            def delete(again: bool) -> pb.DeleteGalleryResponse:
                with gone_already(again):
                    serving.engine.names.delete_gallery(
                        gallery_id, force=request.force, validate_only=request.validate_only
                    )
                return pb.DeleteGalleryResponse()

            return await self._once.done(
                request,
                pb.DeleteGalleryResponse,
                serving,
                lambda again: serving.run(delete, again),
                makes_room=True,
            )

    async def _of_active(self, create: Callable[[Engine], pb.CreateGalleryResponse]) -> pb.CreateGalleryResponse:
        """Make a gallery of the model that is active when it gets its name."""
        while True:
            serving = self._serving.current
            try:
                return await serving.run(create, serving.engine)
            except ModelMismatch:
                if serving is self._serving.current:
                    raise


def _created(
    engine: Engine, request: pb.CreateGalleryRequest, settings: IndexSettings | None
) -> pb.CreateGalleryResponse:
    token = token_of(request)
    try:
        return pb.CreateGalleryResponse(
            gallery=wire.gallery(engine.create_gallery(request.gallery_id, settings, token))
        )
    except AlreadyExists:
        if token is None or request.gallery_id in engine.names.aliases.all():
            raise
        gallery = engine.gallery(request.gallery_id, any_model=True)
        if not keeps_receipts(gallery) or gallery.answered(token) is None:
            raise
        return pb.CreateGalleryResponse(gallery=wire.gallery(gallery))  # as it stands


def _created_once(
    engine: Engine, request: pb.CreateGalleryRequest, settings: IndexSettings | None, again: bool
) -> pb.CreateGalleryResponse:
    try:
        created = engine.create_gallery(request.gallery_id, settings)
    except AlreadyExists:
        if not again:
            raise
        created = engine.gallery(request.gallery_id, any_model=True)
    return pb.CreateGalleryResponse(gallery=wire.gallery(created))


def _described(engine: Engine, gallery_id: str) -> pb.Gallery:
    engine.names.aliases.resolve(gallery_id)  # that these are damaged says nothing of a gallery
    try:
        return wire.gallery(engine.gallery(gallery_id, path="name", any_model=True), with_stats=True)
    except DamagedData as error:
        return wire.damaged_gallery(gallery_id, error)


def _page(catalog: GalleryCatalog, caller: Principal, size: int, after: str, most: int) -> pb.ListGalleriesResponse:
    following = [gallery for gallery in wire.galleries(catalog) if gallery.name > after]
    found = [gallery for gallery in following if caller.allows(gallery.name.removeprefix("galleries/"))]
    shown, next_page = pages.page("galleries", found, size, lambda each: each, lambda each: each.name, most=most)
    return pb.ListGalleriesResponse(galleries=shown, next_page_token=next_page)
