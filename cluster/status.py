"""``rlhf status``: what a run is doing, told from its directory alone.

The process may run on another machine that shares the directory: nothing is asked of it, no lock
is taken and nothing is written. Whether it lives is told by the file ``.lock``, which it touches
every few seconds and empties when it ends in order.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.checkpoint import LOCK
from cluster.health import Watch, is_coarse
from cluster.metrics import FILE_NAME as METRICS
from cluster.report import STATIONS
from cluster.report_stages import SECTIONS
from cluster.step_lines import read_step_lines
from cluster.step_record import WORKERS

SILENT_AFTER_S = 120.0
"""A network file system may show a touch a minute late, and takes the file server's clock."""
STALLED_AFTER_STEPS, STALLED_AFTER_S = 5.0, 60.0
RATE_OVER_STEPS = 20

TOLD: dict[str, tuple[str, ...]] = {
    "ppo": (
        "reward/mean", "measured/good", "ppo/kl_sequence", "ppo/entropy", "response/length_mean",
        "response/eos_rate", "ppo/explained_variance", "ppo/clip_fraction", "samples/failed",
        "tokens/per_second",
    ),
    "supervised": (
        "loss", "held_out_loss", "agreement", "held_out_agreement", "tokens_per_second",
    ),
}  # fmt: skip
"""The metrics that say how it goes, where a run has them."""

State = Literal["running", "silent", "died", "ended", "finished", "not started"]


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage. ``seconds`` are those of a finished one."""

    name: str
    title: str
    state: Literal["done", "under way", "waiting"]
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A metric that is outside its healthy range now."""

    name: str
    value: float
    healthy: str
    since: int
    remedy: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its directory shows it. Times are in seconds, ages from now.

    Attributes:
        stage: The one under way, or the last that was.
        metrics: The last values of those worth watching.
        before: The same metrics ten steps earlier.
        stalled: Running, but without a step for much longer than a step takes.
        workers: State of each rollout actor when step ``workers_step`` ended.
        checkpoint: Step of the newest checkpoint.
    """

    run_dir: str
    state: State
    pid: int | None
    machine: str
    sign_of_life_age: float | None
    stages: tuple[StageStatus, ...]
    stage: str | None
    step: int | None = None
    total: int | None = None
    seconds_per_step: float | None = None
    seconds_left: float | None = None
    last_step_age: float | None = None
    stalled: bool = False
    metrics: Mapping[str, float]
    before: Mapping[str, float]
    outside: tuple[Outside, ...] = ()
    watched: int = 0
    workers: Mapping[str, str]
    workers_step: int | None = None
    checkpoint: int | None = None
    checkpoint_age: float | None = None
    problems: tuple[str, ...] = ()


def find_run(root: Path = Path("runs")) -> Path:
    """The run below ``root`` that was written to last.

    Raises:
        FileNotFoundError: There is none.
    """
    found = [path.parent for path in root.glob("*/config.yaml")]
    if not found:
        raise FileNotFoundError(f"no run in {root}: give a run directory")
    return max(found, key=_touched)


def read_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Look at a run directory once.

    Args:
        now: Seconds since the epoch.

    Raises:
        FileNotFoundError: It is no run directory.
    """
    now = time.time() if now is None else now
    run_dir = _current_round(run_dir)
    config_path = run_dir / "config.yaml"
    if not config_path.is_file() and not (run_dir / LOCK).is_file():
        raise FileNotFoundError(
            f"{run_dir} is not a run directory: give the run_dir of a configuration, such as"
            " runs/quickstart"
        )
    problems: list[str] = []
    config = _mapping(config_path, yaml.safe_load, problems)
    done = _mapping(run_dir / "stages.json", json.loads, problems)
    state, pid, machine, age = _process(run_dir / LOCK, now)
    stages = _stages(run_dir, config, done, running=state == "running")
    if state == "ended" and stages and all(stage.state == "done" for stage in stages):
        state = "finished"
    at = [stage.name for stage in stages if stage.state == "under way"]
    at = at or [stage.name for stage in stages if stage.state == "done"]
    stage = at[-1] if at else None
    directory = {name: metrics for name, _, metrics in STATIONS}.get(stage or "", "")
    rows = _rows(run_dir / directory / METRICS, problems) if directory else []
    workers = _mapping(run_dir / "ppo" / WORKERS, json.loads, problems) if stage == "ppo" else {}
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        pid=pid,
        machine=machine,
        sign_of_life_age=age,
        stages=stages,
        stage=stage,
        workers=workers.get("workers") or {},
        workers_step=workers.get("step"),
        problems=tuple(problems),
        **_progress(rows, now, running=state == "running"),
        **_figures(rows, stage),
        **(_health(rows, config) if stage == "ppo" else {}),
        **_checkpoint(run_dir / directory, now),
    )


def watch(
    run_dir: Path,
    show: Callable[[RunStatus], None],
    *,
    every_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> RunStatus:
    """Show the status again and again until the run no longer runs; returns the last one."""
    while True:
        status = read_status(run_dir)
        show(status)
        if status.state not in ("running", "silent"):
            return status
        sleep(every_s)


def _current_round(run_dir: Path) -> Path:
    """Of ``rlhf loop`` the part that was touched last; every part is a run of its own."""
    parts = [p for p in (run_dir / "start", *run_dir.glob("round-*")) if (p / LOCK).is_file()]
    return max(parts, key=_touched) if parts else run_dir


def _touched(run_dir: Path) -> float:
    files = [p for p in (run_dir / LOCK, run_dir / "config.yaml") if p.is_file()]
    return max((path.stat().st_mtime for path in files), default=0.0)


def _process(lock: Path, now: float) -> tuple[State, int | None, str, float | None]:
    """State, process id, machine, and seconds since its last sign of life."""
    try:
        text, touched = lock.read_text(encoding="utf-8").split(), lock.stat().st_mtime
    except FileNotFoundError:
        return "not started", None, "", None
    if not text or not text[0].isdigit():
        return "ended", None, "", None
    pid, machine, age = int(text[0]), text[1] if len(text) > 1 else "", max(0.0, now - touched)
    if machine == platform.node() and not _lives(pid):
        return "died", pid, machine, age
    return "running" if age < SILENT_AFTER_S else "silent", pid, machine, age


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _stages(
    run_dir: Path, config: Mapping[str, Any], done: Mapping[str, Any], *, running: bool
) -> tuple[StageStatus, ...]:
    """Every configured stage; under way is the first unfinished one, if it has begun."""
    found: list[StageStatus] = []
    for name, title, directory in STATIONS:
        if config and config.get(SECTIONS[name]) is None:
            continue
        summary = done.get(name)
        if isinstance(summary, Mapping):
            seconds = summary.get("seconds")
            found.append(StageStatus(name=name, title=title, state="done", seconds=seconds))
            continue
        first = all(stage.state == "done" for stage in found)
        begun = bool(directory) and (run_dir / directory / METRICS).is_file()
        state: Literal["under way", "waiting"] = (
            "under way" if begun or (running and first) else "waiting"
        )
        found.append(StageStatus(name=name, title=title, state=state))
    return tuple(found)


def _progress(rows: list[dict[str, Any]], now: float, *, running: bool) -> dict[str, Any]:
    if not rows:
        return {}
    last = rows[-1]
    times = [(row["step"], row["time"]) for row in rows[-RATE_OVER_STEPS - 1 :] if "time" in row]
    paces = [(b - a) / (j - i) for (i, a), (j, b) in pairwise(times) if j > i and b > a]
    # The median, so that the gap before a resume counts for one step only.
    pace = statistics.median(paces) if paces else None
    total = last.get("total")
    age = max(0.0, now - last["time"]) if "time" in last else None
    left = pace * (total - last["step"]) if pace is not None and total is not None else None
    limit = max(STALLED_AFTER_S, STALLED_AFTER_STEPS * (pace or 0.0))
    return {
        "step": last["step"],
        "total": total,
        "seconds_per_step": pace,
        "seconds_left": left,
        "last_step_age": age,
        "stalled": running and age is not None and age > limit and last["step"] != total,
    }


def _figures(rows: list[dict[str, Any]], stage: str | None) -> dict[str, Any]:
    names = TOLD["ppo" if stage == "ppo" else "supervised"]
    last: dict[str, float] = {}
    before: dict[str, float] = {}
    for name in names:  # some are measured now and then only
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if values:
            last[name] = values[-1]
        if len(values) > 10:
            before[name] = values[-11]
    return {"metrics": last, "before": before}


def _health(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    engine = (config.get("rollout") or {}).get("engine") or {}
    bf16 = (config.get("ppo") or {}).get("bf16")
    follower = Watch(coarse=is_coarse(engine.get("dtype"), bf16))
    for row in rows:
        figures = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        follower.step(row["step"], figures)
    outside = tuple(
        Outside(
            name=found.name,
            value=float(rows[-1].get(found.name, found.worst)),
            healthy=found.metric.healthy(found.coarse),
            since=found.since or 0,
            remedy=found.metric.remedy,
        )
        for found in follower.excursions()
        if found.ongoing
    )
    return {"outside": outside, "watched": follower.watched}


def _checkpoint(directory: Path, now: float) -> dict[str, Any]:
    """The newest of the directory's checkpoints; they are renamed into place when whole."""
    steps = [
        (int(path.name.removeprefix("step_")), path)
        for path in (directory / "checkpoints").glob("step_*")
        if path.name.removeprefix("step_").isdigit()
    ]
    if not steps:
        return {}
    step, path = max(steps)
    try:
        written = (path / "manifest.json").stat().st_mtime
    except FileNotFoundError:  # deleted a moment ago, when a newer one came
        return {"checkpoint": step, "checkpoint_age": 0.0}
    return {"checkpoint": step, "checkpoint_age": max(0.0, now - written)}


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Lines of a metrics file; one that is being written is not there yet."""
    try:
        return read_step_lines(path)[0]
    except FileNotFoundError:
        return []
    except ValueError as error:
        problems.append(str(error))
        return []


def _mapping(path: Path, parse: Callable[[str], Any], problems: list[str]) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return {}
    return values if isinstance(values, dict) else {}
