"""Messages of the wire contract, from and to the client's types."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from lookalike.types import (
    JSON,
    Calibration,
    Decision,
    Embedding,
    ErrorRates,
    Gallery,
    ImageLike,
    Item,
    ItemName,
    Model,
    Neighbor,
    NewItem,
    OperatingPoint,
    Verdict,
)
from lookalike.v1 import common_pb2, gallery_pb2, model_pb2, search_pb2

ACTIVE_MODEL = "active"

_VERDICTS = {
    common_pb2.VERDICT_MATCH: Verdict.MATCH,
    common_pb2.VERDICT_NON_MATCH: Verdict.NON_MATCH,
    common_pb2.VERDICT_UNCERTAIN: Verdict.UNCERTAIN,
}


def image_input(image: ImageLike) -> common_pb2.ImageInput:
    """Raises OSError when the path of an image cannot be read, ValueError for an array that is no embedding."""
    if isinstance(image, bytes):
        return common_pb2.ImageInput(encoded=image)
    if isinstance(image, ItemName):
        return common_pb2.ImageInput(item=str(image))
    if isinstance(image, np.ndarray):
        if image.ndim != 1 or not np.issubdtype(image.dtype, np.floating):
            raise ValueError(
                f"an embedding is a floating-point array [D]; got {image.dtype} {list(image.shape)}: "
                "send a picture as the bytes of an image file"
            )
        return common_pb2.ImageInput(embedding=image.astype("<f4").tobytes())
    return common_pb2.ImageInput(encoded=Path(image).read_bytes())


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


def update_request(gallery: str, item: NewItem) -> gallery_pb2.UpdateItemRequest:
    return gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(
            name=str(ItemName(gallery, item.id)),
            identity=item.identity or "",
            metadata=_struct(item.metadata),
            etag=item.etag,
        ),
        image=image_input(item.image),
    )


def gallery_name(gallery: str) -> str:
    return f"galleries/{gallery}"


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
    )


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
    )


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _struct(metadata: Mapping[str, JSON]) -> Struct:
    struct = Struct()
    struct.update(dict(metadata))
    return struct


def _dictionary(struct: Struct) -> dict[str, JSON]:
    return cast("dict[str, JSON]", MessageToDict(struct))


def _datetime(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
