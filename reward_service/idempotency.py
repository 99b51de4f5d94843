"""At most one running or remembered call for each key, so that a retried request runs once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class KeyReusedError(ValueError):
    """The same key came with another request."""


@dataclass(slots=True, eq=False)
class _Call(Generic[Answer]):
    content: str
    task: asyncio.Task[Answer]
    finished_at: float | None = None


class OnceForEachKey(Generic[Answer]):
    """Answers of calls by key, those under way among them.

    A call goes on when the caller that began it goes away: the one that retries finds it. Answers
    are remembered for ``seconds`` and at most ``entries`` of them, the oldest forgotten first; a
    call that failed is not remembered, so a retry tries again.
    """

    def __init__(
        self, *, seconds: float, entries: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._entries = entries
        self._clock = clock
        self._calls: dict[str, _Call[Answer]] = {}

    async def call(self, key: str, content: str, start: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of the one call with this key.

        Args:
            key: Chosen by the caller.
            content: Hash of the request.
            start: Begins the call, if there is none.

        Raises:
            KeyReusedError: The key belongs to a request with another content.
            Whatever the call raises.
        """
        self._forget_old()
        found = self._calls.get(key)
        if found is None:
            found = _Call(content=content, task=asyncio.ensure_future(_awaited(start)))
            self._calls[key] = found
            found.task.add_done_callback(lambda task: self._finish(key, task))
        elif found.content != content:
            raise KeyReusedError(
                "the idempotency key belongs to a request with other content: use a new key for "
                "each request"
            )
        return await asyncio.shield(found.task)

    def _finish(self, key: str, task: asyncio.Task[Answer]) -> None:
        call = self._calls.get(key)
        if call is None or call.task is not task:
            return
        if task.cancelled() or task.exception() is not None:
            del self._calls[key]
        else:
            call.finished_at = self._clock()

    def _forget_old(self) -> None:
        oldest = self._clock() - self._seconds
        surplus = len(self._calls) - self._entries + 1
        old: list[str] = []
        for key, call in self._calls.items():  # in the order in which they came
            if call.finished_at is None:
                continue
            if len(old) >= surplus and call.finished_at >= oldest:
                break
            old.append(key)
        for key in old:
            del self._calls[key]


async def _awaited(start: Callable[[], Awaitable[Answer]]) -> Answer:
    return await start()
