"""How the strict group judges answers, on plain actors that stand in for learners."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import learner.strict_group
from learner.strict_group import LearnerGroupFailed, LearnersLost, StrictLearnerGroup


@ray.remote(num_cpus=0)
class Stand:
    def answer(self, value: int, *, sleep_s: float = 0.0, error: Exception | None = None) -> int:
        time.sleep(sleep_s)
        if error is not None:
            raise error
        return value

    def process_id(self) -> int:
        return os.getpid()


@pytest.fixture
def build(ray_session: None) -> Iterator[Callable[[int], StrictLearnerGroup]]:
    groups: list[StrictLearnerGroup] = []

    def make(count: int) -> StrictLearnerGroup:
        group = StrictLearnerGroup.__new__(StrictLearnerGroup)
        group.config = SimpleNamespace(num_learners=count)
        group._workers = [Stand.remote() for _ in range(count)]
        group._is_shut_down = False
        ray.get([worker.answer.remote(0) for worker in group._workers])
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.abort()


def call(group: StrictLearnerGroup, *cases: dict[str, Any], **options: Any) -> list[Any]:
    arguments = [{"value": index, **case} for index, case in enumerate(cases)]
    return group.call("answer", arguments, options.pop("timeout_s", 20.0), **options)


def assert_dies(worker: Any, within_s: float = 30.0) -> None:
    """``ray.kill`` does not wait: a call that reaches the worker first is still answered."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            ray.get(worker.answer.remote(0))
        except ray.exceptions.RayActorError:
            return
        time.sleep(0.05)
    raise AssertionError(f"{worker} still answers {within_s:.0f} s after it was killed")


def test_results_come_in_the_order_of_the_learners(
    build: Callable[[int], StrictLearnerGroup],
) -> None:
    group = build(3)
    assert call(group, {"sleep_s": 0.3}, {}, {"sleep_s": 0.1}) == [0, 1, 2]
    assert call(group, {}) == [0]  # only the first learner is asked


def test_a_silent_learner_is_named_at_the_deadline(
    build: Callable[[int], StrictLearnerGroup],
) -> None:
    group = build(2)
    with pytest.raises(LearnerGroupFailed, match=r"learners \[1\] of 2 .* within 1 s"):
        call(group, {}, {"sleep_s": 30}, timeout_s=1.0)
    with pytest.raises(LearnerGroupFailed, match="after they were shut down"):
        call(group, {}, {})


def test_a_learner_that_dies_while_idle_is_found_out_without_waiting(
    build: Callable[[int], StrictLearnerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner.strict_group, "ASK_EVERY_S", 0.0)
    group = build(2)
    for _ in range(3):  # asked, answered, asked again
        assert not group.has_lost()
        time.sleep(0.2)
    ray.kill(group._workers[1])
    deadline = time.monotonic() + 30
    while not group.has_lost():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_dies(group._workers[0])  # it would wait for its peer


def test_whether_a_new_group_would_help(build: Callable[[int], StrictLearnerGroup]) -> None:
    """An error of a learner's own would come again; a death, a broken network or silence not."""
    with pytest.raises(LearnerGroupFailed) as raised:
        call(build(1), {"error": ZeroDivisionError("again")})
    assert not isinstance(raised.value, LearnersLost)
    with pytest.raises(LearnersLost, match="gloo"):
        call(build(1), {"error": RuntimeError("[gloo] Connection closed by peer")})
    with pytest.raises(LearnersLost, match="within 1 s"):
        call(build(1), {"sleep_s": 30}, timeout_s=1.0)
    group = build(1)
    ray.kill(group._workers[0])
    assert_dies(group._workers[0])
    with pytest.raises(LearnersLost, match="its process died"):
        call(group, {})


def test_arguments_that_all_refuse_leave_the_group_alive(
    build: Callable[[int], StrictLearnerGroup],
) -> None:
    group = build(2)
    no_file = {"error": FileNotFoundError("no such checkpoint")}
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        call(group, no_file, no_file, may_refuse=True)
    assert call(group, {}, {}) == [0, 1]


def test_a_refusal_by_one_learner_alone_ends_the_group(
    build: Callable[[int], StrictLearnerGroup],
) -> None:
    """The others have done what they were asked: they are no longer in step."""
    group = build(2)
    with pytest.raises(LearnerGroupFailed, match="learner 1 of 2 failed in answer: ValueError: no"):
        call(group, {}, {"error": ValueError("no")}, may_refuse=True)
    assert_dies(group._workers[0])


def test_the_cause_is_told_not_what_followed_from_it(
    build: Callable[[int], StrictLearnerGroup],
) -> None:
    group = build(2)
    lost = {"error": RuntimeError("[gloo] Connection closed by peer")}
    with pytest.raises(LearnerGroupFailed, match=r"learner 1 of 2 .* ZeroDivisionError: cause"):
        call(group, lost, {"error": ZeroDivisionError("cause"), "sleep_s": 0.5})
