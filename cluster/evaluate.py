"""Comparison of checkpoints on held-out prompts: pure functions of samples and scores.

Every checkpoint answers the same prompts; the first one is the baseline ("before"). The result
keeps the texts too, so that the report shows them side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from actors.trajectory import Trajectory
from cluster.evaluation import (
    CheckpointResult,
    Comparison,
    Evaluation,
    PromptResponses,
    Response,
    Setting,
)
from cluster.text_statistics import distinct_n, repetition, self_bleu
from reward_service.intervals import Estimate, Groups, bootstrap_mean, share
from reward_service.score import Score


class Quality(Protocol):
    """True quality of one response, where the data can tell it."""

    @property
    def score(self) -> float: ...  # 0 to 1

    @property
    def good(self) -> bool: ...

    @property
    def parts(self) -> Mapping[str, float]: ...  # what the score is made of, each 0 to 1


TrueQuality = Callable[[Mapping[str, Any], str], Quality]
"""From a prompt's ``meta`` and a response's text."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSamples:
    """What one checkpoint wrote and what it was given for it.

    Attributes:
        name: Name in every table and plot ("sft", "ppo").
        trajectories: ``[N]`` its responses.
        scores: ``[N]`` the reward of each, in the same order.
        kl: ``[N]`` log p - log p_reference of each whole response in nats, or ``None``.
        failed: Samples that were set aside because generating or scoring them failed.
    """

    name: str
    trajectories: Sequence[Trajectory]
    scores: Sequence[Score]
    kl: Sequence[float] | None = None
    failed: int = 0

    def __post_init__(self) -> None:
        lengths = {"trajectories": len(self.trajectories), "scores": len(self.scores)}
        if self.kl is not None:
            lengths["kl"] = len(self.kl)
        if len(set(lengths.values())) != 1 or not self.trajectories:
            raise ValueError(f"{self.name}: lengths must be equal and > 0, got {lengths}")
        for trajectory, score in zip(self.trajectories, self.scores, strict=True):
            if trajectory.sample_id != score.sample_id:
                raise ValueError(
                    f"{self.name}: the score of {score.sample_id} stands beside the sample "
                    f"{trajectory.sample_id}"
                )


def evaluate_samples(
    checkpoints: Sequence[CheckpointSamples],
    *,
    true_quality: TrueQuality | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    settings: Mapping[str, Setting] | None = None,
) -> Evaluation:
    """Compares checkpoints by their samples; the first is the baseline.

    Args:
        checkpoints: One or more, with different names.
        true_quality: Judges a response exactly, where the data can.
        confidence: Of every interval.
        seed: Of the bootstrap; the same samples and seed give the same numbers.
        settings: Goes into the result unchanged.

    Raises:
        ValueError: No checkpoint, two of one name, two that share no prompt, or fewer than two
            prompts (an interval needs two).
    """
    names = [c.name for c in checkpoints]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"evaluation needs checkpoints with different names, got {names}")
    responses = {c.name: _responses(c, true_quality) for c in checkpoints}
    comparisons = []
    for name in names[1:]:
        for by in ("reward", "quality") if true_quality else ("reward",):
            comparisons.append(
                _compare(names[0], name, responses, by, confidence=confidence, seed=seed)
            )
    return Evaluation(
        checkpoints=tuple(
            _summarise(c, responses[c.name], confidence=confidence, seed=seed) for c in checkpoints
        ),
        comparisons=tuple(comparisons),
        prompts=_side_by_side(checkpoints, responses),
        settings=dict(settings or {}),
    )


def _responses(
    checkpoint: CheckpointSamples, true_quality: TrueQuality | None
) -> dict[str, list[Response]]:
    """The checkpoint's responses by prompt id, in the order of their sample index."""
    grouped: dict[str, list[Response]] = defaultdict(list)
    kl = checkpoint.kl if checkpoint.kl is not None else [None] * len(checkpoint.trajectories)
    rows = zip(checkpoint.trajectories, checkpoint.scores, kl, strict=True)
    for trajectory, score, divergence in rows:
        text = trajectory.response_text
        quality = true_quality(trajectory.prompt.meta, text) if true_quality else None
        grouped[trajectory.prompt.prompt_id].append(
            Response(
                checkpoint=checkpoint.name,
                sample_index=trajectory.sample_index,
                text=text,
                reward=float(score.value),
                tokens=len(trajectory.response_ids),
                finish_reason=trajectory.finish_reason,
                components={name: float(value) for name, value in score.components.items()},
                kl=None if divergence is None else float(divergence),
                quality=None if quality is None else float(quality.score),
                good=None if quality is None else bool(quality.good),
                quality_parts=(
                    {} if quality is None else {k: float(v) for k, v in quality.parts.items()}
                ),
            )
        )
    return {
        prompt_id: sorted(grouped[prompt_id], key=lambda r: r.sample_index)
        for prompt_id in sorted(grouped)
    }


def _summarise(
    checkpoint: CheckpointSamples,
    responses: Mapping[str, list[Response]],
    *,
    confidence: float,
    seed: int,
) -> CheckpointResult:
    """Everything that is said of one checkpoint alone."""

    def groups(value: Callable[[Response], Any]) -> Groups:
        return [[float(value(r)) for r in group] for group in responses.values()]

    def mean(value: Callable[[Response], Any]) -> Estimate:
        return bootstrap_mean(groups(value), seed=seed, confidence=confidence)

    flat = [r for group in responses.values() for r in group]
    texts = [r.text for r in flat]
    judged = flat[0].quality is not None
    return CheckpointResult(
        name=checkpoint.name,
        samples=len(flat),
        failed=checkpoint.failed,
        reward=mean(lambda r: r.reward),
        kl=mean(lambda r: r.kl) if checkpoint.kl is not None else None,
        quality=mean(lambda r: r.quality) if judged else None,
        good_share=(
            share(groups(lambda r: r.good), seed=seed, confidence=confidence) if judged else None
        ),
        quality_parts={
            name: sum(r.quality_parts[name] for r in flat) / len(flat)
            for name in flat[0].quality_parts
        },
        eos_rate=share(
            groups(lambda r: r.finish_reason == "stop"), seed=seed, confidence=confidence
        ),
        length_tokens=mean(lambda r: r.tokens),
        length_characters=sum(map(len, texts)) / len(texts),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_3=distinct_n(texts, 3),
        self_bleu=self_bleu(texts, seed=seed),
        repetition=sum(map(repetition, texts)) / len(texts),
    )


def _compare(
    baseline: str,
    name: str,
    responses: Mapping[str, Mapping[str, list[Response]]],
    by: Literal["reward", "quality"],
    *,
    confidence: float,
    seed: int,
) -> Comparison:
    """``name`` against ``baseline`` on the prompts that both have responses to."""
    shared = [prompt for prompt in responses[name] if prompt in responses[baseline]]
    if not shared:
        raise ValueError(
            f"{name!r} and {baseline!r} have no prompt in common: a win rate needs the same prompts"
        )
    outcomes: list[list[float]] = []  # for each prompt, of each pair: 1 won, 1/2 tied, 0 lost
    differences: list[list[float]] = []
    for prompt in shared:
        ours = [float(getattr(r, by)) for r in responses[name][prompt]]
        theirs = [float(getattr(r, by)) for r in responses[baseline][prompt]]
        outcomes.append([(a > b) + 0.5 * (a == b) for a in ours for b in theirs])
        differences.append([sum(ours) / len(ours) - sum(theirs) / len(theirs)])
    flat = [outcome for group in outcomes for outcome in group]
    return Comparison(
        name=name,
        baseline=baseline,
        by=by,
        win_rate=share(outcomes, seed=seed, confidence=confidence),
        wins=flat.count(1.0),
        ties=flat.count(0.5),
        losses=flat.count(0.0),
        difference=bootstrap_mean(differences, seed=seed, confidence=confidence),
    )


def _side_by_side(
    checkpoints: Sequence[CheckpointSamples],
    responses: Mapping[str, Mapping[str, list[Response]]],
) -> tuple[PromptResponses, ...]:
    """Every prompt with all checkpoints' responses, baseline first."""
    prompts = {
        trajectory.prompt.prompt_id: trajectory.prompt.text
        for checkpoint in checkpoints
        for trajectory in checkpoint.trajectories
    }
    return tuple(
        PromptResponses(
            prompt_id=prompt_id,
            prompt=prompts[prompt_id],
            responses=tuple(r for c in checkpoints for r in responses[c.name].get(prompt_id, [])),
        )
        for prompt_id in sorted(prompts)
    )
