"""Batching by token budget: the pure rule, and the asyncio queue that a replica applies it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


def batches_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length.

    A batch's padded size (count x longest) stays within ``token_budget``; a sequence beyond the
    budget gets a batch of its own. Longest first, so that memory peaks at once and not late.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches


@dataclass(slots=True, eq=False)
class _Waiting:
    sequence: Any
    since: float
    done: asyncio.Future[Any] = field(repr=False)


class TokenBudgetBatcher(Generic[Item, Result]):
    """Collects sequences from many callers and scores them in batches of similar length.

    A sequence is anything with a length in tokens.

    Consumes what ``submit`` queues and wakes its callers. One task runs while there is work. The
    oldest sequence is in every batch, so a long one never starves behind short ones; the rest of
    the batch are those nearest to it in length. ``forward`` runs in a thread, one batch at a
    time, so the event loop stays free to take requests.
    """

    def __init__(
        self,
        forward: Callable[[list[Item]], list[Result]],
        *,
        token_budget: int,
        wait_s: float,
    ) -> None:
        self._forward = forward
        self._token_budget = token_budget
        self._wait_s = wait_s
        self._queue: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, sequences: Sequence[Item]) -> list[Result]:
        """Results of the sequences, in order. Raises what ``forward`` raised for their batch."""
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        waiting = [_Waiting(s, now, loop.create_future()) for s in sequences]
        self._queue += waiting
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return list(await asyncio.gather(*(w.done for w in waiting)))

    async def _run(self) -> None:
        while self._queue:
            await self._fill()
            batch = self._take()
            if not batch:
                continue
            try:
                scores = await asyncio.to_thread(self._forward, [w.sequence for w in batch])
            except Exception as error:  # handed to every caller of this batch
                for waiting in batch:
                    if not waiting.done.done():
                        waiting.done.set_exception(error)
                continue
            for waiting, score in zip(batch, scores, strict=True):
                if not waiting.done.done():
                    waiting.done.set_result(score)

    async def _fill(self) -> None:
        """Wait until the budget is met or the oldest sequence has waited ``wait_s``."""
        deadline = self._queue[0].since + self._wait_s
        while sum(len(w.sequence) for w in self._queue) < self._token_budget:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """Remove the next batch from the queue; callers that gave up are dropped."""
        self._queue = [w for w in self._queue if not w.done.done()]
        if not self._queue:
            return []
        oldest, *others = self._queue
        others.sort(key=lambda w: abs(len(w.sequence) - len(oldest.sequence)))
        batch, longest = [oldest], len(oldest.sequence)
        for waiting in others:
            widest = max(longest, len(waiting.sequence))
            if widest * (len(batch) + 1) <= self._token_budget:
                batch.append(waiting)
                longest = widest
        taken = set(map(id, batch))
        self._queue = [w for w in self._queue if id(w) not in taken]
        return batch
