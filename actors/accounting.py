"""Exact accounting of samples: queued, in flight on some actor, retried, yielded once.

One thread of the driver runs :meth:`Generation.run`. It consumes what the actors stream, and
feeds them: every turn it restarts dead actors, keeps each healthy actor's batch full, waits for
an outcome, and yields what it can. A sample whose actor is lost goes back to the front of the
queue with its seed, so that whoever samples it next gets the same tokens; what the lost actor
might still have sent is never read. A sample that an actor which lives on could not generate rests
for a while first, twice as long each time.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.config import RolloutConfig, SamplingConfig
from actors.fleet import Fleet
from actors.generation import Completion, SampleRequest
from actors.processes import brief
from actors.rollout_actor import Outcome, Refused
from actors.trajectory import Prompt, SampleFailure, Trajectory, sample_seed
from actors.worker import State, Worker

Progress = Callable[[int, int], None]
Record = Trajectory | SampleFailure
Busy = Callable[[str, float, float], None]
"""An actor's name and when it was first given samples and last gave one back, in monotonic
seconds."""


@dataclass(eq=False)
class _Sample:
    """One sample that was asked for, until it is yielded."""

    prompt: Prompt
    index: int
    seed: int
    failures: int = 0


@dataclass(eq=False)
class _Stream:
    """Samples that one worker is working on, by request id, and how they come back."""

    worker: Worker
    samples: dict[str, _Sample]
    results: Any
    heard: float = field(default_factory=time.monotonic)


def require_version(completion: Completion, version: int) -> None:
    """Nothing stale is trained on: every token must be of the version that the pool serves.

    Raises:
        ValueError: a token is of another version.
    """
    stale = np.flatnonzero(completion.versions != version)
    if len(stale):
        raise ValueError(
            f"token {stale[0]} of the response was sampled with weight version"
            f" {completion.versions[stale[0]]}, the pool serves version {version}"
            f" ({len(stale)} of {len(completion.versions)} tokens are of another version)"
        )


class Generation:
    """Everything that one call of ``RolloutPool.generate`` asked for."""

    # Request ids must differ from those of an earlier call that was closed early.
    _request_numbers = itertools.count()

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        run_seed: int,
        round_index: int,
        fleet: Fleet,
        config: RolloutConfig,
    ) -> None:
        self._sampling = sampling
        self._fleet = fleet
        self._config = config
        self._queue = deque(
            _Sample(prompt, i, sample_seed(run_seed, prompt.prompt_id, i, round_index))
            for prompt in prompts
            for i in range(sampling.samples_per_prompt)
        )
        self._resting: list[tuple[float, _Sample]] = []  # (when to try again, monotonic)
        self._streams: list[_Stream] = []
        self._total = len(self._queue)
        self._worked: dict[str, tuple[float, float]] = {}
        self.again = 0
        """Samples that were in flight on an actor when it was lost."""

    def run(
        self, progress: Progress | None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Record]:
        """Yield one record for each sample; whatever ends it early leaves the engines idle."""
        done = 0
        try:
            while (self._queue or self._streams or self._resting) and not stop():
                for record in self._turn():
                    done += 1
                    if progress is not None:
                        progress(done, self._total)
                    yield record
        finally:
            self._abort()

    def tell(self, busy: Busy) -> None:
        """Say when each actor worked."""
        for name, (began, ended) in self._worked.items():
            busy(name, began, ended)

    def _turn(self) -> Iterator[Record]:
        self._fleet.check()
        for worker in {s.worker for s in self._streams if s.worker.state is State.DEAD}:
            yield from self._recover(worker)
        self._fleet.respawn()
        pause = self._wake()
        self._dispatch()
        if not self._streams:
            self._fleet.require_hope()
        ready = self._fleet.wait([stream.results for stream in self._streams], pause)
        if not self._streams and not self._queue:
            time.sleep(pause)
        for stream in [s for s in self._streams if s.results in ready]:
            if stream.worker.state is not State.DEAD:
                yield from self._read(stream)
        self._fleet.listen(self._busy())
        for worker in self._busy():
            self._end_if_stuck(worker)

    def _busy(self) -> list[Worker]:
        """Workers that have samples and are not lost."""
        busy = dict.fromkeys(stream.worker for stream in self._streams)
        return [worker for worker in busy if worker.state is not State.DEAD]

    def _wake(self) -> float:
        """Queue the samples that have rested; returns how long to wait for the next, in s."""
        now = time.monotonic()
        self._queue.extendleft(sample for due, sample in self._resting if due <= now)
        self._resting = [(due, sample) for due, sample in self._resting if due > now]
        return min([1.0, *(due - now for due, _ in self._resting)])

    def _dispatch(self) -> None:
        """Keep every healthy worker's batch full, and no worker's backlog long."""
        serving = self._fleet.of_state(State.HEALTHY)
        width = self._config.engine.max_num_seqs
        spare = max(1, width // 4)  # waiting in the engine, so that its batch never runs short
        for worker in serving:
            in_flight = sum(len(s.samples) for s in self._streams if s.worker is worker)
            room = width + spare - in_flight
            if self._config.most_actors == 1:
                # Nobody to share with: everything at once, so that what is decoded side by side
                # does not depend on time. With several threads an engine's last bits depend on it.
                room = len(self._queue)
            elif in_flight and room < spare:
                continue
            # At first an even share each, so that workers finish together.
            share = len(self._queue) if in_flight else -(-len(self._queue) // len(serving))
            batch = [self._queue.popleft() for _ in range(min(room, share))]
            if batch:
                self._streams.append(self._submit(worker, batch))

    def _submit(self, worker: Worker, batch: list[_Sample]) -> _Stream:
        samples = {
            f"{s.prompt.prompt_id}#{s.index}@{next(self._request_numbers)}": s for s in batch
        }
        requests = [
            SampleRequest(
                request_id=request_id,
                token_ids=sample.prompt.token_ids,
                max_new_tokens=self._sampling.max_new_tokens,
                temperature=self._sampling.temperature,
                seed=sample.seed,
            )
            for request_id, sample in samples.items()
        ]
        now = time.monotonic()
        self._worked.setdefault(worker.name, (now, now))
        self._fleet.heard(worker)
        results = worker.handle.generate.options(num_returns="streaming").remote(requests)
        return _Stream(worker, samples, results)

    def _read(self, stream: _Stream) -> Iterator[Record]:
        """Take what a stream has ready."""
        worker = stream.worker
        try:
            # What is ready may have to be fetched, and its node may be out of reach by now.
            outcomes: list[Outcome] = ray.get(
                next(stream.results), timeout=self._config.heartbeat_timeout_s
            )
        except StopIteration:
            self._streams.remove(stream)
            assert not stream.samples, "an actor ended a stream before its samples"
            return
        except RayError as error:
            reason = f"{worker.name} died while generating: {brief(error)}"
            self._fleet.lose(worker, reason, error)
            return
        stream.heard = time.monotonic()
        self._worked[worker.name] = self._worked[worker.name][0], stream.heard
        self._fleet.heard(worker)
        for outcome in outcomes:
            if isinstance(outcome, Refused) and outcome.engine_lost:
                self._lose(worker, outcome.reason)  # with all that it has in flight
                continue
            sample = stream.samples.pop(outcome.request_id)
            if isinstance(outcome, Refused):
                yield from self._retry(sample, outcome.reason, rest=True)
            else:
                yield from self._finish(sample, outcome, worker)

    def _lose(self, worker: Worker, reason: str) -> None:
        if worker.state is not State.DEAD:
            self._fleet.lose(worker, reason)

    def _finish(self, sample: _Sample, completion: Completion, worker: Worker) -> Iterator[Record]:
        try:
            require_version(completion, self._fleet.version)
        except ValueError as error:
            # It has other weights than it confirmed: it starts anew, with the current ones.
            self._lose(worker, f"{worker.name}: {error}")
            yield from self._retry(sample, str(error), rest=False)
            return
        try:
            trajectory = Trajectory(
                prompt=sample.prompt,
                sample_index=sample.index,
                response_ids=completion.token_ids,
                response_logprobs=completion.logprobs,
                policy_versions=completion.versions,
                response_text=completion.text,
                finish_reason=completion.finish_reason,
                seed=sample.seed,
            )
        except ValueError as error:
            yield from self._retry(sample, str(error), rest=True)
        else:
            yield trajectory

    def _retry(self, sample: _Sample, reason: str, *, rest: bool) -> Iterator[SampleFailure]:
        """Queue a sample again, at once or after a rest, or give it up."""
        sample.failures += 1
        if sample.failures <= self._config.max_retries:
            if rest:
                pause = self._config.retry_pause_s * 2 ** (sample.failures - 1)
                self._resting.append((time.monotonic() + pause, sample))
            else:
                self._queue.appendleft(sample)
            return
        yield SampleFailure(
            prompt=sample.prompt,
            sample_index=sample.index,
            stage="generation",
            reason=f"failed {sample.failures} times, last: {reason}",
            attempts=sample.failures,
        )

    def _recover(self, worker: Worker) -> Iterator[SampleFailure]:
        """Queue again what a lost worker had in flight.

        Engines begin requests in the order in which they come, so only the first
        ``max_num_seqs`` can have been running; what merely waited behind them is not charged
        with the loss. Nothing is when the worker was lost with its node.
        """
        streams = [s for s in self._streams if s.worker is worker]
        self._streams = [s for s in self._streams if s.worker is not worker]
        unfinished = [sample for stream in streams for sample in stream.samples.values()]
        self.again += len(unfinished)
        running = 0 if worker.blameless else self._config.engine.max_num_seqs
        self._queue.extendleft(reversed(unfinished[running:]))
        for sample in reversed(unfinished[:running]):  # each goes to the front
            yield from self._retry(sample, worker.reason, rest=False)

    def _end_if_stuck(self, worker: Worker) -> None:
        """Lose a worker that lives but has finished no sample for too long."""
        streams = [stream for stream in self._streams if stream.worker is worker]
        limit = self._config.sample_timeout_s
        if time.monotonic() - max(stream.heard for stream in streams) > limit:
            in_flight = sum(len(stream.samples) for stream in streams)
            self._fleet.lose(
                worker,
                f"{worker.name} finished no sample for {limit:g} s, with {in_flight} in flight"
                " (rollout.sample_timeout_s)",
            )

    def _abort(self) -> None:
        """Have the actors forget what is in flight."""
        busy = {s.worker.name: s.worker for s in self._streams}
        calls = [w.handle.abort.remote() for w in busy.values() if w.handle is not None]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=self._config.heartbeat_timeout_s)
