"""The bytes of answers are read as the messages that `wire` makes of them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.bundle import Bundle
from embedding.calibration import Calibration
from embedding.decision import Judge, OperatingPoint
from embedding.errors import InvalidInput, LookalikeError
from index import JSON, Entry, Found, Neighbors
from lookalike.v1 import search_pb2 as pb
from service import errors
from service.messages import encoded, wire
from service.messages.parse import NEIGHBOR_FIELDS

MOST = 2**20


@pytest.fixture(scope="session")
def calibration(bundle: Bundle) -> Calibration:
    return bundle.calibration


texts = st.text(min_size=1, max_size=300)
values: st.SearchStrategy[JSON] = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
entries = st.builds(
    Entry,
    name=texts,
    identity=st.none() | texts,
    metadata=st.dictionaries(texts, values, max_size=3),
    etag=texts,
    generation=st.integers(0, 2**40),
    update_time=st.just(datetime(2026, 1, 1, tzinfo=UTC)),
)
dist = st.floats(0, 2, width=32)
points = st.builds(OperatingPoint, threshold=dist, uncertain_within=st.sampled_from([0.0, 0.125]))
masks = st.sets(st.sampled_from(sorted(NEIGHBOR_FIELDS))).map(frozenset)


@st.composite
def answers(draw: st.DrawFn, calibration: Calibration) -> list[Found]:
    """As a batch has them: columns that all share, with rows between them that belong to none."""
    pairs = draw(st.lists(st.lists(st.tuples(entries, dist), max_size=4), min_size=1, max_size=4))
    judge = Judge(calibration, draw(points), model=draw(st.sampled_from(["m", "model_" + "x" * 150])))
    spare = draw(st.integers(0, 2))
    columns = [each for pair in pairs for each in (*(d for _, d in pair), *[1.0] * spare)]
    decisions = judge.judge_all(np.array(columns, np.float32))
    found, first = [], 0
    for pair in pairs:
        found.append(
            Found(
                neighbors=Neighbors([entry for entry, _ in pair], decisions, first),
                generation=draw(st.integers(0, 2**50)),
                expected_recall=draw(st.sampled_from([0.0, 0.99, 1.0])),
                partial=draw(st.booleans()),
            )
        )
        first += len(pair) + spare
    return found


@given(st.data(), masks)
def test_an_answer_is_read_as_its_message(
    calibration: Calibration, data: st.DataObject, fields: frozenset[str]
) -> None:
    found = data.draw(answers(calibration))
    form = encoded.search_responses("things", fields, most_bytes=MOST)
    for _ in range(2):  # formed, and then as it was kept
        for answer, bytes_ in zip(found, form(found), strict=True):
            assert pb.SearchResponse.FromString(bytes_) == wire.search_response(answer, "things", fields)
    other = encoded.search_responses("other-things", fields, most_bytes=MOST)
    for answer, bytes_ in zip(found, other(found), strict=True):
        assert pb.SearchResponse.FromString(bytes_) == wire.search_response(answer, "other-things", fields)


@given(st.data(), masks)
def test_a_batch_and_a_stream_are_read_as_their_messages(
    calibration: Calibration, data: st.DataObject, fields: frozenset[str]
) -> None:
    outcomes: list[Found | LookalikeError] = list(data.draw(answers(calibration)))
    outcomes.insert(data.draw(st.integers(0, len(outcomes))), InvalidInput("not an image", field="queries[1]"))
    batch = pb.BatchSearchResponse.FromString(encoded.batch_response(outcomes, "things", fields, most_bytes=MOST))
    ids = [data.draw(st.text(max_size=200)) for _ in outcomes]
    alone: list[tuple[str, int | None]] = [(each, None) for each in ids]
    stream = [
        pb.StreamSearchResponse.FromString(each)
        for each in encoded.stream_responses(alone, outcomes, "things", fields, most_bytes=MOST)
    ]
    first = data.draw(st.integers(0, len(outcomes)))
    bundles = encoded.stream_responses(
        [("a", first), ("", len(outcomes) - first)], outcomes, "things", fields, most_bytes=MOST
    )
    read = [pb.StreamSearchResponse.FromString(each) for each in bundles]
    assert [each.id for each in read] == ["a", ""]
    assert [result for each in read for result in each.results.results] == list(batch.results)
    assert [each.id for each in stream] == ids
    for outcome, result, element in zip(outcomes, batch.results, stream, strict=True):
        if isinstance(outcome, LookalikeError):
            assert result.error == element.error == errors.status(outcome)
        else:
            assert result.neighbors == element.neighbors == wire.found_neighbors(outcome, "things", fields)


@given(st.data(), masks, st.integers(1, 2000))
def test_matches_are_cut_into_messages_of_the_size_asked_for(
    calibration: Calibration, data: st.DataObject, fields: frozenset[str], most: int
) -> None:
    for found in data.draw(answers(calibration)):
        messages = encoded.match_responses(found.neighbors, "things", fields, most_bytes=most)
        read = [pb.SearchMatchesResponse.FromString(each) for each in messages]
        whole = [neighbor for message in read for neighbor in message.neighbors]
        assert whole == wire.neighbors(found.neighbors, "things", fields)
        assert all(
            len(each) <= most or len(message.neighbors) == 1 for each, message in zip(messages, read, strict=True)
        )
        assert all(message.neighbors for message in read)
