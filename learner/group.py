"""The group of PPO learners, behind the interface that the training loop uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from actors.trajectory import Float32Array
from actors.weights import WeightUpdate
from learner.actor import PPOLearnerActor
from learner.batch import PPOBatch
from learner.config import LearnersConfig, PPOConfig
from learner.hf_directory import load_tokenizer
from learner.models import POLICY, module_spec
from learner.ppo_setup import PPOAlgorithmConfig, PPOSetup
from learner.strict_group import (
    REFUSALS,
    LearnerGroupFailed,
    LearnersLost,
    StrictLearnerGroup,
    is_loss,
)
from reward_service.encoding import RewardHead

__all__ = ["LearnerGroupFailed", "LearnersLost", "PPOLearners"]


class PPOLearners:
    """Policy, reference and, for PPO proper, critic, on 0 (in-process), 1 or more learners.

    Example::

        with PPOLearners(ppo, learners, policy_dir=sft, reference_dir=sft, critic_dir=reward_model,
                         temperature=1.0, total_steps=100, seed=0) as group:
            metrics = group.update(build_batch(trajectories, scores, ppo))
            rollouts.load(group.export_weights(1, probe_sequences))

    Args:
        policy_dir: Model that training starts from; its tokenizer goes along with saved policies.
        reference_dir: Model that the KL divergence is measured to.
        critic_dir: Reward model that the critic starts from; without, its head starts at zero.
            Not read where ``ppo`` has no critic.
        temperature: Of sampling, > 0.
        total_steps: PPO iterations over which the learning rates decay.

    Raises:
        FileNotFoundError: A directory is not a model.
        ValueError: The reward model has another tokenizer than the policy, or a model cannot be
            trained here.
        TimeoutError: There was no room for them within ``learners.start_timeout_s``.
        LearnersLost: A learner died while it started.
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
        if not ppo.has_critic or not ppo.critic_from_reward_model:
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
        update: WeightUpdate = self._group.call(
            "export_policy", [arguments], self._timeout_s, may_refuse=True
        )[0]
        return update

    def logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Float32Array]:
        """The policy's log-probabilities ``[T - 1]`` of ids 1, 2, ... of each sequence, in
        float32 whatever ``ppo.bf16`` is. Every learner computes a share."""
        if any(len(sequence) < 2 for sequence in sequences):
            raise ValueError("log-probabilities need sequences of at least two ids")
        shares = [
            {"sequences": sequences[i :: self.learners], "temperature": temperature}
            for i in range(self.learners)
        ]
        answers = self._call("sequence_logprobs", shares)
        return [answers[i % self.learners][i // self.learners] for i in range(len(sequences))]

    def save(self, directory: Path) -> dict[str, str]:
        """Write the exact state of the learners into ``directory`` (which learner 0 must see).

        Returns:
            What each file, or each directory of files, is.

        Raises:
            OSError: The disk is full or read-only; the learners are as good as before.
        """
        contents: dict[str, str] = self._group.call(
            "save_state", [{"directory": Path(directory)}], self._timeout_s, may_refuse=True
        )[0]
        return contents

    def restore(self, directory: Path) -> None:
        """Take the state back, bit for bit, whatever the number of learners was.

        Raises:
            FileNotFoundError, ValueError: There is no usable state; nothing was changed.
        """
        arguments = [{"directory": Path(directory)}] * self.learners
        self._call("load_state", arguments)

    def save_policy(self, directory: Path) -> None:
        """Write the policy as a plain Hugging Face directory with its tokenizer."""
        self._group.call(
            "save_policy", [{"directory": Path(directory)}], self._timeout_s, may_refuse=True
        )

    def see(self, file: Path) -> bool:
        """Whether every learner finds ``file`` where its node has that path."""
        return all(self._call("sees", [{"file": Path(file)}] * self.learners))

    def have_lost(self) -> bool:
        """Whether a learner died while they had nothing to do; then all are gone. Does not wait."""
        return self._group.has_lost()

    def process_ids(self) -> list[int]:
        """Operating-system process of each learner."""
        return self._call("process_id", [{}] * self.learners)

    def shutdown(self) -> None:
        self._group.shutdown()

    def _call(self, method: str, arguments: Sequence[dict[str, Any]]) -> list[Any]:
        return self._group.call(method, arguments, self._timeout_s, may_refuse=True)

    def __enter__(self) -> PPOLearners:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def check_setup(setup: PPOSetup) -> None:
    """Find what is wrong with the directories before any process starts."""
    tokenizer = load_tokenizer(setup.policy_dir)
    load_tokenizer(setup.reference_dir)
    if setup.ppo.bf16 and not setup.learners.num_gpus_per_learner and not cpu_has_bfloat16():
        warnings.warn(
            "ppo.bf16 is on, but this CPU has no bfloat16 instructions: learning will be many "
            "times slower than in float32",
            stacklevel=3,
        )
    if setup.critic_dir is None:
        return
    from actors.fingerprint import template_fingerprint

    if RewardHead.load(setup.critic_dir).fingerprint != template_fingerprint(tokenizer):
        raise ValueError(
            f"reward model {setup.critic_dir} was trained with another tokenizer or chat template "
            f"than {setup.policy_dir}: the critic cannot start from it; set "
            "ppo.critic_from_reward_model to false"
        )


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have instructions of their own on this CPU."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _build_group(setup: PPOSetup) -> StrictLearnerGroup:
    options = setup.learners
    config = (
        PPOAlgorithmConfig()
        .framework("torch")
        .learners(
            num_learners=options.num_learners,
            num_cpus_per_learner=options.num_cpus_per_learner,
            num_gpus_per_learner=options.num_gpus_per_learner,
            custom_resources_per_learner=options.resources_per_learner,
            learner_class=PPOLearnerActor,
        )
        .debugging(seed=None)
    )
    config.ppo_setup = setup
    spec = module_spec(
        setup.policy_dir,
        setup.critic_dir,
        setup.temperature,
        shared_trunk=setup.ppo.shared_trunk,
        critic=setup.ppo.has_critic,
    )
    room = _reserve(options)
    try:
        return StrictLearnerGroup(config=config, module_spec=spec, placement_group=room)
    except Exception as error:
        if not options.num_learners:
            raise
        if room is not None:
            ray.util.remove_placement_group(room)
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, REFUSALS):
            raise cause from None
        # What RLlib makes of the death of a learner that starts has Ray's error behind it.
        lost = is_loss(error) or isinstance(error.__context__, RayActorError)
        kind = LearnersLost if lost else LearnerGroupFailed
        raise kind(f"the learners could not be started: {type(cause).__name__}: {cause}") from error


def _reserve(options: LearnersConfig) -> Any:
    """Room for all learners at once (a placement group), or ``None`` where they need none.

    Raises:
        TimeoutError: There is not enough within ``learners.start_timeout_s``.
    """
    each = {name: amount for name, amount in options.learner_resources.items() if amount}
    if not options.num_learners or not each:
        return None
    room = ray.util.placement_group([each] * options.num_learners, strategy="PACK")
    if room.wait(math.ceil(options.start_timeout_s)):
        return room
    ray.util.remove_placement_group(room)
    asked = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
    free = ray.available_resources()
    there = ", ".join(f"{free.get(name, 0):g} {name}" for name in each)
    raise TimeoutError(
        f"no room for {options.num_learners} learners of {asked} each within "
        f"{options.start_timeout_s:g} s (learners.start_timeout_s); free in the whole cluster: "
        f"{there}"
    )
