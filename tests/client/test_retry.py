"""Retries, their budget, and what the server says about them: both clients against servers that fail."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from lookalike import AsyncClient, CallFailed, Cancelled, Client, ResourceExhausted, Retry, Unavailable
from lookalike._retry import Budget, Patience, service_config
from lookalike.errors import from_call
from lookalike.types import Neighbors
from lookalike.v1 import search_pb2
from tests.client.flaky import Context, Flaky, refuse, serving
from tests.client.through import Ask, blocking, both
from tests.service.harness import Loop

FAST = Retry(initial_backoff=0.005, max_backoff=0.01, multiplier=1)


def search(client: Any) -> Any:
    return client.search("g", b"image")


@both
def test_a_server_that_is_full_is_asked_again_when_it_says(loop: Loop, through: Ask) -> None:
    times: list[float] = []

    async def full_twice(before: int, request: bytes, context: Context) -> bytes:
        times.append(asyncio.get_running_loop().time())
        if before < 2:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", seconds=0.2)
        return b""

    with serving(loop, handler := Flaky(full_twice)) as address:
        assert through(address, search, retry=FAST) == Neighbors()
    assert handler.seen["Search"] == 3
    assert min(second - first for first, second in itertools.pairwise(times)) >= 0.2


@both
def test_all_matches_are_asked_for_again_within_the_timeout(loop: Loop, through: Ask) -> None:
    def matches(client: Any) -> Any:
        return client.search_matches("g", b"image")

    left: list[float] = []

    async def full_twice(before: int, request: bytes, context: Context) -> bytes:
        left.append(context.time_remaining() or 0.0)
        if before < 2:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", seconds=0.3)
        return search_pb2.SearchMatchesResponse(summary={"generation": 7}).SerializeToString()

    with serving(loop, Flaky(full_twice)) as address:
        assert through(address, matches, retry=FAST, timeout=5).generation == 7
    assert len(left) == 3
    assert left[2] < left[0] - 0.3  # of 0.6 to 0.75: gRPC says what it said before where that is 5 % off

    async def full(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", seconds=30)
        return b""

    with serving(loop, handler := Flaky(full)) as address, pytest.raises(ResourceExhausted):
        through(address, matches, retry=FAST)
    assert handler.seen["SearchMatches"] == 1


@both
@pytest.mark.parametrize(("seconds", "timeout"), [(1.0, 20.0), (2.0, 1.0), (float("inf"), 5.0)])
def test_an_operation_is_waited_for_no_longer_than_the_timeout_allows(
    loop: Loop, through: Ask, seconds: float, timeout: float
) -> None:
    asked: list[float] = []

    async def told(before: int, request: bytes, context: Context) -> bytes:
        wanted = operations_pb2.WaitOperationRequest.FromString(request).timeout
        asked.append(wanted.seconds + wanted.nanos / 1e9)
        return bytes(operations_pb2.Operation(name="operations/7").SerializeToString())

    with serving(loop, Flaky(told)) as address:
        found = through(address, lambda client: client.wait_operation("7", seconds=seconds), timeout=timeout)
    assert (found.id, found.done) == ("7", False)
    assert asked[0] <= 0.8 * timeout
    assert seconds > timeout or seconds - 0.5 < asked[0] <= seconds


@both
def test_the_wait_for_an_operation_that_is_asked_for_again_is_what_is_left_of_it(loop: Loop, through: Ask) -> None:
    asked: list[float] = []

    async def gone_twice(before: int, request: bytes, context: Context) -> bytes:
        wanted = operations_pb2.WaitOperationRequest.FromString(request).timeout
        asked.append(wanted.seconds + wanted.nanos / 1e9)
        if before < 2:
            await asyncio.sleep(0.3)
            await refuse(context, grpc.StatusCode.UNAVAILABLE)
        return bytes(operations_pb2.Operation(name="operations/7").SerializeToString())

    def wait(client: Any) -> Any:
        return client.wait_operation("7", seconds=0.5)

    with serving(loop, Flaky(gone_twice)) as address:
        assert through(address, wait, retry=FAST).id == "7"
    assert 0 <= asked[2] <= asked[1] <= asked[0] - 0.3
    assert asked[2] == 0  # 0.6 s have gone
    with serving(loop, handler := Flaky(gone_twice)) as address, pytest.raises(Unavailable):
        through(address, wait, retry=None)
    assert handler.seen["WaitOperation"] == 1


@both
@pytest.mark.parametrize("seconds", [float("inf"), 1e10, 10])
def test_a_server_is_waited_for_as_long_as_wanted(loop: Loop, through: Ask, seconds: float) -> None:
    async def serving_later(before: int, request: bytes, context: Context) -> bytes:
        return b"" if before < 2 else b"\x08\x01"

    with serving(loop, handler := Flaky(serving_later)) as address:
        through(address, lambda client: client.wait_until_ready(seconds))
    assert handler.seen["Check"] == 3


@both
@pytest.mark.parametrize("seconds", [None, float("nan"), -1, "1"])
def test_a_senseless_wait_is_refused(through: Ask, seconds: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be 0 or more"):
        through("127.0.0.1:1", lambda client: client.wait_until_ready(seconds))


@both
@pytest.mark.parametrize(
    ("reason", "seconds"), [("STORAGE_FAILED", 0.01), ("OVERLOADED", None), ("OVERLOADED", 100), ("", 0.01)]
)
def test_what_waiting_does_not_mend_is_not_waited_for(
    loop: Loop, through: Ask, reason: str, seconds: float | None
) -> None:
    async def full(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason=reason, seconds=seconds)
        return b""

    with serving(loop, handler := Flaky(full)) as address, pytest.raises(ResourceExhausted) as caught:
        through(address, search, retry=FAST)
    assert handler.seen["Search"] == 1
    assert caught.value.retry_after == seconds


@both
def test_attempts_are_counted_and_can_be_forbidden(loop: Loop, through: Ask) -> None:
    async def down(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, grpc.StatusCode.UNAVAILABLE)
        return b""

    async def full(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason="RATE_LIMITED", seconds=0.001)
        return b""

    for answer, error in ((down, Unavailable), (full, ResourceExhausted)):
        for retry, tries in ((None, 1), (Retry(attempts=2, initial_backoff=0.01), 2)):
            with serving(loop, handler := Flaky(answer)) as address, pytest.raises(error):
                through(address, search, retry=retry)
            assert handler.seen["Search"] == tries


@both
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_budget_ends_repetition(loop: Loop, through: Ask, code: grpc.StatusCode) -> None:
    async def always(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, code, reason="OVERLOADED", seconds=0.001)
        return b""

    async def ask_often(client: AsyncClient) -> list[BaseException | Neighbors]:
        return [(await asyncio.gather(client.search("g", b""), return_exceptions=True))[0] for _ in range(10)]

    def ask(client: Any) -> Any:
        if isinstance(client, AsyncClient):
            return ask_often(client)
        for _ in range(10):
            with pytest.raises((Unavailable, ResourceExhausted)):
                search(client)
        return None

    with serving(loop, handler := Flaky(always)) as address:
        through(address, ask, retry=Retry(initial_backoff=0.005, max_backoff=0.01, budget=5))
    assert 10 < handler.seen["Search"] <= 15  # 40 without a budget


def test_a_budget_is_refilled_by_success() -> None:
    budget = Budget(2, 0.5)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.succeeded()
    assert not budget.take()
    for _ in range(9):
        budget.succeeded()
    assert [budget.take() for _ in range(3)] == [True, True, False]


def full(retry_after: float) -> ResourceExhausted:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return ResourceExhausted("full", code=code, reason="OVERLOADED", retry_after=retry_after)


def test_what_is_not_repeated_for_want_of_time_takes_nothing_of_the_budget() -> None:
    patience = Patience(Retry(budget=1), None)
    assert patience.pause(full(100), 1, seconds_left=30) is None
    assert patience.pause(full(1), 1, seconds_left=30) is not None
    assert patience.pause(full(1), 1, seconds_left=30) is None


def test_the_pause_that_the_server_asks_for_is_kept(loop: Loop) -> None:
    times: list[float] = []

    async def down_once(before: int, request: bytes, context: Context) -> bytes:
        times.append(asyncio.get_running_loop().time())
        if not before:
            await refuse(context, grpc.StatusCode.UNAVAILABLE, pushback="300")
        return b""

    with serving(loop, Flaky(down_once)) as address:
        blocking(address, search, retry=FAST)
    assert times[1] - times[0] >= 0.29


def test_a_server_may_forbid_repetition(loop: Loop) -> None:
    async def down(before: int, request: bytes, context: Context) -> bytes:
        await refuse(context, grpc.StatusCode.UNAVAILABLE, pushback="-1")
        return b""

    with serving(loop, handler := Flaky(down)) as address, pytest.raises(Unavailable):
        blocking(address, search, retry=FAST)
    assert handler.seen["Search"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 1},
        {"attempts": 6},
        {"initial_backoff": 0},
        {"max_backoff": 0.01},
        {"multiplier": 0},
        {"budget": 0},
        {"refund": 11},
        {"refund": 0},
        # gRPC ended every call with these, or waited for ever.
        {"attempts": 2.5},
        {"initial_backoff": 0.001},
        {"initial_backoff": float("nan")},
        {"max_backoff": float("inf")},
        {"max_backoff": float("nan")},
        {"multiplier": float("nan")},
        {"multiplier": float("inf")},
        {"multiplier": 0.001},
        {"budget": 2.5},
        {"refund": float("nan")},
    ],
)
def test_senseless_retries_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{min(wrong)}.* between .*got"):
        Retry(**wrong)


@both
def test_retries_at_their_bounds_are_taken(loop: Loop, through: Ask) -> None:
    async def down_once(before: int, request: bytes, context: Context) -> bytes:
        if not before:
            await refuse(context, grpc.StatusCode.UNAVAILABLE)
        return b""

    for retry in (
        Retry(initial_backoff=0.002, max_backoff=0.002, multiplier=1, budget=2, refund=0.001),
        Retry(attempts=5, initial_backoff=0.002, max_backoff=1e9, multiplier=1000, budget=500, refund=500),
    ):
        with serving(loop, Flaky(down_once)) as address:
            settings = {"hedge_after": 1e9, "max_message_bytes": 2**31 - 1, "timeout": 1e9}
            assert through(address, search, retry=retry, **settings) == Neighbors()


def test_the_service_config_says_what_retry_says() -> None:
    config = service_config(Retry(attempts=3, initial_backoff=0.0025, budget=7, refund=0.25))
    policy = config["methodConfig"][0]["retryPolicy"]
    assert (policy["maxAttempts"], policy["initialBackoff"]) == (3, "0.002500000s")
    assert config["retryThrottling"] == {"maxTokens": 14, "tokenRatio": 0.25}


@pytest.mark.parametrize(
    "settings",
    [
        {"hedge_after": 0},
        {"hedge_after": -1},
        {"hedge_after": float("nan")},
        {"hedge_after": float("inf")},
        {"connections": 0},
        {"connections": 65},
        {"connections": 1.5},
        {"max_message_bytes": 2**31},  # over gRPC's 32 bits
        {"max_message_bytes": 1e6},
        {"window": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},  # ended every call at once
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any]) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=rf"^{min(settings)} must be .*got"):
            kind("127.0.0.1:1", **settings)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.CANCELLED, "CANCELLED", ResourceExhausted),
        (grpc.StatusCode.CANCELLED, "", ResourceExhausted),
        (grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8", ResourceExhausted),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))",
            Unavailable,
        ),
        (grpc.StatusCode.CANCELLED, "Channel closed!", Cancelled),
        (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", Cancelled),
    ],
)
def test_a_call_that_the_server_could_not_look_at_is_told_from_one_that_was_given_up(
    code: grpc.StatusCode, details: str, kind: type[CallFailed]
) -> None:
    failed = from_call(_Ended(code, details), target="shop:1", timeout=1.0)
    assert type(failed) is kind
    assert failed.code is code
    assert (
        "shop:1 has more calls than it can look at" in str(failed) if kind is not Cancelled else str(failed) == details
    )
    pauses = [Patience(Retry(), None).pause(failed, attempt, 30.0) for attempt in (1, 2, 4)]
    bounded = Patience(Retry(max_backoff=0.15), None).pause(failed, 3, 30.0)
    if kind is ResourceExhausted:
        assert bounded is not None
        assert 0.15 <= bounded < 0.2
        assert pauses[0] is not None
        assert pauses[1] is not None
        assert pauses[0] < 0.2 < pauses[1] < 0.4
        assert pauses[2] is None  # of four tries
    else:
        assert pauses == [None] * 3  # gRPC has repeated what was UNAVAILABLE


class _Ended:
    """A call that ended with no more than a code and words of gRPC."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> None:
        return None
