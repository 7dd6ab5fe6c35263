"""What a decision turned out to be: the record that services keep and calibration learns from.

One JSON object a line in a file. Distances and verdicts alone; neither images nor embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from embedding.calibration import Threshold
from embedding.errors import InvalidDataset, NotFound, StorageFailed

MAX_TEXT = 256
"""Longest case id and subject, in characters."""


class Feedback(BaseModel):
    """One decision, and the truth."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    case_id: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    """The caller's own id; one case of one model is recorded once."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the model that decided."""
    model: str
    calibration: Annotated[int, Field(ge=1)]
    """Version of the calibration that decided."""
    distance: Threshold
    threshold: Threshold
    verdict: Literal["match", "non-match", "uncertain"]
    is_match: bool
    """The truth."""
    subject: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    """Cases of one subject are not independent; empty is independent of all others."""
    review_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of decisions like this one that is reviewed; None when not known."""
    candidates: Annotated[int, Field(ge=0)] = 0
    """How many items a search picked the pair from; 0 for a pair compared for its own sake."""
    time: AwareDatetime
    """When it was recorded last."""


def last_of_each_case(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Of each case of each model what was recorded last, in the order in which the cases came first.

    Raises InvalidDataset for a case that is told both ways at once.
    """
    last: dict[tuple[str, str], Feedback] = {}
    for each in feedback:
        known = last.setdefault((each.fingerprint, each.case_id), each)
        if known.time == each.time and known.is_match != each.is_match:
            raise InvalidDataset(
                f"case {each.case_id!r} is told to match and not to match, both recorded at "
                f"{each.time:%Y-%m-%d %H:%M:%S}; keep the true one"
            )
        if each.time >= known.time:
            last[each.fingerprint, each.case_id] = each
    return list(last.values())


def write_lines(file: IO[bytes], feedback: Iterable[Feedback]) -> int:
    """Write feedback, a line each, and return how much it is. Raises OSError."""
    count = 0
    for each in feedback:
        file.write(each.model_dump_json().encode() + b"\n")
        count += 1
    return count


def read_lines(path: Path) -> Iterator[Feedback]:
    """The feedback of a file. Raises NotFound, and InvalidDataset naming the line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield Feedback.model_validate_json(line)
                    except ValidationError as error:
                        problem = error.errors()[0]
                        where = "".join(f"{place}: " for place in problem["loc"])
                        raise InvalidDataset(
                            f"{path}, line {number}: {where}{problem['msg']}; write such files with "
                            "`lookalike feedback export`"
                        ) from error
    except FileNotFoundError as error:
        raise NotFound(f"no file of feedback at {path}; write one with `lookalike feedback export`") from error
    except UnicodeDecodeError as error:
        raise InvalidDataset(
            f"{path} is no text in UTF-8; write such files with `lookalike feedback export`"
        ) from error
    except OSError as error:
        raise StorageFailed(f"cannot read {path}: {error.strerror or error}") from error
