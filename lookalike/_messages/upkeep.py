"""Long operations and what they make."""

from __future__ import annotations

from google.longrunning import operations_pb2

from lookalike._messages.galleries import gallery
from lookalike._messages.names import last_part, moment
from lookalike.errors import from_status
from lookalike.types import Operation, Problem, Snapshot, Verification
from lookalike.v1 import gallery_pb2, upkeep_pb2
from lookalike.v1 import operations_pb2 as pb


def snapshot(message: upkeep_pb2.Snapshot) -> Snapshot:
    _, gallery_id, _, snapshot_id = message.name.split("/")
    return Snapshot(
        gallery=gallery_id,
        id=snapshot_id,
        generation=message.generation,
        create_time=moment(message.create_time),
        size_bytes=message.size_bytes,
        damage=message.damage,
    )


def verification(message: upkeep_pb2.Verification) -> Verification:
    return Verification(
        gallery=last_part(message.gallery),
        item_count=message.item_count,
        file_count=message.file_count,
        problems=tuple(
            Problem(path=problem.path, what=problem.what, repaired=problem.repaired) for problem in message.problems
        ),
        sound=message.sound,
    )


def operation(message: operations_pb2.Operation) -> Operation:
    known = pb.OperationMetadata()
    message.metadata.Unpack(known)
    made, copied = gallery_pb2.Gallery(), upkeep_pb2.Snapshot()
    is_gallery, is_copy = message.response.Unpack(made), message.response.Unpack(copied)
    found = upkeep_pb2.Verification()
    is_found = message.response.Unpack(found)
    return Operation(
        id=last_part(message.name),
        verb=known.verb,
        target=last_part(known.target),
        stage=known.stage,
        progress=known.done,
        total=known.total,
        create_time=moment(known.create_time),
        done=message.done,
        error=from_status(message.error) if message.HasField("error") else None,
        gallery=gallery(made) if is_gallery else None,
        snapshot=snapshot(copied) if is_copy else None,
        verification=verification(found) if is_found else None,
    )
