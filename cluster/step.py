"""One PPO step's samples: sorted as they arrive, accounted for, and described.

Every sample that a step submits ends in exactly one of three lists: trained, filtered or failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.prompts import PromptStream
from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.timeline import Clock
from learner.batch import ScoreScale
from learner.config import PPOConfig
from learner.sample_filter import EXPLANATIONS, FilterReason, filter_reasons
from reward_service.score import Score

PROBE_SEQUENCES = 2
PROBE_TOKENS = 8
"""Enough to show a stale or misplaced tensor, which moves every log-probability, and cheap: of
each step's full sequences the log-probabilities are compared anyway when they are learned from."""

Measure = Callable[[Trajectory], Mapping[str, float]]
"""Figures about a sample that are recorded but never trained on (true quality)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A trajectory with its score and measured figures.

    Attributes:
        filtered: Why it is not trained on, or None.
    """

    trajectory: Trajectory
    score: Score
    measured: Mapping[str, float]
    filtered: FilterReason | None = None


@dataclass
class Step:
    """What one step submitted and what became of it: every sample is in exactly one list.

    Attributes:
        submitted: The ``sample_id`` of every sample that was asked for.
    """

    submitted: list[str]
    samples: list[Sample] = field(default_factory=list)
    filtered: list[Sample] = field(default_factory=list)
    failures: list[SampleFailure] = field(default_factory=list)
    extra: int = 0
    """Those of the submitted samples that were asked in place of filtered ones."""
    extra_rounds: int = 0
    extra_prompts: int = 0
    clock: Clock = field(default_factory=Clock)

    @property
    def scored(self) -> list[Sample]:
        return self.samples + self.filtered

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """The block is one phase of the loop."""
        return self.clock.timed(phase)

    @property
    def scores(self) -> list[Score]:
        """Of the samples that are trained on."""
        return [sample.score for sample in self.samples]

    def filter(self, config: PPOConfig, scale: ScoreScale) -> None:
        """Move the samples that ``config`` filters from ``samples`` to ``filtered``."""
        reasons = filter_reasons([s.trajectory for s in self.samples], self.scores, config, scale)
        judged = [replace(s, filtered=reasons.get(s.trajectory.sample_id)) for s in self.samples]
        self.samples = [sample for sample in judged if sample.filtered is None]
        self.filtered += [sample for sample in judged if sample.filtered is not None]

    def replacements(
        self, prompts: PromptStream, number: int, config: PPOConfig, samples_per_prompt: int
    ) -> list[Prompt]:
        """One prompt for each group without spread that has not been replaced yet, to be asked
        in a further round of step ``number``; none when there is to be no further round."""
        rule = config.dynamic_sampling
        if rule is None or self.extra_rounds == rule.max_extra_rounds:
            return []
        flat = {s.trajectory.prompt.prompt_id for s in self.filtered if s.filtered == "no_spread"}
        found = prompts.replacements(number, self.extra_prompts, len(flat) - self.extra_prompts)
        if found:
            self.extra_rounds += 1
            self.extra_prompts += len(found)
            ids = sample_ids(found, samples_per_prompt)
            self.extra += len(ids)
            self.submitted += ids
        return found

    def check_accounts(self, smallest_share: float) -> None:
        """``submitted = trained + filtered + failed``, sample by sample, and enough of it trained.

        Samples that were asked in place of filtered ones do not raise what is enough.

        Raises:
            RuntimeError: A sample was lost or came twice, or too many samples failed or were
                filtered; names the sample or the most frequent reason.
        """
        found = Counter(s.trajectory.sample_id for s in self.scored)
        found.update(f.sample_id for f in self.failures)
        if found != Counter(self.submitted):
            wrong = sorted((found - Counter(self.submitted)) | (Counter(self.submitted) - found))
            raise RuntimeError(
                f"the accounts of this step do not balance: {len(self.submitted)} samples were "
                f"submitted, {len(self.samples)} are to be trained on, {len(self.filtered)} were "
                f"filtered and {len(self.failures)} failed; lost, doubled or unknown: "
                f"{', '.join(wrong[:5])}"
            )
        trained, lost = len(self.samples), len(self.filtered) + len(self.failures)
        if trained < smallest_share * (len(self.submitted) - self.extra) or not trained:
            reasons = Counter(f"{f.stage}: {f.reason}" for f in self.failures)
            reasons.update(EXPLANATIONS[s.filtered] for s in self.filtered if s.filtered)
            raise RuntimeError(
                f"{lost} of {len(self.submitted)} samples of this step failed or were filtered, "
                f"more than ppo.min_trained_share allows; most often because of "
                f"{reasons.most_common(1)[0][0]} (failed ones are in quarantine.jsonl; go on with "
                "--resume when the cause is gone, or with a smaller share)"
            )

    def staleness(self, number: int, most: int) -> int:
        """How many updates the samples of step ``number``, counted from 0, are behind the learners.

        Raises:
            RuntimeError: A sample is more than ``most`` behind, or of weights yet to come.
        """
        behind = {number - int(v) for s in self.samples for v in s.trajectory.policy_versions}
        if not behind <= set(range(most + 1)):
            raise RuntimeError(
                f"samples of step {number + 1} were made by weights that are {sorted(behind)}"
                f" updates behind the learners, ppo.max_staleness is {most}"
            )
        return max(behind)

    def check_learned(self, metrics: Mapping[str, float]) -> None:
        """The learners trained on exactly these samples and their tokens.

        Raises:
            RuntimeError: Masks or lengths were damaged on the way.
        """
        tokens = sum(len(sample.trajectory.response_ids) for sample in self.samples)
        learned = metrics["ppo/samples"], metrics["ppo/tokens"]
        if learned != (len(self.samples), tokens):
            raise RuntimeError(
                f"the learners trained on {learned[1]:.0f} response tokens of {learned[0]:.0f} "
                f"samples, but the step has {tokens} of {len(self.samples)}: masks or lengths were "
                "damaged on the way; go on with --resume from the last checkpoint"
            )


def sample_ids(prompts: Sequence[Prompt], samples_per_prompt: int) -> list[str]:
    """What a step submits, by the identity that each sample keeps."""
    return [f"{p.prompt_id}#{index}" for p in prompts for index in range(samples_per_prompt)]


def collect(
    step: Step,
    scored: Iterator[tuple[Trajectory, Score] | SampleFailure],
    measure: Measure,
    stop: Callable[[], bool],
) -> None:
    """Sort a stream of scored samples into ``step``, in an order that arrival cannot change."""
    for item in scored:
        if isinstance(item, SampleFailure):
            step.failures.append(item)
        else:
            trajectory, score = item
            step.samples.append(
                Sample(trajectory=trajectory, score=score, measured=measure(trajectory))
            )
        if stop():
            return
    step.samples.sort(key=lambda s: (s.trajectory.prompt.prompt_id, s.trajectory.sample_index))
    step.failures.sort(key=lambda f: (f.prompt.prompt_id, f.sample_index))


def probe_sequences(samples: Sequence[Sample]) -> list[list[int]]:
    """Real sequences on which engine and learner must agree after the update."""
    chosen = samples[:: max(1, len(samples) // PROBE_SEQUENCES)][:PROBE_SEQUENCES]
    sequences = [
        [*s.trajectory.prompt.token_ids.tolist(), *s.trajectory.response_ids.tolist()]
        for s in chosen
    ]
    return [ids[-PROBE_TOKENS:] for ids in sequences]


def describe(step: Step) -> dict[str, float]:
    """Figures of a step that do not come from the learners.

    Rewards and responses are those of all scored samples, filtered ones included: what the policy
    does must not look better because the bad is left out.
    """
    scored = step.scored
    values = np.array([s.score.value for s in scored])
    lengths = np.array([len(s.trajectory.response_ids) for s in scored])
    ended = [s.trajectory.finish_reason == "stop" for s in scored]
    tokens = float(lengths.sum())
    figures: dict[str, float] = {
        "samples/submitted": len(step.submitted),
        "samples/trained": len(step.samples),
        "samples/filtered": len(step.filtered),
        "samples/failed": len(step.failures),
        **{
            f"samples/failed_{stage}": sum(f.stage == stage for f in step.failures)
            for stage in ("generation", "scoring")
        },
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std()),
        "reward/min": float(values.min()),
        "reward/max": float(values.max()),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/eos_rate": float(np.mean(ended)),
        "tokens/response": tokens,
    }
    for group in ("components", "measured"):
        names = sorted({name for s in scored for name in _figures(s, group)})
        prefix = "reward/" if group == "components" else "measured/"
        for name in names:
            found = [_figures(s, group)[name] for s in scored if name in _figures(s, group)]
            figures[f"{prefix}{name}"] = float(np.mean(found))
    reasons = [sample.filtered for sample in step.filtered if sample.filtered is not None]
    figures |= {f"samples/filtered_{r}": reasons.count(r) for r in sorted(set(reasons))}
    if step.extra_rounds:
        figures["samples/extra_rounds"] = step.extra_rounds
    seconds = step.clock.seconds()
    figures |= {f"seconds/{phase}": value for phase, value in seconds.items()}
    total = sum(seconds.values())
    figures["seconds/step"] = total
    figures["tokens/per_second"] = tokens / total if total else 0.0
    return figures


def watched(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few figures that belong beside the progress bar."""
    names = {
        "reward/mean": "reward",
        "ppo/kl_sequence": "KL",
        "response/length_mean": "length",
        "measured/good": "good",
    }
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _figures(sample: Sample, group: str) -> Mapping[str, float]:
    return sample.score.components if group == "components" else sample.measured


def failure_row(step: int, failure: SampleFailure) -> dict[str, Any]:
    """A failure as it is written to ``quarantine.jsonl``; ``step`` counts from 1, as in metrics."""
    return {
        "step": step,
        "sample_id": failure.sample_id,
        "prompt": failure.prompt.text,
        "response": failure.response,
        "stage": failure.stage,
        "reason": failure.reason,
        "attempts": failure.attempts,
    }


def sample_row(sample: Sample) -> dict[str, Any]:
    """A sample as it is written to ``samples/step_*.jsonl``."""
    trajectory = sample.trajectory
    return {
        "sample_id": trajectory.sample_id,
        "prompt_id": trajectory.prompt.prompt_id,
        "prompt": trajectory.prompt.text,
        "response": trajectory.response_text,
        "score": sample.score.value,
        "components": dict(sample.score.components),
        "length": len(trajectory.response_ids),
        "finish_reason": trajectory.finish_reason,
        "policy_version": int(trajectory.policy_versions[-1]),
        **({"filtered": sample.filtered} if sample.filtered else {}),
        **sample.measured,
    }
