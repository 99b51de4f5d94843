"""RLlib's LearnerGroup, made strict: the one place that touches the group's private parts.

The stock group turns failures into silence. After a learner has died its ``update()`` returns an
empty list and training becomes a no-op; an exception on one learner leaves the others waiting for
it for half an hour; with learner 0 down, learner 1 gets the work of learner 0. Here a call gives
one result per learner, or the group is killed and the root cause is raised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch

# How long to wait, after the first learner failed, for a failure that explains it.
ROOT_CAUSE_GRACE_S = 2.0
# How often idle learners are asked whether they live.
ASK_EVERY_S = 2.0
# What a learner says of arguments that it cannot use (no such file, another architecture).
REFUSALS = (ValueError, OSError)
# What a learner says whose peer has died; the peer's own end is the cause.
_CONSEQUENCES = ("Connection closed", "Connection reset", "gloo", "Gloo", "NCCL", "Timed out")


class LearnerGroupFailed(RuntimeError):
    """The learners are gone: one of them raised an error, and would raise it again."""


class LearnersLost(LearnerGroupFailed):
    """The learners are gone for a reason outside of them: a process or its node died, the network
    broke, or one did not answer in time. A new group that restores the last checkpoint goes on."""


class StrictLearnerGroup(LearnerGroup):  # type: ignore[misc]
    """A LearnerGroup whose calls return one result per learner, or raise."""

    _asked: Sequence[Any] = ()
    _asked_at = 0.0

    def update_all(self, batch: MultiAgentBatch, timeout_s: float) -> list[dict[str, float]]:
        """One RLlib update; every learner gets the whole batch, by reference."""
        if self.is_local:
            return [self._learner.update(training_data=TrainingData(batch=batch))]
        reference = ray.put(batch)
        data = [{"training_data": TrainingData(batch_refs=[reference])} for _ in self._workers]
        return self.call("update", data, timeout_s)

    def call(
        self,
        method: str,
        arguments: Sequence[dict[str, Any]],
        timeout_s: float,
        *,
        may_refuse: bool = False,
    ) -> list[Any]:
        """Call ``method`` on the first ``len(arguments)`` learners, each with its own arguments.

        Args:
            timeout_s: Deadline of the slowest learner. In-process calls have none.
            may_refuse: The method checks its arguments before it changes anything, so a learner
                that raises one of ``REFUSALS`` is as good as before.

        Raises:
            ValueError, OSError: Every learner refused the arguments; the group lives on.
            LearnersLost: A learner died or did not answer in time. All learners have been killed.
            LearnerGroupFailed: A learner raised another error. All learners have been killed.
        """
        if self._is_shut_down:
            raise LearnerGroupFailed(f"learners were asked to {method} after they were shut down")
        if self.is_local:
            return [getattr(self._learner, method)(**arguments[0])]
        workers = self._workers[: len(arguments)]
        calls = {
            getattr(worker, method).remote(**own): index
            for index, (worker, own) in enumerate(zip(workers, arguments, strict=True))
        }
        results, errors = _gather(calls, timeout_s)
        if len(results) == len(workers):
            return [results[index] for index in range(len(workers))]
        causes = [e.cause if isinstance(e, RayTaskError) else e for e in errors.values()]
        refusals = [cause for cause in causes if isinstance(cause, REFUSALS)]
        if may_refuse and len(refusals) == len(workers):
            raise refusals[0]
        self.abort()
        index = _root_cause(errors)
        cause = None if index is None else errors[index]
        kind = LearnersLost if cause is None or is_loss(cause) else LearnerGroupFailed
        silent = sorted(set(range(len(workers))) - set(results))
        raise kind(
            _explain(method, index, errors, silent, len(self._workers), timeout_s)
        ) from cause

    def has_lost(self) -> bool:
        """Whether a learner died while none was asked for anything. Asks now and then, and does
        not wait for the answers; once it is true, all learners have been killed."""
        if self.is_local or self._is_shut_down:
            return bool(self._is_shut_down)
        if not self._asked and time.monotonic() - self._asked_at > ASK_EVERY_S:
            self._asked = [worker.process_id.remote() for worker in self._workers]
            self._asked_at = time.monotonic()
        elif self._asked:
            asked = list(self._asked)
            answers, self._asked = ray.wait(asked, num_returns=len(asked), timeout=0.0)
            try:
                ray.get(answers)
            except RayError:
                self.abort()
        return bool(self._is_shut_down)

    def abort(self) -> None:
        """Kill every learner: those that wait for a dead peer would not end by themselves."""
        if self.is_remote and not self._is_shut_down:
            for worker in self._workers:
                ray.kill(worker)
            self.shutdown()

    def shutdown(self) -> None:
        if not self._is_shut_down:
            super().shutdown()


def is_loss(error: BaseException) -> bool:
    """Whether an error says that a learner, or the way to it, is gone: Ray's word for it, or what
    a learner says of a peer that it cannot reach."""
    if isinstance(error, RayTaskError):
        return any(sign in str(error.cause) for sign in _CONSEQUENCES)
    return isinstance(error, RayError)


def _gather(calls: dict[Any, int], timeout_s: float) -> tuple[dict[int, Any], dict[int, RayError]]:
    """Results and errors by learner, of those that answered in time.

    After a first error the others get only a short while: they may wait for it in a collective
    operation, but if they end as well, one of them may know the cause.
    """
    results: dict[int, Any] = {}
    errors: dict[int, RayError] = {}
    deadline = time.monotonic() + timeout_s
    pending = list(calls)
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, timeout=left)
        for call in ready:
            try:
                results[calls[call]] = ray.get(call)
            except RayError as error:
                errors[calls[call]] = error
                deadline = min(deadline, time.monotonic() + ROOT_CAUSE_GRACE_S)
    return results, errors


def _root_cause(errors: dict[int, RayError]) -> int | None:
    """The learner whose error is the cause of the others', or None when none failed."""

    def rank(item: tuple[int, RayError]) -> tuple[bool, int]:
        return any(sign in str(item[1]) for sign in _CONSEQUENCES), item[0]

    return min(errors.items(), key=rank)[0] if errors else None


def _explain(
    method: str,
    index: int | None,
    errors: dict[int, RayError],
    silent: list[int],
    learners: int,
    timeout_s: float,
) -> str:
    if index is None:
        return (
            f"learners {silent} of {learners} were asked to {method} and did not answer within "
            f"{timeout_s:.0f} s (learners.timeout_s)"
        )
    error = errors[index]
    if isinstance(error, RayTaskError):
        what = f"{type(error.cause).__name__}: {error.cause}"
    elif isinstance(error, RayActorError):
        what = "its process died (killed, or out of memory)"
    else:
        what = f"{type(error).__name__}: {error}"
    return f"learner {index} of {learners} failed in {method}: {what}"
