"""The token budget, and the queue that keeps it across callers."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.batcher import TokenBudgetBatcher, batches_by_length


def test_batches_by_hand() -> None:
    # longest first: 9 | 5 5 (10 <= 12) | 4 3 3 (12 <= 12) | 1
    assert batches_by_length([3, 9, 5, 1, 4, 5, 3], 12) == [[1], [2, 5], [4, 0, 6], [3]]
    assert batches_by_length([100, 1], 12) == [[0], [1]]
    assert batches_by_length([2, 1], 0) == [[0], [1]]
    assert batches_by_length([], 12) == []


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_every_index_once_and_the_budget_kept(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


class Recorder:
    """Stands for the model: the score of a sequence is the sum of its ids."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[list[int]]] = []
        self.seconds = seconds

    def __call__(self, sequences: list[list[int]]) -> list[float]:
        self.batches.append(sequences)
        time.sleep(self.seconds)
        if [13] in sequences:
            raise RuntimeError("no luck")
        return [float(sum(s)) for s in sequences]


def test_callers_share_batches_and_each_gets_its_own() -> None:
    recorder = Recorder()

    async def calls() -> list[list[float]]:
        batcher = TokenBudgetBatcher(recorder, token_budget=1000, wait_s=0.05)
        return await asyncio.gather(*(batcher.submit([[n], [n, n]]) for n in range(12)))

    assert asyncio.run(calls()) == [[float(n), 2.0 * n] for n in range(12)]
    assert len(recorder.batches) == 1


def test_a_long_sequence_does_not_starve() -> None:
    recorder = Recorder(seconds=0.01)

    async def calls() -> list[int]:
        batcher = TokenBudgetBatcher(recorder, token_budget=20, wait_s=0.0)
        finished: list[int] = []

        async def one(sequence: list[int]) -> None:
            await batcher.submit([sequence])
            finished.append(len(sequence))

        first = [asyncio.create_task(one([1, 2])) for _ in range(30)]
        await asyncio.sleep(0)
        long = asyncio.create_task(one([1] * 50))  # more than the budget
        await asyncio.sleep(0)
        later = [asyncio.create_task(one([1, 2])) for _ in range(200)]
        await asyncio.gather(*first, long, *later)
        return finished

    finished = asyncio.run(calls())
    assert finished.index(50) <= 40
    assert max(len(b) * max(map(len, b)) for b in recorder.batches if len(b) > 1) <= 20


def test_an_error_reaches_its_callers_and_the_queue_goes_on() -> None:
    async def calls() -> list[float]:
        batcher = TokenBudgetBatcher(Recorder(), token_budget=100, wait_s=0.0)
        with pytest.raises(RuntimeError, match="no luck"):
            await batcher.submit([[13]])
        return await batcher.submit([[1], [2]])

    assert asyncio.run(calls()) == [1.0, 2.0]


def test_a_caller_that_gave_up_is_not_scored() -> None:
    recorder = Recorder(seconds=0.05)

    async def calls() -> None:
        batcher = TokenBudgetBatcher(recorder, token_budget=4, wait_s=0.0)
        running = asyncio.create_task(batcher.submit([[1, 1, 1, 1]]))
        await asyncio.sleep(0.01)
        given_up = asyncio.create_task(batcher.submit([[7, 7, 7, 7]]))
        await asyncio.sleep(0.01)
        given_up.cancel()
        await running
        assert await batcher.submit([[2]]) == [2.0]

    asyncio.run(calls())
    assert [7, 7, 7, 7] not in [s for batch in recorder.batches for s in batch]
