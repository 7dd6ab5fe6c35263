"""Decisions, what was found with them, and feedback on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lookalike._messages.names import dictionary, item_name, last_part, model_name, moment
from lookalike.types import Decision, Embedding, Feedback, Neighbor, Neighbors, RecordedFeedback, Verdict
from lookalike.v1 import common_pb2, feedback_pb2, search_pb2

_VERDICTS = {
    common_pb2.VERDICT_MATCH: Verdict.MATCH,
    common_pb2.VERDICT_NON_MATCH: Verdict.NON_MATCH,
    common_pb2.VERDICT_UNCERTAIN: Verdict.UNCERTAIN,
}

_VERDICT_NUMBERS = {verdict: number for number, verdict in _VERDICTS.items()}


def decision(message: common_pb2.Decision) -> Decision:
    return Decision(
        verdict=_VERDICTS[message.verdict],
        distance=message.distance,
        threshold=message.threshold,
        match_probability=message.match_probability,
        far=message.far,
        far_upper95=message.far_upper95,
        frr=message.frr,
        model=last_part(message.model),
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
        id=last_part(message.name),
        case_id=message.case_id,
        decision=replace(
            decision(message.decision), match_probability=math.nan, far=math.nan, far_upper95=math.nan, frr=math.nan
        ),
        is_match=message.truth == feedback_pb2.TRUTH_MATCH,
        subject=message.subject,
        review_rate=message.review_rate or None,
        candidates=message.candidates,
        fingerprint=message.fingerprint,
        time=moment(message.update_time),
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
        metadata=dictionary(message.metadata),
        decision=decision(message.decision),
    )


def embedding(data: bytes) -> Embedding:
    return np.frombuffer(data, dtype="<f4").astype(np.float32)
