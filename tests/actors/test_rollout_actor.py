"""The engine's thread, around an engine of a few lines: no vLLM and no Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from actors.generation import Completion, EngineLost, SampleRequest
from actors.rollout_actor import EngineThread, Outcome, Refused

STEPS = 3


class CountingEngine:
    """Finishes every request in its third step; breaks when a prompt begins with 13."""

    context_length, vocab_size, version = 100, 100, 0

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.broken = False
        self.threads: set[int] = set()
        self.may_step = threading.Event()
        self.may_step.set()

    @property
    def busy(self) -> bool:
        return bool(self.left)

    def add(self, request: SampleRequest) -> None:
        if request.token_ids[0] == 99:
            raise ValueError("99 is not a token")
        self.broken |= request.token_ids[0] == 13
        self.left[request.request_id] = STEPS

    def step(self) -> list[Completion]:
        self.threads.add(threading.get_ident())
        self.may_step.wait(5)
        if self.broken:
            raise EngineLost("unlucky")
        self.left = {name: n - 1 for name, n in self.left.items()}
        done = [name for name, n in self.left.items() if n == 0]
        self.left = {name: n for name, n in self.left.items() if n}
        return [
            Completion(
                request_id=name,
                token_ids=np.array([1], np.int32),
                logprobs=np.zeros(1, np.float32),
                finish_reason="stop",
                versions=np.zeros(1, np.int32),
            )
            for name in done
        ]

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self.left.pop(name, None)

    def shutdown(self) -> None:
        pass


class Running:
    def __init__(self) -> None:
        self.engine = CountingEngine()
        self.thread = EngineThread(lambda: self.engine)  # type: ignore[arg-type, return-value]
        self.thread.start().result(5)
        self.outcomes: list[Outcome] = []
        self.arrived = threading.Semaphore(0)

    def submit(self, **prompts: list[int]) -> Any:
        def deliver(outcome: Outcome) -> None:
            self.outcomes.append(outcome)
            self.arrived.release()

        requests = [
            SampleRequest(
                request_id=name,
                token_ids=np.array(ids, np.int32),
                max_new_tokens=1,
                temperature=1.0,
                seed=0,
            )
            for name, ids in prompts.items()
        ]
        return self.thread.submit(requests, deliver)

    def wait(self, count: int) -> dict[str, Outcome]:
        for _ in range(count):
            assert self.arrived.acquire(timeout=5)
        return {outcome.request_id: outcome for outcome in self.outcomes}


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.may_step.set()


def test_each_request_has_one_outcome_and_one_thread_steps(running: Running) -> None:
    running.submit(a=[1], b=[2])
    running.submit(c=[3], d=[99])
    outcomes = running.wait(4)
    assert sorted(outcomes) == ["a", "b", "c", "d"]
    assert isinstance(outcomes["a"], Completion)
    assert outcomes["d"] == Refused(request_id="d", reason="99 is not a token")
    assert len(running.outcomes) == 4
    assert running.engine.threads == {running.thread._thread.ident}


def test_commands_run_between_steps_and_return_their_result_or_error(running: Running) -> None:
    assert running.thread.call(lambda engine: engine.vocab_size).result(5) == 100
    with pytest.raises(ZeroDivisionError):
        running.thread.call(lambda engine: 1 // 0).result(5)
    running.submit(a=[1])
    assert "a" in running.wait(1)


def test_aborting_ends_what_is_in_flight_with_an_outcome(running: Running) -> None:
    running.engine.may_step.clear()
    running.submit(a=[1], b=[2])
    aborted = running.thread.abort()
    running.engine.may_step.set()
    aborted.result(5)
    outcomes = running.wait(2)
    assert outcomes["a"] == Refused(request_id="a", reason="aborted")
    assert not running.engine.busy


def test_a_broken_engine_answers_everything_and_everyone(running: Running) -> None:
    running.submit(a=[1], unlucky=[13])
    outcomes = running.wait(2)
    assert outcomes["a"] == Refused(request_id="a", reason="unlucky", engine_lost=True)
    running.thread._thread.join(5)
    for later in (running.submit(b=[1]), running.thread.call(lambda engine: engine.version)):
        with pytest.raises(EngineLost, match="unlucky"):
            later.result(5)


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def fail() -> Any:
        raise FileNotFoundError("no weights")

    with pytest.raises(FileNotFoundError, match="no weights"):
        EngineThread(fail).start().result(5)
