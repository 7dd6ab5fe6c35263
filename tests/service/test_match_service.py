from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from lookalike.v1 import common_pb2, match_pb2
from tests.service.harness import MARGIN, Stubs, encoded, fields, info, png, refused, rich, stored, vector

PLAIN = common_pb2.OperatingPoint()


def verify(
    stubs: Stubs,
    a: common_pb2.ImageInput,
    b: common_pb2.ImageInput,
    point: common_pb2.OperatingPoint = PLAIN,
) -> common_pb2.Decision:
    return stubs.match.Verify(match_pb2.VerifyRequest(a=a, b=b, operating_point=point)).decision


def test_an_image_matches_itself(stubs: Stubs, bundle: Bundle) -> None:
    decision = verify(stubs, encoded(1), encoded(1))
    assert decision.verdict == common_pb2.VERDICT_MATCH
    assert decision.distance == 0
    assert decision.threshold == MARGIN
    assert decision.signed_margin == MARGIN
    assert decision.match_probability > 0.5
    assert (decision.far, decision.far_upper95, decision.frr) == (0.01, 0.03, 0.2)
    assert decision.model == f"models/{bundle.name}"
    assert decision.calibration == 3


def test_orthogonal_embeddings_lie_the_square_root_of_two_apart(stubs: Stubs) -> None:
    decision = verify(stubs, vector(1), vector(0, 1))
    assert decision.distance == np.sqrt(np.float32(2))
    assert decision.verdict == common_pb2.VERDICT_NON_MATCH
    assert decision.signed_margin == pytest.approx(MARGIN - 2**0.5)


def test_the_embedding_is_that_of_the_encoder(stubs: Stubs, bundle: Bundle) -> None:
    response = stubs.match.Embed(match_pb2.EmbedRequest(image=encoded(5)))
    (expected_D,) = Encoder(bundle, device="cpu").encode([png(5)])
    assert response.embedding == expected_D.astype("<f4").tobytes()
    assert response.model == f"models/{bundle.name}"


def test_a_stored_item_stands_for_its_image(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": encoded(1)})
    assert verify(stubs, stored(gallery, "one"), encoded(1)).distance == 0
    embedding = stubs.match.Embed(match_pb2.EmbedRequest(image=stored(gallery, "one"))).embedding
    assert embedding == stubs.match.Embed(match_pb2.EmbedRequest(image=encoded(1))).embedding


@pytest.mark.parametrize(
    ("point", "threshold"),
    [
        ({"threshold": 1.5}, 1.5),
        ({"name": "strict"}, 0.125),
        ({"target_far": 0.01}, MARGIN),
        ({}, MARGIN),
    ],
)
def test_the_operating_point_sets_the_threshold(stubs: Stubs, point: dict[str, object], threshold: float) -> None:
    decision = verify(stubs, vector(1), vector(0, 1), common_pb2.OperatingPoint(**point))
    assert decision.threshold == threshold
    assert (decision.verdict == common_pb2.VERDICT_MATCH) == (threshold >= 2**0.5)


def test_a_distance_inside_the_band_is_uncertain(stubs: Stubs) -> None:
    point = common_pb2.OperatingPoint(threshold=1.5, uncertain_within=0.1)
    assert verify(stubs, vector(1), vector(0, 1), point).verdict == common_pb2.VERDICT_UNCERTAIN


@pytest.mark.parametrize(
    ("point", "path"),
    [
        ({"threshold": 2.5}, "operating_point.threshold"),
        ({"threshold": float("nan")}, "operating_point.threshold"),
        ({"target_far": 1e-6}, "operating_point.target_far"),
        ({"target_fpir": 0.5}, "operating_point.target_fpir"),
        ({"name": "nowhere"}, "operating_point.name"),
        ({"uncertain_within": -1}, "operating_point.uncertain_within"),
    ],
)
def test_a_point_that_the_calibration_cannot_support_is_refused(
    stubs: Stubs, point: dict[str, object], path: str
) -> None:
    request = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2), operating_point=common_pb2.OperatingPoint(**point))
    status = rich(refused(stubs.match.Verify, request))
    assert fields(status) == [path]
    assert info(status).reason == "INVALID_OPERATING_POINT"


def test_a_bad_pair_fails_alone_with_the_status_that_verify_gives(stubs: Stubs) -> None:
    bad = common_pb2.ImageInput(encoded=b"no image")
    pairs = [
        match_pb2.ImagePair(a=encoded(1), b=encoded(2)),
        match_pb2.ImagePair(a=encoded(1), b=bad),
        match_pb2.ImagePair(a=bad),
        match_pb2.ImagePair(a=encoded(2)),
        match_pb2.ImagePair(a=encoded(2), b=encoded(2)),
    ]
    results = stubs.match.BatchVerify(match_pb2.BatchVerifyRequest(pairs=pairs)).results
    assert [result.WhichOneof("result") for result in results] == ["decision", "error", "error", "error", "decision"]
    assert results[0].decision == verify(stubs, encoded(1), encoded(2))
    assert [fields(results[i].error) for i in (1, 2, 3)] == [
        ["pairs[1].b.encoded"],
        ["pairs[2].a.encoded", "pairs[2].b"],
        ["pairs[3].b"],
    ]
    alone = rich(refused(stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1), b=bad)))
    assert (results[1].error.code, results[1].error.message) == (alone.code, alone.message)
    assert info(results[1].error) != info(alone), "each names its own field"


def test_concurrent_calls_get_their_own_answers(stubs: Stubs, bundle: Bundle) -> None:
    images = [png(seed) for seed in range(48)]
    expected_BD = Encoder(bundle, device="cpu").encode(images)
    with ThreadPoolExecutor(16) as pool:
        calls = [match_pb2.EmbedRequest(image=common_pb2.ImageInput(encoded=data)) for data in images]
        embeddings = [response.embedding for response in pool.map(stubs.match.Embed, calls)]
    assert embeddings == [emb_D.astype("<f4").tobytes() for emb_D in expected_BD]
