"""Charts of a run: small SVGs for the page, and one PNG for the README.

The SVGs follow the page: every colour is a CSS variable, so they turn with light and dark, and
their text takes the page's font. Each is drawn at 1 unit = 1 CSS pixel for a phone's width and
scales from there. Nothing here opens a window or touches matplotlib's global state.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Colour = Literal["ink", "muted", "grid", "paper", "after", "before", "third", "fourth", "fifth"]

SERIES: tuple[Colour, ...] = ("after", "third", "before", "fourth", "fifth")

# What matplotlib is told; the page's variable takes each one's place afterwards.
_PLACEHOLDERS: dict[Colour, str] = {
    "ink": "#010a01", "muted": "#010b01", "grid": "#010c01", "paper": "#010d01",
    "after": "#020a02", "before": "#020b02", "third": "#020c02", "fourth": "#020d02",
    "fifth": "#020e02",
}  # fmt: skip
PRINT_COLOURS: dict[Colour, str] = {
    "ink": "#1c2024", "muted": "#687076", "grid": "#e6e4df", "paper": "#ffffff",
    "after": "#0b7a75", "before": "#c2570c", "third": "#4f46e5", "fourth": "#be185d",
    "fifth": "#64748b",
}  # fmt: skip

WIDTH, HEIGHT = 280, 168
MAX_POINTS = 400
"""A longer curve is thinned to so many points: no screen shows more, and the page stays small."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's font
    "svg.hashsalt": "report",  # the same data gives the same bytes
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.size": 10.5,
    "axes.linewidth": 0.8,
    "path.simplify": True,
}


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
    """Exponential moving average with the weight of a window of ``span``, without the lag of a
    zero start (bias-corrected as in Adam). NaN is passed over."""
    out = np.full(len(y), np.nan)
    decay, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    for i, value in enumerate(y):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        if weight:
            out[i] = total / weight
    return out


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
            band.x, band.low, band.high, color=_PLACEHOLDERS[band.colour], alpha=0.16, linewidth=0
        )
    for line in lines:
        _draw_line(axes, line, log=log)
    _pad_limits(axes, log=log)
    for value, text in marks:
        _draw_mark(axes, value, text)
    _format_axes(axes, percent=percent, log=log)
    axes.set_xlabel(x_label, color=_PLACEHOLDERS["muted"], labelpad=2)
    return _to_svg(figure, label)


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
        x, heights, colors=[_PLACEHOLDERS[c] for _, _, c in parts], alpha=0.85, linewidth=0
    )
    axes.set_xlim(float(x.min()), float(x.max()))
    axes.set_ylim(0, max(float(heights.sum(axis=0).max()) * 1.05, 1e-9))
    _format_axes(axes)
    axes.set_xlabel(x_label, color=_PLACEHOLDERS["muted"], labelpad=2)
    return _to_svg(figure, label)


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
        axes.stairs(shares, edges, fill=True, color=_PLACEHOLDERS[colour], alpha=0.25)
        axes.stairs(shares, edges, color=_PLACEHOLDERS[colour], linewidth=1.5)
        mean = float(values.mean())
        axes.axvline(mean, color=_PLACEHOLDERS[colour], linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    _format_axes(axes, percent=True)
    axes.set_xlabel(x_label, color=_PLACEHOLDERS["muted"], labelpad=2)
    return _to_svg(figure, label)


def _figure() -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        # Fixed margins: cheap, and the plots of a row line up.
        axes = figure.add_axes((40 / WIDTH, 34 / HEIGHT, 1 - 48 / WIDTH, 1 - 44 / HEIGHT))
    figure.patch.set_visible(False)
    clean_axes(axes, _PLACEHOLDERS)
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
    colour = _PLACEHOLDERS[line.colour]
    style: dict[str, Any] = {"color": colour, "solid_capstyle": "round", "solid_joinstyle": "round"}
    if len(x) > 60 and not line.dots:
        axes.plot(x, y, linewidth=0.8, alpha=0.3, **style)
        averaged = np.exp(smooth(np.log(y), len(y) // 12)) if log else smooth(y, len(y) // 12)
        axes.plot(x, averaged, linewidth=1.9, **style)
    else:
        axes.plot(x, y, linewidth=1.9, **style)
    if line.dots or len(x) == 1:
        axes.plot(x, y, "o", markersize=4, color=colour)


def _draw_mark(axes: Any, value: float, text: str) -> None:
    """A reference line; the limits widen to hold it unless that would squeeze the curves."""
    low, high = axes.get_ylim()
    if not low - 2 * (high - low) <= value <= high + 2 * (high - low):
        return
    axes.axhline(value, color=_PLACEHOLDERS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    reach = 0.06 * (max(high, value) - min(low, value))
    axes.set_ylim(min(low, value - reach), max(high, value + reach))
    right = axes.get_xlim()[1]
    axes.annotate(
        text, (right, value), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom",
        fontsize=10, color=_PLACEHOLDERS["muted"],
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


_COLOUR_OF = {hex_: f"var(--{name})" for name, hex_ in _PLACEHOLDERS.items()}
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL), ""),
    (re.compile(r'<g id="[^"]*"'), "<g"),
    (re.compile(r' transform="rotate\(-0 [^"]*\)"'), ""),
    (re.compile(r"font-family: [^;\"]+"), "font-family: var(--sans)"),
    (re.compile(r"font: ([\d.]+)px [^;\"]+"), r"font: \1px var(--sans)"),
    (re.compile(r"\s*\n\s*"), "\n"),
)
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def _to_svg(figure: Any, label: str) -> str:
    """The figure as an ``<svg>`` to put into a page: no header, no addresses, no fixed size, ids
    that no other figure has, and the page's colours and font."""
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name may have characters that the font used for measuring lacks; the page has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in _REWRITES:
        body = pattern.sub(replacement, body)
    # matplotlib makes the same ids in every figure; a page may have each only once.
    prefix = "c" + hashlib.sha256((label + body).encode(errors="replace")).hexdigest()[:10]
    body = _ID.sub(rf"\g<1>{prefix}-", body)
    for placeholder, variable in _COLOUR_OF.items():
        body = body.replace(placeholder, variable)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"\n{body.strip()}"
    )
