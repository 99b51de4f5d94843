"""The group of PPO learners: RLlib's ``LearnerGroup``, made strict, behind a small interface.

``StrictLearnerGroup`` is the one place that touches RLlib's group and its private parts. The
stock group turns failures into silence: after a learner died, its ``update()`` returns an empty
list, and an exception on one learner leaves the others waiting for it. Here a call gives one
result per learner, or the group is killed and the root cause is raised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from actors.trajectory import Float32Array
from actors.weights import WeightUpdate
from learner.actor import PPOLearnerActor
from learner.batch import PPOBatch
from learner.config import LearnersConfig, PPOConfig
from learner.hf_directory import load_tokenizer
from learner.models import POLICY, module_spec
from learner.ppo import PPOAlgorithmConfig, PPOSetup
from reward_service.encoding import RewardHead

# How long to wait, after the first learner failed, for a failure that explains it.
ROOT_CAUSE_GRACE_S = 2.0
# Mistakes of the user, found by every learner alike, before anything was changed.
USER_ERRORS = (ValueError, FileNotFoundError)
# A learner whose peer died says one of these; the peer's own error is the cause.
_CONSEQUENCES = ("Connection closed", "Connection reset", "gloo", "NCCL", "Timed out")


class LearnerGroupFailed(RuntimeError):
    """The learners are gone. Build a new group and restore the last checkpoint."""


class StrictLearnerGroup(LearnerGroup):  # type: ignore[misc]
    """A LearnerGroup whose calls return one result per learner, or raise."""

    def update_all(self, batch: MultiAgentBatch, timeout_s: float) -> list[dict[str, float]]:
        """One PPO iteration; every learner gets the whole batch, by reference."""
        if self.is_local:
            return [self._learner.update(training_data=TrainingData(batch=batch))]
        reference = ray.put(batch)
        data = [{"training_data": TrainingData(batch_refs=[reference])} for _ in self._workers]
        return self.call("update", data, timeout_s)

    def call(self, method: str, arguments: Sequence[dict[str, Any]], timeout_s: float) -> list[Any]:
        """Call ``method`` on the first ``len(arguments)`` learners, each with its own arguments.

        Raises:
            ValueError, FileNotFoundError: Every learner said so; the group lives on.
            LearnerGroupFailed: A learner died, failed or did not answer in time. All learners
                have been killed.
        """
        if self.is_local:
            return [getattr(self._learner, method)(**arguments[0])]
        if self._is_shut_down:
            raise LearnerGroupFailed(f"learners were asked to {method} after they were shut down")
        workers = self._workers[: len(arguments)]
        calls = {
            getattr(worker, method).remote(**kwargs): index
            for index, (worker, kwargs) in enumerate(zip(workers, arguments, strict=True))
        }
        results, errors = self._gather(calls, timeout_s)
        if len(results) == len(workers):
            return [results[index] for index in range(len(workers))]
        causes = [
            error.cause if isinstance(error, RayTaskError) else error for error in errors.values()
        ]
        if len(errors) == len(workers) and all(isinstance(c, USER_ERRORS) for c in causes):
            raise causes[0]
        self.abort()
        raise LearnerGroupFailed(_explain(method, errors, len(workers), timeout_s)) from (
            causes[0] if causes else None
        )

    @staticmethod
    def _gather(
        calls: dict[Any, int], timeout_s: float
    ) -> tuple[dict[int, Any], dict[int, RayError]]:
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

    def abort(self) -> None:
        """Kill every learner: those that wait for a dead peer would not end by themselves."""
        if self.is_remote and not self._is_shut_down:
            for worker in self._workers:
                ray.kill(worker)
            self.shutdown()

    def shutdown(self) -> None:
        if not self._is_shut_down:
            super().shutdown()


def _explain(method: str, errors: dict[int, RayError], learners: int, timeout_s: float) -> str:
    if not errors:
        return (
            f"{learners} learners were asked to {method} and did not answer within "
            f"{timeout_s:.0f} s (learners.timeout_s)"
        )

    def consequence(error: RayError) -> bool:
        return any(sign in str(error) for sign in _CONSEQUENCES)

    index, error = min(errors.items(), key=lambda item: (consequence(item[1]), item[0]))
    if isinstance(error, RayTaskError):
        what = f"{type(error.cause).__name__}: {error.cause}"
    elif isinstance(error, RayActorError):
        what = "its process died (killed, or out of memory)"
    else:
        what = f"{type(error).__name__}: {error}"
    return f"learner {index} of {learners} failed in {method}: {what}"


class PPOLearners:
    """Policy, critic and reference with their optimizers, on 0 (in-process), 1 or more learners.

    Example::

        with PPOLearners(ppo, learners, policy_dir=sft, reference_dir=sft, critic_dir=reward_model,
                         temperature=1.0, total_steps=100, seed=0) as group:
            metrics = group.update(build_batch(trajectories, scores, ppo))
            rollouts.load(group.export_weights(1, probe_sequences))

    Args:
        policy_dir: Model that training starts from; its tokenizer goes along with saved policies.
        reference_dir: Model that the KL divergence is measured to.
        critic_dir: Reward model that the critic starts from; without, its head starts at zero.
        temperature: Of sampling, > 0.
        total_steps: PPO iterations over which the learning rates decay.

    Raises:
        FileNotFoundError: A directory is not a model.
        ValueError: The reward model has another tokenizer than the policy, or a model cannot be
            trained here.
        LearnerGroupFailed: The learners could not be started.
    """

    def __init__(
        self,
        ppo: PPOConfig,
        learners: LearnersConfig,
        policy_dir: Path,
        reference_dir: Path,
        critic_dir: Path | None,
        temperature: float,
        total_steps: int,
        seed: int,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"sampling.temperature is {temperature}; PPO needs more than 0")
        if critic_dir is not None and (ppo.shared_trunk or not ppo.critic_from_reward_model):
            critic_dir = None
        self._timeout_s = learners.timeout_s
        self._setup = PPOSetup(
            ppo=ppo,
            learners=learners,
            policy_dir=Path(policy_dir),
            reference_dir=Path(reference_dir),
            critic_dir=Path(critic_dir) if critic_dir is not None else None,
            temperature=temperature,
            total_steps=total_steps,
            seed=seed,
        )
        check_setup(self._setup)
        self._group = _build_group(self._setup)

    @property
    def learners(self) -> int:
        """How many processes learn."""
        return max(1, self._setup.learners.num_learners)

    def update(self, batch: PPOBatch) -> dict[str, float]:
        """One PPO iteration. Returns its metrics, named ``ppo/...``; seconds are learner 0's."""
        samples = MultiAgentBatch({POLICY: SampleBatch(batch.columns)}, env_steps=len(batch))
        return self._group.update_all(samples, self._timeout_s)[0]

    def export_weights(
        self, version: int, probe_sequences: Sequence[Sequence[int]]
    ) -> WeightUpdate:
        """The policy as a weight update that engines can verify; learner 0 puts the tensors."""
        publish = ray.is_initialized()
        arguments = {"version": version, "probe_sequences": probe_sequences, "publish": publish}
        update: WeightUpdate = self._group.call("export_policy", [arguments], self._timeout_s)[0]
        return update

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """The policy's log-probabilities ``[T - 1]`` of ids 1, 2, ... of each sequence, in
        float32 at temperature 1. Every learner computes a share."""
        shares = [{"sequences": sequences[i :: self.learners]} for i in range(self.learners)]
        answers = self._group.call("sequence_logprobs", shares, self._timeout_s)
        return [answers[i % self.learners][i // self.learners] for i in range(len(sequences))]

    def save(self, directory: Path) -> None:
        """Write the exact state of the learners into ``directory`` (which learner 0 must see)."""
        self._group.call("save_state", [{"directory": Path(directory)}], self._timeout_s)

    def restore(self, directory: Path) -> None:
        """Take the state back, bit for bit, whatever the number of learners was.

        Raises:
            FileNotFoundError, ValueError: There is no usable state; nothing was changed.
        """
        arguments = [{"directory": Path(directory)}] * self.learners
        self._group.call("load_state", arguments, self._timeout_s)

    def save_policy(self, directory: Path) -> None:
        """Write the policy as a plain Hugging Face directory with its tokenizer."""
        self._group.call("save_policy", [{"directory": Path(directory)}], self._timeout_s)

    def process_ids(self) -> list[int]:
        return self._group.call("process_id", [{}] * self.learners, self._timeout_s)

    def shutdown(self) -> None:
        self._group.shutdown()

    def __enter__(self) -> PPOLearners:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def check_setup(setup: PPOSetup) -> None:
    """Find what is wrong with the directories before any process starts."""
    tokenizer = load_tokenizer(setup.policy_dir)
    load_tokenizer(setup.reference_dir)
    if setup.critic_dir is None:
        return
    from actors.fingerprint import template_fingerprint

    if RewardHead.load(setup.critic_dir).fingerprint != template_fingerprint(tokenizer):
        raise ValueError(
            f"reward model {setup.critic_dir} was trained with another tokenizer or chat template "
            f"than {setup.policy_dir}: the critic cannot start from it; set "
            "ppo.critic_from_reward_model to false"
        )


def _build_group(setup: PPOSetup) -> StrictLearnerGroup:
    options = setup.learners
    config = (
        PPOAlgorithmConfig()
        .framework("torch")
        .learners(
            num_learners=options.num_learners,
            num_cpus_per_learner=options.num_cpus_per_learner,
            num_gpus_per_learner=options.num_gpus_per_learner,
            learner_class=PPOLearnerActor,
        )
        .debugging(seed=None)
    )
    config.ppo_setup = setup
    spec = module_spec(
        setup.policy_dir, setup.critic_dir, setup.temperature, setup.ppo.shared_trunk
    )
    try:
        return StrictLearnerGroup(config=config, module_spec=spec)
    except RayTaskError as error:
        if isinstance(error.cause, USER_ERRORS):
            raise error.cause from None
        raise LearnerGroupFailed(
            f"the learners could not be started: {type(error.cause).__name__}: {error.cause}"
        ) from error
