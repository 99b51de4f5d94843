"""What came out, for the page: the three figures, distributions, the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.charts import Chart
from cluster.evaluation import CheckpointResult, Evaluation, Response, display_name
from cluster.plots import compact, histogram
from cluster.run_files import RunFiles
from cluster.svg import Colour
from reward_service.intervals import Estimate

MOST_DISTRIBUTIONS = 3
"""One row of the page; the table has the means of the others."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the three figures at the top."""

    label: str
    value: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A row of an interval plot; positions are per cent of its width."""

    label: str
    text: str
    point: float
    low: float
    high: float
    colour: str
    note: str = ""
    extra: str = ""
    """Said where there is room."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A row that shows a share before and after."""

    label: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class TableRow:
    label: str
    explain: str
    cells: tuple[tuple[str, str], ...]
    """(value, interval) for each checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    conclusions: tuple[str, ...]
    names: tuple[str, ...]
    intervals: tuple[Interval, ...]
    charts: tuple[Chart, ...]
    shifts: tuple[Shift, ...]
    table: tuple[TableRow, ...]
    settings: tuple[tuple[str, str], ...]


def language_of(run: RunFiles) -> str:
    """Language of the texts, for the ``lang`` of their elements; empty when unknown."""
    language = run.setting("data.newswire.language")
    return language if language in ("en", "zh") else ""


def lede(run: RunFiles) -> str:
    """The first sentence of the page: what happened, without any decoration."""
    if run.evaluation is not None and len(run.evaluation.checkpoints) > 1:
        return conclusions(run.evaluation)[0]
    frame = run.metrics.get("ppo")
    if frame is not None:
        step = int(frame["step"].max())
        total = int(frame["total"].iloc[-1]) if "total" in frame else step
        if step < total:
            return f"PPO has done {step} of {total} steps; there is no evaluation yet."
        return f"PPO has done its {total} steps; there is no evaluation yet."
    if run.metrics:
        return "PPO has not begun yet."
    return "Nothing has run in this directory yet."


def headline_figures(run: RunFiles) -> list[Figure]:
    """The three figures that matter, from the evaluation or, without one, from PPO's metrics."""
    if run.evaluation is not None and len(run.evaluation.checkpoints) > 1:
        return _figures_of_evaluation(run.evaluation)
    frame = run.metrics.get("ppo")
    figures = []
    for label, name, percent, unit in (
        ("Good texts", "measured/good", True, "of the training samples"),
        ("Reward", "reward/mean", False, "on the training prompts"),
        ("KL to the reference", "ppo/kl_sequence", False, "nats a response"),
    ):
        if frame is not None and name in frame:
            values = frame[name].dropna().to_numpy(dtype=float)
            count = max(1, len(values) // 10)
            ends = [values[:count].mean(), values[-count:].mean()]
            first, last = (f"{100 * v:.0f}%" if percent else compact(v) for v in ends)
            figures.append(Figure(label=label, before=first, value=last, note=unit))
    return figures[:3]


def conclusions(evaluation: Evaluation) -> tuple[str, ...]:
    """What the evaluation says in sentences, and how sure it is."""
    before, after = evaluation.checkpoints[0], evaluation.checkpoints[-1]
    old_name, new_name = display_name(before.name), display_name(after.name)
    prompts = f"on {after.reward.n} prompts it had never seen"
    if before.good_share and after.good_share:
        old, new = before.good_share.value, after.good_share.value
        factor = f", {new / old:.1f} times as many" if new > old > 0 else ""
        values = f"{old:.0%}", f"{new:.0%}"
        subject = "share of good texts"
    else:
        values = compact(before.reward.value), compact(after.reward.value)
        factor, subject = "", "mean reward"
        old, new = before.reward.value, after.reward.value
    if values[0] == values[1]:
        sentences = [f"{new_name} left the {subject} at {values[0]}, {prompts}."]
    else:
        verb = "raised" if new > old else "lowered"
        sentences = [
            f"{new_name} {verb} the {subject} from {values[0]} to {values[1]}{factor}, {prompts}."
        ]
    by: Literal["quality", "reward"]
    for by in ("quality", "reward"):
        comparison = evaluation.comparison(after.name, by)
        if comparison is None:
            continue
        rate = comparison.win_rate
        if rate.low > 0.5:
            verdict = f"{new_name} is the better of the two beyond chance"
        elif rate.high < 0.5:
            verdict = f"{new_name} is the worse of the two beyond chance"
        else:
            verdict = "the interval holds 50%, so chance alone could explain it"
        sentences.append(
            f"Judged by {'true quality' if by == 'quality' else 'reward'}, {new_name} wins "
            f"{rate.value:.0%} of the comparisons with {old_name} ({span(rate, percent=True)}, "
            f"ties counting half): {verdict}."
        )
    return tuple(sentences)


def outcome_section(run: RunFiles) -> Outcome | None:
    """Everything but the three figures and the texts; ``None`` without an evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    names = tuple(display_name(c.name) for c in evaluation.checkpoints)
    before, after = evaluation.checkpoints[0], evaluation.checkpoints[-1]
    return Outcome(
        conclusions=conclusions(evaluation)[1:] if len(names) > 1 else (),
        names=names,
        intervals=_intervals(evaluation),
        charts=tuple(_distributions(evaluation)),
        shifts=tuple(
            Shift(
                label=name.replace("_", " "),
                before=100 * before.quality_parts[name],
                after=100 * after.quality_parts[name],
            )
            for name in before.quality_parts
            if name in after.quality_parts and len(names) > 1
        ),
        table=tuple(_table(evaluation)),
        settings=tuple((name, str(value)) for name, value in evaluation.settings.items()),
    )


def colour_of(index: int, count: int) -> Colour:
    """Of a checkpoint by its place: the first is "before", the last "after"."""
    if index == 0 and count > 1:
        return "before"
    if index == count - 1:
        return "after"
    return ("third", "fourth", "fifth")[(index - 1) % 3]


def span(estimate: Estimate, *, percent: bool = False) -> str:
    """The interval as text: ``53 to 76%``."""
    if estimate.low == estimate.high:
        return ""
    if percent:
        return f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}%"
    return f"{compact(estimate.low)} to {compact(estimate.high)}"


def interval_row(label: str, estimate: Estimate, colour: str, extra: str = "") -> Interval:
    """A share as a row of an interval plot from 0 to 100 %."""
    return Interval(
        label=label,
        text=f"{100 * estimate.value:.0f}%",
        point=100 * estimate.value,
        low=100 * estimate.low,
        high=100 * estimate.high,
        colour=colour,
        note=span(estimate, percent=True),
        extra=extra,
    )


def _figures_of_evaluation(evaluation: Evaluation) -> list[Figure]:
    before, after = evaluation.checkpoints[0], evaluation.checkpoints[-1]
    old_name, new_name = display_name(before.name), display_name(after.name)
    if before.good_share and after.good_share:
        old, new = before.good_share, after.good_share
        first = Figure(
            label="Good texts",
            before=f"{old.value:.0%}",
            value=f"{new.value:.0%}",
            note=f"{old_name} to {new_name}; 95% interval {span(new, percent=True)}",
        )
    else:
        first = Figure(
            label="Reward",
            before=compact(before.reward.value),
            value=compact(after.reward.value),
            note=f"{old_name} to {new_name}; 95% interval {span(after.reward)}",
        )
    figures = [first]
    by_quality = evaluation.comparison(after.name, "quality")
    by_reward = evaluation.comparison(after.name, "reward")
    comparison = by_quality or by_reward
    if comparison:
        figures.append(
            Figure(
                label="Win rate",
                value=f"{comparison.win_rate.value:.0%}",
                note=f"against {old_name}, by "
                f"{'true quality' if comparison.by == 'quality' else 'reward'}; 95% interval "
                f"{span(comparison.win_rate, percent=True)}",
            )
        )
    if after.kl:
        figures.append(
            Figure(
                label="KL to the reference",
                value=compact(after.kl.value),
                note=f"nats a response; 95% interval {span(after.kl)}",
            )
        )
    return figures


def _intervals(evaluation: Evaluation) -> tuple[Interval, ...]:
    rows = []
    count = len(evaluation.checkpoints)
    for index, checkpoint in enumerate(evaluation.checkpoints):
        if checkpoint.good_share:
            rows.append(
                interval_row(
                    f"Good texts, {display_name(checkpoint.name)}",
                    checkpoint.good_share,
                    colour_of(index, count),
                )
            )
    for comparison in evaluation.comparisons:
        by = "true quality" if comparison.by == "quality" else "reward"
        rows.append(
            interval_row(
                f"{display_name(comparison.name)} wins against "
                f"{display_name(comparison.baseline)}, by {by}",
                comparison.win_rate,
                "third",
                f"{comparison.wins} won, {comparison.ties} tied, {comparison.losses} lost",
            )
        )
    return tuple(rows)


def _distributions(evaluation: Evaluation) -> list[Chart]:
    measures: tuple[tuple[str, str, Callable[[Response], float | None]], ...] = (
        ("Reward", "score", lambda r: r.reward),
        ("True quality", "true quality", lambda r: r.quality),
        ("KL to the reference", "nats", lambda r: r.kl),
        ("Length", "tokens", lambda r: r.tokens),
    )
    charts: list[Chart] = []
    count = len(evaluation.checkpoints)
    responses = [r for prompt in evaluation.prompts for r in prompt.responses]
    for title, unit, measure in measures:
        if len(charts) == MOST_DISTRIBUTIONS:
            break
        groups = []
        for index, checkpoint in enumerate(evaluation.checkpoints):
            found = [measure(r) for r in responses if r.checkpoint == checkpoint.name]
            values = np.array([v for v in found if v is not None], dtype=float)
            if len(values) and values.any():  # KL of the reference to itself is no distribution
                groups.append((display_name(checkpoint.name), values, colour_of(index, count)))
        if groups:
            means = ", ".join(f"{name} {compact(float(v.mean()))}" for name, v, _ in groups)
            charts.append(
                Chart(
                    title=f"{title}, response by response",
                    explain="Dashed: the mean.",
                    svg=histogram(
                        groups, label=f"Distribution of {title.lower()}; means: {means}",
                        x_label=unit,
                    ),
                    legend=tuple((name, colour) for name, _, colour in groups),
                )
            )  # fmt: skip
    return charts


def _table(evaluation: Evaluation) -> list[TableRow]:
    def estimate(value: Estimate | None, percent: bool = False) -> tuple[str, str]:
        if value is None:
            return "not measured", ""
        shown = f"{100 * value.value:.1f}%" if percent else compact(value.value)
        return shown, span(value, percent=percent)

    def number(value: float | None, digits: int = 3) -> tuple[str, str]:
        return ("not measured" if value is None else f"{value:.{digits}f}"), ""

    rows: tuple[tuple[str, str, Callable[[CheckpointResult], tuple[str, str]]], ...] = (
        ("Reward", "what PPO was trained on", lambda c: estimate(c.reward)),
        ("True quality", "0 to 1", lambda c: estimate(c.quality)),
        ("Good texts", "without any fault", lambda c: estimate(c.good_share, True)),
        ("KL to the reference", "nats a response", lambda c: estimate(c.kl)),
        ("Ended by itself", "not cut off", lambda c: estimate(c.eos_rate, True)),
        ("Length", "tokens", lambda c: estimate(c.length_tokens)),
        ("Length", "characters", lambda c: number(c.length_characters, 0)),
        ("Distinct-1", "different words over all", lambda c: number(c.distinct_1)),
        ("Distinct-2", "different pairs over all", lambda c: number(c.distinct_2)),
        ("Distinct-3", "different triples over all", lambda c: number(c.distinct_3)),
        ("Self-BLEU", "1: all texts alike", lambda c: number(c.self_bleu)),
        ("Repetition", "four-word runs said before", lambda c: number(c.repetition)),
        ("Samples", "and failures", lambda c: (f"{c.samples}", f"{c.failed} failed")),
    )
    table = []
    for label, explain, cell in rows:
        cells = tuple(cell(checkpoint) for checkpoint in evaluation.checkpoints)
        if any(value != "not measured" for value, _ in cells):
            table.append(TableRow(label=label, explain=explain, cells=cells))
    return table
