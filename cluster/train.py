"""The PPO loop. Read :func:`train` first: it is the whole algorithm, in the order of the data.

Ray actors generate with vLLM, scores are fetched while later completions are still being written,
the learners take a synchronised PPO step, and the new weights go back, verified, before the next
prompt is answered.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.config import SamplingConfig
from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.drift_watch import DriftWatch, weight_metrics
from learner.batch import build_batch
from learner.config import PPOConfig
from learner.group import PPOLearners
from reward_service.config import RetryConfig
from reward_service.rewards import Reward
from reward_service.score import Score
from reward_service.scoring import score_stream

PROBE_SEQUENCES = 2
PROBE_TOKENS = 8
"""Enough to show a stale or misplaced tensor, which moves every log-probability, and cheap: of
each step's full sequences the log-probabilities are compared anyway when they are learned from."""

Measure = Callable[[Trajectory], Mapping[str, float]]
"""Figures about a sample that are recorded but never trained on (true quality)."""


class TrainingLog(Protocol):
    """What the loop needs of a run: where to go on, and what to do with failures and with a
    finished step."""

    next_step: int

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None: ...

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A trajectory with its score and measured figures."""

    trajectory: Trajectory
    score: Score
    measured: Mapping[str, float]


@dataclass
class Step:
    """What one step submitted and what became of it: every sample is in exactly one list.

    Attributes:
        submitted: The ``sample_id`` of every sample that was asked for.
    """

    submitted: Sequence[str]
    samples: list[Sample] = field(default_factory=list)
    failures: list[SampleFailure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def check_accounts(self, smallest_share: float) -> None:
        """``submitted = trained + failed``, sample by sample, and enough of it trained.

        Raises:
            RuntimeError: A sample was lost or came twice, or too many samples failed; names the
                sample or the most frequent reason.
        """
        found = Counter(s.trajectory.sample_id for s in self.samples)
        found.update(f.sample_id for f in self.failures)
        if found != Counter(self.submitted):
            wrong = sorted((found - Counter(self.submitted)) | (Counter(self.submitted) - found))
            raise RuntimeError(
                f"the accounts of this step do not balance: {len(self.submitted)} samples were "
                f"submitted, {len(self.samples)} are to be trained on and {len(self.failures)} "
                f"failed; lost, doubled or unknown: {', '.join(wrong[:5])}"
            )
        trained, failed = len(self.samples), len(self.failures)
        if trained < smallest_share * len(self.submitted) or not trained:
            reasons = Counter(f"{f.stage}: {f.reason}" for f in self.failures)
            raise RuntimeError(
                f"{failed} of {len(self.submitted)} samples of this step failed, more than "
                f"ppo.min_trained_share allows; most often because of "
                f"{reasons.most_common(1)[0][0]} (all of them are in quarantine.jsonl; go on with "
                "--resume when the cause is gone)"
            )

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


def train(
    config: PPOConfig,
    sampling: SamplingConfig,
    *,
    prompts: PromptStream,
    rollouts: RolloutPool,
    reward: Reward,
    learners: PPOLearners,
    log: TrainingLog,
    seed: int,
    measure: Measure,
    stop: Callable[[], bool],
    progress: Callable[[int, int, Mapping[str, float]], None],
    warn: Callable[[str], None],
    retry: RetryConfig | None = None,
) -> bool:
    """Run PPO from ``log.next_step`` to ``config.steps``.

    Returns:
        True when all steps are done, False when ``stop`` asked to end early. A step that was
        under way is then given up: it is generated again, from the same seeds, on resume.
    """
    watch = DriftWatch(config.drift_limits, warn)
    for number in range(log.next_step, config.steps):
        batch_of_prompts = prompts.batch(number)
        step = Step(submitted=sample_ids(batch_of_prompts, sampling.samples_per_prompt))
        with step.timed("generate"):
            answers = rollouts.generate(
                batch_of_prompts, sampling, run_seed=seed, round_index=number
            )
            try:
                collect(step, score_stream(reward, answers, retry=retry), measure, stop)
            finally:
                log.set_aside(number, step.failures)
        if stop():
            return False
        with step.timed("accounting"):
            step.check_accounts(config.min_trained_share)
        batch = build_batch(
            [sample.trajectory for sample in step.samples],
            [sample.score for sample in step.samples],
            config,
        )
        with step.timed("learn"):
            metrics = learners.update(batch)
        step.check_learned(metrics)
        watch.check(number, metrics)
        with step.timed("broadcast"):
            update = learners.export_weights(number + 1, probe_sequences(step.samples))
            confirmations = rollouts.load(update)
        watch.loaded(confirmations)
        metrics = {**metrics, **describe(step)}
        metrics |= weight_metrics(update, confirmations, metrics["seconds/step"])
        log.finish_step(number, metrics, step.samples)
        progress(number + 1, config.steps, watched(metrics))
    return True


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
    """Figures of a step that do not come from the learners."""
    values = np.array([s.score.value for s in step.samples])
    lengths = np.array([len(s.trajectory.response_ids) for s in step.samples])
    ended = [s.trajectory.finish_reason == "stop" for s in step.samples]
    tokens = float(lengths.sum())
    figures: dict[str, float] = {
        "samples/submitted": len(step.submitted),
        "samples/trained": len(step.samples),
        "samples/filtered": 0,
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
        names = sorted({name for s in step.samples for name in _figures(s, group)})
        prefix = "reward/" if group == "components" else "measured/"
        for name in names:
            found = [_figures(s, group)[name] for s in step.samples if name in _figures(s, group)]
            figures[f"{prefix}{name}"] = float(np.mean(found))
    figures |= {f"seconds/{phase}": value for phase, value in step.seconds.items()}
    total = sum(step.seconds.values())
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
        **sample.measured,
    }
