"""Who waited for what in a PPO step, for the page: a chart of a few steps and a table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.plots import clean_axes, compact
from cluster.run_files import RunFiles
from cluster.svg import PLACEHOLDERS, STYLE, Colour, to_svg
from cluster.timeline import DRIVER, StepTimeline, waits

STEPS_DRAWN = 3
MOST_LANES = 12
WIDTH, LANE_HEIGHT, LEFT, BELOW, ABOVE = 640.0, 20.0, 70.0, 34.0, 20.0

COLOURS: dict[str, Colour] = {
    "generate": "before",
    "score": "fourth",
    "learn": "after",
    "annotate": "third",
    "epochs": "after",
    "export": "sixth",
    "broadcast": "sixth",
    "verify": "sixth",
    "load": "sixth",
    "probe": "sixth",
    "accounting": "fifth",
    "save": "fifth",
    "checkpoint": "fifth",
}
LEGEND: tuple[tuple[str, Colour], ...] = (
    ("generate", "before"),
    ("score", "fourth"),
    ("annotate", "third"),
    ("learn, in epochs", "after"),
    ("weights: export, verify, load, probe", "sixth"),
    ("accounts, metrics, checkpoint", "fifth"),
)


@dataclass(frozen=True, kw_only=True)
class LaneRow:
    """A lane over all steps: how much of the time it worked, and what it waited for."""

    lane: str
    busy: str
    waited: str


@dataclass(frozen=True, kw_only=True)
class TimelineSection:
    title: str
    explain: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    rows: tuple[LaneRow, ...]


def timeline_section(run: RunFiles) -> TimelineSection | None:
    """``None`` when the run has no timeline."""
    if not run.timeline:
        return None
    drawn = last_together(run.timeline)
    first, last = drawn[0].step, drawn[-1].step
    title = f"Steps {first} to {last}, second by second" if first != last else f"Step {first}"
    return TimelineSection(
        title=title,
        explain="Where a lane is empty it waits for what the driver is at. `rlhf timeline` writes"
        " all steps as a trace for Perfetto.".replace("`", ""),
        svg=gantt(drawn, label=f"{title}: {_spoken(drawn[-1])}"),
        legend=LEGEND,
        rows=tuple(lane_rows(run.timeline)),
    )


def last_together(steps: Sequence[StepTimeline]) -> list[StepTimeline]:
    """The last few steps that followed each other without a break of the run."""
    chosen = [steps[-1]]
    for step in reversed(steps[:-1]):
        gap = chosen[0].time - step.time - step.seconds
        if len(chosen) == STEPS_DRAWN or gap > max(1.0, step.seconds):
            break
        chosen.insert(0, step)
    return chosen


def lane_rows(steps: Sequence[StepTimeline]) -> list[LaneRow]:
    """Shares of the time of all steps together, by lane."""
    total = sum(step.seconds for step in steps)
    waited: dict[str, dict[str, float]] = {}
    for step in steps:
        for lane, phases in waits(step).items():
            sums = waited.setdefault(lane, {})
            for phase, seconds in phases.items():
                sums[phase] = sums.get(phase, 0.0) + seconds
    rows = []
    for lane, sums in waited.items():
        there = sum(step.seconds for step in steps if lane in step.lanes)
        busy = 1 - sum(sums.values()) / there if there else 0.0
        largest = sorted(sums.items(), key=lambda item: -item[1])
        told = [f"{name} {s / there:.0%}" for name, s in largest if s >= 0.01 * total]
        rows.append(LaneRow(lane=lane, busy=f"{max(0.0, busy):.0%}", waited=", ".join(told)))
    return rows


def gantt(steps: Sequence[StepTimeline], *, label: str) -> str:
    """Lanes over time as an inline SVG; steps are laid out as the wall clock had them."""
    import matplotlib
    from matplotlib.figure import Figure

    lanes = list(dict.fromkeys(lane for step in steps for lane in step.lanes))
    hidden = len(lanes) - MOST_LANES
    lanes = lanes[:MOST_LANES]
    height = LANE_HEIGHT * len(lanes) + ABOVE + BELOW
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_axes((LEFT / WIDTH, BELOW / height, 1 - (LEFT + 8) / WIDTH,
                                1 - (ABOVE + BELOW) / height))  # fmt: skip
    figure.patch.set_visible(False)
    clean_axes(axes, PLACEHOLDERS)
    axes.grid(axis="y", visible=False)
    zero = steps[0].time
    for step in steps:
        offset = step.time - zero
        axes.axvline(offset, color=PLACEHOLDERS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            f"step {step.step}", (offset, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
            textcoords="offset points", fontsize=10, color=PLACEHOLDERS["muted"],
        )  # fmt: skip
        for span in step.spans:
            if span.lane in lanes:
                axes.barh(
                    lanes.index(span.lane), span.seconds, left=offset + span.start, height=0.66,
                    color=PLACEHOLDERS[COLOURS.get(span.what, "muted")], linewidth=0,
                    alpha=0.45 if span.lane == DRIVER else 0.9,
                )  # fmt: skip
    end = steps[-1].time - zero + steps[-1].seconds
    axes.set_xlim(0, max(end, 1e-3))
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), lanes, parse_math=False)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    more = f" ({hidden} more actors are not drawn)" if hidden > 0 else ""
    axes.set_xlabel(f"seconds{more}", color=PLACEHOLDERS["muted"], labelpad=2, parse_math=False)
    return to_svg(figure, label, (WIDTH, height))


def _spoken(step: StepTimeline) -> str:
    phases = ", ".join(f"{span.what} {compact(span.seconds)} s" for span in step.of(DRIVER))
    return f"of step {step.step} the driver spent {phases}"
