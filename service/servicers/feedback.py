"""gRPC adapter of FeedbackService: what decisions turned out to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import grpc

from embedding.errors import InvalidInput
from embedding.feedback import MAX_TEXT, Feedback
from index.items import name_of_page_token
from lookalike.v1 import common_pb2, feedback_pb2_grpc
from lookalike.v1 import feedback_pb2 as pb
from service.errors import translated_errors
from service.feedback_store import FeedbackStore, Kept
from service.made_decisions import Known, check_made, gathered
from service.messages import parse, wire
from service.once import Once, gone_already, token_of
from service.pool import Pool
from service.rollout.swap import Rollout
from service.servicers import pages
from service.serving import Serving, run_in

MAX_CASES = 1024
"""Most cases of one RecordFeedback."""

Context = grpc.aio.ServicerContext[Any, Any]

_NOT_FOUND_YET = "0" * 64

_NAME = re.compile(r"feedback/([1-9][0-9]{0,17})")

_VERDICTS: Mapping[int, Literal["match", "non-match", "uncertain"]] = {
    common_pb2.VERDICT_MATCH: "match",
    common_pb2.VERDICT_NON_MATCH: "non-match",
    common_pb2.VERDICT_UNCERTAIN: "uncertain",
}
_VERDICT_NUMBERS = {name: number for number, name in _VERDICTS.items()}


class FeedbackService(feedback_pb2_grpc.FeedbackServiceServicer):
    """What decisions turned out to be."""

    def __init__(
        self, store: FeedbackStore, rollout: Rollout, serving: Serving, once: Once, *, waiting: int, seconds: float
    ) -> None:
        """At most `waiting` calls wait for the store, and none that would wait longer than `seconds`."""
        self._store = store
        self._rollout = rollout
        self._serving = serving
        self._once = once
        # A thread of its own: the store has one connection, and where another process holds it searches go on.
        self._pool = Pool(threads=1, most=waiting, seconds=seconds)

    def close(self) -> None:
        """Let running work end, and close the store."""
        self._pool.close()
        self._store.close()

    async def RecordFeedback(self, request: pb.RecordFeedbackRequest, context: Context) -> pb.RecordFeedbackResponse:
        async with translated_errors(context):
            parse.check_batch(request.feedback, most=MAX_CASES, path="feedback")
            self._serving.check_ready()
            here = [(each.name, each.fingerprint, each.calibration) for each in await self._rollout.described()]
            read: list[Feedback] = []
            wrong = parse.Violations()
            for i, each in enumerate(request.feedback):
                with wrong:
                    read.append(_read(each, f"feedback[{i}]"))
            wrong.check()
            _check_distinct(read)

            def record() -> pb.RecordFeedbackResponse:
                known = gathered(self._store.calibrations({each.model for each in read}, here))
                checked = _checked(request.feedback, read, known)
                answer = self._store.record(checked, _recorded, token_of(request), calibrations=here)
                return pb.RecordFeedbackResponse.FromString(answer)

            return await run_in(self._pool, "store", record)

    async def ListFeedback(self, request: pb.ListFeedbackRequest, context: Context) -> pb.ListFeedbackResponse:
        async with translated_errors(context):
            size, after = parse.page_size(request.page_size), _after(request.page_token)
            model = parse.model_name(request.model, "model") if request.model else ""
            self._serving.check_ready()
            found = await run_in(self._pool, "store", lambda: self._store.page(after, size + 1, model))
            shown, following = pages.page(
                "feedback",
                found,
                size,
                lambda pair: _message(*pair),
                lambda pair: str(pair[0]),
                most=pages.most_bytes(),
            )
            return pb.ListFeedbackResponse(feedback=shown, next_page_token=following)

    async def DeleteFeedback(self, request: pb.DeleteFeedbackRequest, context: Context) -> pb.DeleteFeedbackResponse:
        async with translated_errors(context):
            named = _NAME.fullmatch(request.name)
            if named is None:
                raise InvalidInput(f"name must be feedback/{{feedback}}; got {request.name[:80]!a}", field="name")
            serving = self._serving.current

            def delete(again: bool) -> pb.DeleteFeedbackResponse:
                with gone_already(again):
                    self._store.delete(int(named[1]))
                return pb.DeleteFeedbackResponse()

            return await self._once.done(
                request,
                pb.DeleteFeedbackResponse,
                serving,
                lambda again: run_in(self._pool, "store", partial(delete, again)),
            )


def _checked(messages: Sequence[pb.Feedback], read: Sequence[Feedback], known: Mapping[str, Known]) -> list[Feedback]:
    """The feedback with the fingerprint of its model. Raises NotFound and InvalidInput for decisions never made."""
    checked: list[Feedback] = []
    wrong = parse.Violations()
    for i, (message, each) in enumerate(zip(messages, read, strict=True)):
        with wrong:
            fingerprint = check_made(message.decision, each.model, f"feedback[{i}].decision", known)
            checked.append(each.model_copy(update={"fingerprint": fingerprint}))
    wrong.check()
    return checked


def _read(message: pb.Feedback, path: str) -> Feedback:
    """What is said in the message, by a model whose fingerprint is still to be found."""
    decision, wrong = message.decision, parse.Violations()
    for field, is_wrong, accepted in (
        (
            "case_id",
            not 1 <= len(message.case_id) <= MAX_TEXT or not message.case_id.isprintable(),
            "1 to 256 printable characters",
        ),
        (
            "subject",
            len(message.subject) > MAX_TEXT or not (message.subject or "-").isprintable(),
            "at most 256 printable characters",
        ),
        ("decision", not message.HasField("decision"), "the decision as it was answered"),
        ("decision.distance", not 0 <= decision.distance <= 2, "a distance in [0, 2]"),
        ("decision.threshold", not 0 <= decision.threshold <= 2, "a threshold in [0, 2]"),
        ("decision.verdict", decision.verdict not in _VERDICTS, "the verdict as it was answered"),
        ("decision.calibration", decision.calibration < 1, "the version of the calibration as it was answered"),
        ("truth", message.truth not in {pb.TRUTH_MATCH, pb.TRUTH_NON_MATCH}, "TRUTH_MATCH or TRUTH_NON_MATCH"),
        ("review_rate", not 0 <= message.review_rate <= 1, "a share in (0, 1], or 0 when it is not known"),
        ("candidates", message.candidates < 0, "a number of items, or 0"),
    ):
        with wrong:
            if is_wrong:
                raise InvalidInput(f"{path}.{field} must be {accepted}", field=f"{path}.{field}")
    with wrong:
        model = parse.model_name(decision.model, f"{path}.decision.model")
    wrong.check()
    return Feedback(
        case_id=message.case_id,
        fingerprint=_NOT_FOUND_YET,
        model=model,
        calibration=decision.calibration,
        distance=decision.distance,
        threshold=decision.threshold,
        verdict=_VERDICTS[decision.verdict],
        is_match=message.truth == pb.TRUTH_MATCH,
        subject=message.subject,
        review_rate=message.review_rate or None,
        candidates=message.candidates,
        time=datetime.now(UTC),
    )


def _check_distinct(feedback: Sequence[Feedback]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for i, each in enumerate(feedback):
        first = seen.setdefault((each.model, each.case_id), i)
        if first != i:
            raise InvalidInput(
                f"case {each.case_id[:80]!r} comes twice in one request, first as feedback[{first}]; keep one of them",
                field=f"feedback[{i}].case_id",
            )


def _recorded(kept: Sequence[Kept]) -> bytes:
    response = pb.RecordFeedbackResponse(feedback=[_message(number, each) for number, each in kept])
    return response.SerializeToString()


def _message(number: int, known: Feedback) -> pb.Feedback:
    return pb.Feedback(
        name=f"feedback/{number}",
        case_id=known.case_id,
        decision=common_pb2.Decision(
            verdict=common_pb2.Verdict.ValueType(_VERDICT_NUMBERS[known.verdict]),
            distance=known.distance,
            threshold=known.threshold,
            signed_margin=known.threshold - known.distance,
            model=wire.model_name(known.model),
            calibration=known.calibration,
        ),
        truth=pb.TRUTH_MATCH if known.is_match else pb.TRUTH_NON_MATCH,
        subject=known.subject,
        review_rate=known.review_rate or 0,
        candidates=known.candidates,
        fingerprint=known.fingerprint,
        update_time=wire.timestamp(known.time),
    )


def _after(page_token: str) -> int:
    name = name_of_page_token(page_token, "feedback")
    if name and not _NAME.fullmatch(f"feedback/{name}"):
        raise InvalidInput("page_token is not one that this listing returned; leave it out", field="page_token")
    return int(name or 0)
