"""``rlhf bench overlap``: a PPO step that generates the next one's samples meanwhile, against one
that does not.

Engine and learner have half of the cores each, as on devices apart, so that neither can be faster
by working alone. The floor of a step is then the longer of the two; what overlap can save at most
is the shorter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.bench import bench_config, build_models, median_of, random_prompts, run_steps
from cluster.config import RunConfig

EPOCHS = 2
"""Fewer than PPO usually takes, so that learning does not outlast generating by too much: what
overlap can give is the shorter of the two."""


def bench_overlap(place: Path, repeats: int) -> dict[str, Any]:
    """Medians of ``2 * repeats`` steps of each kind, the first steps left out."""
    model, reward_model = build_models(place, hidden=128, layers=4)
    config = _halved(bench_config(place, model, reward_model, steps=2 * repeats + 2, bf16=False))
    by_turns, beside = (
        # The first step is warming up; overlap begins with the second and ends before the last.
        run_steps(_with(config, staleness), model, reward_model, random_prompts())[1:-1]
        for staleness in (0, 1)
    )
    alone = {phase: median_of(by_turns, f"seconds/{phase}") for phase in ("generate", "learn")}
    before, after = (median_of(steps, "seconds/step") for steps in (by_turns, beside))
    return {
        "ratio_to_by_turns": after / before,
        "ratio_at_best": 1 - min(alone.values()) / before,
        "seconds_step": after,
        "seconds_step_by_turns": before,
        **{f"seconds_{phase}_by_turns": seconds for phase, seconds in alone.items()},
        "seconds_waited_for_samples": median_of(beside, "seconds/generate"),
        "stale_sample_size": median_of(beside, "ppo/stale_sample_size"),
        "iterations": len(beside),
    }


def _halved(config: RunConfig) -> RunConfig:
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    rollout, service = config.rollout, config.reward.service
    engine = rollout.engine.model_copy(update={"threads": half})
    return config.model_copy(
        update={
            "rollout": rollout.model_copy(update={"engine": engine}),
            "learners": config.learners.model_copy(update={"threads": half}),
            "reward": config.reward.model_copy(
                update={"service": service.model_copy(update={"threads": half})}
            ),
        }
    )


def _with(config: RunConfig, staleness: int) -> RunConfig:
    assert config.ppo is not None
    changes = {"max_staleness": staleness, "epochs": EPOCHS}
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=changes)})
