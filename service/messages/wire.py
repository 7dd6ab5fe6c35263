"""Domain → messages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from google.longrunning import operations_pb2
from google.protobuf import json_format, struct_pb2, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from embedding import calibration as measured
from embedding.decision import Decision, Judge, Vectors, Verdict
from embedding.errors import NotFound
from index import JSON, Found, GalleryCatalog, GalleryEngine, IndexSettings, Item, Neighbor, Unparsed
from index.engine import Fallback, Stats, Verification
from index.shelf import Copy
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, model_pb2, search_pb2, upkeep_pb2
from lookalike.v1 import operations_pb2 as pb
from service import operations
from service.messages import parse
from service.messages.parse import NEIGHBOR_FIELDS
from service.operations import Operation
from service.rollout.stock import Model
from service.writes import settings_etag

VERDICTS = {
    Verdict.MATCH: common_pb2.VERDICT_MATCH,
    Verdict.NON_MATCH: common_pb2.VERDICT_NON_MATCH,
    Verdict.UNCERTAIN: common_pb2.VERDICT_UNCERTAIN,
}


def decision(decided: Decision) -> common_pb2.Decision:
    return common_pb2.Decision(
        verdict=VERDICTS[decided.verdict],
        distance=decided.distance,
        threshold=decided.threshold,
        signed_margin=decided.signed_margin,
        match_probability=decided.match_probability,
        far=decided.far,
        far_upper95=decided.far_upper95,
        frr=decided.frr,
        model=model_name(decided.model),
        calibration=decided.calibration,
    )


def evidence(judge: Judge) -> common_pb2.Decision:
    """What all decisions of the judge share."""
    return common_pb2.Decision(
        threshold=judge.threshold,
        far=judge.rates.far,
        far_upper95=judge.rates.far_upper95,
        frr=judge.rates.frr,
        model=model_name(judge.model),
        calibration=judge.calibration.version,
    )


def embedding(emb_D: Vectors) -> bytes:
    """Little-endian float32 values."""
    return emb_D.astype("<f4", copy=False).tobytes()


def search_response(
    found: Found, gallery_id: str, fields: Collection[str] = NEIGHBOR_FIELDS
) -> search_pb2.SearchResponse:
    return search_pb2.SearchResponse(
        neighbors=neighbors(found.neighbors, gallery_id, fields),
        expected_recall=found.expected_recall,
        generation=found.generation,
        partial=found.partial,
    )


def found_neighbors(found: Found, gallery_id: str, fields: Collection[str] = NEIGHBOR_FIELDS) -> search_pb2.Neighbors:
    return search_pb2.Neighbors(
        neighbors=neighbors(found.neighbors, gallery_id, fields),
        expected_recall=found.expected_recall,
        generation=found.generation,
        partial=found.partial,
    )


def matches_summary(found: Found) -> search_pb2.MatchesSummary:
    return search_pb2.MatchesSummary(
        match_count=len(found.neighbors),
        truncated=found.truncated,
        expected_recall=found.expected_recall,
        generation=found.generation,
        partial=found.partial,
    )


def neighbors(
    found: Sequence[Neighbor], gallery_id: str, fields: Collection[str] = NEIGHBOR_FIELDS
) -> list[search_pb2.Neighbor]:
    with_item, with_identity, with_metadata, with_decision = (
        name in fields for name in ("item", "identity", "metadata", "decision")
    )
    return [
        search_pb2.Neighbor(
            item=item_name(gallery_id, neighbor.item.name) if with_item else "",
            identity=neighbor.item.identity or "" if with_identity else "",
            metadata=struct(neighbor.item.metadata) if with_metadata else None,
            decision=decision(neighbor.decision) if with_decision else None,
        )
        for neighbor in found
    ]


def item(stored: Item, gallery_id: str) -> gallery_pb2.Item:
    """The item without its embedding."""
    return gallery_pb2.Item(
        name=item_name(gallery_id, stored.name),
        identity=stored.identity or "",
        metadata=struct(stored.metadata),
        etag=stored.etag,
        generation=stored.generation,
        update_time=timestamp(stored.update_time) if stored.update_time else None,
    )


def item_fields(stored: Item, gallery_id: str, fields: Collection[str]) -> gallery_pb2.Item:
    """Some fields of the item."""
    message = item(stored if "metadata" in fields else replace(stored, metadata={}), gallery_id)
    for name in parse.ITEM_FIELDS - {*fields}:
        message.ClearField(name)  # type: ignore[arg-type]  # the stubs know its names one by one
    if "embedding" in fields:
        message.embedding = embedding(stored.embedding)
    return message


def gallery(described: GalleryEngine, *, with_stats: bool = False) -> gallery_pb2.Gallery:
    known = described.stats()
    return gallery_pb2.Gallery(
        name=gallery_name(described.id),
        model=model_name(described.model.name),
        item_count=described.size,
        generation=described.generation,
        create_time=timestamp(described.created),
        index=index_settings(known.settings),
        etag=settings_etag(described, known.settings),
        stats=stats(known) if with_stats else None,
    )


def index_settings(settings: IndexSettings) -> gallery_pb2.IndexSettings:
    return gallery_pb2.IndexSettings(
        min_recall=settings.min_recall,
        structure=settings.structure,
        memory_bytes=settings.memory_bytes or 0,
        vectors=settings.vectors,
    )


_FALLBACKS: dict[Fallback, gallery_pb2.StructureFallback.ValueType] = {
    "": gallery_pb2.STRUCTURE_FALLBACK_UNSPECIFIED,
    "few-rows": gallery_pb2.STRUCTURE_FALLBACK_FEW_ROWS,
    "odd-width": gallery_pb2.STRUCTURE_FALLBACK_ODD_WIDTH,
    "sealed-before": gallery_pb2.STRUCTURE_FALLBACK_SEALED_BEFORE,
}


def stats(known: Stats) -> gallery_pb2.GalleryStats:
    return gallery_pb2.GalleryStats(
        fresh_items=known.fresh,
        dead_rows=known.dead,
        disk_bytes=known.disk_bytes,
        memory_bytes=known.memory_bytes,
        segments=[
            gallery_pb2.Segment(
                rows=segment.rows,
                dead_rows=segment.dead,
                structure=segment.structure,
                fallback=_FALLBACKS[segment.fallback],
                curve=[
                    gallery_pb2.CurvePoint(
                        k=point.k,
                        recall=point.recall,
                        match_recall=point.match_recall,
                        microseconds=point.microseconds,
                        nprobe=point.effort.nprobe or 0,
                        ef_search=point.effort.ef_search or 0,
                        rescore=point.effort.rescore or 0,
                    )
                    for point in segment.curve
                ],
            )
            for segment in known.segments
        ],
        busy=known.busy,
        last_failure=known.last_failure,
    )


def alias(name: str, gallery_id: str) -> alias_pb2.Alias:
    return alias_pb2.Alias(name=f"aliases/{name}", gallery=gallery_name(gallery_id))


def snapshot(copy: Copy) -> upkeep_pb2.Snapshot:
    return upkeep_pb2.Snapshot(
        name=f"galleries/{copy.gallery}/snapshots/{copy.id}",
        generation=copy.generation,
        create_time=timestamp(copy.created),
        size_bytes=copy.size_bytes,
        damage=copy.damage,
    )


def verification(gallery_id: str, found: Verification) -> upkeep_pb2.Verification:
    return upkeep_pb2.Verification(
        gallery=gallery_name(gallery_id),
        item_count=found.items,
        file_count=found.files,
        problems=[
            upkeep_pb2.Problem(path=problem.path, what=problem.what, repaired=problem.repaired)
            for problem in found.problems
        ],
        sound=found.sound,
    )


def operation(
    known: Operation[Message], status: Callable[[BaseException], status_pb2.Status]
) -> operations_pb2.Operation:
    """The operation as it stands; `status` says what an error is on the wire."""
    message = operations_pb2.Operation(name=f"operations/{known.id}", done=known.done)  # before what it settles
    progress, ended = known.progress, known.ended
    message.metadata.Pack(
        pb.OperationMetadata(
            verb=known.verb,
            target=gallery_name(known.target),
            stage=progress.stage,
            done=progress.done,
            total=progress.total,
            create_time=timestamp(known.created),
            end_time=timestamp(ended) if ended else None,
        )
    )
    if message.done:
        if known.error is not None:
            message.error.CopyFrom(status(known.error))
        else:
            message.response.Pack(operations.value(known))
    return message


def damaged_gallery(gallery_id: str, error: Exception) -> gallery_pb2.Gallery:
    """A gallery of which no more is known than why it cannot be served."""
    return gallery_pb2.Gallery(name=gallery_name(gallery_id), damage=str(error))


def galleries(catalog: GalleryCatalog) -> list[gallery_pb2.Gallery]:
    """Every gallery by name, damaged ones included."""
    healthy, damaged = catalog.survey()
    described = {}
    for found in healthy:
        with suppress(NotFound):  # deleted since the survey
            described[found.id] = gallery(found)
    described |= {gallery_id: damaged_gallery(gallery_id, error) for gallery_id, error in damaged.items()}
    return [described[gallery_id] for gallery_id in sorted(described)]


def model(known: Model) -> model_pb2.Model:
    bundle = known.described
    return model_pb2.Model(
        name=model_name(bundle.name),
        fingerprint=bundle.fingerprint,
        modality=bundle.manifest.modality,
        embedding_dim=bundle.embedding_dim,
        network=bundle.architecture.network,
        image_size=bundle.architecture.image_size,
        create_time=timestamp(bundle.lineage.created),
        calibration=calibration(bundle.calibration),
        active=known.active,
        state=model_pb2.MODEL_STATE_ACTIVE
        if known.active
        else model_pb2.MODEL_STATE_LOADED
        if known.loaded
        else model_pb2.MODEL_STATE_AVAILABLE,
        calibrations=known.calibrations,
    )


def calibration(known: measured.Calibration) -> model_pb2.Calibration:
    probability = known.probability
    if isinstance(probability, measured.IsotonicProbability):
        slope, points = 0.0, probability.points
    else:
        slope, points = probability.slope, ()
    return model_pb2.Calibration(
        version=known.version,
        protocol=known.protocol,
        identities=known.identities,
        matching_pairs=known.matching_pairs,
        impostor_pairs=known.impostor_pairs,
        learned_margin=known.learned_margin,
        probability_slope=slope,
        curve=[
            model_pb2.ErrorRates(
                threshold=row.threshold,
                far=row.far,
                far_upper95=row.far_upper95,
                frr=row.frr,
                frr_upper95=row.frr_upper95,
            )
            for row in known.curve
        ],
        named_points=known.named_points,
        smallest_supported_far=known.smallest_supported_far,
        probability_points=[
            model_pb2.ProbabilityPoint(distance=distance, probability=each) for distance, each in points
        ],
        feedback_pairs=known.feedback_pairs,
    )


def struct(values: Mapping[str, JSON]) -> struct_pb2.Struct | None:
    """The message, or None, which leaves the field unset, when there are no values."""
    if isinstance(values, Unparsed):
        return json_format.ParseDict(values.parsed(), struct_pb2.Struct())
    return json_format.ParseDict(dict(values), struct_pb2.Struct()) if values else None


def timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


def gallery_name(gallery_id: str) -> str:
    return f"galleries/{gallery_id}"


def item_name(gallery_id: str, item_id: str) -> str:
    return f"galleries/{gallery_id}/items/{item_id}"


def model_name(name: str) -> str:
    return f"models/{name}"
