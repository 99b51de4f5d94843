"""Generation while workers die, hang and leave: Ray and the clock are of paper, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayError

import actors.accounting
import actors.fleet
from actors.accounting import Generation
from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.fleet import Fleet
from actors.generation import Completion, SampleRequest
from actors.nodes import Node
from actors.trajectory import Trajectory
from actors.worker import Event, State, Worker
from tests.actors.stand_in import RUN_SEED, prompts, response_of, wrong_samples

LIMIT_S = 30.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Answer:
    """What a call to a process gives: a value or an error, now or never."""

    def __init__(self, process: Process, value: Any = None) -> None:
        self._process, self._value = process, value

    @property
    def ready(self) -> bool:
        return not self._process.hangs

    def get(self) -> Any:
        if self._process.dead:
            raise self._process.dead
        return self._value


class Stream:
    """One sample each time that somebody looks, in the order in which they were asked for."""

    def __init__(self, process: Process, requests: Sequence[SampleRequest]) -> None:
        self._process, self._left = process, list(requests)

    @property
    def ready(self) -> bool:
        return not self._process.hangs

    def __next__(self) -> Answer:
        if not self._left and not self._process.dead:
            raise StopIteration
        request = self._left.pop(0)
        ids = response_of(request.seed, 0)
        completion = Completion(
            request_id=request.request_id,
            token_ids=np.array(ids, np.int32),
            logprobs=np.full(len(ids), -1.0, np.float32),
            finish_reason="stop",
            versions=np.zeros(len(ids), np.int32),
            text=self._process.name,
        )
        return Answer(self._process, [completion])


class Process:
    """The process of a worker, and the handle of its actor."""

    def __init__(self, name: str) -> None:
        self.name, self.dead, self.hangs = name, cast(RayError | None, None), False
        self.generate = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda requests: Stream(self, requests))
        )
        self.ping = SimpleNamespace(remote=lambda: Answer(self))
        self.abort = SimpleNamespace(remote=lambda: Answer(self))


class Pool(Fleet):
    """Workers start at once, on a node of their own name."""

    def __init__(self, clock: Clock, **config: Any) -> None:
        self.clock, self.drained, self.seen = clock, set[str](), list[tuple[float, str, State]]()
        self.processes: list[Process] = []
        options = {"num_actors": 2, "heartbeat_timeout_s": LIMIT_S, "max_retries": 0} | config
        self.options = RolloutConfig(engine=EngineConfig(max_num_seqs=4), **options)
        super().__init__(Path("model"), self.options, name="w", look=self._paper_nodes)

    def _paper_nodes(self) -> dict[str, Node]:
        names = [process.name for process in self.processes]
        return {name: Node(total={}, free={}, draining=name in self.drained) for name in names}

    def _spawn(self, worker: Worker) -> None:
        process = Process(f"{worker.name}.{len(self.processes)}")
        self.processes.append(process)
        worker.handle, worker.info = process, cast(Any, SimpleNamespace(node_id=process.name))
        worker.on(Event.SPAWNED)
        worker.on(Event.BUILT)
        self._confirmed(worker)

    def run(self, count: int, events: dict[int, Any]) -> list[Any]:
        """Generate; ``events`` by the number of samples that there are."""
        self.bring_up()
        generation = Generation(
            prompts(count, 0),
            SamplingConfig(max_new_tokens=8),
            run_seed=RUN_SEED,
            round_index=0,
            fleet=self,
            config=self.options,
        )
        records = []
        for record in generation.run(None):
            records.append(record)
            if event := events.pop(len(records), None):
                event()
        assert wrong_samples(records, prompts(count, 0), 0) == []
        self.again = generation.again
        return records


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()

    def wait(refs: list[Any], *, timeout: float, **_: Any) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref.ready]
        if not ready:
            clock.sleep(timeout)
        return ready, [ref for ref in refs if not ref.ready]

    def end(workers: Sequence[Worker], timeout_s: float) -> None:
        for worker in workers:
            worker.handle = worker.info = None

    paper = SimpleNamespace(wait=wait, get=lambda ref, timeout=None: ref.get())
    for module in (actors.fleet, actors.accounting):
        monkeypatch.setattr(module, "ray", paper)
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(actors.fleet, "end", end)
    return clock


def by(records: list[Any]) -> set[str]:
    return {record.response_text for record in records if isinstance(record, Trajectory)}


def test_nothing_happens(clock: Clock) -> None:
    pool = Pool(clock)
    assert by(pool.run(40, {})) == {"w-0.0", "w-1.1"}
    assert (pool.losses, pool.again) == (0, 0)


def test_a_process_dies(clock: Clock) -> None:
    """What it had in flight is sampled again, once, by others and by its successor."""
    pool = Pool(clock, max_retries=2)

    def die() -> None:
        pool.processes[0].dead = ActorDiedError()

    assert by(pool.run(40, {5: die})) == {"w-0.0", "w-1.1", "w-0.2"}
    assert pool.losses == 1
    assert 0 < pool.again <= 5  # a batch and a quarter


def test_a_process_hangs(clock: Clock) -> None:
    pool = Pool(clock, max_retries=2)
    hung = pool.workers[0]
    states: list[tuple[float, State]] = []
    record, judge = hung.on, pool.clock.monotonic

    def on(event: Event) -> None:
        record(event)
        states.append((judge(), hung.state))

    hung.on = on  # type: ignore[method-assign]
    began: list[float] = []

    def hang() -> None:
        began.append(clock.now)
        pool.processes[0].hangs = True

    assert by(pool.run(40, {5: hang})) == {"w-0.0", "w-1.1", "w-0.2"}
    assert (pool.losses, hung.state) == (1, State.HEALTHY)
    after = [(at - began[0], state) for at, state in states if at > began[0]]
    suspected = next(at for at, state in after if state is State.SUSPECT)
    lost = next(at for at, state in after if state is State.DEAD)
    assert LIMIT_S / 3 < suspected < LIMIT_S / 3 + 5
    assert LIMIT_S < lost < LIMIT_S + 5


def test_a_suspect_that_answers_keeps_what_it_has(clock: Clock) -> None:
    pool = Pool(clock)
    process = pool.processes
    sleep = clock.sleep

    def wake_after_a_while(seconds: float) -> None:
        sleep(seconds)
        if pool.workers[0].state is State.SUSPECT:
            process[0].hangs = False

    clock.sleep = wake_after_a_while  # type: ignore[method-assign]

    def hang() -> None:
        process[0].hangs = True

    assert by(pool.run(40, {5: hang})) == {"w-0.0", "w-1.1"}
    assert (pool.losses, pool.again) == (0, 0)
    assert pool.workers[0].state is State.HEALTHY


def test_a_node_is_drained(clock: Clock) -> None:
    """Its samples go elsewhere at once, and are not charged: there are no retries here."""
    pool = Pool(clock)

    def drain() -> None:
        pool.drained.add("w-0.0")
        clock.sleep(actors.fleet.LOOK_EVERY_S)

    assert by(pool.run(40, {5: drain})) == {"w-0.0", "w-1.1", "w-0.2"}
    assert pool.losses == 1
    assert 0 < pool.again <= 5


def test_generation_goes_on_where_a_pause_had_left_a_suspect(clock: Clock) -> None:
    """A generation that was closed early leaves it so; the next one hears of it."""
    pool = Pool(clock, num_actors=1)
    pool.bring_up()
    pool.workers[0].on(Event.SILENT)
    assert by(pool.run(3, {})) == {"w-0.0"}
