"""``rlhf status``: everything it says comes from the run directory, by hand-written files here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.checkpoint import LOCK, RunLock
from cluster.cli import main
from cluster.status import find_run, read_status, watch
from cluster.status_text import describe

NOW = 1_764_000_000.0
CONFIG = "run_dir: x\nmodel: m\nsft: {}\nppo: {steps: 40}\n"


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ppo_row(step: int, *, at: float) -> dict[str, Any]:
    return {
        "stage": "ppo", "step": step, "total": 40, "time": at, "reward/mean": step / 10,
        "ppo/clip_fraction": 0.1 if step < 9 else 0.5, "samples/failed": int(step == 2),
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """PPO after step 12 of 40, a step every 6 s, resumed after a pause of an hour behind step 5."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    (run / "stages.json").write_text(json.dumps({"sft": {"seconds": 38.2}}))
    times = {step: NOW - 4 - 6 * (12 - step) - (3600 if step <= 5 else 0) for step in range(1, 13)}
    write_lines(run / "ppo" / "metrics.jsonl", [ppo_row(s, at=t) for s, t in times.items()])
    workers = {"step": 12, "time": NOW, "workers": {"rollout-0": "serving", "rollout-1": "dead"}}
    (run / "ppo" / "workers.json").write_text(json.dumps(workers))
    for step in (5, 10):
        manifest = run / "ppo" / "checkpoints" / f"step_{step:06d}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        os.utime(manifest, (NOW, NOW - 16))
    (run / "ppo" / "checkpoints" / "damaged_step_000011").mkdir()
    return run


def hold(run: Path, text: str, age: float) -> None:
    (run / LOCK).write_text(text)
    os.utime(run / LOCK, (NOW, NOW - age))


def test_a_running_job(run_dir: Path) -> None:
    hold(run_dir, f"{os.getpid()} {platform.node()}\n", age=3)
    status = read_status(run_dir, now=NOW)
    assert (status.state, status.pid) == ("running", os.getpid())
    assert [(s.name, s.state) for s in status.stages] == [
        ("sft", "done"), ("ppo", "under way"), ("evaluate", "waiting"),
    ]  # fmt: skip
    assert (status.stage, status.step, status.total) == ("ppo", 12, 40)
    assert status.seconds_per_step == pytest.approx(6.0)
    assert status.seconds_left == pytest.approx(28 * 6.0)
    assert status.last_step_age == pytest.approx(4.0)
    assert not status.stalled
    assert status.metrics["reward/mean"] == 1.2
    assert status.before["reward/mean"] == pytest.approx(0.2)
    assert [(one.name, one.value, one.since) for one in status.outside] == [
        ("ppo/clip_fraction", 0.5, 9)
    ]
    assert status.workers == {"rollout-0": "serving", "rollout-1": "dead"}
    assert (status.checkpoint, status.checkpoint_age) == (10, pytest.approx(16.0))
    text = describe(status)
    for words in (
        f"running, pid {os.getpid()} on", "last sign of life 3 s ago", "step 12 of 40, 6 s a step",
        "2 min 48 s left", "reward/mean", "1 of 2 metrics out of range",
        "ppo/clip_fraction 0.5, healthy is at most 0.25; since step 9. ",
        "rollout-1 dead", "last checkpoint: step 10, 16 s ago",
    ):  # fmt: skip
        assert words in text, (words, text)


def test_a_job_on_another_machine_lives_as_long_as_it_touches_its_lock(run_dir: Path) -> None:
    hold(run_dir, "999999999 elsewhere\n", age=30)
    assert read_status(run_dir, now=NOW).state == "running"
    hold(run_dir, "999999999 elsewhere\n", age=500)
    status = read_status(run_dir, now=NOW)
    assert status.state == "silent"
    assert "no sign of life, though" in describe(status)


def test_a_killed_job_is_told_from_one_that_ended(run_dir: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hold(run_dir, f"{gone.pid} {platform.node()}\n", age=3)
    assert read_status(run_dir, now=NOW).state == "died"
    hold(run_dir, "", age=3)
    assert read_status(run_dir, now=NOW).state == "ended"
    done = {name: {"seconds": 1.0} for name in ("sft", "ppo", "evaluate")}
    (run_dir / "stages.json").write_text(json.dumps(done))
    status = read_status(run_dir, now=NOW)
    assert (status.state, status.stage) == ("finished", "evaluate")


def test_a_step_that_takes_much_too_long_is_said(run_dir: Path) -> None:
    hold(run_dir, f"{os.getpid()} {platform.node()}\n", age=3)
    status = read_status(run_dir, now=NOW + 100)
    assert status.stalled
    assert "NO STEP FOR 1 min 44 s" in describe(status)


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(run_dir: Path) -> None:
    (run_dir / "stages.json").write_text('{"sft": ')
    path = run_dir / "ppo" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "ppo", "st')  # a line that is being written
    status = read_status(run_dir, now=NOW)
    assert status.state == "not started"
    assert status.step == 12
    (problem,) = status.problems
    assert "stages.json cannot be read" in problem


def test_rounds_of_a_loop_show_the_one_that_was_touched_last(run_dir: Path) -> None:
    loop = run_dir.parent
    (loop / "config.yaml").write_text(CONFIG)
    for number, age in ((1, 50), (2, 5)):
        part = loop / f"round-{number:02d}"
        part.mkdir()
        (part / "config.yaml").write_text(CONFIG)
        os.utime(part / "config.yaml", (NOW, NOW - 100))
        hold(part, "5 elsewhere\n", age=age)
    assert read_status(loop, now=NOW).run_dir == str(loop / "round-02")


def test_the_command_finds_the_newest_run_and_writes_json(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 1
    assert "no run in runs" in result.output
    Path("runs/old").mkdir(parents=True)
    (Path("runs/old") / "config.yaml").write_text(CONFIG)
    os.utime("runs/old/config.yaml", (NOW, NOW - 1e6))
    run_dir.rename("runs/new")
    assert find_run() == Path("runs/new")
    result = CliRunner().invoke(main, ["status", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["step"] == 12
    result = CliRunner().invoke(main, ["status", "."])
    assert result.exit_code == 1
    assert "is not a run directory" in result.output


def test_watching_ends_with_the_run(run_dir: Path) -> None:
    (run_dir / LOCK).write_text(f"{os.getpid()} {platform.node()}\n")
    seen = []

    def sleep(_: float) -> None:
        (run_dir / LOCK).write_text("")

    last = watch(run_dir, lambda status: seen.append(status.state), every_s=1.0, sleep=sleep)
    assert seen == ["running", "ended"]
    assert last.state == "ended"


def test_the_lock_names_its_process_gives_signs_of_life_and_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.checkpoint.LOCK_BEAT_S", 0.01)
    with RunLock(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {platform.node()}\n"
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime < 1e9:
            assert time.monotonic() < deadline, "the lock was not touched"
            time.sleep(0.01)
    assert (tmp_path / LOCK).read_text() == ""
