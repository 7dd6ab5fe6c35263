"""The calls of FeedbackService."""

from __future__ import annotations

from collections.abc import Iterable

from lookalike import _messages as messages
from lookalike._calls.kinds import PAGE_SIZE, Batch, Call, Page, call, new_id, raised
from lookalike.types import Feedback, RecordedFeedback
from lookalike.v1 import feedback_pb2

FEEDBACK = "lookalike.v1.FeedbackService"

MAX_CASES = 1024


def record_feedback(
    cases: Iterable[Feedback],
) -> Batch[feedback_pb2.Feedback, RecordedFeedback]:
    """Record, durably, what decisions turned out to be: up to 1,024 at a time, all or none."""
    return Batch(
        map(messages.feedback, cases),
        MAX_CASES,
        lambda chunk: call(
            f"{FEEDBACK}/RecordFeedback",
            feedback_pb2.RecordFeedbackRequest(feedback=chunk, request_id=new_id()),
            feedback_pb2.RecordFeedbackResponse,
            lambda response: [messages.recorded_feedback(case) for case in response.feedback],
        ),
        raised,
    )


def list_feedback(page_token: str, *, model: str = "") -> Call[Page[RecordedFeedback]]:
    """The recorded feedback, of one model or all, in the order of its recording; pages are fetched as needed."""
    return call(
        f"{FEEDBACK}/ListFeedback",
        feedback_pb2.ListFeedbackRequest(
            page_size=PAGE_SIZE, page_token=page_token, model=messages.model_name(model) if model else ""
        ),
        feedback_pb2.ListFeedbackResponse,
        lambda response: Page(
            [messages.recorded_feedback(case) for case in response.feedback], response.next_page_token
        ),
    )


def delete_feedback(feedback: str) -> Call[None]:
    """Delete recorded feedback, named by the id that it was given."""
    return call(
        f"{FEEDBACK}/DeleteFeedback",
        feedback_pb2.DeleteFeedbackRequest(name=f"feedback/{feedback}", request_id=new_id()),
        feedback_pb2.DeleteFeedbackResponse,
        lambda response: None,
    )
