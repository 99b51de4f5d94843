"""The PPO stage: start the parts, run the loop, keep checkpoints, leave a plain model behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from actors.fingerprint import template_fingerprint
from actors.prompts import PromptStream, tokenize_prompts
from actors.trajectory import Prompt, SampleFailure
from actors.weights import WeightsLost
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.config import RunConfig
from cluster.drift_watch import FIGURES
from cluster.health import Watch, is_coarse
from cluster.live_metrics import LiveMetrics
from cluster.metrics import MetricsWriter
from cluster.recovery import Recovery
from cluster.resume import as_json, changed_results, check_inputs, differences, input_digests
from cluster.session import Parts
from cluster.stages import Workplace
from cluster.step import Sample, Step, failure_row, probe_sequences, sample_row
from cluster.step_file import read_step, write_step
from cluster.step_lines import StepLines
from cluster.step_record import StepRecord
from cluster.stop import Stopped
from cluster.storage import RunMirror
from cluster.train import train
from cluster.whole_file import replace_text
from learner.batch import ScoreScale
from learner.config import PPOConfig
from learner.group import LearnersLost, PPOLearners
from reward_service.encoding import RewardHead
from reward_service.statistics import drift

SAMPLES_EVERY = 5
"""Steps between files of written-out samples; the first and the last step always have one."""

CONTEXT = "max_position_embeddings"
AHEAD = "ahead.json"
"""In a checkpoint: the samples of the next step, where they were generated ahead."""


class PPOLog:
    """Writes what the loop reports: metrics and failures each step, samples now and then,
    checkpoints.

    Args:
        inputs: Digests of the models that the run reads.
        references: The scores that each reward model was normalised on, as quantiles.
        next_step: Step to go on with, counted from 0; lines of it and later ones are cut.
        scale: Of the scores, when a checkpoint has it.
        ahead: Samples of the next step, when a checkpoint has them.
        mirror: Gets a copy of the run with each checkpoint.
        recovery: Told of each step that is finished.
    """

    def __init__(
        self,
        directory: Path,
        config: PPOConfig,
        learners: PPOLearners,
        writer: MetricsWriter,
        store: CheckpointStore,
        inputs: Mapping[str, str],
        next_step: int,
        scale: ScoreScale | None,
        ahead: Step | None,
        references: Mapping[str, Sequence[float]],
        watch: Watch,
        warn: Callable[[str], None],
        recovery: Recovery,
        mirror: RunMirror | None = None,
    ) -> None:
        self.next_step = next_step
        self.scale = scale
        self.ahead = ahead
        self._watch = watch
        self._warn = warn
        self._mirror = mirror
        self._live = LiveMetrics(directory.parent.name)
        self._recovery = recovery
        self._references = references
        self._directory = directory
        self._config = config
        self._learners = learners
        self._writer = writer
        self._store = store
        self._inputs = inputs
        self._quarantine = StepLines(directory / "quarantine.jsonl", resume_step=next_step)
        self._metrics: Mapping[str, float] = {}
        self._probe: list[list[int]] = []

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None:
        self._quarantine.append(failure_row(step + 1, failure) for failure in failures)

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        done = step + 1
        self._store.chosen_metric(metrics)  # said in the first step, not at the first checkpoint
        self._recovery.reached(done)
        metrics = {**metrics, **score_drift(samples, self._references)}
        metrics["recovery/learner_restarts"] = self._recovery.restarts
        self._writer.write(done, metrics, total=self._config.steps)
        self._live.show(done, metrics)
        told = {figure.metric for figure in FIGURES}  # by the loop's own DriftWatch
        rest = {name: value for name, value in metrics.items() if name not in told}
        for sentence in self._watch.step(done, rest):
            self._warn(sentence)
        if step % SAMPLES_EVERY == 0 or done == self._config.steps:
            self._write_samples(done, samples)
        self.next_step, self._metrics = done, metrics
        self._probe = probe_sequences([s for s in samples if s.filtered is None])
        if done % self._config.checkpoint_every == 0 or done == self._config.steps:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the state after the last finished step, unless it is saved already."""
        if self.next_step and self.next_step not in self._store.steps():
            self._writer.sync()
            self._quarantine.sync()
            # The probe, so that a resumed run hands its engines the very same update.
            assert self.scale is not None, "a finished step has scores"
            state = {
                "probe": self._probe,
                "inputs": dict(self._inputs),
                "score_scale": asdict(self.scale),
            }
            self._store.save(self.next_step, state, self._write_state, self._metrics)
            if self._mirror is not None:
                self._mirror.sync()

    def close(self) -> None:
        self._quarantine.close()

    def _write_state(self, directory: Path) -> Mapping[str, str]:
        contents = self._learners.save(directory)
        if self.ahead is None:
            return contents
        write_step(directory / AHEAD, self.ahead)
        return {**contents, AHEAD: "samples of the next step, made by weights of the one before"}

    def _write_samples(self, done: int, samples: Sequence[Sample]) -> None:
        path = self._directory / "samples" / f"step_{done:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps(sample_row(sample), ensure_ascii=False) for sample in samples)
        replace_text(path, "".join(f"{row}\n" for row in rows), errors="backslashreplace")


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
    """Train with PPO from the policy model; writes ``ppo/`` and the final policy in it.

    When the learners are lost, the stage goes on from the last checkpoint as ``--resume`` would,
    with the engines and the reward service that it has.
    """
    config = work.config
    assert config.ppo is not None
    store = CheckpointStore(
        work.run_dir / "ppo" / "checkpoints",
        keep=config.ppo.keep_checkpoints,
        best_by=config.ppo.keep_best,
        config=as_json(config),
        warn=work.reporter.warn,
    )
    models = {
        name: Path(path) for term in config.reward_terms for name, path in term.members.items()
    }
    inputs = input_digests(config, models)
    prompts = tokenize_prompts(
        work.data.prompts(), AutoTokenizer.from_pretrained(config.policy_model), config.data
    )
    recovery = Recovery(config.learners.max_restarts, work.reporter.warn)
    resume = work.resume
    while True:
        try:
            _train(work, store, inputs, prompts, recovery, resume)
        except (LearnersLost, WeightsLost) as error:
            recovery.lost(error)
            resume = True
        else:
            return {"steps": config.ppo.steps}


def _train(
    work: Workplace,
    store: CheckpointStore,
    inputs: Mapping[str, str],
    prompts: Sequence[Prompt],
    recovery: Recovery,
    resume: bool,
) -> None:
    """From the last checkpoint (from the beginning without ``resume``) to the final policy.

    Raises:
        LearnersLost, WeightsLost: Nothing is wrong with the run, but its learners are gone.
    """
    config = work.config
    assert config.ppo is not None
    directory = work.run_dir / "ppo"
    checkpoint = _last_checkpoint(work, store, inputs) if resume else None
    work.reporter.say("starting vLLM, the reward service and the learners")
    parts = work.session.parts(
        config.policy_model, config.reward_terms, lambda: make_learners(work)
    )
    with parts.learners as learners:
        rollouts = parts.rollouts
        rollouts.check_prompts(prompts)
        check_shared(directory, learners)
        start, scale, ahead = 0, None, None
        # From here on the pool has weights that no directory has.
        work.session.forget_weights()
        if checkpoint is not None:
            scale = ScoreScale(**checkpoint.state["score_scale"])
            learners.restore(checkpoint.path)
            start = checkpoint.step
            ahead = samples_ahead(checkpoint, config, prompts, work.reporter.warn)
            rollouts.load(learners.export_weights(start, checkpoint.state["probe"]))
            work.reporter.say(f"going on after step {start}")
        writer = MetricsWriter(
            directory,
            stage="ppo",
            tensorboard=work.run_dir / "tensorboard",
            resume_step=start if resume else None,
        )
        watch = Watch(coarse=is_coarse(config.rollout.engine.dtype, config.ppo.bf16))
        watch.catch_up(directory, start)  # what was said before the run was interrupted
        log = PPOLog(
            directory,
            config.ppo,
            learners,
            writer,
            store,
            inputs,
            start,
            scale,
            ahead,
            references=work.session.score_references(),
            watch=watch,
            warn=work.reporter.warn,
            recovery=recovery,
            mirror=work.mirror,
        )
        record = StepRecord(
            directory, start, workers=lambda: rollouts.states, checkpoints=store.steps
        )
        with writer, closing(log), closing(record):
            _take_steps(work, parts, prompts, log, record)
        final = directory / "final"
        shutil.rmtree(final, ignore_errors=True)
        learners.save_policy(final)


def _take_steps(
    work: Workplace, parts: Parts, prompts: Sequence[Prompt], log: PPOLog, record: StepRecord
) -> None:
    """The loop, from ``log.next_step`` to the last step.

    Raises:
        Stopped: Somebody asked for it; what is done is saved.
        LearnersLost: A learner died.
    """
    config = work.config
    assert config.ppo is not None
    with work.reporter.bar("PPO") as bar:
        bar.update(log.next_step, config.ppo.steps, {})
        finished = train(
            config.ppo,
            config.sampling,
            prompts=PromptStream(prompts, config.ppo.prompts_per_step, config.seed),
            rollouts=parts.rollouts,
            reward=parts.reward,
            learners=parts.learners,
            log=log,
            seed=config.seed,
            measure=work.data.measure,
            stop=work.stop,
            progress=bar.update,
            retry=config.reward.retry,
            warn=work.reporter.warn,
            timeline=record,
        )
        if not finished:
            log.checkpoint()
            raise Stopped(f"PPO after step {log.next_step}; go on with --resume")


def _last_checkpoint(
    work: Workplace, store: CheckpointStore, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """The last good one, if there is any; tells what is no longer as it was."""
    checkpoint = store.latest()
    if checkpoint is not None:
        check_inputs(checkpoint, inputs)
        for difference in differences(checkpoint, work.config):
            work.reporter.warn(f"not the run that was interrupted, bit for bit: {difference}")
    return checkpoint


def samples_ahead(
    checkpoint: Checkpoint,
    config: RunConfig,
    prompts: Sequence[Prompt],
    warn: Callable[[str], None],
) -> Step | None:
    """The samples of the next step that a checkpoint holds.

    ``None``, with a warning, where they are of no use or lacking though samples may be stale: they
    are generated anew then, by the weights of the checkpoint.
    """
    ppo = config.ppo
    assert ppo is not None
    path = checkpoint.path / AHEAD
    held = path.exists()
    if not held and (not ppo.max_staleness or checkpoint.step >= ppo.steps):
        return None
    try:
        if not held:
            raise ValueError("it has none")
        if not ppo.max_staleness:
            raise ValueError("ppo.max_staleness is 0 now")
        # They were generated, scored and filtered as the settings were.
        if changed := changed_results(checkpoint, config):
            raise ValueError(f"settings have changed: {', '.join(changed)}")
        step = read_step(path, prompts)
        step.check_accounts(ppo.min_trained_share)
    except (ValueError, RuntimeError) as error:
        warn(
            f"the samples that were made ahead of step {checkpoint.step + 1} are not taken from the"
            f" checkpoint but generated anew, by newer weights than those ({error})"
        )
        return None
    return step


def check_shared(directory: Path, learners: PPOLearners) -> None:
    """Learner 0 writes checkpoints and all read them: they must mean this directory.

    Raises:
        ValueError: A learner runs on a node that has another one, or none, by that path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-") as file:
        if not learners.see(Path(file.name)):
            raise ValueError(
                f"the learners do not see {directory}: put run_dir on storage that every node "
                "mounts at the same place; with learners on one node only, the driver can run "
                "there instead (ray job submit --entrypoint-resources, see docs/cluster.md)"
            )


def make_learners(work: Workplace) -> PPOLearners:
    """Policy and reference from the policy model; the critic from a reward model, if one fits."""
    config = work.config
    assert config.ppo is not None
    return PPOLearners(
        config.ppo,
        config.learners,
        policy_dir=config.policy_model,
        reference_dir=config.policy_model,
        critic_dir=critic_start(config) if config.ppo.critic_from_reward_model else None,
        temperature=config.sampling.temperature,
        total_steps=config.ppo.steps,
        seed=config.seed,
    )


def critic_start(config: RunConfig) -> Path | None:
    """The reward model that the critic starts from; ``None`` when no term has one that fits.

    That of this run, where a term uses it; else the first, members of ensembles included, that a
    term rewards and that reads texts as the policy does. A classifier's output is no value.
    """
    served = [
        Path(path)
        for term in config.reward_terms
        if term.weight > 0
        for path in term.members.values()
    ]
    own = (config.run_dir / "reward_model").resolve()
    if any(path.resolve() == own for path in served):
        return own
    return next((path for path in served if _reads_as(path, config.policy_model)), None)


def _reads_as(reward_model: Path, policy: Path) -> bool:
    """Whether the tokenizer and template are the policy's, and its context holds as much."""
    head = RewardHead.load(reward_model)
    if head.activation != "identity":
        return False
    tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    contexts = [
        getattr(AutoConfig.from_pretrained(path, local_files_only=True), CONTEXT, None)
        for path in (reward_model, policy)
    ]
    holds = contexts[0] is None or (contexts[1] is not None and contexts[0] >= contexts[1])
    return holds and head.fingerprint == template_fingerprint(tokenizer)
