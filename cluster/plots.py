"""Charts of a run: small SVGs for the page, and one PNG for the README.

The SVGs follow the page: every colour is a CSS variable, so they turn with light and dark, and
their text takes the page's font. Each is drawn at 1 unit = 1 CSS pixel for a phone's width and
scales from there. Nothing here opens a window or touches matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster.svg import HEIGHT, PLACEHOLDERS, PRINT_COLOURS, STYLE, WIDTH, Colour, to_svg

if TYPE_CHECKING:
    from reward_service.intervals import Estimate

Array = npt.NDArray[np.float64]
SERIES: tuple[Colour, ...] = ("after", "third", "before", "fourth", "fifth")

MAX_POINTS = 400
"""A longer curve is thinned to so many points: no screen shows more, and the page stays small."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: ``x`` and ``y`` of one length; NaN in ``y`` is left out."""

    name: str
    x: Array
    y: Array
    colour: Colour = "after"
    dots: bool = False

    def cleaned(self) -> tuple[Array, Array]:
        keep = np.isfinite(self.y)
        x, y = self.x[keep], self.y[keep]
        if len(x) > MAX_POINTS:
            chosen = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
            x, y = x[chosen], y[chosen]
        return x, y


@dataclass(frozen=True, kw_only=True)
class Band:
    """A shaded range around a curve (spread, quantiles)."""

    x: Array
    low: Array
    high: Array
    colour: Colour = "after"


def smooth(y: Array, span: int) -> Array:
    """Moving average with Gaussian weights around each point, about ``span`` points wide.

    Centred, so it does not lag behind a steep curve; at the ends it averages what is there.
    """
    reach = max(1, span)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(0.5, span / 3)) ** 2)
    there = np.convolve(np.isfinite(y).astype(float), weights)[reach:-reach]
    summed = np.convolve(np.nan_to_num(y), weights)[reach:-reach]
    return np.asarray(summed / np.where(there > 0, there, np.nan), dtype=np.float64)


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    band: Band | None = None,
    log: bool = False,
    percent: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves over steps, as an inline SVG.

    A noisy curve of more than 60 points is drawn faintly with its moving average over it.

    Args:
        label: What a screen reader says.
        band: Shaded behind the first curve.
        log: Logarithmic y; values that are not positive are left out.
        percent: y is a share.
        marks: Horizontal lines, each with a word on what it is.
    """
    figure, axes = _figure()
    if log:
        axes.set_yscale("log")
    if band is not None:
        axes.fill_between(
            band.x, band.low, band.high, color=PLACEHOLDERS[band.colour], alpha=0.16, linewidth=0
        )
    for line in lines:
        _draw_line(axes, line, log=log)
    _pad_limits(axes, log=log)
    for value, text in marks:
        _draw_mark(axes, value, text, log=log)
    _format_axes(axes, percent=percent, log=log)
    axes.set_xlabel(x_label, color=PLACEHOLDERS["muted"], labelpad=2, parse_math=False)
    return to_svg(figure, label)


def stacked_chart(
    x: Array, parts: Sequence[tuple[str, Array, Colour]], *, label: str, x_label: str
) -> str:
    """Parts of a whole over steps (seconds per phase), stacked from the bottom up."""
    figure, axes = _figure()
    heights = np.vstack([np.nan_to_num(values) for _, values, _ in parts])
    if len(x) > MAX_POINTS:
        chosen = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
        x, heights = x[chosen], heights[:, chosen]
    if len(x) == 1:  # an area needs two points
        x, heights = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(heights, 2, axis=1)
    axes.stackplot(
        x, heights, colors=[PLACEHOLDERS[c] for _, _, c in parts], alpha=0.85, linewidth=0
    )
    axes.set_xlim(float(x.min()), float(x.max()))
    axes.set_ylim(0, max(float(heights.sum(axis=0).max()) * 1.05, 1e-9))
    _format_axes(axes)
    axes.set_xlabel(x_label, color=PLACEHOLDERS["muted"], labelpad=2, parse_math=False)
    return to_svg(figure, label)


def histogram(
    groups: Sequence[tuple[str, Array, Colour]], *, label: str, x_label: str, bins: int = 24
) -> str:
    """Distributions over each other, on common bins, as shares of their own group."""
    figure, axes = _figure()
    everything = np.concatenate([values for _, values, _ in groups])
    low, high = float(everything.min()), float(everything.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    for _, values, colour in groups:
        shares = np.histogram(values, edges)[0] / len(values)
        axes.stairs(shares, edges, fill=True, color=PLACEHOLDERS[colour], alpha=0.25)
        axes.stairs(shares, edges, color=PLACEHOLDERS[colour], linewidth=1.5)
        mean = float(values.mean())
        axes.axvline(mean, color=PLACEHOLDERS[colour], linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    _format_axes(axes, percent=True)
    axes.set_xlabel(x_label, color=PLACEHOLDERS["muted"], labelpad=2, parse_math=False)
    return to_svg(figure, label)


def _figure() -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        # Fixed margins: cheap, and the plots of a row line up.
        axes = figure.add_axes((40 / WIDTH, 34 / HEIGHT, 1 - 48 / WIDTH, 1 - 44 / HEIGHT))
    figure.patch.set_visible(False)
    clean_axes(axes, PLACEHOLDERS)
    return figure, axes


def clean_axes(axes: Any, theme: dict[Colour, str]) -> None:
    """Only what carries meaning: horizontal grid lines and a base line."""
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme["grid"])
    axes.tick_params(which="both", length=0, labelcolor=theme["muted"], labelsize=10.5, pad=4)
    axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_line(axes: Any, line: Line, *, log: bool) -> None:
    x, y = line.cleaned()
    if log:
        x, y = x[y > 0], y[y > 0]
    if not len(x):
        return
    colour = PLACEHOLDERS[line.colour]
    style: dict[str, Any] = {"color": colour, "solid_capstyle": "round", "solid_joinstyle": "round"}
    if len(x) > 60 and not line.dots:
        axes.plot(x, y, linewidth=0.8, alpha=0.3, **style)
        averaged = np.exp(smooth(np.log(y), len(y) // 12)) if log else smooth(y, len(y) // 12)
        axes.plot(x, averaged, linewidth=1.9, **style)
    else:
        axes.plot(x, y, linewidth=1.9, **style)
    if line.dots or len(x) == 1:
        axes.plot(x, y, "o", markersize=4, color=colour)


def _draw_mark(axes: Any, value: float, text: str, *, log: bool) -> None:
    """A reference line; the limits widen to hold it unless that would squeeze the curves."""
    scale = math.log10 if log else float
    low, high = (scale(limit) for limit in axes.get_ylim())
    at = scale(value)
    if not low - 2 * (high - low) <= at <= high + 2 * (high - low):
        return
    axes.axhline(value, color=PLACEHOLDERS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    reach = 0.06 * (max(high, at) - min(low, at))
    limits = min(low, at - reach), max(high, at + reach)
    axes.set_ylim(*(10**limit for limit in limits) if log else limits)
    right = axes.get_xlim()[1]
    axes.annotate(
        text, (right, value), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom",
        fontsize=10, color=PLACEHOLDERS["muted"], parse_math=False,
    )  # fmt: skip


def _pad_limits(axes: Any, *, log: bool) -> None:
    """Room for a flat curve, and no empty margin left and right."""
    axes.margins(x=0.02)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    if not log and high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        reach = max(0.5 * abs(high), 1e-6)
        axes.set_ylim(low - reach, high + reach)


def _format_axes(axes: Any, *, percent: bool = False, log: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: compact(v)))
    low, high = axes.get_ylim()
    if log:
        wide = high > 100 * low
        subs = (1.0,) if wide else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=5 if wide else 9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _log_label(v)))
        return
    if percent:
        # The view, not the data, would pass 0 and 100 %.
        axes.set_ylim(max(low, 0.0), min(high, 1.0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: compact(v)))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _log_label(value: float) -> str:
    return compact(value) if 1e-3 <= value < 1e6 else f"{value:.0e}".replace("e-0", "e-")


def compact(value: float) -> str:
    """Four characters where possible: 1234 is 1.23k, 0.00012 is 1.2e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * factor:
            return f"{value / factor:.3g}{suffix}".replace("-", "\N{MINUS SIGN}")
    text = f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
    mantissa, e, exponent = text.partition("e")
    return mantissa.replace("-", "\N{MINUS SIGN}") + e + exponent


def plot_quickstart_summary(run_dir: Path, png_path: Path) -> None:
    """The picture for a README: quality rising, KL paid for it, held-out texts before and after.

    Where the data has no true quality, the reward takes its place.

    Raises:
        FileNotFoundError: The run has no PPO metrics or no evaluation yet.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from cluster.evaluation import display_name, read_evaluation
    from cluster.metrics import read_metrics

    frame = read_metrics(run_dir / "ppo")
    evaluation = read_evaluation(run_dir)
    before, after = evaluation.checkpoints[0], evaluation.checkpoints[-1]
    judged = "measured/good" in frame and before.good_share and after.good_share
    style = STYLE | {"font.sans-serif": ["Inter", "Helvetica", "Arial", "DejaVu Sans"]}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.8, 3.1), dpi=200, facecolor=PRINT_COLOURS["paper"])
        panels = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1.25, 1.25, 1)})
        x = frame["step"].to_numpy(dtype=float)
        curves: tuple[tuple[str, str, Colour], ...] = (
            ("Good texts while PPO trains", "measured/good", "after")
            if judged
            else ("Reward while PPO trains", "reward/mean", "after"),
            ("KL to the reference, nats a response", "ppo/kl_sequence", "third"),
        )
        for axes, (title, name, colour) in zip(panels[:2], curves, strict=True):
            clean_axes(axes, PRINT_COLOURS)
            _plain_curve(axes, x, frame[name].to_numpy(dtype=float), PRINT_COLOURS[colour])
            _print_labels(axes, title, percent=name == "measured/good", x_label="PPO step")
        clean_axes(panels[2], PRINT_COLOURS)
        values = [c.good_share if judged else c.reward for c in (before, after)]
        _bars(
            panels[2],
            [display_name(c.name) for c in (before, after)],
            [v for v in values if v is not None],
        )
        what = "Good texts" if judged else "Reward"
        _print_labels(panels[2], f"{what}, held out", percent=bool(judged))
        figure.tight_layout(pad=0.9, w_pad=2.6)
        figure.savefig(png_path, format="png", metadata={"Software": None})


def _plain_curve(axes: Any, x: Array, y: Array, colour: str) -> None:
    """The steps' own values faintly, their moving average over them."""
    axes.plot(x, y, color=colour, linewidth=1, alpha=0.35)
    axes.plot(x, smooth(y, max(2, len(y) // 8)), color=colour, linewidth=2.4)
    axes.set_xlim(float(x.min()), float(x.max()))
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(y))))


def _bars(axes: Any, names: Sequence[str], estimates: Sequence[Estimate]) -> None:
    """A bar a checkpoint with its interval; the value stands in it."""
    values = np.array([e.value for e in estimates])
    reach = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]])
    colours = [PRINT_COLOURS["before"], PRINT_COLOURS["after"]]
    axes.bar(range(len(values)), values, width=0.58, color=colours, alpha=0.9)
    axes.errorbar(
        range(len(values)), values, yerr=reach, fmt="none", color=PRINT_COLOURS["ink"],
        elinewidth=1.3, capsize=4,
    )  # fmt: skip
    share = all(e.low >= 0 and e.high <= 1 for e in estimates)
    for index, value in enumerate(values):
        axes.annotate(
            f"{value:.0%}" if share else compact(float(value)),
            (index, 0), xytext=(0, 6 if value >= 0 else -16),
            textcoords="offset points", ha="center", fontsize=11, fontweight="bold", color="white",
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _print_labels(axes: Any, title: str, *, percent: bool, x_label: str = "") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=PRINT_COLOURS["ink"])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{100 * v:.3g}%" if percent else compact(v))
    )
    if x_label:
        axes.set_xlabel(x_label, color=PRINT_COLOURS["muted"])
