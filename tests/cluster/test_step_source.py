"""Samples of the next step while this one is learned: who waits for whom, and what ends it.

Pool, reward and learners are stand-ins here; ``tests/test_train_loop.py`` has the real ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.config import SamplingConfig
from actors.prompts import PromptStream
from actors.trajectory import Prompt, Trajectory
from cluster.step import Step
from cluster.step_source import StepSource
from learner.batch import ScoreScale
from learner.config import PPOConfig
from learner.group import LearnersLost
from reward_service.score import Score

PROMPTS = [
    Prompt(prompt_id=f"p{i}", token_ids=np.array([3], np.int32), text="x") for i in range(80)
]


class Pool:
    """Calls ``before`` for every sample."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.rounds: list[int] = []
        self.generating = False

    def generate(
        self, prompts: Sequence[Prompt], *_: Any, round_index: int, busy: Any, **__: Any
    ) -> Iterator[Trajectory]:
        self.rounds.append(round_index)
        began = time.monotonic()
        self.generating = True
        try:
            for prompt in prompts:
                self.before()
                yield Trajectory(
                    prompt=prompt,
                    sample_index=0,
                    response_ids=np.array([5], np.int32),
                    response_logprobs=np.zeros(1, np.float32),
                    policy_versions=np.zeros(1, np.int32),
                    response_text="",
                    finish_reason="stop",
                    seed=0,
                )
        finally:
            self.generating = False
        busy("rollout-0", began, time.monotonic())


class Ones:
    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None

    def score(self, trajectories: Sequence[Trajectory]) -> list[Any]:
        self.before()
        return [Score(sample_id=t.sample_id, value=1.0) for t in trajectories]


class Parts:
    def __init__(self, max_staleness: int, prompts_per_step: int = 4) -> None:
        self.pool, self.reward = Pool(), Ones()
        self.lost = self.stopped = False
        self.memory = SimpleNamespace(scale=None, ahead=None)
        self.source = StepSource(
            PPOConfig(steps=3, prompts_per_step=prompts_per_step, max_staleness=max_staleness),
            SamplingConfig(),
            prompts=PromptStream(PROMPTS, prompts_per_step, seed=0),
            rollouts=self.pool,  # type: ignore[arg-type]
            reward=self.reward,
            learners=SimpleNamespace(have_lost=lambda: self.lost),  # type: ignore[arg-type]
            memory=self.memory,
            seed=0,
            measure=lambda _: {},
            stop=lambda: self.stopped,
        )

    def first(self) -> Step:
        step = self.source.take(0)
        assert self.source.fill(step, 0)
        return step


@pytest.fixture
def parts() -> Iterator[Parts]:
    parts = Parts(max_staleness=1)
    with parts.source:
        yield parts
    assert not [t for t in threading.enumerate() if t.name.startswith(("ahead", "scoring"))]


def test_a_step_made_ahead_is_taken_as_it_is(parts: Parts) -> None:
    step = parts.first()
    assert parts.memory.scale == ScoreScale()
    learning = threading.Event()
    parts.pool.before = lambda: assert_(learning.wait(10))  # it is made during the block
    with parts.source.next_meanwhile(step, 1):
        learning.set()
    assert parts.pool.rounds == [0, 1]
    ahead = parts.memory.ahead
    ahead.check_accounts(1.0)
    lanes = [(span.lane, span.what) for span in step.clock.spans]
    assert lanes.count(("rollout-0", "generate")) == 2  # told in the step in which it happened
    assert parts.source.take(1) is ahead
    assert ahead.clock.spans == []
    assert parts.source.fill(ahead, 1)
    assert parts.memory.ahead is None
    assert parts.pool.rounds == [0, 1], "nothing was generated again"
    with parts.source.next_meanwhile(ahead, 3):  # there is no step 3
        pass
    assert parts.memory.ahead is None
    assert parts.pool.rounds == [0, 1]


def test_nothing_is_made_ahead_unless_samples_may_be_stale() -> None:
    parts = Parts(max_staleness=0)
    with parts.source:
        with parts.source.next_meanwhile(parts.first(), 1):
            pass
        assert parts.memory.ahead is None
        assert parts.pool.rounds == [0]


def assert_(fact: bool) -> None:
    assert fact


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [RuntimeError("an actor keeps dying"), TimeoutError("late")])
def test_what_goes_wrong_ahead_is_raised_where_its_step_would_begin(
    parts: Parts, error: Exception
) -> None:
    """The step that is learned meanwhile is finished first."""
    step = parts.first()
    parts.pool.before = lambda: fail(error)
    with parts.source.next_meanwhile(step, 1):
        time.sleep(0.1)
    assert parts.memory.ahead is None
    step = parts.source.take(1)
    with pytest.raises(type(error), match=str(error)):
        parts.source.fill(step, 1)
    parts.stopped = True
    assert not parts.source.fill(step, 1)


def test_a_reward_that_fails_ahead_leaves_a_pool_that_can_be_loaded() -> None:
    """The weights of the step that is learned meanwhile are loaded into it after the block."""
    parts = Parts(max_staleness=1, prompts_per_step=80)  # several batches of the reward
    with parts.source:
        step = parts.first()
        parts.reward.before = lambda: fail(ValueError("HTTP 401"))
        parts.pool.before = lambda: time.sleep(0.01)  # samples are under way when it fails
        with parts.source.next_meanwhile(step, 1):
            pass
        assert not parts.pool.generating
        with pytest.raises(ValueError, match="HTTP 401"):
            parts.source.fill(parts.source.take(1), 1)


def test_what_goes_wrong_in_the_block_ends_what_is_made_ahead(parts: Parts) -> None:
    step = parts.first()
    made: list[int] = []
    parts.pool.before = lambda: (made.append(1), time.sleep(0.2))[1]
    with (
        pytest.raises(ZeroDivisionError),
        parts.source.next_meanwhile(step, 1),
    ):
        raise ZeroDivisionError
    parts.source.__exit__()
    assert len(made) < 4
    assert parts.memory.ahead is None


def test_learners_that_are_lost_end_the_wait_and_a_request_to_stop_does_not(parts: Parts) -> None:
    step = parts.first()
    parts.stopped = True
    with parts.source.next_meanwhile(step, 1):
        pass
    ahead = parts.source.take(1)
    assert not parts.source.fill(ahead, 1), "but no step is begun"
    assert parts.memory.ahead is ahead, "it is there for the checkpoint"
    parts.stopped = False
    assert parts.source.fill(ahead, 1)
    assert parts.memory.ahead is None
    parts.lost = True
    parts.pool.before = lambda: time.sleep(0.3)
    began = time.monotonic()
    with (
        pytest.raises(LearnersLost, match="while samples were generated"),
        parts.source.next_meanwhile(ahead, 2),
    ):
        pass
    assert time.monotonic() - began < 10


def test_learners_that_are_lost_end_the_generation_of_a_step(parts: Parts) -> None:
    parts.lost = True
    with pytest.raises(LearnersLost):
        parts.source.fill(parts.source.take(0), 0)
