"""The timeline of a step: what is recorded, what waiting is, and its form as a Chrome trace."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from actors.weights import UpdateConfirmation
from cluster.cli import main
from cluster.report_timeline import gantt, lane_rows, last_together
from cluster.step_record import StepRecord
from cluster.timeline import (
    DRIVER,
    FILE_NAME,
    Clock,
    Span,
    StepTimeline,
    chrome_trace,
    joined,
    read_timeline,
    waits,
)


def step_of(
    *spans: tuple[str, str, float, float], number: int = 1, at: float = 0.0
) -> StepTimeline:
    found = tuple(Span(*span) for span in spans)
    return StepTimeline(step=number, time=at, seconds=max(s.end for s in found), spans=found)


STEP = step_of(
    ("driver", "generate", 0.0, 4.0),
    ("rollout-0", "generate", 0.0, 1.0),
    ("rollout-1", "generate", 0.0, 3.0),
    ("reward", "score", 3.0, 4.0),
    ("driver", "learn", 4.0, 9.0),
    ("learners", "annotate", 4.0, 5.0),
    ("learners", "epochs", 5.0, 9.0),
    ("driver", "broadcast", 9.5, 10.0),
    ("rollout-0", "load", 9.5, 10.0),
    ("rollout-1", "load", 9.5, 9.75),
)


def test_idle_time_is_told_by_the_phase_that_was_waited_for() -> None:
    found = waits(STEP)
    assert found["rollout-0"] == {"generate": 3.0, "learn": 5.0, "broadcast": 0.0, "other": 0.5}
    assert found["rollout-1"] == {"generate": 1.0, "learn": 5.0, "broadcast": 0.25, "other": 0.5}
    assert found["learners"] == {"generate": 4.0, "learn": 0.0, "broadcast": 0.5, "other": 0.5}
    assert DRIVER not in found
    rows = {row.lane: (row.busy, row.waited) for row in lane_rows([STEP])}
    assert rows["learners"] == ("50%", "generate 40%, broadcast 5%, other 5%")


def test_a_clock_sums_phases_and_lays_remote_parts_out_in_order() -> None:
    clock = Clock()
    began = clock.began
    clock.add(DRIVER, "generate", began, began + 1.0)
    clock.add(DRIVER, "generate", began + 1.5, began + 2.0)
    clock.add(DRIVER, "learn", began + 2.0, began + 5.0)
    clock.add("learners", "export", began + 5.0, began + 5.25)
    confirmation = UpdateConfirmation(
        actor="rollout-0", version=1, probe_max_error=0.0, probe_mean_error=0.0,
        seconds_verify=0.25, seconds_load=0.5, seconds_probe=0.0,
    )  # fmt: skip
    metrics = {
        "ppo/seconds_annotate": 1.0, "ppo/seconds_forward_backward": 1.5,
        "ppo/seconds_optimizer": 0.5,
    }  # fmt: skip
    clock.remote_parts(metrics, [confirmation])
    assert clock.seconds() == pytest.approx({"generate": 1.5, "learn": 3.0})
    row = clock.row(3)
    assert row["step"] == 3
    assert row["seconds"] == pytest.approx(6.0)
    assert ["learners", "annotate", 2.0, 3.0] in row["spans"]
    assert ["learners", "epochs", 3.0, 5.0] in row["spans"]
    assert ["rollout-0", "verify", 5.25, 5.5] in row["spans"]
    assert ["rollout-0", "load", 5.5, 6.0] in row["spans"]
    assert not [span for span in row["spans"] if span[1] == "probe"]


def test_batches_that_touch_are_one_span() -> None:
    spans = [Span("reward", "score", a, a + 0.1) for a in (0.0, 0.1, 0.102, 0.5)]
    spans.append(Span("driver", "generate", 0.05, 0.4))
    assert joined(spans) == [
        Span("reward", "score", 0.0, 0.202),
        Span("driver", "generate", 0.05, 0.4),
        Span("reward", "score", 0.5, 0.6),
    ]


def test_the_trace_has_the_form_that_perfetto_reads() -> None:
    later = step_of(("driver", "generate", 0.0, 1.0), ("rollout-10", "generate", 0.2, 0.4),
                    number=2, at=100.5)  # fmt: skip
    trace = chrome_trace([STEP, later], "my run")
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    threads = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert list(threads.values()) == [
        "driver", "learners", "reward", "rollout-0", "rollout-1", "rollout-10",
    ]  # fmt: skip
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(STEP.spans) + len(later.spans)
    for event in complete:
        assert {"name", "cat", "ts", "dur", "pid", "tid", "args"} <= set(event)
        assert isinstance(event["ts"], int)
        assert isinstance(event["dur"], int)
        assert event["tid"] in threads
    last = complete[-1]
    assert (last["ts"], last["dur"], last["args"]) == (100_700_000, 200_000, {"step": 2})
    # Complete events of one thread must nest or follow each other, or the viewer drops them.
    for thread in threads:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if e["tid"] == thread)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_the_command_writes_a_trace_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    result = CliRunner().invoke(main, ["timeline", str(tmp_path)])
    assert result.exit_code == 1
    assert "no timeline at" in result.output
    spans = [list(span) for span in STEP.spans]
    row = {"step": 1, "time": 5.0, "seconds": 10.0, "spans": spans}
    lines = [json.dumps(row | {"step": step}) + "\n" for step in range(1, 41)]
    (tmp_path / "ppo" / FILE_NAME).write_text("".join(lines))
    result = CliRunner().invoke(main, ["timeline", str(tmp_path)])
    assert result.exit_code == 0
    trace = json.loads(result.output)
    assert max(event.get("args", {}).get("step", 0) for event in trace["traceEvents"]) == 40


def test_a_record_has_checkpoints_and_workers_and_is_cut_back_on_resume(tmp_path: Path) -> None:
    checkpoints = [2]
    workers = {"rollout-0": "serving"}

    def finish(record: StepRecord, step: int) -> None:
        clock = Clock()
        clock.add(DRIVER, "learn", clock.began, clock.began + 1.0)
        clock.add(DRIVER, "save", clock.began + 1.0, clock.began + 1.5)
        record(step, clock)

    record = StepRecord(tmp_path, 0, workers=lambda: workers, checkpoints=lambda: checkpoints)
    for step in (1, 2, 3):
        finish(record, step)
    record.close()
    steps = read_timeline(tmp_path)
    assert [step.lanes for step in steps] == [["driver"], ["driver", "learners"], ["driver"]]
    assert steps[1].of("learners") == [Span("learners", "checkpoint", 1.0, 1.5)]
    state = json.loads((tmp_path / "workers.json").read_text())
    assert (state["step"], state["workers"]) == (3, workers)
    record = StepRecord(tmp_path, 2, workers=lambda: workers, checkpoints=lambda: checkpoints)
    finish(record, 3)
    record.close()
    assert [step.step for step in read_timeline(tmp_path)] == [1, 2, 3]


def test_a_killed_run_loses_a_line_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    good = json.dumps(
        {"step": 1, "time": 5.0, "seconds": 1.0, "spans": [["driver", "learn", 0, 1]]}
    )
    path.write_text(good + "\n" + good[:40])
    (step,) = read_timeline(tmp_path)
    assert step.spans == (Span("driver", "learn", 0.0, 1.0),)
    path.write_text(good + "\n" + '{"step": 2, "time": 1, "seconds": 1, "spans": [["x"]]}\n')
    with pytest.raises(ValueError, match=r"timeline\.jsonl:2: not a step's timeline"):
        read_timeline(path)


def test_steps_that_are_drawn_together_have_no_break_between_them() -> None:
    times = (0.0, 10.1, 500.0, 510.2, 520.3)
    steps = [step_of(("driver", "learn", 0.0, 10.0), number=i, at=t) for i, t in enumerate(times)]
    assert [step.step for step in last_together(steps)] == [2, 3, 4]
    assert [step.step for step in last_together(steps[:4])] == [2, 3]
    drawn = gantt(last_together(steps), label="<steps>")
    assert drawn.startswith("<svg")
    assert "&lt;steps&gt;" in drawn
    assert drawn.count("step 3") == 1
