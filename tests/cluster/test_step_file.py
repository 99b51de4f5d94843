"""A step's samples that wait in a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.checkpoint import Checkpoint
from cluster.config import RunConfig
from cluster.ppo_stage import samples_ahead
from cluster.resume import as_json
from cluster.step import Sample, Step
from cluster.step_file import read_step, write_step
from learner.batch import ScoreScale, build_batch
from learner.config import PPOConfig
from reward_service.score import Score

PROMPTS = [
    Prompt(prompt_id=f"p{i}", token_ids=np.array([3, 4 + i], np.int32), text=f"text {i}")
    for i in range(3)
]


def sample(prompt: Prompt, index: int, rng: np.random.Generator, *, per_token: bool) -> Sample:
    length = int(rng.integers(1, 7))
    trajectory = Trajectory(
        prompt=prompt,
        sample_index=index,
        response_ids=rng.integers(3, 500, length).astype(np.int32),
        response_logprobs=-rng.exponential(2.0, length).astype(np.float32),
        policy_versions=np.full(length, 4, np.int32),
        response_text='"§ \u2028 北京 \U0001f600',
        finish_reason="length",
        seed=2**62 + 12345,
    )
    tokens = rng.normal(size=length).astype(np.float32) if per_token else None
    value = float(rng.normal()) if tokens is None else float(tokens.sum(dtype=np.float64))
    score = Score(
        sample_id=trajectory.sample_id,
        value=value,
        per_token=tokens,
        components={"a": value / 3, "b": float(rng.normal())},
        model_version="a@1,b@2",
    )
    return Sample(trajectory=trajectory, score=score, measured={"good": True, "q": 0.1 + 0.2})


def make_step() -> Step:
    rng = np.random.default_rng(0)
    samples = [sample(PROMPTS[i // 2], i % 2, rng, per_token=i == 1) for i in range(4)]
    failures = [
        SampleFailure(
            prompt=PROMPTS[2], sample_index=0, stage="scoring", reason="NaN", attempts=3,
            response="x",
        ),
        SampleFailure(prompt=PROMPTS[2], sample_index=1, stage="generation", reason="died"),
    ]  # fmt: skip
    return Step(
        submitted=["p0#0", "p0#1", "p1#0", "p1#1", "p2#0", "p2#1"],
        samples=samples[:3],
        filtered=[replace(samples[3], filtered="no_spread")],
        failures=failures,
        extra=2,
        extra_rounds=1,
        extra_prompts=1,
    )


def test_a_step_comes_back_bit_for_bit(tmp_path: Path) -> None:
    step = make_step()
    write_step(tmp_path / "ahead.json", step)
    back = read_step(tmp_path / "ahead.json", PROMPTS)
    write_step(tmp_path / "again.json", back)
    assert (tmp_path / "ahead.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    back.check_accounts(0.5)
    assert (back.submitted, back.extra, back.extra_rounds, back.extra_prompts) == (
        step.submitted, 2, 1, 1,
    )  # fmt: skip
    for one, other in zip(step.scored, back.scored, strict=True):
        assert other.trajectory.prompt is one.trajectory.prompt
        for name in ("response_ids", "response_logprobs", "policy_versions"):
            a, b = getattr(one.trajectory, name), getattr(other.trajectory, name)
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
        assert one.score.value == other.score.value
        assert one.measured == other.measured
        assert one.filtered == other.filtered
    for failed, same in zip(step.failures, back.failures, strict=True):
        assert (same.sample_id, same.stage, same.reason, same.attempts, same.response) == (
            failed.sample_id, failed.stage, failed.reason, failed.attempts, failed.response,
        )  # fmt: skip
    config, scale = PPOConfig(), ScoreScale()
    batches = [
        build_batch([s.trajectory for s in one.samples], one.scores, config, scale)
        for one in (step, back)
    ]
    for name in batches[0].columns:
        assert batches[0].columns[name].tobytes() == batches[1].columns[name].tobytes()


def test_prompts_that_are_gone_or_changed_are_named(tmp_path: Path) -> None:
    write_step(tmp_path / "ahead.json", make_step())
    with pytest.raises(ValueError, match="no such prompts any more: p1, p2"):
        read_step(tmp_path / "ahead.json", PROMPTS[:1])
    other = replace(PROMPTS[0], token_ids=np.array([9], np.int32))
    with pytest.raises(ValueError, match="no such prompts any more: p0"):
        read_step(tmp_path / "ahead.json", [other, *PROMPTS[1:]])


def configured(**ppo: Any) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "runs/x", "model": "m", "ppo": {"steps": 9} | ppo})


def at_step(path: Path, step: int, config: RunConfig) -> Checkpoint:
    return Checkpoint(path=path, step=step, state={}, config=as_json(config), versions={})


def test_samples_of_a_checkpoint_are_taken_where_they_are_of_use(tmp_path: Path) -> None:
    """Otherwise the step is generated anew, which is said, as the bits are others then."""
    told: list[str] = []
    fresh, ahead = configured(), configured(max_staleness=1)
    assert samples_ahead(at_step(tmp_path, 4, fresh), fresh, PROMPTS, told.append) is None
    assert samples_ahead(at_step(tmp_path, 9, ahead), ahead, PROMPTS, told.append) is None
    assert told == [], "there were none to be expected"
    checkpoint = at_step(tmp_path, 4, ahead)
    assert samples_ahead(checkpoint, ahead, PROMPTS, told.append) is None
    write_step(tmp_path / "ahead.json", make_step())
    longer = configured(max_staleness=1, steps=99, checkpoint_every=3)
    for unchanged in (ahead, longer):
        found = samples_ahead(checkpoint, unchanged, PROMPTS, told.append)
        assert found is not None
        assert len(found.scored) == 4
    assert len(told) == 1
    for config, prompts in (
        (fresh, PROMPTS),
        (configured(max_staleness=1, truncated="filter"), PROMPTS),
        (ahead, PROMPTS[1:]),
        (configured(max_staleness=1, min_trained_share=0.9), PROMPTS),
    ):
        assert samples_ahead(checkpoint, config, prompts, told.append) is None
    whys = (
        "it has none",
        "max_staleness is 0 now",
        "settings have changed: ppo.truncated 'score' -> 'filter'",
        "no such prompts any more: p0",
        "samples of",
    )
    for sentence, why in zip(told, whys, strict=True):
        assert "made ahead of step 5 are not taken from the checkpoint" in sentence
        assert why in sentence
