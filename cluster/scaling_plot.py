"""The picture of a simulated cluster's growth: throughput, and what the time of a step goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.plots import clean_axes, compact
from cluster.scaling import CAUSES, Scaling
from cluster.svg import PRINT_COLOURS, STYLE, Colour

COLOURS: dict[str, Colour] = {
    "work": "after",
    "stragglers": "before",
    "driver": "fourth",
    "exchange": "third",
    "broadcast": "sixth",
    "failures": "fifth",
}
LABELS = {
    "work": "work itself",
    "stragglers": "waiting for the slowest",
    "driver": "the one driver",
    "exchange": "between learners",
    "broadcast": "new weights",
    "failures": "failures",
}


def plot_scaling(scaling: Scaling, path: Path) -> None:
    """Write an SVG or a PNG, by the name's ending.

    Raises:
        ValueError: Another ending.
    """
    import matplotlib
    from matplotlib.figure import Figure

    form = path.suffix.lstrip(".").lower()
    if form not in ("svg", "png"):
        raise ValueError(f"{path}: a plot is written as .svg or .png")
    style = STYLE | {"font.sans-serif": ["Inter", "Helvetica", "Arial", "DejaVu Sans"]}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.8, 3.6), dpi=150, facecolor=PRINT_COLOURS["paper"])
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.15)})
        _throughput(left, scaling)
        _shares(right, scaling)
        figure.tight_layout(pad=0.9, w_pad=2.4)
        path.parent.mkdir(parents=True, exist_ok=True)
        nothing = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(path, format=form, metadata=nothing)


def _throughput(axes: Any, scaling: Scaling) -> None:
    clean_axes(axes, PRINT_COLOURS)
    nodes = scaling.nodes
    ideal = scaling.throughput[0] * nodes / nodes[0]
    low, high = np.quantile(scaling.seconds, [0.9, 0.1], axis=1)
    axes.plot(nodes, ideal, color=PRINT_COLOURS["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.fill_between(
        nodes, scaling.samples / low, scaling.samples / high, linewidth=0, alpha=0.18,
        color=PRINT_COLOURS["after"],
    )  # fmt: skip
    axes.plot(nodes, scaling.throughput, color=PRINT_COLOURS["after"], linewidth=2.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.annotate(
        "no loss", (nodes[-1], ideal[-1]), xytext=(-16, 0), textcoords="offset points", ha="right",
        va="center", fontsize=9.5, color=PRINT_COLOURS["muted"],
    )  # fmt: skip
    _label(axes, "Samples a second, simulated", nodes)


def _shares(axes: Any, scaling: Scaling) -> None:
    clean_axes(axes, PRINT_COLOURS)
    shares = scaling.causes / scaling.causes.sum(axis=1, keepdims=True)
    axes.stackplot(
        scaling.nodes, shares.T, colors=[PRINT_COLOURS[COLOURS[cause]] for cause in CAUSES],
        labels=[LABELS[cause] for cause in CAUSES], alpha=0.88, linewidth=0,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(scaling.nodes[0], scaling.nodes[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9.5, reverse=True,
        labelcolor=PRINT_COLOURS["ink"],
    )  # fmt: skip
    _label(axes, "What the time of a step goes to", scaling.nodes)


def _label(axes: Any, title: str, nodes: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=PRINT_COLOURS["ink"])
    axes.set_xlabel("nodes", color=PRINT_COLOURS["muted"])
    axes.set_xticks(nodes[::2], [f"{n:.0f}" for n in nodes[::2]])
    axes.minorticks_off()
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
