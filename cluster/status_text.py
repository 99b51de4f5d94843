"""A run's status as a person or a program reads it."""

from __future__ import annotations

import json
from dataclasses import asdict

from cluster.plots import compact
from cluster.report import duration
from cluster.status import RunStatus, State

EXPLAINED: dict[State, str] = {
    "running": "",
    "silent": "no sign of life, though the process is there or on another machine: it hangs, is"
    " suspended, or its machine is gone",
    "died": "the process is gone and did not end in order; --resume goes on from the last"
    " checkpoint",
    "ended": "no process; --resume goes on with what is not finished",
    "finished": "",
    "not started": "",
}


def describe(status: RunStatus) -> str:
    """The status as a dozen lines for a person."""
    lines = [_headline(status)]
    for stage in status.stages:
        detail = ""
        if stage.name == status.stage and status.total:
            detail = _pace(status)
        elif stage.seconds is not None:
            detail = duration(stage.seconds)
        lines.append(f"  {stage.title:<16}{stage.state:<11}{detail}".rstrip())
    if status.metrics:
        lines.append(f"metrics of step {status.step} (ten steps before)")
        for name, value in status.metrics.items():
            before = f"   ({compact(status.before[name])})" if name in status.before else ""
            lines.append(f"  {name:<26}{compact(value):>8}{before}")
    if status.watched:
        lines.append(f"health: {len(status.outside)} of {status.watched} metrics out of range")
        for one in status.outside:
            lines.append(
                f"  {one.name} {compact(one.value)}, healthy is {one.healthy}; since step"
                f" {one.since}. {one.remedy}"
            )
    if status.workers:
        states = ", ".join(f"{name} {state}" for name, state in status.workers.items())
        lines.append(f"workers after step {status.workers_step}: {states}")
    if status.checkpoint is not None and status.checkpoint_age is not None:
        age = duration(status.checkpoint_age)
        lines.append(f"last checkpoint: step {status.checkpoint}, {age} ago")
    lines += [f"problem: {problem}" for problem in status.problems]
    return "\n".join(lines)


def as_json(status: RunStatus) -> str:
    """The status as one line."""
    return json.dumps(asdict(status))


def _headline(status: RunStatus) -> str:
    text = f"{status.run_dir}: {status.state}"
    if status.pid is not None:
        text += f", pid {status.pid}" + (f" on {status.machine}" if status.machine else "")
    if status.sign_of_life_age is not None and status.state in ("running", "silent", "died"):
        text += f", last sign of life {duration(status.sign_of_life_age)} ago"
    if explained := EXPLAINED[status.state]:
        text += f" ({explained})"
    return text


def _pace(status: RunStatus) -> str:
    text = f"step {status.step} of {status.total}"
    if status.seconds_per_step is not None:
        text += f", {status.seconds_per_step:.3g} s a step"
    if status.seconds_left is not None and status.state == "running":
        text += f", {duration(status.seconds_left)} left"
    if status.stalled and status.last_step_age is not None:
        text += f"; NO STEP FOR {duration(status.last_step_age)}"
    return text
