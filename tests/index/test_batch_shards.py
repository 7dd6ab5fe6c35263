"""A shard's bytes follow from its outcomes, however these come: one by one, by batches, from here or from a server."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.batch import shards as batch_shards
from index.batch.answers import Answer, Answered, Evidence, Failure
from index.batch.folder import Conditions
from index.batch.shards import SCHEMA, ShardWriter
from index.texts import Texts

EVIDENCE = Evidence(threshold=0.5, far=0.01, far_upper95=0.02, frr=0.1, model="m", calibration=1)
STATED = Conditions(
    queries="array",
    queries_digest="d",
    gallery="g",
    gallery_created="now",
    generation=1,
    model="m",
    fingerprint="f",
    calibration=1,
    parameters={},
)
names = st.text("aß語", min_size=1, max_size=3)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    items = draw(st.lists(names, max_size=4))
    dist_R = np.sort(np.array([draw(st.floats(0, 2, width=32)) for _ in items], np.float32))
    return Answer(
        items=items,
        identities=[draw(st.none() | names) for _ in items],
        distance_R=dist_R,
        verdict_R=np.array([draw(st.integers(0, 2)) for _ in items], np.int8),
        probability_R=1 - dist_R.astype(np.float64) / 2,
        evidence=EVIDENCE if items else None,
        generation=1,
        truncated=draw(st.booleans()),
    )


outcomes = st.lists(st.tuples(names, answers() | st.builds(Failure, names, names)), min_size=1, max_size=12)


def written(parts: Sequence[Answered]) -> tuple[bytes, object]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part-00000.parquet"
        writer = ShardWriter(path, first=7, conditions=STATED)
        for part in parts:
            writer.add(part)
        shard = writer.publish()
        return path.read_bytes(), shard


def as_texts(answered: Answered) -> Answered:
    """As a search in this process gives it."""
    identities = None if answered.identities is None else Texts.of(answered.identities)
    kept = {name: getattr(answered, name) for name in Answered.__dataclass_fields__}
    return Answered(**{**kept, "items": Texts.of(answered.items), "identities": identities})


@settings(deadline=None, max_examples=25)
@given(outcomes, st.data())
def test_bytes_are_the_same_however_outcomes_come(
    found: list[tuple[str, Answer | Failure]], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_shards, "GROUP_ROWS", data.draw(st.integers(1, 20)))
        one_by_one = written([Answered.of([each]) for each in found])
        whole = Answered.of(found)
        assert written([whole]) == one_by_one
        assert written([as_texts(whole)]) == one_by_one
        cuts = sorted(data.draw(st.sets(st.integers(0, len(found)), max_size=4)) | {0, len(found)})
        parts = [whole.cut(start, end) for start, end in pairwise(cuts)]
        assert written(parts) == one_by_one
        assert written([as_texts(part) if at % 2 else part for at, part in enumerate(parts)]) == one_by_one
        assert written([Answered.joined(parts)]) == one_by_one


@settings(deadline=None, max_examples=60)
@given(outcomes)
def test_rows_say_what_became_of_each_query(found: list[tuple[str, Answer | Failure]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part-00000.parquet"
        writer = ShardWriter(path, first=7, conditions=STATED)
        writer.add(as_texts(Answered.of(found)))
        writer.publish()
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow.equals(SCHEMA)
            rows = file.read().to_pylist()
    expected = []
    for at, (query, outcome) in enumerate(found):
        if isinstance(outcome, Failure):
            expected.append((7 + at, query, None, None, None, None, None, None, outcome.message, outcome.reason))
            continue
        for rank, (item, identity, dist, verdict) in enumerate(
            zip(
                outcome.items,
                outcome.identities,
                outcome.distance_R.tolist(),
                outcome.verdict_R.tolist(),
                strict=True,
            ),
            1,
        ):
            name = ("non-match", "match", "uncertain")[verdict]
            expected.append((7 + at, query, rank, item, identity, dist, name, outcome.truncated, None, None))
    told = (
        "query_row",
        "query",
        "rank",
        "item",
        "identity",
        "distance",
        "verdict",
        "truncated",
        "error",
        "error_reason",
    )
    assert [tuple(row[name] for name in told) for row in rows] == expected
    for row in rows:
        failed = row["error"] is not None
        assert (row["threshold"], row["far"], row["frr"]) == ((None,) * 3 if failed else (0.5, 0.01, 0.1))
        assert row["is_match"] == (None if failed else row["verdict"] == "match")
