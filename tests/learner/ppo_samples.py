"""Random PPO batches with very unequal lengths, and small models beside the shared fixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from learner.batch import PPOBatch
from learner.config import LearnersConfig, PPOConfig
from learner.group import PPOLearners
from learner.learner_state import read_state

VOCABULARY = 512


def random_batch(samples: int, seed: int, longest: int = 20) -> PPOBatch:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 12, samples).astype(np.int32)
    responses = rng.integers(1, longest, samples).astype(np.int32)
    responses[0] = longest
    width = int(responses.max())
    rewards = np.zeros((samples, width), np.float32)
    scores = rng.normal(size=samples).astype(np.float32)
    rewards[np.arange(samples), responses - 1] = scores
    return PPOBatch(
        # Token 0 pads in the model's configuration and is an ordinary token here.
        input_ids=rng.integers(0, VOCABULARY, (samples, int((prompts + responses).max()))).astype(
            np.int32
        ),
        prompt_lengths=prompts,
        response_lengths=responses,
        engine_logprobs=rng.normal(-6, 0.5, (samples, width)).astype(np.float32),
        rewards=rewards,
        scores=scores,
        stopped=rng.random(samples) < 0.5,
        groups=np.arange(samples, dtype=np.int32) // 2,  # pairs, the odd one alone
    )


def in_process(
    ppo: PPOConfig,
    policy_dir: Path,
    *,
    reference_dir: Path | None = None,
    critic_dir: Path | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    threads: int = 1,
) -> PPOLearners:
    return PPOLearners(
        ppo,
        LearnersConfig(num_learners=0, threads=threads),
        policy_dir,
        reference_dir or policy_dir,
        critic_dir,
        temperature=temperature,
        total_steps=10,
        seed=seed,
    )


def weights(learners: PPOLearners, directory: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor, by way of a saved state."""
    learners.save(directory)
    state = read_state(directory, torch.device("cpu"))
    policy = {f"policy/model.{name}": tensor for name, tensor in state.policy.items()}
    if "lm_head.weight" not in state.policy:
        policy["policy/model.lm_head.weight"] = state.policy["model.embed_tokens.weight"]
    return policy | dict(state.beside)
