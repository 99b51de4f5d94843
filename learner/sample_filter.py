"""Which scored samples are not trained on, and why: overlong and dynamic sampling filters.

Both come from DAPO (arXiv 2503.14476). They look at samples alone, in any order, so that what is
filtered does not depend on who finished first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from actors.trajectory import Float32Array, Int32Array, Trajectory
from learner.batch import UNSCALED, ScoreScale, group_numbers, place_score
from learner.config import PPOConfig
from reward_service.score import Score

FilterReason = Literal["truncated", "no_spread"]

EXPLANATIONS: dict[FilterReason, str] = {
    "truncated": "filtered: cut off by the length limit (ppo.truncated is 'filter')",
    "no_spread": "filtered: all rewards of its group are alike (ppo.dynamic_sampling)",
}


def filter_reasons(
    trajectories: Sequence[Trajectory],
    scores: Sequence[Score],
    config: PPOConfig,
    scale: ScoreScale = UNSCALED,
) -> dict[str, FilterReason]:
    """Why each filtered sample is not trained on, by sample id; the other samples are.

    Cut-off responses go first, when ``ppo.truncated`` is ``filter``; they count for nothing, so
    the spread of a group is that of what is left of it. With ``ppo.dynamic_sampling`` a group is
    filtered whose rewards, as they are trained on but without KL, differ by no more than
    ``min_spread``; a group of one is such a group.

    Args:
        scores: Of the trajectories, in their order.
    """
    reasons: dict[str, FilterReason] = {}
    kept: list[tuple[Trajectory, Score]] = []
    for trajectory, score in zip(trajectories, scores, strict=True):
        if config.truncated == "filter" and trajectory.finish_reason == "length":
            reasons[trajectory.sample_id] = "truncated"
        else:
            kept.append((trajectory, score))
    if config.dynamic_sampling is None or not kept:
        return reasons
    rewards = np.array([place_score(t, s, config, scale).sum() for t, s in kept], np.float32)
    groups = group_numbers([t for t, _ in kept])
    flat = group_spread(rewards, groups) <= config.dynamic_sampling.min_spread
    for (trajectory, _), group in zip(kept, groups, strict=True):
        if flat[group]:
            reasons[trajectory.sample_id] = "no_spread"
    return reasons


def group_spread(rewards: Float32Array, groups: Int32Array) -> npt.NDArray[np.float32]:
    """``[G]`` the largest less the smallest of the rewards ``[B]`` of each group."""
    count = int(groups.max()) + 1
    largest, smallest = np.full(count, -np.inf, np.float32), np.full(count, np.inf, np.float32)
    np.maximum.at(largest, groups, rewards)
    np.minimum.at(smallest, groups, rewards)
    return largest - smallest
