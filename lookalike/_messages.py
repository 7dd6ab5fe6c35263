"""Messages of the wire contract, from and to the client's types."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
from google.longrunning import operations_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from lookalike._arrays import encoded_picture, png
from lookalike.errors import from_status
from lookalike.types import (
    JSON,
    Alias,
    Calibration,
    CurvePoint,
    Decision,
    Effort,
    Embedding,
    EmbeddingOf,
    ErrorRates,
    Feedback,
    Gallery,
    GalleryStats,
    ImageLike,
    Imported,
    IndexSettings,
    Item,
    ItemName,
    Model,
    ModelChange,
    Neighbor,
    Neighbors,
    NewItem,
    NotStored,
    OperatingPoint,
    Operation,
    Problem,
    Purged,
    RecordedFeedback,
    Segment,
    Snapshot,
    Verdict,
    Verification,
)
from lookalike.v1 import alias_pb2, common_pb2, feedback_pb2, gallery_pb2, model_pb2, search_pb2, upkeep_pb2
from lookalike.v1 import operations_pb2 as pb

ACTIVE_MODEL = "active"

_ITEM_FIELDS = tuple(field.name for field in gallery_pb2.Item.DESCRIPTOR.fields)
_RAW = ("nprobe", "ef_search", "rescore")

_VERDICTS = {
    common_pb2.VERDICT_MATCH: Verdict.MATCH,
    common_pb2.VERDICT_NON_MATCH: Verdict.NON_MATCH,
    common_pb2.VERDICT_UNCERTAIN: Verdict.UNCERTAIN,
}

_FALLBACKS = {
    gallery_pb2.STRUCTURE_FALLBACK_FEW_ROWS: "few-rows",
    gallery_pb2.STRUCTURE_FALLBACK_ODD_WIDTH: "odd-width",
    gallery_pb2.STRUCTURE_FALLBACK_SEALED_BEFORE: "sealed-before",
}

_VERDICT_NUMBERS = {verdict: number for number, verdict in _VERDICTS.items()}


def image_input(image: ImageLike) -> common_pb2.ImageInput:
    """Raises OSError when the path of an image cannot be read, ValueError for an array that is no image, TypeError."""
    if isinstance(image, bytes):
        return common_pb2.ImageInput(encoded=image)
    if isinstance(image, ItemName):
        return common_pb2.ImageInput(item=str(image))
    if isinstance(image, EmbeddingOf):
        message = image_input(image.embedding)
        message.model = model_name(image.model)
        return message
    if isinstance(image, np.ndarray):
        if image.ndim == 1 and np.issubdtype(image.dtype, np.floating):
            return common_pb2.ImageInput(embedding=image.astype("<f4").tobytes())
        return common_pb2.ImageInput(encoded=png(image))
    if isinstance(image, str | os.PathLike):
        return common_pb2.ImageInput(encoded=Path(image).read_bytes())
    if hasattr(image, "getexif"):
        return common_pb2.ImageInput(encoded=encoded_picture(image))
    raise TypeError(
        "an image is bytes, a path, an array, a picture of Pillow, an EmbeddingOf or an ItemName; got "
        f"{type(image).__name__}"
    )


def operating_point(point: OperatingPoint | None) -> common_pb2.OperatingPoint | None:
    """Raises ValueError when more than one way to put the threshold is given: the wire carries one."""
    if point is None:
        return None
    given = [name for name in ("target_far", "threshold", "name") if getattr(point, name) is not None]
    if len(given) > 1:
        raise ValueError(f"an operating point takes one of target_far, threshold and name; got {' and '.join(given)}")
    message = common_pb2.OperatingPoint(uncertain_within=point.uncertain_within)
    if point.target_far is not None:
        message.target_far = point.target_far
    if point.threshold is not None:
        message.threshold = point.threshold
    if point.name is not None:
        message.name = point.name
    return message


def effort(wanted: Effort | None) -> search_pb2.Effort | None:
    """Raises ValueError when more than one way to say it is given: the wire carries one."""
    if wanted is None:
        return None
    raw = {name: value for name in _RAW if (value := getattr(wanted, name)) is not None}
    if wanted.exact + (wanted.recall is not None) + bool(raw) > 1:
        raise ValueError("an effort is one of exact, recall, and parameters of the index; got more than one")
    if any(value < 1 for value in raw.values()):
        raise ValueError(f"parameters of the index are at least 1; got {raw}")
    if wanted.exact:
        return search_pb2.Effort(exact=search_pb2.ExactEffort())
    if wanted.recall is not None:
        return search_pb2.Effort(recall=wanted.recall)
    return search_pb2.Effort(raw=search_pb2.RawEffort(**raw)) if raw else None


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
            metadata=_struct(item.metadata),
            etag=item.etag,
        ),
        image=None if item.image is None else image_input(item.image),
        update_mask=FieldMask(paths=fields),
        allow_missing=allow_missing,
        request_id=request_id,
    )


def item_mask(metadata: bool, embedding: bool) -> FieldMask:
    optional = {"metadata": metadata, "embedding": embedding}
    return FieldMask(paths=[name for name in _ITEM_FIELDS if optional.get(name, True)])


def neighbor_mask(metadata: bool) -> FieldMask | None:
    return None if metadata else FieldMask(paths=["item", "identity", "decision"])


def gallery_name(gallery: str) -> str:
    return f"galleries/{gallery}"


def snapshot_name(gallery: str, snapshot: str) -> str:
    return f"{gallery_name(gallery)}/snapshots/{snapshot}"


def model_name(model: str) -> str:
    return f"models/{model}"


def decision(message: common_pb2.Decision) -> Decision:
    return Decision(
        verdict=_VERDICTS[message.verdict],
        distance=message.distance,
        threshold=message.threshold,
        match_probability=message.match_probability,
        far=message.far,
        far_upper95=message.far_upper95,
        frr=message.frr,
        model=_id(message.model),
        calibration=message.calibration,
    )


def feedback(case: Feedback) -> feedback_pb2.Feedback:
    decision = case.decision
    return feedback_pb2.Feedback(
        case_id=case.case_id,
        decision=common_pb2.Decision(
            verdict=_VERDICT_NUMBERS[decision.verdict],
            distance=decision.distance,
            threshold=decision.threshold,
            model=model_name(decision.model),
            calibration=decision.calibration,
        ),
        truth=feedback_pb2.TRUTH_MATCH if case.is_match else feedback_pb2.TRUTH_NON_MATCH,
        subject=case.subject,
        review_rate=case.review_rate or 0,
        candidates=case.candidates,
    )


def recorded_feedback(message: feedback_pb2.Feedback) -> RecordedFeedback:
    return RecordedFeedback(
        id=_id(message.name),
        case_id=message.case_id,
        decision=replace(
            decision(message.decision), match_probability=math.nan, far=math.nan, far_upper95=math.nan, frr=math.nan
        ),
        is_match=message.truth == feedback_pb2.TRUTH_MATCH,
        subject=message.subject,
        review_rate=message.review_rate or None,
        candidates=message.candidates,
        fingerprint=message.fingerprint,
        time=_datetime(message.update_time),
    )


def neighbors(message: search_pb2.SearchResponse | search_pb2.Neighbors) -> Neighbors:
    return Neighbors._of(
        message.neighbors,
        neighbor,
        expected_recall=message.expected_recall,
        generation=message.generation,
        partial=message.partial,
    )


def matches(parts: Sequence[search_pb2.SearchMatchesResponse]) -> Neighbors | None:
    """All parts of an answer; None when it broke off."""
    if not parts or not parts[-1].HasField("summary"):
        return None
    summary = parts[-1].summary
    return Neighbors._of(
        [each for part in parts for each in part.neighbors],
        neighbor,
        expected_recall=summary.expected_recall,
        generation=summary.generation,
        truncated=summary.truncated,
        partial=summary.partial,
    )


def neighbor(message: search_pb2.Neighbor) -> Neighbor:
    return Neighbor(
        item=item_name(message.item),
        identity=message.identity or None,
        metadata=_dictionary(message.metadata),
        decision=decision(message.decision),
    )


def embedding(data: bytes) -> Embedding:
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def item(message: gallery_pb2.Item) -> Item:
    return Item(
        name=item_name(message.name),
        identity=message.identity or None,
        metadata=_dictionary(message.metadata),
        etag=message.etag,
        generation=message.generation,
        update_time=_datetime(message.update_time),
        embedding=embedding(message.embedding) if message.embedding else None,
    )


def item_name(name: str) -> ItemName:
    """Raises ValueError unless `name` reads `galleries/{gallery}/items/{item}`."""
    match name.split("/"):
        case ["galleries", gallery, "items", item] if gallery and item:
            return ItemName(gallery, item)
    raise ValueError(f"an item is named galleries/GALLERY/items/ITEM; got {name!r}")


def gallery(message: gallery_pb2.Gallery) -> Gallery:
    return Gallery(
        id=_id(message.name),
        model=_id(message.model),
        item_count=message.item_count,
        generation=message.generation,
        create_time=_datetime(message.create_time) if message.HasField("create_time") else None,
        damage=message.damage,
        index=_index(message.index) if message.HasField("index") else None,
        etag=message.etag,
        stats=_stats(message.stats) if message.HasField("stats") else None,
    )


def alias(message: alias_pb2.Alias) -> Alias:
    return Alias(id=_id(message.name), gallery=_id(message.gallery))


def snapshot(message: upkeep_pb2.Snapshot) -> Snapshot:
    _, gallery_id, _, snapshot_id = message.name.split("/")
    return Snapshot(
        gallery=gallery_id,
        id=snapshot_id,
        generation=message.generation,
        create_time=_datetime(message.create_time),
        size_bytes=message.size_bytes,
        damage=message.damage,
    )


def verification(message: upkeep_pb2.Verification) -> Verification:
    return Verification(
        gallery=_id(message.gallery),
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
        id=_id(message.name),
        verb=known.verb,
        target=_id(known.target),
        stage=known.stage,
        progress=known.done,
        total=known.total,
        create_time=_datetime(known.create_time),
        done=message.done,
        error=from_status(message.error) if message.HasField("error") else None,
        gallery=gallery(made) if is_gallery else None,
        snapshot=snapshot(copied) if is_copy else None,
        verification=verification(found) if is_found else None,
    )


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


def model(message: model_pb2.Model) -> Model:
    return Model(
        id=_id(message.name),
        fingerprint=message.fingerprint,
        modality=message.modality,
        embedding_dim=message.embedding_dim,
        network=message.network,
        image_size=message.image_size,
        create_time=_datetime(message.create_time),
        calibration=calibration(message.calibration),
        active=message.active,
        loaded=message.state != model_pb2.MODEL_STATE_AVAILABLE,
        calibrations=tuple(message.calibrations),
    )


def model_change(message: model_pb2.ActivateModelResponse | model_pb2.DeactivateModelResponse) -> ModelChange:
    return ModelChange(model=model(message.model), incompatible=tuple(map(_id, message.incompatible_galleries)))


def calibration(message: model_pb2.Calibration) -> Calibration:
    return Calibration(
        version=message.version,
        protocol=message.protocol,
        identities=message.identities,
        matching_pairs=message.matching_pairs,
        impostor_pairs=message.impostor_pairs,
        learned_margin=message.learned_margin,
        probability_slope=message.probability_slope,
        curve=tuple(
            ErrorRates(
                threshold=row.threshold,
                far=row.far,
                far_upper95=row.far_upper95,
                frr=row.frr,
                frr_upper95=row.frr_upper95,
            )
            for row in message.curve
        ),
        named_points=dict(message.named_points),
        smallest_supported_far=message.smallest_supported_far,
        probability_points=tuple((point.distance, point.probability) for point in message.probability_points),
        feedback_pairs=message.feedback_pairs,
    )


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _struct(metadata: Mapping[str, JSON]) -> Struct:
    struct = Struct()
    struct.update(dict(metadata))
    return struct


def _dictionary(struct: Struct) -> dict[str, JSON]:
    return cast("dict[str, JSON]", MessageToDict(struct)) if struct.fields else {}


def _datetime(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
