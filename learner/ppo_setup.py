"""What a PPO learner is built from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from learner.config import LearnersConfig, PPOConfig


@dataclass(frozen=True, kw_only=True)
class PPOSetup:
    """What a learner is built from.

    Attributes:
        temperature: Of sampling: logits of policy and reference are divided by it.
        total_steps: PPO iterations over which the learning rate decays.
        seed: Of the shuffles into minibatches.
    """

    ppo: PPOConfig
    learners: LearnersConfig
    policy_dir: Path
    reference_dir: Path
    critic_dir: Path | None
    temperature: float
    total_steps: int
    seed: int


class PPOAlgorithmConfig(AlgorithmConfig):  # type: ignore[misc]
    """Carries a ``PPOSetup`` to the learners, beside what RLlib itself wants to know."""

    ppo_setup: PPOSetup


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Without RLlib's warnings about its own constructors and a progress bar for every model."""
    from transformers.utils import logging as transformers_logging

    rllib = logging.getLogger("ray._common.deprecation")
    level, bars = rllib.level, transformers_logging.is_progress_bar_enabled()
    rllib.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        rllib.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
