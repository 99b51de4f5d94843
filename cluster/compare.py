"""Evaluation of checkpoints: the same held-out prompts, seeds and reward for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actors.newswire import true_quality
from actors.prompts import tokenize_prompts
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.evaluate import CheckpointSamples, evaluate_samples
from cluster.evaluation import Evaluation
from cluster.stages import Workplace
from reward_service.rewards import Reward
from reward_service.score import Score
from reward_service.scoring import score_stream


def compare_checkpoints(work: Workplace, models: dict[str, Path]) -> Evaluation:
    """Generate with each checkpoint, score everything, measure KL to the first one.

    KL is the Monte-Carlo estimate ``log p - log p_first`` of each whole response in nats, both
    from the engine at temperature 1.
    """
    for name, path in models.items():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"checkpoint {name!r}: no model at {path}")
    config = work.config
    first = next(iter(models.values()))
    prompts = tokenize_prompts(
        work.data.held_out_prompts(), AutoTokenizer.from_pretrained(first), config.data
    )
    reward = work.session.reward(config.reward_terms)
    answers: dict[str, tuple[list[Trajectory], list[Score], int]] = {}
    own: dict[str, list[np.ndarray]] = {}
    with work.reporter.bar("evaluate") as bar:
        for done, (name, path) in enumerate(models.items()):
            bar.update(done, len(models), {})
            pool = work.session.rollouts(path)
            answers[name] = answer(work, pool, reward, prompts)
            own[name] = pool.logprobs(sequences(answers[name][0]))
        pool = work.session.rollouts(first)
        reference = {name: pool.logprobs(sequences(answers[name][0])) for name in models}
        bar.update(len(models), len(models), {})
    samples = []
    for name, (trajectories, scores, failed) in answers.items():
        kl = [
            float((mine - theirs)[len(t.prompt.token_ids) - 1 :].sum())
            for t, mine, theirs in zip(trajectories, own[name], reference[name], strict=True)
        ]
        samples.append(
            CheckpointSamples(
                name=name, trajectories=trajectories, scores=scores, kl=kl, failed=failed
            )
        )
    return evaluate_samples(
        samples,
        true_quality=true_quality if work.data.has_true_quality else None,
        seed=config.seed,
        settings={
            "prompts": len(prompts),
            "temperature": config.evaluate.temperature,
            "max_new_tokens": config.sampling.max_new_tokens,
            **{f"model {name}": str(path) for name, path in models.items()},
        },
    )


def answer(
    work: Workplace, pool: RolloutPool, reward: Reward, prompts: Sequence[Prompt]
) -> tuple[list[Trajectory], list[Score], int]:
    """Responses and their scores in the order of the prompts, and how many failed."""
    config = work.config
    sampling = config.sampling.model_copy(
        update={
            "temperature": config.evaluate.temperature,
            "samples_per_prompt": config.evaluate.samples_per_prompt,
        }
    )
    found: list[tuple[Trajectory, Score]] = []
    failed, reason = 0, ""
    generated = pool.generate(prompts, sampling, run_seed=config.seed, round_index=0)
    for item in score_stream(reward, generated, retry=config.reward.retry):
        if isinstance(item, SampleFailure):
            failed += 1
            reason = item.reason
        else:
            found.append(item)
    if not found:
        raise RuntimeError(f"evaluation: every generation or score failed, the last: {reason}")
    found.sort(key=lambda pair: (pair[0].prompt.prompt_id, pair[0].sample_index))
    return [t for t, _ in found], [s for _, s in found], failed


def sequences(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    return [[*t.prompt.token_ids.tolist(), *t.response_ids.tolist()] for t in trajectories]
