"""The drift of a reward model's scores during PPO."""

from __future__ import annotations

import numpy as np
import pytest

from actors.trajectory import Prompt, Trajectory
from cluster.ppo_stage import score_drift
from cluster.train import Sample
from reward_service.score import Score


def sample(score: float, **members: float) -> Sample:
    ids = np.array([5], np.int32)
    trajectory = Trajectory(
        prompt=Prompt(prompt_id="p", token_ids=ids, text="p"),
        sample_index=0,
        response_ids=ids,
        response_logprobs=np.zeros(1, np.float32),
        policy_versions=np.zeros(1, np.int32),
        response_text="r",
        finish_reason="stop",
        seed=0,
    )
    scored = Score(
        sample_id="p#0", value=2 * score, components={"rm": score, "length": 1.0} | members
    )
    return Sample(trajectory=trajectory, score=scored, measured={})


def test_the_unweighted_score_of_each_model_is_compared_with_its_own_reference() -> None:
    samples = [sample(score) for score in (1.0, 2.0, 3.0)]
    # quantiles of -1, 0, 1: every one of them has moved by 2
    assert score_drift(samples, {"rm": (-1.0, -0.5, 0.0, 0.5, 1.0)}) == {
        "reward/rm_drift": pytest.approx(2.0)
    }
    assert score_drift(samples, {"another": (0.0, 1.0)}) == {}


def test_the_members_of_an_ensemble_drift_each_by_itself() -> None:
    samples = [sample(0.0, **{"both.0": score, "both.1": -score}) for score in (1.0, 2.0, 3.0)]
    reference = (-1.0, -0.5, 0.0, 0.5, 1.0)
    # quantiles of 1, 2, 3 are 2 above, those of -3, -2, -1 are 2 below
    assert score_drift(
        samples, {"both.0": reference, "both.1": (-3.0, -2.5, -2.0, -1.5, -1.0)}
    ) == {
        "reward/both.0_drift": pytest.approx(2.0),
        "reward/both.1_drift": pytest.approx(0.0),
    }
