"""A step's samples as a file, for a checkpoint that is written while they wait to be trained on.

JSON: Python writes a float such that reading it gives the same bits, float32 included. Prompts are
named, with a digest of their tokens, and not repeated: a run that goes on has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.step import Sample, Step
from reward_service.score import Score

COUNTS = ("extra", "extra_rounds", "extra_prompts")


def write_step(path: Path, step: Step) -> None:
    """Write everything of ``step`` but its clock."""
    prompts = {p.prompt_id: _digest(p) for p in _prompts(step)}
    value = {
        "prompts": prompts,
        "submitted": step.submitted,
        "samples": [_sample_row(sample) for sample in step.samples],
        "filtered": [_sample_row(sample) for sample in step.filtered],
        "failures": [_failure_row(failure) for failure in step.failures],
        **{name: getattr(step, name) for name in COUNTS},
    }
    path.write_text(json.dumps(value), encoding="utf-8")


def read_step(path: Path, prompts: Sequence[Prompt]) -> Step:
    """The step of a file.

    Raises:
        ValueError: It has samples of a prompt that is not among ``prompts``, or not as it was.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    changed = sorted(
        name
        for name, digest in value["prompts"].items()
        if name not in by_id or _digest(by_id[name]) != digest
    )
    if changed:
        raise ValueError(f"the data has no such prompts any more: {', '.join(changed[:5])}")
    return Step(
        submitted=value["submitted"],
        samples=[_sample(row, by_id) for row in value["samples"]],
        filtered=[_sample(row, by_id) for row in value["filtered"]],
        failures=[_failure(row, by_id) for row in value["failures"]],
        **{name: value[name] for name in COUNTS},
    )


def _prompts(step: Step) -> Iterator[Prompt]:
    for sample in step.scored:
        yield sample.trajectory.prompt
    for failure in step.failures:
        yield failure.prompt


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(prompt.token_ids.astype("<i4").tobytes()).hexdigest()


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
