"""Models and their calibrations."""

from __future__ import annotations

from lookalike._messages.names import last_part, moment
from lookalike.types import Calibration, ErrorRates, Model, ModelChange
from lookalike.v1 import model_pb2

ACTIVE_MODEL = "active"


def model(message: model_pb2.Model) -> Model:
    return Model(
        id=last_part(message.name),
        fingerprint=message.fingerprint,
        modality=message.modality,
        embedding_dim=message.embedding_dim,
        network=message.network,
        image_size=message.image_size,
        create_time=moment(message.create_time),
        calibration=calibration(message.calibration),
        active=message.active,
        loaded=message.state != model_pb2.MODEL_STATE_AVAILABLE,
        calibrations=tuple(message.calibrations),
    )


def model_change(message: model_pb2.ActivateModelResponse | model_pb2.DeactivateModelResponse) -> ModelChange:
    return ModelChange(model=model(message.model), incompatible=tuple(map(last_part, message.incompatible_galleries)))


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
