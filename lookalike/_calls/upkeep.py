"""The calls of UpkeepService, and those that follow its long-running operations."""

from __future__ import annotations

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from lookalike import _messages as messages
from lookalike._calls.kinds import PAGE_SIZE, Call, Page, call, new_id
from lookalike.types import IndexSettings, Operation, Snapshot
from lookalike.v1 import upkeep_pb2

UPKEEP = "lookalike.v1.UpkeepService"
OPERATIONS = "google.longrunning.Operations"

_WAITED = 0.8
"""Share of its time that a call waits on the server at most; the rest is for the way."""


def reindex_gallery(gallery: str, *, index: IndexSettings | None = None) -> Call[Operation]:
    """Begin to index a gallery anew, as `index` says when given."""
    return call(
        f"{UPKEEP}/ReindexGallery",
        upkeep_pb2.ReindexGalleryRequest(
            name=messages.gallery_name(gallery),
            index=messages.index_settings(index) if index else None,
            request_id=new_id(),
        ),
        upkeep_pb2.ReindexGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def verify_gallery(gallery: str, *, repair: bool = False) -> Call[Operation]:
    """Begin to check a gallery, damaged or not, and with `repair` make again what can be.

    What is found is the `verification` of the operation.
    """
    return call(
        f"{UPKEEP}/VerifyGallery",
        upkeep_pb2.VerifyGalleryRequest(name=messages.gallery_name(gallery), repair=repair, request_id=new_id()),
        upkeep_pb2.VerifyGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def migrate_gallery(gallery: str, to: str, *, model: str = "", alias: str = "") -> Call[Operation]:
    """Begin to embed a gallery's stored thumbnails with another loaded model into the gallery `to`.

    The model is by default the active one. Items imported into `to` before are kept. When all is there, the alias, if
    one is given, moves.
    """
    return call(
        f"{UPKEEP}/MigrateGallery",
        upkeep_pb2.MigrateGalleryRequest(
            name=messages.gallery_name(gallery),
            gallery_id=to,
            model=messages.model_name(model) if model else "",
            alias=f"aliases/{alias}" if alias else "",
            request_id=new_id(),
        ),
        upkeep_pb2.MigrateGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def create_snapshot(gallery: str, snapshot: str) -> Call[Operation]:
    """Begin to copy a gallery, at one generation, on the server's disk."""
    return call(
        f"{UPKEEP}/CreateSnapshot",
        upkeep_pb2.CreateSnapshotRequest(
            parent=messages.gallery_name(gallery), snapshot_id=snapshot, request_id=new_id()
        ),
        upkeep_pb2.CreateSnapshotResponse,
        lambda response: messages.operation(response.operation),
    )


def list_snapshots(page_token: str, gallery: str) -> Call[Page[Snapshot]]:
    """The snapshots of a gallery, by name; pages are fetched as they are needed."""
    return call(
        f"{UPKEEP}/ListSnapshots",
        upkeep_pb2.ListSnapshotsRequest(
            parent=messages.gallery_name(gallery), page_size=PAGE_SIZE, page_token=page_token
        ),
        upkeep_pb2.ListSnapshotsResponse,
        lambda response: Page([messages.snapshot(found) for found in response.snapshots], response.next_page_token),
    )


def delete_snapshot(gallery: str, snapshot: str) -> Call[None]:
    """Delete a snapshot of a gallery."""
    return call(
        f"{UPKEEP}/DeleteSnapshot",
        upkeep_pb2.DeleteSnapshotRequest(name=messages.snapshot_name(gallery, snapshot), request_id=new_id()),
        upkeep_pb2.DeleteSnapshotResponse,
        lambda response: None,
    )


def restore_gallery(gallery: str, snapshot: str, to: str) -> Call[Operation]:
    """Begin to make the new gallery `to` from a snapshot of a gallery."""
    return call(
        f"{UPKEEP}/RestoreGallery",
        upkeep_pb2.RestoreGalleryRequest(
            snapshot=messages.snapshot_name(gallery, snapshot), gallery_id=to, request_id=new_id()
        ),
        upkeep_pb2.RestoreGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def get_operation(operation: str) -> Call[Operation]:
    """How far an operation is."""
    return call(
        f"{OPERATIONS}/GetOperation",
        operations_pb2.GetOperationRequest(name=f"operations/{operation}"),
        operations_pb2.Operation,
        messages.operation,
    )


def wait_operation(operation: str, *, seconds: float = 10.0) -> Call[Operation]:
    """The operation once it is done, or as it is after so many seconds, at most four fifths of the client's timeout;
    those before the call was repeated count."""

    def request(left: float, gone: float) -> bytes:
        asked = operations_pb2.WaitOperationRequest(name=f"operations/{operation}")
        asked.timeout.FromNanoseconds(int(max(0.0, min(seconds - gone, _WAITED * left)) * 1e9))
        return bytes(asked.SerializeToString())

    return Call(
        f"{OPERATIONS}/WaitOperation",
        request,
        lambda data: messages.operation(operations_pb2.Operation.FromString(data)),
    )


def cancel_operation(operation: str) -> Call[None]:
    """End an operation as soon as it can be; what it had written stays."""
    return call(
        f"{OPERATIONS}/CancelOperation",
        operations_pb2.CancelOperationRequest(name=f"operations/{operation}"),
        empty_pb2.Empty,
        lambda response: None,
    )


def list_operations(page_token: str) -> Call[Page[Operation]]:
    """The operations of the server since it started, the oldest first; pages are fetched as they are needed."""
    return call(
        f"{OPERATIONS}/ListOperations",
        operations_pb2.ListOperationsRequest(name="operations", page_size=PAGE_SIZE, page_token=page_token),
        operations_pb2.ListOperationsResponse,
        lambda response: Page([messages.operation(found) for found in response.operations], response.next_page_token),
    )
