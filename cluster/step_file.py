"""A step's samples as a file, for a checkpoint that is written while they wait to be trained on.

JSON: Python writes a float such that reading it gives the same bits, float32 included. Prompts are
named, not repeated: a run that goes on has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.step import Sample, Step
from reward_service.score import Score

COUNTS = ("extra", "extra_rounds", "extra_prompts")


def write_step(path: Path, step: Step) -> None:
    """Write everything of ``step`` but its clock."""
    value = {
        "submitted": step.submitted,
        "samples": [_sample_row(sample) for sample in step.samples],
        "filtered": [_sample_row(sample) for sample in step.filtered],
        "failures": [_failure_row(failure) for failure in step.failures],
        **{name: getattr(step, name) for name in COUNTS},
    }
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def read_step(path: Path, prompts: Sequence[Prompt]) -> Step:
    """The step of a file.

    Raises:
        ValueError: It names a prompt that is not among ``prompts``.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    rows = [*value["samples"], *value["filtered"], *value["failures"]]
    missing = sorted({row["prompt"] for row in rows} - set(by_id))
    if missing:
        raise ValueError(
            f"{path} has samples of prompts that the data no longer has ({', '.join(missing[:5])}):"
            " put the old prompts back, or start anew with --overwrite"
        )
    return Step(
        submitted=value["submitted"],
        samples=[_sample(row, by_id) for row in value["samples"]],
        filtered=[_sample(row, by_id) for row in value["filtered"]],
        failures=[_failure(row, by_id) for row in value["failures"]],
        **{name: value[name] for name in COUNTS},
    )


def _sample_row(sample: Sample) -> dict[str, Any]:
    trajectory, score = sample.trajectory, sample.score
    return {
        "prompt": trajectory.prompt.prompt_id,
        "index": trajectory.sample_index,
        "ids": trajectory.response_ids.tolist(),
        "logprobs": trajectory.response_logprobs.tolist(),
        "versions": trajectory.policy_versions.tolist(),
        "text": trajectory.response_text,
        "finish_reason": trajectory.finish_reason,
        "seed": trajectory.seed,
        "score": score.value,
        "per_token": None if score.per_token is None else score.per_token.tolist(),
        "components": dict(score.components),
        "model_version": score.model_version,
        "measured": dict(sample.measured),
        "why_filtered": sample.filtered,
    }


def _sample(row: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Sample:
    trajectory = Trajectory(
        prompt=prompts[row["prompt"]],
        sample_index=row["index"],
        response_ids=np.array(row["ids"], np.int32),
        response_logprobs=np.array(row["logprobs"], np.float32),
        policy_versions=np.array(row["versions"], np.int32),
        response_text=row["text"],
        finish_reason=row["finish_reason"],
        seed=row["seed"],
    )
    per_token = None if row["per_token"] is None else np.array(row["per_token"], np.float32)
    score = Score(
        sample_id=trajectory.sample_id,
        value=row["score"],
        per_token=per_token,
        components=row["components"],
        model_version=row["model_version"],
    )
    return Sample(
        trajectory=trajectory,
        score=score,
        measured=row["measured"],
        filtered=row["why_filtered"],
    )


def _failure_row(failure: SampleFailure) -> dict[str, Any]:
    return {
        "prompt": failure.prompt.prompt_id,
        "index": failure.sample_index,
        "stage": failure.stage,
        "reason": failure.reason,
        "attempts": failure.attempts,
        "response": failure.response,
    }


def _failure(row: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> SampleFailure:
    return SampleFailure(
        prompt=prompts[row["prompt"]],
        sample_index=row["index"],
        stage=row["stage"],
        reason=row["reason"],
        attempts=row["attempts"],
        response=row["response"],
    )
