"""Searches that arrive together are answered together: one search of many queries costs a third of as many searches.

Calls that come one right after the other are collected, and answered when no more come; where calls have come alone
lately, nobody is waited for. Only searches that take so short that they are answered on the event loop anyway are
collected here.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any

from embedding.errors import LookalikeError, ResponseTooLarge
from index import Found
from service.batching.quiet import Quiet
from service.engine import Engine
from service.questions import Search, SearchBatch
from service.stages import Work
from service.telemetry.watch import ModelWatch

MOST = 32
"""Searches answered between two turns of the event loop; more would hold up other calls and save little."""

COMPANY = 64
"""Answers to single searches, after which others are no longer expected: then nobody is waited for."""

LOOK_EVERY = 16
"""Of these, the next of so many waits all the same: a call that is on its way is seen by nobody who does not wait."""

Form = Callable[[Sequence[Found]], Sequence[bytes | ResponseTooLarge]]
"""Answers as bytes, one each."""


@dataclass(eq=False)
class _Asked:
    question: Search
    form: Form
    work: Work
    done: asyncio.Future[bytes]

    @property
    def kind(self) -> Any:
        """What must be equal for two to be answered together."""
        scope = self.question.scope
        return self.form, scope.gallery, scope.point, scope.effort, scope.metadata, self.question.k


class Together:
    """Collects searches for one engine, on one event loop."""

    def __init__(self, engine: Engine, watch: ModelWatch) -> None:
        self._engine = engine
        self._watch = watch
        self._waiting: list[_Asked] = []
        self._quiet = Quiet()
        self._company = 0
        self._alone = 0

    async def ask(self, question: Search, form: Form) -> bytes:
        """The answer as `form` makes it; calls must give the same form to be answered together.

        The question must have no filter. Raises LookalikeError.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(question, form, Work(), loop.create_future())
        if not self._waiting:
            self._soon(loop)
        self._waiting.append(asked)
        self._quiet.came()
        return await asked.done

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # In nobody's name: each caller's rights were looked at when the gallery was resolved, whose id is asked for.
        loop.call_soon(self._answer, loop, context=Context())

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._others_may_come():
            self._soon(loop)
            return
        some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        if self._waiting:
            self._soon(loop)
        kinds: defaultdict[Any, list[_Asked]] = defaultdict(list)
        for asked in some:
            if not asked.done.done():  # its caller has not gone
                kinds[asked.kind].append(asked)
        for alike in kinds.values():
            outcomes = self._answered(alike)
            for asked, outcome in zip(alike, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    asked.done.set_exception(outcome)
                else:
                    asked.done.set_result(outcome)

    def _answered(self, alike: Sequence[_Asked]) -> Sequence[bytes | Exception]:
        try:
            return Work.run_as_one([asked.work for asked in alike], "search", self._outcomes, alike)
        except ResponseTooLarge as error:
            if len(alike) == 1:
                return [error]
            return [outcome for asked in alike for outcome in self._answered([asked])]  # each may be small enough
        except Exception as error:
            return [error] * len(alike)

    def _others_may_come(self) -> bool:
        count = len(self._waiting)
        if (self._company or not self._alone) and count < MOST and not self._quiet.after_turn():
            return True
        if count > 1:
            self._company = COMPANY
        else:
            self._company = max(0, self._company - 1)
            self._alone = (self._alone + 1) % LOOK_EVERY
        self._quiet.came()  # those beyond this answer count as if they came now
        return False

    def _outcomes(self, alike: Sequence[_Asked]) -> Sequence[bytes | Exception]:
        first = alike[0].question
        batch = SearchBatch(
            scope=replace(first.scope, deadline=None),  # it would be one caller's, and the work is short
            queries=[asked.question.query for asked in alike],
            k=first.k,
            exclude=[asked.question.exclude for asked in alike],
            threads=1,
        )
        found = self._watch.answered(self._engine.ask(batch))
        formed = iter(alike[0].form([each for each in found if not isinstance(each, LookalikeError)]))
        return [each if isinstance(each, LookalikeError) else next(formed) for each in found]
