"""The stages of a run, in order, each resumable: base -> SFT -> judgement -> reward -> PPO.

``stages.json`` in the run directory says which stages are finished and how long they took.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import stages
from cluster.checkpoint import RunLock
from cluster.config import RunConfig, Stage, write_config
from cluster.data import RunData
from cluster.hub import with_local_model
from cluster.job import check_job
from cluster.progress import Reporter
from cluster.session import Session
from cluster.stages import Workplace
from cluster.stop import Stopped, StopRequest
from cluster.storage import RunMirror
from cluster.whole_file import replace_text

TITLES: dict[Stage, str] = {
    "pretrain": "Base model",
    "sft": "Supervised fine-tuning",
    "collect": "Candidates and judgement",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
    "report": "Report",
}

OUTPUTS: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("base",),
    "sft": ("sft",),
    "collect": ("feedback.sqlite", "feedback.sqlite-wal", "feedback.sqlite-shm", "feedback.json"),
    "reward": ("reward_model",),
    "ppo": ("ppo", "tensorboard/ppo"),
    "evaluate": ("evaluation.json",),
    "report": ("report.html",),
}
"""What each stage writes below the run directory, thrown away by --overwrite."""

RUNNERS: dict[Stage, Callable[[Workplace], dict[str, Any]]] = {
    "pretrain": stages.pretrain,
    "sft": stages.sft,
    "collect": stages.collect,
    "reward": stages.reward,
    "ppo": stages.ppo,
    "evaluate": stages.evaluate,
    "report": stages.report,
}


class Pipeline:
    """Runs the stages that a configuration has sections for.

    Args:
        config: The run.
        resume: Skip finished stages and go on inside an unfinished one.
        overwrite: Throw away what the stages to run wrote before.
    """

    def __init__(self, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
        self._config = config
        self._resume = resume
        self._overwrite = overwrite
        self._reporter = Reporter()
        self._stop = StopRequest(self._reporter.say)
        self._mirror: RunMirror | None = None
        check_job(config, self._reporter.warn)

    def run(self, only: Stage | None = None) -> None:
        """Run one stage, or all of them and the report.

        Raises:
            ValueError: The configuration lacks the section of the stage asked for.
            FileExistsError: The directory already holds what would be written.
            Stopped: Ctrl-C or SIGTERM; what was done is saved.
        """
        wanted = [only] if only else configured_stages(self._config)
        self._require_sections(wanted)
        self._config = with_local_model(self._config)
        directory = self._config.run_dir
        quieten_libraries()
        with RunLock(directory):
            self._fetch()
            self._check_directory(wanted)
            write_config(self._config, directory / "config.yaml")
            self._sync(dropped=[n for s in wanted for n in OUTPUTS[s]] if self._overwrite else [])
            self._stop.install()
            with Session(self._config, self._reporter, self._stop) as session:
                self._run_stages(wanted, session)

    def evaluate(self, models: dict[str, Path] | None) -> None:
        """Compare the given checkpoints, by default the policy before and after PPO."""
        self._config = with_local_model(self._config)
        directory = self._config.run_dir
        with RunLock(directory), Session(self._config, self._reporter, self._stop) as session:
            self._fetch()
            stages.evaluate(self._workplace(session), models)
            stages.report(self._workplace(session))
            self._sync()

    def train_moderation(self, labels: str) -> None:
        """A classifier from labelled texts, beside the run's reward model."""
        self._config = with_local_model(self._config)
        directory = self._config.run_dir
        output = directory / "moderation"
        quieten_libraries()
        with RunLock(directory):
            self._fetch()
            if self._overwrite:
                _remove(output)
            elif output.exists() and not self._resume:
                raise FileExistsError(
                    f"{directory} already holds moderation: go on with --resume, start anew with "
                    "--overwrite, or choose another run_dir"
                )
            if not (directory / "config.yaml").exists():
                write_config(self._config, directory / "config.yaml")
            self._stop.install()
            with Session(self._config, self._reporter, self._stop) as session:
                stages.moderation(self._workplace(session), labels)
            self._sync()

    def _run_stages(self, wanted: list[Stage], session: Session) -> None:
        workplace = self._workplace(session)
        for stage in wanted:
            done = read_stages(self._config.run_dir)
            if self._resume and self._is_done(stage, done):
                self._reporter.say(f"{TITLES[stage]}: already done")
                continue
            self._reporter.heading(TITLES[stage])
            started = time.monotonic()
            summary = RUNNERS[stage](workplace)
            done[stage] = {"seconds": round(time.monotonic() - started, 2), **summary}
            _write_stages(self._config.run_dir, done)
            self._sync()
            if self._stop():
                raise Stopped(f"after {TITLES[stage]}; go on with --resume")

    def _fetch(self) -> None:
        """Go on from the copy at ``cluster.storage`` when it is further than this directory."""
        url, directory = self._config.cluster.storage, self._config.run_dir
        if url is not None:
            self._mirror = RunMirror(url, directory, self._reporter.warn)
            if self._mirror.fetch():
                self._reporter.say(f"fetched from {url} into {directory}")

    def _sync(self, dropped: Sequence[str] = ()) -> None:
        if self._mirror is not None:
            self._mirror.sync(dropped=dropped, required=True)

    def _is_done(self, stage: Stage, done: dict[str, Any]) -> bool:
        """A report is always written anew, and PPO goes on when more steps are asked for."""
        if stage not in done or stage == "report":
            return False
        ppo = self._config.ppo
        return stage != "ppo" or ppo is None or done[stage].get("steps", 0) >= ppo.steps

    def _workplace(self, session: Session) -> Workplace:
        return Workplace(
            config=self._config,
            data=RunData(self._config),
            session=session,
            reporter=self._reporter,
            stop=self._stop,
            resume=self._resume,
            mirror=self._mirror,
        )

    def _require_sections(self, wanted: list[Stage]) -> None:
        sections: dict[Stage, Any] = {
            "pretrain": self._config.pretrain,
            "sft": self._config.sft,
            "collect": self._config.collect,
            "reward": self._config.reward_model,
            "ppo": self._config.ppo,
        }
        for stage in wanted:
            if stage in sections and sections[stage] is None:
                name = "reward_model" if stage == "reward" else stage
                raise ValueError(
                    f"the configuration has no `{name}` section: add one (`{name}: {{}}` takes "
                    "the defaults)"
                )

    def _check_directory(self, wanted: list[Stage]) -> None:
        """Refuse to mix two runs; with --overwrite make room."""
        directory = self._config.run_dir
        existing = [
            name
            for stage in wanted
            if stage not in ("report", "evaluate")
            for name in OUTPUTS[stage]
            if (directory / name).exists() and not self._is_of_people(name)
        ]
        if self._overwrite:
            self._spare_people(wanted)
            done = read_stages(directory)
            for stage in wanted:
                done.pop(stage, None)
                for name in OUTPUTS[stage]:
                    _remove(directory / name)
            _write_stages(directory, done)
        elif self._resume and not existing:
            self._reporter.say(f"no earlier run in {directory}: starting anew")
        elif existing and not self._resume:
            raise FileExistsError(
                f"{directory} already holds {', '.join(existing)}: go on with --resume, start "
                "anew with --overwrite, or choose another run_dir"
            )

    def _is_of_people(self, name: str) -> bool:
        """A store that people fill: the page or an import may have made it, and it only grows."""
        collect = self._config.collect
        return (
            collect is not None
            and collect.source == "people"
            and name.startswith("feedback.sqlite")
        )

    def _spare_people(self, wanted: list[Stage]) -> None:
        store = self._config.run_dir / "feedback.sqlite"
        if "collect" in wanted and self._is_of_people(store.name) and store.exists():
            raise ValueError(
                f"{store} holds what people said, which --overwrite does not throw away: move it "
                "elsewhere, or choose another run_dir"
            )


def quieten_libraries() -> None:
    """Loading a reward model from a language model is meant to leave its head new."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def configured_stages(config: RunConfig) -> list[Stage]:
    """The stages that a configuration has sections for, with evaluation and report at the end."""
    sections: list[tuple[Stage, Any]] = [
        ("pretrain", config.pretrain),
        ("sft", config.sft),
        ("collect", config.collect),
        ("reward", config.reward_model),
        ("ppo", config.ppo),
        ("evaluate", config.ppo),
        ("report", True),
    ]
    return [stage for stage, section in sections if section is not None]


def read_stages(directory: Path) -> dict[str, Any]:
    """Finished stages with their summaries."""
    path = directory / "stages.json"
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write_stages(directory: Path, done: dict[str, Any]) -> None:
    replace_text(directory / "stages.json", json.dumps(done, indent=1, ensure_ascii=False))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
