"""A key's call runs once, whoever asks again and whenever."""

from __future__ import annotations

import asyncio

import pytest

from reward_service.idempotency import KeyReusedError, OnceForEachKey


class Counted:
    """A call that waits for ``go`` and says how often it has been started."""

    def __init__(self) -> None:
        self.started = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.started += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return self.started


def test_callers_of_one_key_share_one_call_even_when_the_first_goes_away() -> None:
    async def run() -> None:
        once: OnceForEachKey[int] = OnceForEachKey(seconds=60, entries=10)
        call = Counted()
        first = asyncio.create_task(once.call("k", "body", call))
        await asyncio.sleep(0)
        first.cancel()
        again = [asyncio.create_task(once.call("k", "body", call)) for _ in range(5)]
        await asyncio.sleep(0)
        call.go.set()
        assert await asyncio.gather(*again) == [1] * 5
        assert await once.call("k", "body", call) == 1  # later, too
        assert await once.call("another", "body", call) == 2
        with pytest.raises(KeyReusedError, match="other content"):
            await once.call("k", "other body", call)

    asyncio.run(run())


def test_a_failure_is_not_remembered() -> None:
    async def run() -> None:
        once: OnceForEachKey[int] = OnceForEachKey(seconds=60, entries=10)
        call = Counted()
        call.go.set()
        call.error = RuntimeError("lost")
        with pytest.raises(RuntimeError, match="lost"):
            await once.call("k", "body", call)
        call.error = None
        assert await once.call("k", "body", call) == 2

    asyncio.run(run())


def test_answers_are_forgotten_by_age_and_by_number() -> None:
    async def run() -> None:
        now = 0.0
        once: OnceForEachKey[int] = OnceForEachKey(seconds=60, entries=2, clock=lambda: now)
        call = Counted()
        call.go.set()
        assert [await once.call(k, "b", call) for k in "abc"] == [1, 2, 3]
        assert await once.call("c", "b", call) == 3
        assert await once.call("a", "b", call) == 4  # the oldest made room
        now = 61.0
        assert await once.call("c", "b", call) == 5

    asyncio.run(run())


def test_a_call_under_way_is_never_forgotten() -> None:
    async def run() -> None:
        once: OnceForEachKey[int] = OnceForEachKey(seconds=0, entries=1)
        slow, quick = Counted(), Counted()
        quick.go.set()
        first = asyncio.create_task(once.call("slow", "b", slow))
        await asyncio.sleep(0)
        for key in "abc":
            await once.call(key, "b", quick)
        again = asyncio.create_task(once.call("slow", "b", slow))
        await asyncio.sleep(0)
        slow.go.set()
        assert [await first, await again] == [1, 1]

    asyncio.run(run())
