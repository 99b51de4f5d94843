"""Who did what when, and who waited for whom: one line of ``timeline.jsonl`` for each PPO step.

::

    {"step": 7, "time": 1764000000.1, "seconds": 6.31,
     "spans": [["driver", "generate", 0.0, 2.114], ["rollout-0", "generate", 0.003, 2.05], ...]}

``time`` is the wall clock at which the step began, and a span is a lane, what it was busy with,
and when it began and ended in seconds since then. The lane ``driver`` holds the phases of the loop
one after the other; a lane that is not busy waits for the phase that the driver is in. What a
remote process did is timed by its own clock and drawn from the moment it was asked, so that clocks
of two machines are never compared.

Only clocks are in this file: nothing reads it back into a run, and a killed run may lack its last
line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from actors.weights import UpdateConfirmation
from cluster.step_lines import read_step_lines

FILE_NAME = "timeline.jsonl"
DRIVER, LEARNERS, REWARD = "driver", "learners", "reward"
JOINED_BELOW_S = 0.005
"""Two spans of one lane with less between them are one: batches scored back to back."""


class Span(NamedTuple):
    """A lane that was busy with ``what`` from ``start`` to ``end``, in seconds."""

    lane: str
    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Clock:
    """The spans of the step that is under way, in seconds of one monotonic clock.

    Appending is atomic, so that any thread of the driver may record what it saw.
    """

    def __init__(self) -> None:
        self.time = time.time()
        self.began = time.monotonic()
        self.spans: list[Span] = []

    @contextmanager
    def timed(self, what: str, lane: str = DRIVER) -> Iterator[None]:
        """Record the block as a span; one that raises is not recorded."""
        started = time.monotonic()
        yield
        self.add(lane, what, started, time.monotonic())

    def add(self, lane: str, what: str, start: float, end: float) -> None:
        """Record a span between two readings of ``time.monotonic``."""
        self.spans.append(Span(lane, what, start, end))

    def chain(self, lane: str, start: float, parts: Mapping[str, float]) -> None:
        """Record parts that followed each other from ``start`` on, by their seconds."""
        for what, seconds in parts.items():
            if seconds > 0:
                self.add(lane, what, start, start + seconds)
            start += seconds

    def generated(self, actor: str, start: float, end: float) -> None:
        """An actor had samples in flight."""
        self.add(actor, "generate", start, end)

    def scored(self, start: float, end: float) -> None:
        """The reward was called."""
        self.add(REWARD, "score", start, end)

    def remote_parts(
        self, metrics: Mapping[str, float], confirmations: Sequence[UpdateConfirmation]
    ) -> None:
        """What learners and actors said of their own time, once the weights are loaded.

        The learners' seconds are those of learner 0; what an actor verified, loaded and proved
        is drawn from the moment at which the weights were exported.
        """
        inside = ("annotate", "forward_backward", "optimizer")
        annotate, *epochs = (metrics.get(f"ppo/seconds_{part}", 0.0) for part in inside)
        parts = {"annotate": annotate, "epochs": sum(epochs)}
        self.chain(LEARNERS, self.start_of("learn"), parts)
        exported = max(s.end for s in self.spans if s.what == "export")
        for one in confirmations:
            parts = {
                "verify": one.seconds_verify, "load": one.seconds_load, "probe": one.seconds_probe
            }  # fmt: skip
            self.chain(one.actor, exported, parts)

    def start_of(self, phase: str) -> float:
        """When the driver last began a phase that has ended."""
        return max(s.start for s in self.spans if s.lane == DRIVER and s.what == phase)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase of the driver."""
        totals: dict[str, float] = {}
        for span in self.spans:
            if span.lane == DRIVER:
                totals[span.what] = totals.get(span.what, 0.0) + span.seconds
        return totals

    def row(self, step: int) -> dict[str, Any]:
        """The step's line, with times from its beginning. ``step`` counts from 1."""
        together = joined(self.spans)
        total = max((span.end - self.began for span in together), default=0.0)
        spans = [
            [s.lane, s.what, round(s.start - self.began, 4), round(s.end - self.began, 4)]
            for s in together
        ]
        return {
            "step": step,
            "time": round(self.time, 3),
            "seconds": round(total, 4),
            "spans": spans,
        }


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """One step as read back; spans are in seconds from ``time``, the wall clock at its start."""

    step: int
    time: float
    seconds: float
    spans: tuple[Span, ...]

    @property
    def lanes(self) -> list[str]:
        """The driver, the learners, the reward, then every rollout actor."""
        first = [DRIVER, LEARNERS, REWARD]
        found = {span.lane for span in self.spans}
        return [n for n in first if n in found] + sorted(found - set(first), key=_natural)

    def of(self, lane: str) -> list[Span]:
        return sorted((s for s in self.spans if s.lane == lane), key=lambda s: s.start)


def joined(spans: Sequence[Span]) -> list[Span]:
    """The spans in order of time, those of one lane and kind that touch made one."""
    result: list[Span] = []
    last: dict[tuple[str, str], int] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        at = last.get((span.lane, span.what))
        if at is not None and span.start - result[at].end < JOINED_BELOW_S:
            result[at] = result[at]._replace(end=max(result[at].end, span.end))
            continue
        last[span.lane, span.what] = len(result)
        result.append(span)
    return result


def read_timeline(path: Path) -> list[StepTimeline]:
    """The steps of a ``timeline.jsonl``, or of the directory that holds it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line, other than an unfinished last one, is not a step's.
    """
    path = path / FILE_NAME if path.is_dir() else path
    rows, _ = read_step_lines(path)
    steps = []
    for number, row in enumerate(rows, start=1):
        try:
            spans = tuple(Span(str(a), str(b), float(c), float(d)) for a, b, c, d in row["spans"])
            time_, seconds = float(row["time"]), float(row["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a step's timeline: {error!r}") from None
        steps.append(StepTimeline(step=row["step"], time=time_, seconds=seconds, spans=spans))
    return steps


def waits(step: StepTimeline) -> dict[str, dict[str, float]]:
    """For every lane but the driver, the seconds it was idle by the phase that it waited for.

    Idle time between two phases of the driver counts as ``other``.
    """
    phases = step.of(DRIVER)
    result = {}
    for lane in step.lanes:
        if lane == DRIVER:
            continue
        busy = _union([(s.start, s.end) for s in step.of(lane)])
        idle = step.seconds - sum(end - start for start, end in busy)
        found: dict[str, float] = {}
        for phase in phases:
            taken = sum(
                max(0.0, min(end, phase.end) - max(start, phase.start)) for start, end in busy
            )
            waited = max(0.0, phase.seconds - taken)
            found[phase.what] = found.get(phase.what, 0.0) + waited
        found["other"] = max(0.0, idle - sum(found.values()))
        result[lane] = found
    return result


def chrome_trace(steps: Sequence[StepTimeline], name: str) -> dict[str, Any]:
    """The steps in Chrome's trace-event format, which Perfetto and chrome://tracing open.

    One process, one thread a lane, complete events (``"ph": "X"``) in microseconds from the
    beginning of the first step; a resumed run keeps the gap in which nothing ran.
    Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    lanes = list(dict.fromkeys(lane for step in steps for lane in step.lanes))
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": name}}
    ]
    for thread, lane in enumerate(lanes, start=1):
        here = {"ph": "M", "pid": 1, "tid": thread}
        events.append({**here, "name": "thread_name", "args": {"name": lane}})
        events.append({**here, "name": "thread_sort_index", "args": {"sort_index": thread}})
    zero = steps[0].time if steps else 0.0
    for step in steps:
        offset = step.time - zero
        for span in step.spans:
            events.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": lanes.index(span.lane) + 1,
                    "name": span.what,
                    "cat": "ppo",
                    "ts": round((offset + span.start) * 1e6),
                    "dur": round(span.seconds * 1e6),
                    "args": {"step": step.step},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def export_trace(run_dir: Path, write: Callable[[str], None]) -> None:
    """Write a run's timeline as Chrome trace JSON.

    Raises:
        FileNotFoundError: The run has no timeline: PPO has not finished a step.
    """
    path = run_dir / "ppo" / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no timeline at {path}: `rlhf ppo` writes it, a line when a step ends"
        )
    write(json.dumps(chrome_trace(read_timeline(path), name=run_dir.resolve().name)))


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def _natural(name: str) -> tuple[str, int]:
    """``rollout-2`` before ``rollout-10``."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, -1)
