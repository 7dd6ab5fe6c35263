"""A process that writes to every store beside the galleries until it is killed, and what they must hold after any
number of its steps.

Run as a module it answers each line `first step` on its standard input with a fork that works from that step on, and
tells the fork's process number, then the number of each step once it has been acknowledged, then `gone`. A step that
was cut off is done again by the next fork, as a client or an operator would.
"""

from __future__ import annotations

import os
import random
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from embedding.errors import AlreadyExists, NotFound
from embedding.feedback import Feedback
from index.aliases import Aliases
from index.receipts import Token
from service.access.key_ring import KeyRing
from service.feedback_store import FeedbackStore, Kept
from service.once import Ledger
from service.rollout import standing
from service.rollout.standing import Standing
from service.rollout.stock import Choice
from tests.index.calibrations import calibration

FINGERPRINT = "a" * 64
KEYS = "keys.json"
CASES, ALIASES = 9, 5
AT_ONCE = 3
KEYS_KEPT = 3
KINDS = ("record", "ledger", "alias", "models", "keys", "delete")


@dataclass
class Truth:
    """What the stores hold."""

    feedback: dict[str, float] = field(default_factory=dict)
    """Distance by case."""
    answers: dict[int, bytes] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    models: Standing | None = None
    keys: list[str] = field(default_factory=list)


def kind(n: int) -> str:
    """What step n does: a function of n alone, as all of it."""
    return KINDS[n % len(KINDS)]


def token(n: int) -> Token:
    return Token(str(uuid.UUID(int=n)), b"digest")


def answer(n: int) -> bytes:
    return random.Random(n).randbytes(random.Random(-n).randrange(2000))


def cases(n: int) -> list[str]:
    """Recorded together, or deleted, the first of them."""
    return [f"case-{i}" for i in random.Random(n).sample(range(CASES), AT_ONCE)]


def distance(n: int) -> float:
    return (n % 1024) / 1024


def said(n: int) -> list[Feedback]:
    return [
        Feedback(
            case_id=case,
            fingerprint=FINGERPRINT,
            model="toy",
            calibration=1,
            distance=distance(n),
            threshold=0.5,
            verdict="match",
            is_match=True,
            time=datetime.now(UTC),
        )
        for case in cases(n)
    ]


def alias(n: int) -> tuple[str, str]:
    """An alias and its gallery, empty when it is deleted."""
    draw = random.Random(n)
    return f"alias-{draw.randrange(ALIASES)}", "" if n % 4 == 0 else f"gallery-{n}"


def models(n: int) -> Standing:
    return Standing(given=(Choice("toy", 1),), active=Choice("toy", n + 1), others=(Choice("other", n + 1),))


def truth_after(steps: int) -> Truth:
    truth = Truth()
    for n in range(steps):
        match kind(n):
            case "record":
                truth.feedback |= dict.fromkeys(cases(n), distance(n))
            case "delete":
                truth.feedback.pop(cases(n)[0], None)
            case "ledger":
                truth.answers[n] = answer(n)
            case "alias":
                name, gallery = alias(n)
                truth.aliases.pop(name, None)
                if gallery:
                    truth.aliases[name] = gallery
            case "models":
                truth.models = models(n)
            case _:
                truth.keys = [*truth.keys, f"key-{n}"][-KEYS_KEPT:]
    return truth


def form(kept: Sequence[Kept]) -> bytes:
    return repr([(number, each.case_id, each.distance) for number, each in kept]).encode()


def work(folder: Path, first: int, told: Callable[[int], None]) -> None:
    """Steps from `first` on, for ever."""
    feedback, ledger, ring = FeedbackStore(folder), Ledger(folder), KeyRing(folder / KEYS)
    named = (("toy", FINGERPRINT, calibration()),)
    names = Aliases(folder)
    for n in range(first, 10**9):
        match kind(n):
            case "record":
                feedback.record(said(n), form, token(n), calibrations=named)
            case "delete":
                for number, each in feedback.page(0, CASES):
                    if each.case_id == cases(n)[0]:
                        feedback.delete(number)
            case "ledger":
                known, _ = ledger.begin(token(n))
                if known is None:
                    ledger.end(token(n), answer(n))
            case "alias":
                name, gallery = alias(n)
                if gallery:
                    names.put(name, gallery)
                else:
                    with suppress(NotFound):
                        names.delete(name)
            case "models":
                standing.write(folder, models(n))
            case _:
                with suppress(AlreadyExists):
                    ring.create(f"key-{n}", scopes=("read",), galleries=("*",))
                for record in ring.all()[:-KEYS_KEPT]:
                    ring.revoke(record.id)
        told(n)


def _tell(what: object) -> None:
    """In one write, which a kill cannot cut."""
    os.write(sys.stdout.fileno(), f"{what}\n".encode())


def main(folder: Path) -> None:
    for line in sys.stdin:
        process = os.fork()
        if not process:
            _tell(os.getpid())
            work(folder, int(line), _tell)
        os.waitpid(process, 0)
        _tell("gone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
