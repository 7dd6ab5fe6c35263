"""gRPC adapters of UpkeepService, and of the standard Operations service that tells of its work."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2

from embedding.errors import InvalidInput
from index import GalleryEngine
from index.items import name_of_page_token
from index.schema import as_datetime, as_us
from lookalike.v1 import gallery_pb2, upkeep_pb2_grpc
from lookalike.v1 import upkeep_pb2 as pb
from service import errors, upkeep
from service.call import principal
from service.errors import translated_errors
from service.messages import parse, wire
from service.once import Once, gone_already, token_of
from service.operations import Makes, Operation, Operations
from service.servicers import pages
from service.serving import Serving

MAX_WAIT_SECONDS = 60.0
"""Longest that one WaitOperation waits; the answer then says that it is not done."""

_LOOK_SECONDS = 0.05

Context = grpc.aio.ServicerContext[Any, Any]


class UpkeepService(upkeep_pb2_grpc.UpkeepServiceServicer):
    """Long work on whole galleries."""

    def __init__(self, serving: Serving, operations: Operations, once: Once) -> None:
        self._serving = serving
        self._operations = operations
        self._once = once

    async def ReindexGallery(self, request: pb.ReindexGalleryRequest, context: Context) -> pb.ReindexGalleryResponse:
        async with translated_errors(context):
            name = parse.gallery_name(request.name, "name")
            settings = parse.index_settings(request.index, "index") if request.HasField("index") else None
            engine = self._serving.current.engine
            token = token_of(request)
            if (before := self._operations.begun(token)) is not None:
                return pb.ReindexGalleryResponse(operation=_told(before))
            gallery_id = await self._existing(name, "name")
            if request.validate_only:
                return pb.ReindexGalleryResponse()
            begun = self._operations.start(
                "reindex",
                gallery_id,
                lambda tell: _gallery(upkeep.reindex(engine, gallery_id, settings, tell)),
                builds=True,
                token=token,
            )
            return pb.ReindexGalleryResponse(operation=_told(begun))

    async def VerifyGallery(self, request: pb.VerifyGalleryRequest, context: Context) -> pb.VerifyGalleryResponse:
        async with translated_errors(context):
            name, repair = parse.gallery_name(request.name, "name"), request.repair
            serving = self._serving.current
            engine = serving.engine
            token = token_of(request)
            if (before := self._operations.begun(token)) is not None:
                return pb.VerifyGalleryResponse(operation=_told(before))
            gallery_id = await serving.run(upkeep.existing, engine, name)
            if request.validate_only:
                return pb.VerifyGalleryResponse()
            begun = self._operations.start(
                "verify",
                gallery_id,
                lambda tell: wire.verification(gallery_id, upkeep.verify(engine, gallery_id, repair, tell)),
                token=token,
            )
            return pb.VerifyGalleryResponse(operation=_told(begun))

    async def MigrateGallery(self, request: pb.MigrateGalleryRequest, context: Context) -> pb.MigrateGalleryResponse:
        async with translated_errors(context):
            source = parse.gallery_name(request.name, "name")
            alias = parse.alias_name(request.alias, "alias") if request.alias else ""
            serving = self._serving.named(parse.model_name(request.model, "model") if request.model else "")
            token = token_of(request)
            if (before := self._operations.begun(token)) is not None:
                return pb.MigrateGalleryResponse(operation=_told(before))
            migration = await serving.run(upkeep.Migration, serving.engine, source, request.gallery_id, alias=alias)
            if request.validate_only:
                await serving.run(migration.check_images)
                return pb.MigrateGalleryResponse()
            begun = self._operations.start(
                "migrate",
                migration.source_id,
                lambda tell: _gallery(migration.run(tell)),
                others=[request.gallery_id],
                builds=True,
                makes=Makes(request.gallery_id, serving.engine.model),
                token=token,
            )
            return pb.MigrateGalleryResponse(operation=_told(begun))

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> pb.CreateSnapshotResponse:
        async with translated_errors(context):
            engine = self._serving.current.engine
            token = token_of(request)
            if (before := self._operations.begun(token)) is not None:
                return pb.CreateSnapshotResponse(operation=_told(before))
            gallery_id = await self._existing(parse.gallery_name(request.parent, "parent"), "parent")
            await self._serving.current.run(engine.names.shelf.check_free, gallery_id, request.snapshot_id)
            if request.validate_only:
                return pb.CreateSnapshotResponse()
            begun = self._operations.start(
                "snapshot",
                gallery_id,
                lambda tell: wire.snapshot(upkeep.snapshot(engine, gallery_id, request.snapshot_id, tell)),
                token=token,
            )
            return pb.CreateSnapshotResponse(operation=_told(begun))

    async def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: Context) -> pb.ListSnapshotsResponse:
        async with translated_errors(context):
            serving = self._serving.current
            named = parse.gallery_name(request.parent, "parent")
            gallery_id, copies = await serving.run(serving.engine.names.snapshots, named)
            kind = pages.within("snapshots", f"galleries/{gallery_id}")
            size, after = parse.page_size(request.page_size), name_of_page_token(request.page_token, kind)
            found = [copy for copy in copies if copy.id > after]
            shown, following = pages.page(
                kind, found, size, wire.snapshot, lambda copy: copy.id, most=pages.most_bytes()
            )
            return pb.ListSnapshotsResponse(snapshots=shown, next_page_token=following)

    async def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: Context) -> pb.DeleteSnapshotResponse:
        async with translated_errors(context):
            serving = self._serving.current
            gallery, snapshot = parse.snapshot_name(request.name, "name")

            def delete(again: bool) -> pb.DeleteSnapshotResponse:
                with gone_already(again):
                    serving.engine.names.delete_snapshot(gallery, snapshot)
                return pb.DeleteSnapshotResponse()

            return await self._once.done(
                request,
                pb.DeleteSnapshotResponse,
                serving,
                lambda again: serving.run(delete, again),
                makes_room=True,
            )

    async def RestoreGallery(self, request: pb.RestoreGalleryRequest, context: Context) -> pb.RestoreGalleryResponse:
        async with translated_errors(context):
            serving = self._serving.current
            engine = serving.engine
            gallery, snapshot = parse.snapshot_name(request.snapshot, "snapshot")
            token = token_of(request)
            if (before := self._operations.begun(token)) is not None:
                return pb.RestoreGalleryResponse(operation=_told(before))
            source, model = await serving.run(upkeep.restorable, engine, request.gallery_id, gallery, snapshot)
            if request.validate_only:
                return pb.RestoreGalleryResponse()
            begun = self._operations.start(
                "restore",
                request.gallery_id,
                lambda tell: _gallery(upkeep.restore(engine, source, request.gallery_id, tell)),
                makes=None if model is None else Makes(request.gallery_id, model),
                token=token,
            )
            return pb.RestoreGalleryResponse(operation=_told(begun))

    async def _existing(self, name: str, path: str) -> str:
        """The id of the gallery that a name or an alias stands for. Raises NotFound."""
        serving = self._serving.current
        return (await serving.run(serving.engine.gallery, name, path=path, any_model=True)).id


class OperationsService(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """google.longrunning.Operations: what the work of this server has come to."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        async with translated_errors(context):
            return _told(self._named(request.name))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        async with translated_errors(context):
            if request.name not in {"", "operations"}:
                raise InvalidInput(f"name must be `operations`; got {request.name[:80]!a}", field="name")
            wanted = {"": None, "done=true": True, "done=false": False}
            spelling = request.filter.replace(" ", "")
            if spelling not in wanted:
                raise InvalidInput("filter is `done = true`, `done = false` or empty", field="filter")
            done, size = wanted[spelling], parse.page_size(request.page_size)
            kind = pages.within("operations", "this server", spelling)
            after, caller = _created_after(request.page_token, kind), principal()
            found = [
                each
                for each in self._operations.all()
                if each.created > after and done in {None, each.done} and caller.allows(each.target)
            ]
            shown, following = pages.page(
                kind, found, size, _told, lambda each: str(as_us(each.created)), most=pages.most_bytes()
            )
            return operations_pb2.ListOperationsResponse(operations=shown, next_page_token=following)

    async def DeleteOperation(
        self, request: operations_pb2.DeleteOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        async with translated_errors(context):
            self._operations.delete(self._named(request.name).id)
            return empty_pb2.Empty()

    async def CancelOperation(
        self, request: operations_pb2.CancelOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        async with translated_errors(context):
            self._named(request.name).cancel()
            return empty_pb2.Empty()

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        async with translated_errors(context):
            operation = self._named(request.name)
            timeout = request.timeout  # of any length: the longest is no interval of Python's
            asked = timeout.seconds + timeout.nanos / 1e9 if request.HasField("timeout") else MAX_WAIT_SECONDS
            ends = asyncio.get_running_loop().time() + min(max(asked, 0.0), MAX_WAIT_SECONDS)
            while not operation.done and asyncio.get_running_loop().time() < ends:
                await asyncio.sleep(_LOOK_SECONDS)  # a thread that waits would be one less for searches
            return _told(operation)

    def _named(self, name: str) -> Operation[Any]:
        return self._operations.get(parse.operation_name(name, "name"))


def _created_after(page_token: str, kind: str) -> datetime:
    """When the last operation of the page before was created, which may be forgotten by now."""
    name = name_of_page_token(page_token, kind)
    if not name:
        return datetime.min.replace(tzinfo=UTC)
    try:
        return as_datetime(int(name))
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            "page_token is not one that a list of operations returned; leave it out", field="page_token"
        ) from error


def _gallery(made: GalleryEngine) -> gallery_pb2.Gallery:
    """As the work left it: what becomes of it later is not the operation's."""
    return wire.gallery(made, with_stats=True)


def _told(operation: Operation[Any]) -> operations_pb2.Operation:
    return wire.operation(operation, partial(errors.status, operation=operation.id))
