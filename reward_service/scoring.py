"""Scoring while samples are still being generated, with a second and a third try.

One background thread calls the reward. A sample that it could not score rests for a while, twice
as long each time, and is scored again; after ``max_retries`` it is given up with its reason. A
reward that cannot be reached at all is tried again for ``unreachable_s``; then that is an error.
Nothing is ever made up for what could not be scored.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from actors.trajectory import SampleFailure, Trajectory
from reward_service.config import RetryConfig
from reward_service.rewards import Reward, Scored, score_all
from reward_service.score import RewardUnavailable, Score

logger = logging.getLogger(__name__)

Result = tuple[Trajectory, Score] | SampleFailure
Busy = Callable[[float, float], None]
"""Beginning and end of a piece of work, in monotonic seconds."""

LOOK_UP_S = 0.5
"""How often somebody who waits for a score looks whether the run is to stop."""


def score_stream(
    reward: Reward,
    samples: Iterable[Trajectory | SampleFailure],
    *,
    batch: int = 32,
    retry: RetryConfig | None = None,
    stop: Callable[[], bool] = lambda: False,
    busy: Busy | None = None,
) -> Generator[Result]:
    """Score samples while later ones are still being generated.

    Consumes ``samples`` in the caller's thread and hands trajectories, ``batch`` at a time, to one
    background thread that calls ``reward``. Yields each sample exactly once, in no particular
    order; failures of generation pass through. Nothing runs on after the iterator is closed.

    Args:
        stop: Looked at with every sample and while scores are awaited; when it is true the
            iterator ends early.
        busy: Told of every call of ``reward`` when it began and ended.

    Raises:
        RewardUnavailable: The reward could not be reached within ``retry.unreachable_s``.
        Whatever else ``samples`` or ``reward`` raise.
    """
    scorer = _BackgroundScorer(reward, retry or RetryConfig(), busy)
    try:
        yield from _through(scorer, samples, batch, stop)
    finally:
        scorer.stop()


def _through(
    scorer: _BackgroundScorer,
    samples: Iterable[Trajectory | SampleFailure],
    batch: int,
    stop: Callable[[], bool],
) -> Iterator[Result]:
    waiting: list[Trajectory] = []
    for sample in samples:
        if stop():
            return
        if isinstance(sample, SampleFailure):
            yield sample
            continue
        waiting.append(sample)
        if len(waiting) == batch:
            scorer.submit(waiting)
            waiting = []
        yield from scorer.finished()
    if waiting:
        scorer.submit(waiting)
    yield from scorer.drain(stop)


@dataclass(kw_only=True)
class _Batch:
    """Samples to score together.

    Attributes:
        tries: How often these samples have been tried already.
        due: When to try, in monotonic seconds.
    """

    samples: list[Trajectory]
    tries: int = 0
    due: float = 0.0


class _BackgroundScorer:
    """One thread that scores batches in the order in which they were submitted.

    ``submit`` wakes it; ``finished`` gives what it has done so far; ``drain`` waits for the rest.
    An exception of the reward surfaces in ``finished`` or ``drain``.
    """

    def __init__(self, reward: Reward, retry: RetryConfig, busy: Busy | None) -> None:
        self._reward = reward
        self._retry = retry
        self._busy = busy
        self._submitted: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._resting: list[_Batch] = []
        self._results: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._pending = 0  # samples
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, trajectories: list[Trajectory]) -> None:
        self._pending += len(trajectories)
        self._submitted.put(_Batch(samples=trajectories))

    def finished(self) -> Iterator[Result]:
        while self._pending and not self._results.empty():
            yield from self._next()

    def drain(self, stop: Callable[[], bool]) -> Iterator[Result]:
        while self._pending and not stop():
            with contextlib.suppress(queue.Empty):
                yield from self._next(timeout=LOOK_UP_S)

    def stop(self) -> None:
        """Drop what has not been started and wait for what has."""
        self._stopped.set()
        self._submitted.put(None)
        self._thread.join()

    def _next(self, timeout: float | None = None) -> list[Result]:
        results = self._results.get(timeout=timeout)
        if self._error is not None:
            raise self._error
        self._pending -= len(results)
        return results

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                began = time.monotonic()
                scored = self._score(batch.samples)
                if self._busy is not None:
                    self._busy(began, time.monotonic())
                self._results.put(self._settled(batch, scored))
        except BaseException as error:  # raised again in the caller's thread
            self._error = error
            self._results.put([])

    def _take(self) -> _Batch | None:
        """The next batch that is due; waits for one. ``None`` when stopped."""
        while not self._stopped.is_set():
            self._resting.sort(key=lambda batch: batch.due)
            pause = self._resting[0].due - time.monotonic() if self._resting else None
            if pause is not None and pause <= 0:
                return self._resting.pop(0)
            try:
                return self._submitted.get(timeout=pause)
            except queue.Empty:
                continue
        return None

    def _score(self, samples: list[Trajectory]) -> list[Scored]:
        """Call the reward; again, for a while, when it cannot be reached."""
        name = type(self._reward).__name__
        began = time.monotonic()
        tries = 0
        while True:
            try:
                return score_all(name, self._reward, samples)
            except (RewardUnavailable, TimeoutError) as error:
                tries += 1
                pause = self._retry.pause(tries)
                waited = time.monotonic() - began
                if waited + pause > self._retry.unreachable_s or self._stopped.is_set():
                    raise RewardUnavailable(
                        f"the reward was tried {tries} times in {waited:.0f} s without an answer "
                        f"(reward.retry.unreachable_s is {self._retry.unreachable_s:g}): {error}; "
                        "go on with --resume when it runs again"
                    ) from error
                logger.warning("scoring failed and is tried again in %.1f s: %s", pause, error)
                if self._stopped.wait(pause):
                    raise

    def _settled(self, batch: _Batch, results: Sequence[Scored]) -> list[Result]:
        """What is final; the rest of the batch rests before it is scored again."""
        tries = batch.tries + 1
        final: list[Result] = []
        again: list[Trajectory] = []
        for trajectory, result in zip(batch.samples, results, strict=True):
            if not isinstance(result, SampleFailure):
                final.append((trajectory, result))
            elif tries <= self._retry.max_retries:
                again.append(trajectory)
            else:
                reason = f"failed {tries} times, last: {result.reason}"
                final.append(replace(result, reason=reason, attempts=tries))
        if again:
            due = time.monotonic() + self._retry.pause(tries)
            self._resting.append(_Batch(samples=again, tries=tries, due=due))
        return final
