"""From the metrics of a stage to drawn charts, panel by panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.panels import PHASES, Names, Panel
from cluster.plots import SERIES, Array, Band, Line, compact, line_chart, stacked_chart
from cluster.svg import Colour

if TYPE_CHECKING:
    import pandas as pd

MOST_UNKNOWN_CHARTS = 30


DULL = ("learning_rate", "samples/", "tokens/", "seconds/", "ppo/seconds_", "ppo/samples",
        "ppo/tokens", "ppo/optimizer_steps", "ppo/learning_rate", "reward/min", "reward/max",
        "response/length_max")  # fmt: skip
"""Metrics that deserve no chart of their own although no panel has them."""

RESERVED = ("stage", "step", "total", "time")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn panel. ``first`` and ``last`` are means of the first and last tenth of a curve."""

    title: str
    explain: str
    svg: str
    first: str = ""
    last: str = ""
    unit: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    """(name, colour variable) of each curve when there are several."""
    flat: bool = False
    """Nothing moved: worth a line of text, not a chart."""


def draw_panels(
    frame: pd.DataFrame,
    panels: Sequence[Panel],
    *,
    x_label: str,
    marks: Mapping[str, tuple[tuple[float, str], ...]] | None = None,
) -> list[Chart]:
    """A chart for each panel that the table has a metric for.

    Args:
        frame: One row a step.
        marks: Further horizontal lines, by panel title.
    """
    charts = []
    for panel in panels:
        lines = _lines(frame, panel)
        if not lines:
            continue
        main = next((line for line in lines if not line.dots), lines[0])
        first, last = _ends(main.y, panel.percent)
        reader_text = f"{panel.title} by {x_label}: from {first} to {last} {panel.unit}"
        charts.append(
            Chart(
                title=panel.title,
                explain=panel.explain,
                svg=line_chart(
                    lines,
                    label=reader_text.strip(),
                    x_label=x_label,
                    band=_band(frame, panel, lines[0]),
                    log=panel.log,
                    percent=panel.percent,
                    marks=panel.marks + (marks or {}).get(panel.title, ()),
                ),
                first=first,
                last=last,
                unit=panel.unit,
                legend=_legend([(line.name, line.colour) for line in lines]),
                flat=all(_is_flat(line.y) for line in lines) and len(frame) > 2,
            )
        )
    return charts


def draw_unknown(
    frame: pd.DataFrame, panels: Sequence[Panel], *, x_label: str
) -> tuple[list[Chart], list[tuple[str, str, str]]]:
    """What no panel shows: charts, and a row (name, first, last) for each metric beyond them."""
    known = {name for panel in panels for _, names in panel.lines for name in names}
    known |= {name for panel in panels for name in panel.spread}
    rest = [
        str(name)
        for name in sorted(frame.columns)
        if name not in known and name not in RESERVED and _column(frame, (str(name),)) is not None
    ]
    interesting = [name for name in rest if not name.startswith(DULL)][:MOST_UNKNOWN_CHARTS]
    charts = draw_panels(
        frame,
        [Panel(title=name, explain="", lines=(("", (name,)),)) for name in interesting],
        x_label=x_label,
    )
    table = []
    for name in rest:
        column = _column(frame, (name,))
        if name not in interesting and column is not None:
            table.append((name, *_ends(column, percent=False)))
    return charts, table


def reward_terms(frame: pd.DataFrame) -> list[Panel]:
    """The terms of a composed reward, where there are several, and how far the scores of each
    reward model have moved, where that is known."""
    statistics = {"reward/mean", "reward/std", "reward/min", "reward/max"}
    names = [str(n) for n in frame.columns if str(n).startswith("reward/") and n not in statistics]
    drifts = [name for name in names if name.endswith("_drift")]
    terms = [name for name in names if name not in drifts]
    panels = []
    if len(terms) > 1:
        panels.append(
            Panel(
                title="Terms of the reward",
                explain="Mean of each term, before its weight. One that climbs alone is being"
                " gamed.",
                lines=tuple((n.removeprefix("reward/"), (n,)) for n in terms[: len(SERIES)]),
            )
        )
    if drifts:
        known = [(n.removeprefix("reward/").removesuffix("_drift"), (n,)) for n in drifts]
        panels.append(
            Panel(
                title="Drift of the score",
                explain="How far a reward model's scores have moved from those of the texts on"
                " which it was normalised, in their standard deviations. The further, the less"
                " they are worth.",
                lines=tuple(known[: len(SERIES)]) if len(known) > 1 else (("", known[0][1]),),
            )
        )
    return panels


def draw_phases(frame: pd.DataFrame, *, x_label: str) -> Chart | None:
    """Seconds of a step by phase, stacked; what the learners' parts leave is "other learning"."""
    x = frame["step"].to_numpy(dtype=float)
    parts = [
        (name, column) for name, names in PHASES if (column := _column(frame, names)) is not None
    ]
    learn = _column(frame, ("seconds/learn",))
    if learn is not None:
        inside = [
            np.nan_to_num(column) for name, column in parts
            if name in ("annotate", "forward and backward", "optimizer")
        ]  # fmt: skip
        remaining = np.clip(learn - np.sum(inside, axis=0), 0, None) if inside else learn
        parts.insert(-1 if len(parts) > 1 else len(parts), ("other learning", remaining))
    parts = [(name, column) for name, column in parts if np.nansum(column) > 0]
    if not parts:
        return None
    colours: tuple[Colour, ...] = ("before", "third", "after", "fourth", "fifth", "sixth")
    shown = [(name, column, colours[i % 6]) for i, (name, column) in enumerate(parts)]
    total = float(np.sum([np.nanmean(column) for _, column in parts]))
    described = ", ".join(f"{name} {compact(float(np.nanmean(c)))} s" for name, c in parts)
    return Chart(
        title="Seconds of a step",
        explain=f"{compact(total)} s on average: {described}.",
        svg=stacked_chart(x, shown, label=f"Seconds of a PPO step: {described}", x_label=x_label),
        legend=_legend([(name, colour) for name, _, colour in shown]),
    )


def _lines(frame: pd.DataFrame, panel: Panel) -> list[Line]:
    lines: list[Line] = []
    for index, (legend, names) in enumerate(panel.lines):
        y = _column(frame, names)
        if y is not None:
            lines.append(
                Line(
                    name=legend,
                    x=frame["step"].to_numpy(dtype=float),
                    y=y,
                    colour=SERIES[len(lines)],
                    dots=index == panel.sparse,
                )
            )
    return lines


def _column(frame: pd.DataFrame, names: Names) -> Array | None:
    """The first of ``names`` that the table has with at least one number in it."""
    import pandas as pd

    for name in names:
        if name in frame.columns and pd.api.types.is_numeric_dtype(frame[name]):
            values: Array = frame[name].to_numpy(dtype=float)
            if np.isfinite(values).any():
                return values
    return None


def _band(frame: pd.DataFrame, panel: Panel, line: Line) -> Band | None:
    spread = _column(frame, panel.spread)
    if spread is None:
        return None
    return Band(x=line.x, low=line.y - spread, high=line.y + spread, colour=line.colour)


def _ends(y: Array, percent: bool) -> tuple[str, str]:
    """Means of the first and last tenth, as text."""
    y = y[np.isfinite(y)]
    count = max(1, len(y) // 10)
    ends = float(y[:count].mean()), float(y[-count:].mean())
    first, last = (f"{100 * v:.0f}%" if percent else compact(v) for v in ends)
    return first, last


def _is_flat(y: Array) -> bool:
    y = y[np.isfinite(y)]
    return bool(np.ptp(y) <= 1e-6 * max(1.0, float(np.abs(y).max())))


def _legend(entries: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(entries) if len(entries) > 1 else ()
