from __future__ import annotations

from datetime import UTC, datetime

import grpc
import pytest

from embedding.bundle import Bundle
from embedding.calibration import IsotonicProbability
from lookalike._messages import calibration
from lookalike.v1 import model_pb2 as pb
from service.messages import wire
from tests.service.harness import DIM, MARGIN, SIDE, Stubs, fields, refused, rich


def test_a_model_is_described_with_its_whole_calibration(stubs: Stubs, bundle: Bundle) -> None:
    model = stubs.models.GetModel(pb.GetModelRequest(name=f"models/{bundle.name}")).model
    assert (model.name, model.fingerprint) == (f"models/{bundle.name}", bundle.fingerprint)
    assert (model.modality, model.network, model.embedding_dim, model.image_size) == ("image", "small_cnn", DIM, SIDE)
    assert model.create_time.ToDatetime(UTC) == datetime(2026, 1, 2, tzinfo=UTC)
    assert model.active
    known = model.calibration
    assert (known.version, known.protocol) == (3, "identity-disjoint")
    assert (known.identities, known.matching_pairs, known.impostor_pairs) == (20, 400, 600)
    assert (known.learned_margin, known.probability_slope) == (MARGIN, 8.0)
    assert known.smallest_supported_far == 3 / 600
    assert dict(known.named_points) == {"learned-margin": MARGIN, "strict": 0.125}
    assert [(row.threshold, row.far, row.far_upper95, row.frr, row.frr_upper95) for row in known.curve] == [
        (0.125, 0.0, 0.02, 0.6, 0.7),
        (MARGIN, 0.01, 0.03, 0.2, 0.3),
        (2.0, 1.0, 1.0, 0.0, 0.02),
    ]


def test_an_isotonic_probability_travels_to_the_client(bundle: Bundle) -> None:
    points = ((0.0, 0.99), (MARGIN, 0.5), (1.5, 0.125), (2.0, 0.01))
    known = bundle.calibration.model_copy(update={"probability": IsotonicProbability(midpoint=MARGIN, points=points)})
    message = wire.calibration(known)
    assert message.probability_slope == 0
    received = calibration(pb.Calibration.FromString(message.SerializeToString()))
    assert received.probability_points == points
    assert calibration(wire.calibration(bundle.calibration)).probability_points == ()


def test_the_model_that_answers_has_an_alias_and_is_listed(stubs: Stubs, bundle: Bundle) -> None:
    named = stubs.models.GetModel(pb.GetModelRequest(name=f"models/{bundle.name}")).model
    assert stubs.models.GetModel(pb.GetModelRequest(name="models/active")).model == named
    page = stubs.models.ListModels(pb.ListModelsRequest())
    assert (list(page.models), page.next_page_token) == ([named], "")


def test_an_unknown_model_is_not_found(stubs: Stubs, bundle: Bundle) -> None:
    error = refused(stubs.models.GetModel, pb.GetModelRequest(name="models/unknown"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert bundle.name in error.details()


@pytest.mark.parametrize("name", ["", "unknown", "models/", "models/a/b"])
def test_a_malformed_model_name_is_refused(stubs: Stubs, name: str) -> None:
    assert fields(rich(refused(stubs.models.GetModel, pb.GetModelRequest(name=name)))) == ["name"]
