"""Which charts the page draws, from which metrics, and what each of them means to a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.plots import SERIES, Array, Band, Line, compact, line_chart, stacked_chart
from cluster.svg import Colour

if TYPE_CHECKING:
    import pandas as pd

Names = tuple[str, ...]
"""Names one figure may have, the preferred one first."""

MOST_UNKNOWN_CHARTS = 30


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: a title, what a reader should look for, and the metrics of its curves.

    Attributes:
        lines: For each curve its legend ("" for none) and the metric's possible names.
        spread: Names of the standard deviation that shades a band around the first curve.
        marks: Horizontal lines: value and word.
        sparse: Index of a curve measured now and then only, drawn with dots.
    """

    title: str
    explain: str
    lines: tuple[tuple[str, Names], ...]
    unit: str = ""
    percent: bool = False
    log: bool = False
    spread: Names = ()
    marks: tuple[tuple[float, str], ...] = ()
    sparse: int | None = None


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


LEARNED: tuple[Panel, ...] = (
    Panel(
        title="Reward",
        explain="Mean score of each step's samples, and one standard deviation around it.",
        lines=(("", ("reward/mean", "ppo/score")),),
        spread=("reward/std", "ppo/score_std"),
    ),
    Panel(
        title="Good texts",
        explain="Share of samples without any fault, by true quality. Never part of the reward.",
        lines=(("", ("measured/good",)),),
        percent=True,
    ),
    Panel(
        title="True quality",
        explain="Mean true quality, 0 to 1. When the reward rises and this does not, the reward"
        " is being gamed.",
        lines=(("", ("measured/true_quality", "measured/quality")),),
    ),
    Panel(
        title="KL to the reference",
        explain="How far the policy has moved from the model it started as, per response.",
        lines=(("", ("ppo/kl_sequence",)),),
        unit="nats",
    ),
    Panel(
        title="Entropy",
        explain="Uncertainty of the next token. Falling to zero means that variety is lost.",
        lines=(("", ("ppo/entropy",)),),
        unit="nats",
    ),
    Panel(
        title="Response length",
        explain="Mean tokens of a response. A steady climb often means rambling pays.",
        lines=(("", ("response/length_mean", "ppo/response_length")),),
        unit="tokens",
    ),
    Panel(
        title="Ended by itself",
        explain="Share of responses that end with the end-of-text token instead of being cut off.",
        lines=(("", ("response/eos_rate", "ppo/eos_rate")),),
        percent=True,
    ),
    Panel(
        title="Reward after the KL penalty",
        explain="What PPO maximises: the score less the price of moving away.",
        lines=(("", ("ppo/reward_shaped",)),),
    ),
)

HEALTH: tuple[Panel, ...] = (
    Panel(
        title="Engine against learner",
        explain="Difference of the log-probabilities that vLLM sampled with and that the learner"
        " computes. Rounding only, when the weights are in step: below 1e-4 in float32.",
        lines=(("mean", ("ppo/engine_delta_mean",)), ("largest", ("ppo/engine_delta_max",))),
        log=True,
        unit="|Δ log p|",
    ),
    Panel(
        title="Clipped tokens",
        explain="Share of tokens whose update was clipped. A few per cent is usual; beyond a"
        " quarter the steps are too large.",
        lines=(
            ("policy", ("ppo/clip_fraction",)),
            ("value", ("ppo/value_clip_fraction",)),
        ),
        percent=True,
    ),
    Panel(
        title="Explained variance",
        explain="How much of the return the critic foresees: 1 is all of it, 0 none.",
        lines=(("", ("ppo/explained_variance",)),),
    ),
    Panel(
        title="Change in one step",
        explain="Approximate KL between the policy after and before an update, per token.",
        lines=(("", ("ppo/approx_kl",)),),
        unit="nats",
    ),
    Panel(
        title="Probability ratio",
        explain="Of new to old policy: the mean stays near 1, the largest shows outliers.",
        lines=(("mean", ("ppo/ratio_mean",)), ("largest", ("ppo/ratio_max",))),
        log=True,
    ),
    Panel(
        title="Gradient norm",
        explain="Before clipping. Spikes that do not come back down announce divergence.",
        lines=(
            ("policy", ("ppo/grad_norm_policy",)),
            ("critic", ("ppo/grad_norm_critic",)),
        ),
        log=True,
    ),
    Panel(
        title="Policy loss",
        explain="The clipped surrogate. Its sign and size say little; a jump says something.",
        lines=(("", ("ppo/loss_policy",)),),
    ),
    Panel(
        title="Value loss",
        explain="The critic's squared error.",
        lines=(("", ("ppo/loss_value",)),),
    ),
    Panel(
        title="KL coefficient",
        explain="The price of a nat of KL; changes only under adaptive control.",
        lines=(("", ("ppo/kl_coef",)),),
    ),
    Panel(
        title="Effective sample size",
        explain="Share of the tokens that counts when engine and learner disagree; 1 is all.",
        lines=(("", ("ppo/effective_sample_size",)),),
        percent=True,
    ),
    Panel(
        title="Failed samples",
        explain="Samples set aside because generating or scoring them failed.",
        lines=(("", ("samples/failed",)),),
    ),
    Panel(
        title="Throughput",
        explain="Response tokens generated, scored and learned from per second.",
        lines=(("", ("tokens/per_second",)),),
        unit="tokens/s",
    ),
)

SUPERVISED: tuple[Panel, ...] = (
    Panel(
        title="Loss",
        explain="On the training data, and on data kept apart. When the two part, it memorises.",
        lines=(("training", ("loss",)), ("held out", ("held_out_loss",))),
        sparse=1,
    ),
    Panel(
        title="Agreement with the judges",
        explain="Share of judgements it agrees with; a tie counts as a miss.",
        lines=(
            ("training", ("agreement", "accuracy")),
            ("held out", ("held_out_agreement", "held_out_accuracy")),
        ),
        percent=True,
        marks=((0.5, "a coin"),),
        sparse=1,
    ),
    Panel(
        title="Gradient norm",
        explain="Before clipping.",
        lines=(("", ("gradient_norm", "grad_norm")),),
        log=True,
    ),
    Panel(
        title="Throughput",
        explain="Tokens trained on per second.",
        lines=(("", ("tokens_per_second",)),),
        unit="tokens/s",
    ),
)

PHASES: tuple[tuple[str, Names], ...] = (
    ("generate and score", ("seconds/generate",)),
    ("annotate", ("ppo/seconds_annotate",)),
    ("forward and backward", ("ppo/seconds_forward_backward",)),
    ("optimizer", ("ppo/seconds_optimizer",)),
    ("broadcast weights", ("seconds/broadcast",)),
)

DULL = ("learning_rate", "samples/", "tokens/", "seconds/", "ppo/seconds_", "ppo/samples",
        "ppo/tokens", "ppo/optimizer_steps", "ppo/learning_rate", "reward/min", "reward/max",
        "response/length_max")  # fmt: skip
"""Metrics that deserve no chart of their own although no panel has them."""

RESERVED = ("stage", "step", "total", "time")


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
