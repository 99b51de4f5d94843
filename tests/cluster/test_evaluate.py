"""Evaluation of checkpoints on samples whose outcome is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.trajectory import Prompt, Trajectory
from cluster.evaluate import CheckpointSamples, evaluate_samples
from cluster.evaluation import read_evaluation, write_evaluation
from reward_service.intervals import wilson
from reward_service.score import Score


@dataclass(frozen=True)
class Judged:
    score: float
    good: bool

    @property
    def parts(self) -> dict[str, float]:
        return {"length": self.score}


def quality_of_length(meta: Mapping[str, Any], response: str) -> Judged:
    """Stands in for a data set's true quality: the longer the better, good from ``meta`` on."""
    return Judged(score=len(response) / 10, good=len(response) >= meta["good_from"])


def checkpoint(
    name: str,
    rows: Sequence[tuple[str, str, float]],
    *,
    kl: Sequence[float] | None = None,
    failed: int = 0,
    stopped: bool = True,
) -> CheckpointSamples:
    """``rows``: (prompt id, response, reward); a prompt id may come again."""
    seen: dict[str, int] = {}
    trajectories, scores = [], []
    for prompt_id, response, reward in rows:
        index = seen[prompt_id] = seen.get(prompt_id, -1) + 1
        count = max(1, len(response))
        trajectory = Trajectory(
            prompt=Prompt(
                prompt_id=prompt_id,
                token_ids=np.array([1], np.int32),
                text=f"Prompt {prompt_id}: ",
                meta={"good_from": 5},
            ),
            sample_index=index,
            response_ids=np.arange(count, dtype=np.int32),
            response_logprobs=np.full(count, -1.0, np.float32),
            policy_versions=np.zeros(count, np.int32),
            response_text=response,
            finish_reason="stop" if stopped else "length",
            seed=0,
        )
        trajectories.append(trajectory)
        scores.append(
            Score(sample_id=trajectory.sample_id, value=reward, components={"rm": reward})
        )
    return CheckpointSamples(
        name=name, trajectories=trajectories, scores=scores, kl=kl, failed=failed
    )


BEFORE = [("p1", "aaaa", 1.0), ("p2", "bb", 2.0), ("p3", "cccc", 0.0), ("p4", "d", 1.0)]
AFTER = [("p1", "aaaaaa", 2.0), ("p2", "bbbbb", 2.0), ("p3", "ccc", -1.0), ("p4", "ddddd", 3.0)]


def test_win_rate_counts_ties_half() -> None:
    result = evaluate_samples(
        [checkpoint("sft", BEFORE), checkpoint("ppo", AFTER)], true_quality=quality_of_length
    )
    by_reward = result.comparison("ppo", "reward")
    assert by_reward is not None
    assert (by_reward.wins, by_reward.ties, by_reward.losses) == (2, 1, 1)
    assert by_reward.win_rate == wilson(2.5, 4)
    assert by_reward.difference.value == pytest.approx((1 + 0 - 1 + 2) / 4)
    by_quality = result.comparison("ppo", "quality")
    assert by_quality is not None
    assert (by_quality.wins, by_quality.ties, by_quality.losses) == (3, 0, 1)
    assert by_quality.difference.value == pytest.approx((0.2 + 0.3 - 0.1 + 0.4) / 4)
    assert result.comparison("sft", "reward") is None


def test_summary_of_a_checkpoint_by_hand() -> None:
    result = evaluate_samples(
        [
            checkpoint("sft", BEFORE, kl=[0.0, 0.0, 0.0, 0.0]),
            checkpoint("ppo", AFTER, kl=[1.0, 2.0, 3.0, 6.0], failed=2, stopped=False),
        ],
        true_quality=quality_of_length,
    )
    before, after = result.checkpoints
    assert result.baseline is before
    assert before.reward.value == 1.0
    assert after.reward.value == 1.5
    assert after.kl is not None
    assert after.kl.value == 3.0
    assert 1.0 <= after.kl.low < 3.0 < after.kl.high <= 6.0
    assert before.good_share == wilson(0, 4)
    assert after.good_share == wilson(3, 4)
    assert after.quality is not None
    assert after.quality.value == pytest.approx((0.6 + 0.5 + 0.3 + 0.5) / 4)
    assert after.quality_parts == {"length": after.quality.value}
    assert (before.eos_rate.value, after.eos_rate.value) == (1.0, 0.0)
    assert after.length_tokens.value == after.length_characters == (6 + 5 + 3 + 5) / 4
    assert (after.samples, after.failed) == (4, 2)
    assert after.distinct_1 == 1.0
    assert after.self_bleu == 0.0
    assert after.repetition == 0.0


def test_several_samples_a_prompt_meet_each_other() -> None:
    before = checkpoint("sft", [("p1", "x", 0.0), ("p1", "x", 2.0), ("p2", "x", 1.0)])
    after = checkpoint("ppo", [("p1", "x", 1.0), ("p1", "x", 3.0), ("p2", "x", 1.0)])
    comparison = evaluate_samples([before, after]).comparison("ppo", "reward")
    assert comparison is not None
    # p1: 1 > 0, 1 < 2, 3 > 0, 3 > 2; p2: a tie.
    assert (comparison.wins, comparison.ties, comparison.losses) == (3, 1, 1)
    assert comparison.win_rate.value == pytest.approx(3.5 / 5)
    assert comparison.win_rate.method == "bootstrap"
    assert comparison.difference.value == pytest.approx((1.0 + 0.0) / 2)


def test_a_missing_prompt_is_left_out_of_the_comparison_only() -> None:
    result = evaluate_samples([checkpoint("sft", BEFORE), checkpoint("ppo", AFTER[:3], failed=1)])
    comparison = result.comparison("ppo", "reward")
    assert comparison is not None
    assert comparison.win_rate.n == 3
    assert [len(p.responses) for p in result.prompts] == [2, 2, 2, 1]
    assert [r.checkpoint for r in result.prompts[0].responses] == ["sft", "ppo"]
    assert result.prompts[0].prompt == "Prompt p1: "
    assert result.checkpoints[0].kl is None
    assert result.checkpoints[0].good_share is None


def test_three_checkpoints_are_each_compared_with_the_first() -> None:
    result = evaluate_samples(
        [checkpoint(name, rows) for name, rows in [("a", BEFORE), ("b", AFTER), ("c", BEFORE)]]
    )
    assert [(c.name, c.baseline, c.by) for c in result.comparisons] == [
        ("b", "a", "reward"),
        ("c", "a", "reward"),
    ]
    assert result.comparisons[1].win_rate.value == 0.5


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        evaluate_samples([checkpoint("a", BEFORE), checkpoint("a", AFTER)])
    with pytest.raises(ValueError, match="different names"):
        evaluate_samples([])
    with pytest.raises(ValueError, match="no prompt in common"):
        evaluate_samples(
            [checkpoint("a", BEFORE), checkpoint("b", [("q1", "x", 0.0), ("q2", "x", 0.0)])]
        )
    with pytest.raises(ValueError, match="at least 2 prompts"):
        evaluate_samples([checkpoint("a", BEFORE[:1])])
    one = checkpoint("a", BEFORE)
    with pytest.raises(ValueError, match=r"lengths must be equal.*'kl': 1"):
        CheckpointSamples(name="a", trajectories=one.trajectories, scores=one.scores, kl=[1.0])
    with pytest.raises(ValueError, match="the score of p2#0 stands beside the sample p1#0"):
        CheckpointSamples(name="a", trajectories=one.trajectories[:1], scores=one.scores[1:2])


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = [("p1", "<b>桥梁</b>\u202e", 1.0), ("p2", "b", 2.0)]
    evaluation = evaluate_samples(
        [checkpoint("sft", rows, kl=[0.1, 0.2]), checkpoint("ppo", rows)],
        true_quality=quality_of_length,
        settings={"temperature": 1.0, "prompts": "held-out"},
    )
    write_evaluation(tmp_path, evaluation)
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_broken_evaluation_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rlhf evaluate"):
        read_evaluation(tmp_path)
    path = tmp_path / "evaluation.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not an evaluation"):
        read_evaluation(path)
    write_evaluation(path, evaluate_samples([checkpoint("sft", BEFORE)]))
    raw = json.loads(path.read_text())
    raw["checkpoints"][0]["reward"]["value"] = "high"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"checkpoints\.0\.reward\.value"):
        read_evaluation(path)
