"""The PPO stage: start the parts, run the loop, keep checkpoints, leave a plain model behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from actors.prompts import PromptStream, tokenize_prompts
from cluster.checkpoint import CheckpointStore
from cluster.metrics import MetricsWriter
from cluster.stages import Workplace
from cluster.stop import Stopped
from cluster.train import Sample, sample_row, train
from learner.config import PPOConfig
from learner.group import PPOLearners
from reward_service.statistics import drift

SAMPLES_EVERY = 5
"""Steps between files of written-out samples; the first and the last step always have one."""


class PPOLog:
    """Writes what the loop reports: metrics each step, samples now and then, checkpoints."""

    def __init__(
        self,
        directory: Path,
        config: PPOConfig,
        learners: PPOLearners,
        writer: MetricsWriter,
        store: CheckpointStore,
        next_step: int,
        references: Mapping[str, Sequence[float]],
    ) -> None:
        """``references`` are the scores that each reward model was normalised on, as quantiles."""
        self.next_step = next_step
        self._references = references
        self._directory = directory
        self._config = config
        self._learners = learners
        self._writer = writer
        self._store = store

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        done = step + 1
        metrics = {**metrics, **score_drift(samples, self._references)}
        self._writer.write(done, metrics, total=self._config.steps)
        if step % SAMPLES_EVERY == 0 or done == self._config.steps:
            self._write_samples(done, samples)
        self.next_step = done
        if done % self._config.checkpoint_every == 0 or done == self._config.steps:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the state after the last finished step, unless it is saved already."""
        if self.next_step and self.next_step not in self._store.steps():
            self._store.save(self.next_step, {}, self._learners.save)

    def _write_samples(self, done: int, samples: Sequence[Sample]) -> None:
        path = self._directory / "samples" / f"step_{done:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample_row(sample), ensure_ascii=False) + "\n")


def score_drift(
    samples: Sequence[Sample], references: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """How far each reward model's scores have moved from those that it was normalised on.

    In standard deviations of the latter (``reward_service.statistics.drift``). A reward model
    knows texts like those; the further away, the less its scores are worth.
    """
    figures = {}
    for name, reference in references.items():
        scores = [s.score.components[name] for s in samples if name in s.score.components]
        if scores:
            figures[f"reward/{name}_drift"] = drift(scores, reference)
    return figures


def run_ppo(work: Workplace) -> dict[str, Any]:
    """Train with PPO from the policy model; writes ``ppo/`` and the final policy in it."""
    config = work.config
    assert config.ppo is not None
    directory = work.run_dir / "ppo"
    store = CheckpointStore(
        directory / "checkpoints", config.ppo.keep_checkpoints, warn=work.reporter.warn
    )
    checkpoint = store.latest() if work.resume else None
    policy = config.policy_model
    prompts = tokenize_prompts(
        work.data.prompts(), AutoTokenizer.from_pretrained(policy), config.data
    )
    work.reporter.say("starting vLLM, the reward service and the learners")
    parts = work.session.parts(policy, config.reward_terms, lambda: make_learners(work))
    rollouts, learners = parts.rollouts, parts.learners
    start = 0
    if checkpoint is not None:
        learners.restore(checkpoint.path)
        start = checkpoint.step
        rollouts.load(learners.export_weights(start, [prompts[0].token_ids.tolist()]))
        work.reporter.say(f"going on after step {start}")
    writer = MetricsWriter(
        directory,
        stage="ppo",
        tensorboard=work.run_dir / "tensorboard",
        resume_step=start if work.resume else None,
    )
    references = work.session.score_references()
    log = PPOLog(directory, config.ppo, learners, writer, store, start, references)
    work.session.forget_weights()
    with writer, work.reporter.bar("PPO") as bar:
        bar.update(start, config.ppo.steps, {})
        finished = train(
            config.ppo,
            config.sampling,
            prompts=PromptStream(prompts, config.ppo.prompts_per_step, config.seed),
            rollouts=rollouts,
            reward=parts.reward,
            learners=learners,
            log=log,
            seed=config.seed,
            measure=work.data.measure,
            stop=work.stop,
            progress=bar.update,
        )
    if not finished:
        log.checkpoint()
        raise Stopped(f"PPO after step {log.next_step}; go on with --resume")
    final = directory / "final"
    shutil.rmtree(final, ignore_errors=True)
    learners.save_policy(final)
    learners.shutdown()
    return {"steps": config.ppo.steps}


def make_learners(work: Workplace) -> PPOLearners:
    """Policy and reference from the policy model; the critic from a reward model of this run."""
    config = work.config
    assert config.ppo is not None
    trained = work.run_dir / "reward_model"
    uses_it = any(term.model == str(trained) for term in config.reward_terms)
    return PPOLearners(
        config.ppo,
        config.learners,
        policy_dir=config.policy_model,
        reference_dir=config.policy_model,
        critic_dir=trained if uses_it and config.ppo.critic_from_reward_model else None,
        temperature=config.sampling.temperature,
        total_steps=config.ppo.steps,
        seed=config.seed,
    )
