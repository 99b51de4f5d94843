"""Learning rates over a run."""

from __future__ import annotations

import math

from learner.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, done: int, total: int) -> float:
    """The learning rate after ``done`` of ``total`` steps.

    A linear warm-up over ``warmup_share`` of the steps, then the schedule's decay towards 0, which
    the step after the last one would have.
    """
    warmup = math.ceil(config.warmup_share * total)
    if done < warmup:
        return config.learning_rate * (done + 1) / (warmup + 1)
    progress = min(1.0, (done - warmup) / max(1, total - warmup))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * factor
