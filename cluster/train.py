"""The PPO loop. Read :func:`train` first: it is the whole algorithm, in the order of the data.

Ray actors generate with vLLM, scores are fetched while later completions are still being written,
the learners take a synchronised PPO step, and the new weights go back, verified, before the next
prompt is answered (with ``ppo.max_staleness`` 1, before the one after that).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from actors.config import SamplingConfig
from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from actors.trajectory import SampleFailure
from cluster.drift_watch import DriftWatch, as_stale, weight_metrics
from cluster.step import Measure, Sample, Step, describe, probe_sequences, watched
from cluster.step_source import Memory, StepSource
from cluster.timeline import LEARNERS, Clock
from learner.batch import ScoreScale, build_batch
from learner.config import PPOConfig
from learner.group import PPOLearners
from reward_service.config import RetryConfig
from reward_service.rewards import Reward


class TrainingLog(Memory, Protocol):
    """What the loop needs of a run: where to go on, and what to do with failures and with a
    finished step.

    Attributes:
        next_step: Step to go on with, counted from 0.
    """

    next_step: int

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None: ...

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None: ...


class KeptSteps:
    """A log that keeps every step's metrics and the last step's samples; a failure is an error."""

    def __init__(self) -> None:
        self.next_step = 0
        self.scale: ScoreScale | None = None
        self.ahead: Step | None = None
        self.steps: list[Mapping[str, float]] = []
        self.samples: list[Sample] = []

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None:
        if failures:
            raise RuntimeError(
                f"step {step}: {failures[0].stage} of {failures[0].sample_id} failed: "
                f"{failures[0].reason}"
            )

    def finish_step(
        self,
        step: int,  # noqa: ARG002  (the protocol's)
        metrics: Mapping[str, float],
        samples: Sequence[Sample],
    ) -> None:
        self.steps.append(metrics)
        self.samples = list(samples)


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
    timeline: Callable[[int, Clock], None] = lambda *_: None,
) -> bool:
    """Run PPO from ``log.next_step`` to ``config.steps``.

    Args:
        timeline: Given each step, counted from 1, and who was busy when, once all of it is done.

    Returns:
        True when all steps are done, False when ``stop`` asked to end early. A step that was
        under way is then given up: it is generated again, from the same seeds, on resume.

    Raises:
        LearnersLost: A learner died.
        RuntimeError: Too few good samples, drift, or anything else that more steps would only
            make worse.
    """
    watch = DriftWatch(config.drift_limits, warn)
    with StepSource(
        config,
        sampling,
        prompts=prompts,
        rollouts=rollouts,
        reward=reward,
        learners=learners,
        memory=log,
        seed=seed,
        measure=measure,
        stop=stop,
        retry=retry,
    ) as source:
        for number in range(log.next_step, config.steps):
            step = source.take(number)
            try:
                if not source.fill(step, number):
                    return False
            finally:
                log.set_aside(number, step.failures)
            assert log.scale is not None, "a step with samples has made it"
            with step.timed("accounting"):
                step.check_accounts(config.min_trained_share)
                staleness = step.staleness(number, config.max_staleness)
                batch = build_batch(
                    [sample.trajectory for sample in step.samples], step.scores, config, log.scale
                )
            with source.next_meanwhile(step, number + 1):
                with step.timed("learn"):
                    metrics = learners.update(batch)
                step.check_learned(metrics)
                if staleness:
                    metrics = as_stale(metrics)
                else:
                    watch.check(number, metrics)
            with step.timed("broadcast"):
                with step.clock.timed("export", LEARNERS):
                    update = learners.export_weights(number + 1, probe_sequences(step.samples))
                confirmations = rollouts.load(update)
            step.clock.remote_parts(metrics, confirmations)
            watch.loaded(confirmations)
            metrics = {**metrics, **describe(step)}
            metrics |= weight_metrics(update, confirmations, metrics["seconds/step"])
            metrics |= rollouts.figures()
            with step.timed("save"):
                log.finish_step(number, metrics, step.scored)
            timeline(number + 1, step.clock)
            progress(number + 1, config.steps, watched(metrics))
    return True


def take_steps(
    config: PPOConfig,
    sampling: SamplingConfig,
    *,
    prompts: PromptStream,
    rollouts: RolloutPool,
    reward: Reward,
    learners: PPOLearners,
    seed: int,
    warn: Callable[[str], None],
) -> KeptSteps:
    """Run PPO from the beginning to its end for the sake of what it reports: for a benchmark or a
    check, which no one stops and nothing resumes."""
    log = KeptSteps()
    train(
        config,
        sampling,
        prompts=prompts,
        rollouts=rollouts,
        reward=reward,
        learners=learners,
        log=log,
        seed=seed,
        measure=lambda _: {},
        stop=lambda: False,
        progress=lambda *_: None,
        warn=warn,
    )
    return log
