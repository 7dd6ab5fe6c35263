"""Who is let in, in which order, and what is said to the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.errors import DeadlineExceeded, Overloaded
from service import admission
from service.admission import GREED, Pace, Room, Ticket
from service.fairness import FairQueue
from service.pool import Pool


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "take", "discard"]))))
def test_callers_take_turns_and_each_keeps_its_order(steps: list[tuple[str, str]]) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: dict[str, deque[int]] = {}
    turns: list[str] = []  # whose turn it is first, by a naive list
    for number, (caller, step) in enumerate(steps):
        if step == "put":
            queue.put(caller, number)
            waiting.setdefault(caller, deque()).append(number)
            if caller not in turns:
                turns.append(caller)
        elif step == "take":
            taken = queue.take()
            if not turns:
                assert taken is None
                continue
            first = turns.pop(0)
            assert taken == (first, waiting[first].popleft())
            if waiting[first]:
                turns.append(first)
        elif waiting.get(caller):
            queue.discard(caller, waiting[caller].pop())
            if not waiting[caller]:
                turns.remove(caller)
        assert len(queue) == sum(map(len, waiting.values()))


def filled(room: Room, caller: str) -> list[Ticket]:
    """As much as the caller gets."""
    tickets = []
    while True:
        try:
            tickets.append(room.enter(caller, 1, 10))
        except Overloaded:
            return tickets


@pytest.mark.parametrize(("most", "most_bytes"), [(9_000, None), (10**6, 90_000)])
def test_no_caller_takes_all_and_newcomers_find_room(most: int, most_bytes: int | None) -> None:
    room = Room("things", most=most, most_bytes=most_bytes)
    greedy = filled(room, "greedy")
    assert len(greedy) == 9_000 * GREED / (GREED + 1)
    others = [filled(room, f"other {i}") for i in range(3)]
    assert all(others)
    assert room.count <= 9_000
    for ticket in [*greedy, *(ticket for tickets in others for ticket in tickets)]:
        ticket.close()
        ticket.close()
    assert (room.count, room.bytes) == (0, 0)
    assert len(filled(room, "anybody")) == len(greedy)


def test_an_empty_room_takes_anything() -> None:
    room = Room("things", most=2, most_bytes=10)
    with room.enter("a", 5, 100), pytest.raises(Overloaded) as caught:
        room.enter("b")
    assert caught.value.subject == "things"
    assert caught.value.retry_seconds >= admission.LEAST_RETRY_SECONDS
    room.enter("b", 2, 10).close()


def test_nobody_enters_who_would_wait_too_long() -> None:
    pace = Pace()
    room = Room("things", most=1000, most_seconds=2.0, free_of_time=3, seconds_each=lambda: pace.seconds)
    unknown = [room.enter("a") for _ in range(10)]  # nothing is known about time yet
    pace.record(3.0, pieces=10)
    with pytest.raises(Overloaded, match="3 seconds") as caught:
        room.enter("a")
    assert caught.value.retry_seconds == pytest.approx(3.0)
    # Turns are taken, so that the first of another caller waits for one of the others only.
    assert room.seconds_ahead("b") == pytest.approx(0.3)
    room.enter("b", seconds_left=0.4).close()
    with pytest.raises(Overloaded, match="deadline is earlier"):
        room.enter("b", seconds_left=0.2)
    for ticket in unknown[:8]:
        ticket.close()
    room.enter("a", seconds_left=0.001).close()  # three are never judged by time


def test_a_pace_weighs_pieces_alike_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = Pace(), Pace()
    for pace in (together, apart):
        pace.record(1.0)
    together.record(6.0, pieces=3)
    for _ in range(3):
        apart.record(2.0)
    assert together.seconds == pytest.approx(apart.seconds)
    assert 1 < together.seconds < 2
    later = time.monotonic() + admission.FORGOTTEN_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert together.seconds == 0


def told(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), timeout=30))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_patient_enter_by_turns_and_one_who_leaves_blocks_nobody() -> None:
    async def story() -> None:
        room = Room("things", most=1)
        first = room.enter("x")
        entered: list[str] = []

        async def come(name: str) -> None:
            with await room.enter_patiently(name[0]):
                entered.append(name)

        tasks = {name: asyncio.create_task(come(name)) for name in ("a0", "a1", "a2", "b0", "c0", "a3")}
        await settled()
        assert (entered, room.patient) == ([], 6)
        for name in ("a1", "c0"):
            tasks[name].cancel()
        await settled()
        assert room.patient == 4
        first.close()
        await asyncio.gather(*(tasks[name] for name in ("a0", "a2", "a3", "b0")))
        assert (entered, room.count, room.patient) == (["a0", "b0", "a2", "a3"], 0, 0)

    told(story)


def test_room_that_comes_free_goes_to_the_patient_and_a_greedy_one_blocks_nobody() -> None:
    async def story() -> None:
        room = Room("things", most=18)
        assert len(filled(room, "greedy")) == 16
        others = filled(room, "other")
        assert room.count == 18
        greedy = asyncio.create_task(room.enter_patiently("greedy"))
        other = asyncio.create_task(room.enter_patiently("other"))
        await settled()
        others[0].close()
        with pytest.raises(Overloaded):
            room.enter("latecomer")
        await settled()
        assert other.done()
        assert not greedy.done()
        greedy.cancel()

    told(story)


def test_one_who_leaves_when_its_turn_has_come_passes_it_on() -> None:
    async def story() -> None:
        room = Room("things", most=1)
        first = room.enter("a")
        leaving = asyncio.create_task(room.enter_patiently("b"))
        following = asyncio.create_task(room.enter_patiently("c"))
        await settled()
        first.close()  # lets in the one that is cancelled before it runs
        leaving.cancel()
        (await following).close()
        assert room.count == 0

    told(story)


class Held:
    """A function that waits until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.begun: list[str] = []

    def named(self, name: str) -> Callable[[], str]:
        def call() -> str:
            self.begun.append(name)
            assert self.let_go.wait(timeout=20)
            return name

        return call


def with_pool(story: Callable[[Pool, Held], Coroutine[Any, Any, None]], *, most: int = 100) -> None:
    async def run() -> None:
        pool, held = Pool(threads=1, most=most, seconds=60), Held()
        try:
            await asyncio.wait_for(story(pool, held), timeout=30)
        finally:
            held.let_go.set()
            pool.close()

    asyncio.run(run())


def test_tasks_are_begun_by_turns_and_never_for_who_has_gone() -> None:
    async def story(pool: Pool, held: Held) -> None:
        names = [("a", "a0"), ("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b0")]
        tasks = [asyncio.create_task(pool.run(held.named(name), caller=caller)) for caller, name in names]
        late = asyncio.create_task(pool.run(held.named("late"), caller="c", seconds_left=0.0))
        await settled()
        assert pool.waiting == 5
        tasks[2].cancel()
        held.let_go.set()
        assert await asyncio.gather(*tasks[:2], *tasks[3:]) == ["a0", "a1", "a3", "b0"]
        with pytest.raises(DeadlineExceeded):
            await late
        assert held.begun == ["a0", "a1", "b0", "a3"]
        assert (pool.room.count, pool.waiting) == (0, 0)

    with_pool(story)


def test_tasks_are_refused_when_there_are_too_many_but_not_half_done() -> None:
    async def story(pool: Pool, held: Held) -> None:
        tasks = [asyncio.create_task(pool.run(held.named(str(i)))) for i in range(3)]
        await settled()
        with pytest.raises(Overloaded, match="searches, reads and writes"):
            await pool.run(held.named("refused"))
        patient = asyncio.create_task(pool.run(held.named("patient"), patient=True))
        admitted = asyncio.create_task(pool.run(held.named("admitted"), admitted=True))
        await settled()
        held.let_go.set()
        assert await asyncio.gather(*tasks, admitted, patient) == ["0", "1", "2", "admitted", "patient"]
        assert held.begun == ["0", "1", "2", "admitted", "patient"]

    with_pool(story, most=3)


def test_what_a_task_raises_reaches_its_caller() -> None:
    async def story(pool: Pool, held: Held) -> None:
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)
        held.let_go.set()
        assert await pool.run(held.named("next")) == "next"

    with_pool(story)
