"""gRPC adapter of AliasService: parse, ask the engine, format."""

from __future__ import annotations

from typing import Any

import grpc

from index.items import name_of_page_token
from lookalike.v1 import alias_pb2 as pb
from lookalike.v1 import alias_pb2_grpc
from service.call import principal
from service.errors import translated_errors
from service.messages import parse, wire
from service.once import Once, gone_already
from service.servicers import pages
from service.serving import Serving

Context = grpc.aio.ServicerContext[Any, Any]


class AliasService(alias_pb2_grpc.AliasServiceServicer):
    """Names that stand for galleries."""

    def __init__(self, serving: Serving, once: Once) -> None:
        self._serving = serving
        self._once = once

    async def UpdateAlias(self, request: pb.UpdateAliasRequest, context: Context) -> pb.UpdateAliasResponse:
        async with translated_errors(context):
            alias = parse.alias_name(request.alias.name, "alias.name")
            gallery_id = parse.gallery_name(request.alias.gallery, "alias.gallery")
            serving = self._serving.current

            def put(_: bool) -> pb.UpdateAliasResponse:
                serving.engine.names.put_alias(alias, gallery_id, allow_missing=request.allow_missing)
                return pb.UpdateAliasResponse(alias=wire.alias(alias, gallery_id))

            return await self._once.done(
                request, pb.UpdateAliasResponse, serving, lambda again: serving.run(put, again)
            )

    async def GetAlias(self, request: pb.GetAliasRequest, context: Context) -> pb.GetAliasResponse:
        async with translated_errors(context):
            alias = parse.alias_name(request.name, "name")
            return pb.GetAliasResponse(alias=wire.alias(alias, self._serving.current.engine.names.aliases.get(alias)))

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        async with translated_errors(context):
            size = parse.page_size(request.page_size)
            after = name_of_page_token(request.page_token, "aliases")
            aliases = self._serving.current.engine.names.aliases.all().items()
            found = [pair for pair in aliases if pair[0] > after and all(map(principal().allows, pair))]
            shown, following = pages.page(
                "aliases", found, size, lambda pair: wire.alias(*pair), lambda pair: pair[0], most=pages.most_bytes()
            )
            return pb.ListAliasesResponse(aliases=shown, next_page_token=following)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        async with translated_errors(context):
            alias = parse.alias_name(request.name, "name")
            serving = self._serving.current

            def delete(again: bool) -> pb.DeleteAliasResponse:
                with gone_already(again):
                    serving.engine.names.delete_alias(alias)
                return pb.DeleteAliasResponse()

            return await self._once.done(
                request, pb.DeleteAliasResponse, serving, lambda again: serving.run(delete, again)
            )
