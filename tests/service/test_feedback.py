"""What decisions turned out to be, recorded and listed over the wire."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedding.bundle import Bundle
from embedding.calibration import Calibration
from embedding.errors import DamagedData
from embedding.feedback import read_lines, write_lines
from index.items import page_token_after
from lookalike.v1 import common_pb2, match_pb2, search_pb2
from lookalike.v1 import feedback_pb2 as pb
from service.feedback_store import read_feedback
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, fields, info, make_bundle, refused, rich, served


@pytest.fixture
def decision(stubs: Stubs) -> common_pb2.Decision:
    return stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))).decision


def case(name: str, decision: common_pb2.Decision, **options: Any) -> pb.Feedback:
    return pb.Feedback(**{"case_id": name, "decision": decision, "truth": pb.TRUTH_MATCH, **options})


def record(stubs: Stubs, *cases: pb.Feedback, request_id: str = "") -> list[pb.Feedback]:
    request = pb.RecordFeedbackRequest(feedback=cases, request_id=request_id)
    return list(stubs.feedback.RecordFeedback(request).feedback)


def listed(stubs: Stubs, **options: Any) -> list[pb.Feedback]:
    found: list[pb.Feedback] = []
    request = pb.ListFeedbackRequest(page_size=2, **options)
    while True:
        page = stubs.feedback.ListFeedback(request)
        found += page.feedback
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def test_feedback_is_kept_with_its_decision_and_read_back(
    loop: Loop, settings: Settings, bundle: Bundle, tmp_path: Path, decision: common_pb2.Decision
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    with served(loop, own) as server, connected(server.address) as stubs:
        recorded = record(
            stubs,
            case("a", decision, subject="me", review_rate=0.25, candidates=7),
            case("b", decision, truth=pb.TRUTH_NON_MATCH),
        )
        first, second = recorded
        assert (first.case_id, first.subject, first.review_rate, first.candidates) == ("a", "me", 0.25, 7)
        assert first.fingerprint == bundle.fingerprint
        for field in ("distance", "threshold", "verdict", "model", "calibration", "signed_margin"):
            assert getattr(first.decision, field) == getattr(decision, field)
        assert first.update_time.ToSeconds() > 1_700_000_000
        assert second.truth == pb.TRUTH_NON_MATCH
        (again,) = record(stubs, case("a", decision, truth=pb.TRUTH_NON_MATCH))
        assert (again.name, again.truth, again.subject) == (first.name, pb.TRUTH_NON_MATCH, "")
        record(stubs, *(case(f"c{i}", decision) for i in range(5)))
    with served(loop, own) as server, connected(server.address) as stubs:
        kept = listed(stubs)
        assert [each.case_id for each in kept] == ["a", "b", *(f"c{i}" for i in range(5))]
        assert listed(stubs, model=f"models/{bundle.name}") == kept
        assert listed(stubs, model="models/other") == []
        delete = pb.DeleteFeedbackRequest(name=second.name, request_id=str(uuid.uuid4()))
        stubs.feedback.DeleteFeedback(delete)
        stubs.feedback.DeleteFeedback(delete)
        delete.request_id = ""
        assert refused(stubs.feedback.DeleteFeedback, delete).code() is grpc.StatusCode.NOT_FOUND
        # The folder tells the same, while the server runs, and so does a file of it.
        exported = list(read_feedback(own.galleries))
        assert [each.case_id for each in exported] == ["a", *(f"c{i}" for i in range(5))]
        assert exported[0].distance == decision.distance
        with (tmp_path / "feedback.jsonl").open("wb") as file:
            assert write_lines(file, exported) == 6
        assert list(read_lines(tmp_path / "feedback.jsonl")) == exported


def test_calibrations_are_neither_written_nor_read_again_with_each_record(
    loop: Loop, settings: Settings, tmp_path: Path, decision: common_pb2.Decision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration takes a third of a millisecond each way, and a folder of models may hold many."""
    done: list[str] = []
    for name in ("model_dump_json", "model_validate_json", "__eq__"):
        real = getattr(Calibration, name)

        def counted(*args: Any, _real: Any = real, _name: str = name, **named: Any) -> Any:
            done.append(_name)
            return _real(*args, **named)

        of_a_class = name == "model_validate_json"
        monkeypatch.setattr(Calibration, name, staticmethod(counted) if of_a_class else counted)
    own = settings.model_copy(update={"galleries": tmp_path / "galleries", "models": tmp_path})
    make_bundle(tmp_path / "other", seed=1)
    with served(loop, own) as server, connected(server.address) as stubs:
        record(stubs, case("a", decision))
        assert "model_dump_json" in done
        done.clear()
        for i in range(3):
            record(stubs, case(f"b{i}", decision))
        assert done == []
        path = own.galleries / ".feedback.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            (kept,) = connection.execute("SELECT count(*) FROM calibrations").fetchone()
            connection.execute("DELETE FROM calibrations")
            connection.commit()
            record(stubs, case("c", decision))
            assert connection.execute("SELECT count(*) FROM calibrations").fetchone() == (kept,) == (2,)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE feedback SET distance = 9",
        "UPDATE feedback SET updated_us = 9223372036854775807",
        "UPDATE feedback SET verdict = 'perhaps'",
        "UPDATE calibrations SET text = replace(text, '0.25', '0.26')",
        "UPDATE calibrations SET text = ''",
    ],
)
def test_values_that_were_never_recorded_are_damage(
    loop: Loop, settings: Settings, tmp_path: Path, decision: common_pb2.Decision, damage: str
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    gone = make_bundle(tmp_path / "gone", seed=1)
    with served(loop, own.model_copy(update={"bundle": gone.path})) as server, connected(server.address) as stubs:
        asked = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
        of_gone = case("a", stubs.match.Verify(asked).decision)
        record(stubs, of_gone)
    with closing(sqlite3.connect(own.galleries / ".feedback.sqlite")) as connection:
        connection.execute(damage)
        connection.commit()
    with served(loop, own) as server, connected(server.address) as stubs:
        if "calibrations" in damage:
            error = refused(stubs.feedback.RecordFeedback, pb.RecordFeedbackRequest(feedback=[of_gone]))
        else:
            error = refused(stubs.feedback.ListFeedback, pb.ListFeedbackRequest())
            with pytest.raises(DamagedData, match="restored from a copy"):
                list(read_feedback(own.galleries))
        assert (error.code(), info(rich(error)).reason) == (grpc.StatusCode.DATA_LOSS, "DAMAGED_DATA")
        assert "restored from a copy" in (error.details() or "")


def test_the_same_request_is_recorded_once(stubs: Stubs, decision: common_pb2.Decision) -> None:
    request_id = str(uuid.uuid4())
    first = record(stubs, case("once", decision), request_id=request_id)
    record(stubs, case("once", decision, truth=pb.TRUTH_NON_MATCH))
    assert record(stubs, case("once", decision), request_id=request_id) == first
    assert next(each for each in listed(stubs) if each.case_id == "once").truth == pb.TRUTH_NON_MATCH
    request = pb.RecordFeedbackRequest(feedback=[case("other", decision)], request_id=request_id)
    assert info(rich(refused(stubs.feedback.RecordFeedback, request))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"case_id": ""}, "case_id"),
        ({"case_id": "x" * 257}, "case_id"),
        ({"case_id": "a\nb"}, "case_id"),
        ({"subject": "x" * 257}, "subject"),
        ({"truth": pb.TRUTH_UNSPECIFIED}, "truth"),
        ({"review_rate": 1.5}, "review_rate"),
        ({"review_rate": float("nan")}, "review_rate"),
        ({"candidates": -1}, "candidates"),
        ({"decision": {"distance": 3}}, "decision.distance"),
        ({"decision": {"distance": float("nan")}}, "decision.distance"),
        ({"decision": {"threshold": -1}}, "decision.threshold"),
        ({"decision": {"verdict": common_pb2.VERDICT_UNSPECIFIED}}, "decision.verdict"),
        ({"decision": {"calibration": 0}}, "decision.calibration"),
        ({"decision": {"model": "toy"}}, "decision.model"),
        ({"decision": {"verdict": common_pb2.VERDICT_MATCH, "threshold": 0.001}}, "decision.verdict"),
        ({"decision": {"verdict": common_pb2.VERDICT_NON_MATCH, "threshold": 2}}, "decision.verdict"),
        ({"decision": {"signed_margin": 1.9}}, "decision.signed_margin"),
        ({"decision": {"match_probability": 0.123}}, "decision.match_probability"),
        ({"decision": {"match_probability": float("nan")}}, "decision.match_probability"),
        ({"decision": {"far": 0.123}}, "decision.far"),
        ({"decision": {"far_upper95": 0.123}}, "decision.far_upper95"),
        ({"decision": {"frr": 0.123}}, "decision.frr"),
    ],
)
def test_what_is_no_feedback_is_refused_as_a_whole(
    stubs: Stubs, decision: common_pb2.Decision, wrong: dict[str, Any], field: str
) -> None:
    changed = common_pb2.Decision()
    changed.CopyFrom(decision)
    for name, value in wrong.pop("decision", {}).items():
        setattr(changed, name, value)
    before = listed(stubs)
    request = pb.RecordFeedbackRequest(
        feedback=[case("good", decision), case(**{"name": "bad", "decision": changed} | wrong)]
    )
    error = refused(stubs.feedback.RecordFeedback, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(rich(error)) == [f"feedback[1].{field}"]
    assert listed(stubs) == before


def test_more_ways_to_ask_wrongly(stubs: Stubs, decision: common_pb2.Decision) -> None:
    twice = pb.RecordFeedbackRequest(feedback=[case("a", decision), case("a", decision)])
    assert fields(rich(refused(stubs.feedback.RecordFeedback, twice))) == ["feedback[1].case_id"]
    assert fields(rich(refused(stubs.feedback.RecordFeedback, pb.RecordFeedbackRequest()))) == ["feedback"]
    unknown = common_pb2.Decision()
    unknown.CopyFrom(decision)
    unknown.model = "models/unknown"
    request = pb.RecordFeedbackRequest(feedback=[case("a", unknown)])
    assert refused(stubs.feedback.RecordFeedback, request).code() is grpc.StatusCode.NOT_FOUND
    for name in ("", "feedback/", "feedback/0", "feedback/x", "cases/1"):
        assert fields(rich(refused(stubs.feedback.DeleteFeedback, pb.DeleteFeedbackRequest(name=name)))) == ["name"]
    for options, field in (
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "eA=="}, "page_token"),
        ({"model": "x"}, "model"),
    ):
        request_ = pb.ListFeedbackRequest(**options)
        assert fields(rich(refused(stubs.feedback.ListFeedback, request_))) == [field]


@pytest.mark.parametrize(
    "point",
    [
        {},
        {"threshold": 0.7},
        {"threshold": 0.1},
        {"target_far": 0.02},
        {"name": "strict"},
        {"uncertain_within": 2.0},
    ],
)
def test_whatever_was_decided_can_be_told_of(stubs: Stubs, gallery: str, point: dict[str, Any]) -> None:
    operating = common_pb2.OperatingPoint(**point)
    stubs.fill(gallery, {f"{i}": encoded(i) for i in range(5)})
    search = search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=encoded(2), operating_point=operating)
    verify = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2), operating_point=operating)
    made = [neighbor.decision for neighbor in stubs.search.Search(search).neighbors]
    made.append(stubs.match.Verify(verify).decision)
    recorded = record(stubs, *(case(f"{gallery}-{i}", each) for i, each in enumerate(made)))
    assert [each.decision.distance for each in recorded] == [each.distance for each in made]


def test_what_is_not_kept_may_be_left_out(stubs: Stubs, decision: common_pb2.Decision) -> None:
    kept = common_pb2.Decision(
        verdict=decision.verdict,
        distance=decision.distance,
        threshold=decision.threshold,
        model=decision.model,
        calibration=decision.calibration,
    )
    assert record(stubs, case("short", kept))[0].case_id == "short"


def test_a_calibration_is_known_as_long_as_feedback_may_come(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    first, second = (make_bundle(tmp_path / f"{i}", seed=0, version=i, margin=0.25 * i) for i in (1, 2))
    own = settings.model_copy(update={"galleries": tmp_path / "galleries", "bundle": first.path})
    verify = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
    with served(loop, own) as server, connected(server.address) as stubs:
        early = stubs.match.Verify(verify).decision
        never = common_pb2.Decision()
        never.CopyFrom(early)
        never.calibration = 2
        request = pb.RecordFeedbackRequest(feedback=[case("a", early), case("b", never)])
        status = rich(refused(stubs.feedback.RecordFeedback, request))
        assert (info(status).reason, info(status).metadata["field"]) == (
            "NOT_FOUND",
            "feedback[1].decision.calibration",
        )
        assert listed(stubs) == []
        record(stubs, case("a", early))
    with served(loop, own.model_copy(update={"bundle": second.path})) as server, connected(server.address) as stubs:
        late = stubs.match.Verify(verify).decision
        assert (early.calibration, late.calibration) == (1, 2)
        assert len(record(stubs, case("c", early), case("d", late))) == 2
        early.far = 0.5
        request = pb.RecordFeedbackRequest(feedback=[case("e", early)])
        assert fields(rich(refused(stubs.feedback.RecordFeedback, request))) == ["feedback[0].decision.far"]


@pytest.mark.parametrize("edited", ["9" * 19, "9" * 30, "9" * 5000, "٣", "0", "-1", "1.5", "1e3", " 1"])
def test_a_page_token_that_was_edited_is_refused(stubs: Stubs, edited: str) -> None:
    """Numbers that no store holds ended with INTERNAL."""
    request = pb.ListFeedbackRequest(page_token=page_token_after(edited, "feedback"))
    error = refused(stubs.feedback.ListFeedback, request)
    assert (info(rich(error)).reason, fields(rich(error))) == ("INVALID_INPUT", ["page_token"])
