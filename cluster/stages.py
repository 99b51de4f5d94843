"""What each stage of a run does. One function a stage; each reads and writes the run directory.

A stage returns a small summary that goes into ``stages.json``. Checkpoints cross between stages
as Hugging Face directories, by path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.data import RunData
from cluster.metrics import MetricsWriter
from cluster.progress import Reporter
from cluster.session import Session
from cluster.stop import Stopped, StopRequest
from cluster.storage import RunMirror

Summary = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a stage works with."""

    config: RunConfig
    data: RunData
    session: Session
    reporter: Reporter
    stop: StopRequest
    resume: bool
    mirror: RunMirror | None = None

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @contextmanager
    def watched(self, stage: str, output: Path) -> Iterator[OnStep]:
        """A progress bar and a metrics file for a supervised stage; Ctrl-C becomes Stopped."""
        from learner.supervised import Interrupted
        from learner.training_state import saved_step

        resumed = saved_step(output) if self.resume else None
        writer = MetricsWriter(
            output, stage=stage, tensorboard=self.run_dir / "tensorboard", resume_step=resumed
        )
        with writer, self.reporter.bar(stage) as bar:

            def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
                writer.write(step, metrics, total=total)
                bar.update(step, total, metrics)

            try:
                yield on_step
            except Interrupted as error:
                raise Stopped(f"{error}") from None


OnStep = Callable[[int, int, dict[str, float]], None]


def pretrain(work: Workplace) -> Summary:
    from learner.pretrain import pretrain as train_base
    from learner.tokenizer import CHAT_TEMPLATES

    config = work.config
    assert config.pretrain is not None
    template = config.pretrain.chat_template
    output = work.run_dir / "base"
    with work.watched("pretrain", output) as on_step:
        result = train_base(
            config.pretrain,
            work.data.corpus(),
            output,
            seed=config.seed,
            chat_template=CHAT_TEMPLATES.get(template, template) if template else None,
            resume=work.resume,
            on_step=on_step,
            should_stop=work.stop,
        )
    return asdict(result)


def sft(work: Workplace) -> Summary:
    from learner.sft import train_sft

    config = work.config
    assert config.sft is not None
    output = work.run_dir / "sft"
    with work.watched("sft", output) as on_step:
        result = train_sft(
            config.sft,
            work.data.demonstrations(),
            config.base_model,
            output,
            seed=config.seed,
            resume=work.resume,
            on_step=on_step,
            should_stop=work.stop,
        )
    return asdict(result)


def collect(work: Workplace) -> Summary:
    from cluster.judgement import judge

    report = judge(work)
    path = work.run_dir / "feedback.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    return {"comparisons": report.get("comparisons"), "summary": report.get("summary")}


def reward(work: Workplace) -> Summary:
    from cluster.judgement import open_store, reference_samples, teaching_of
    from learner.reward_model import train_reward_model
    from learner.supervised import OtherDataError

    config = work.config
    assert config.reward_model is not None
    output = work.run_dir / "reward_model"
    with open_store(config) as store:
        comparisons, ratings = store.preferences(), store.ratings()
    teaching = teaching_of(comparisons, config.reward_model)
    try:
        with work.watched("reward_model", output) as on_step:
            report = train_reward_model(
                config.reward_model,
                comparisons,
                ratings,
                config.policy_model,
                output,
                reference_samples=reference_samples(comparisons, config.reward_model),
                teaching=teaching,
                seed=config.seed,
                resume=work.resume,
                on_step=on_step,
                should_stop=work.stop,
            )
    except OtherDataError:  # people go on judging, and take back, at any time
        work.reporter.warn(
            "the judgements are not those with which this training began: it begins again, with "
            "what there is now"
        )
        return reward(replace(work, resume=False))
    summary = asdict(report)
    path = output / "report.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def moderation(work: Workplace, labels: str) -> Summary:
    """A classifier of flagged texts, to be used as a penalty; writes ``moderation``."""
    from cluster.data import load_labels
    from learner.classifier import train_classifier
    from learner.config import RewardModelConfig

    config = work.config
    output = work.run_dir / "moderation"
    with work.watched("moderation", output) as on_step:
        report = train_classifier(
            config.reward_model or RewardModelConfig(),
            load_labels(labels, config.data),
            config.policy_model,
            output,
            seed=config.seed,
            resume=work.resume,
            on_step=on_step,
            should_stop=work.stop,
        )
    work.reporter.say(
        f"flags from {report.threshold:.3f} (best F1 on {report.validation_texts} validation "
        f"texts); on {report.held_out_texts} held-out texts precision {report.precision or 0:.3f}, "
        f"recall {report.recall or 0:.3f}, F1 {report.f1:.3f}, ROC AUC {report.roc_auc or 0:.3f}; "
        f"{report.flagged_share:.1%} of them are flagged"
    )
    return asdict(report)


def ppo(work: Workplace) -> Summary:
    from cluster.ppo_stage import run_ppo

    return run_ppo(work)


def evaluate(work: Workplace, models: dict[str, Path] | None = None) -> Summary:
    from cluster.compare import compare_checkpoints
    from cluster.evaluation import write_evaluation

    config = work.config
    before, after = config.policy_names
    chosen = models or {before: config.policy_model, after: work.run_dir / "ppo" / "final"}
    evaluation = compare_checkpoints(work, chosen)
    write_evaluation(work.run_dir, evaluation)
    return {"checkpoints": list(chosen)}


def report(work: Workplace) -> Summary:
    """Write the page, and say what it says at its top."""
    from cluster.report import write_report
    from cluster.report_outcome import headline_figures
    from cluster.run_files import read_run

    path = write_report(work.run_dir)
    for figure in headline_figures(read_run(work.run_dir)):
        change = f"{figure.before} -> {figure.value}" if figure.before else figure.value
        work.reporter.say(f"{figure.label:<24} {change}   {figure.note}".rstrip())
    work.reporter.say(f"\nThe page: {path.resolve()}")
    return {}
