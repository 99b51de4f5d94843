"""Which metrics of a run left their healthy range, since when, and what to do about it.

The records are in :mod:`cluster.known_metrics`; :class:`Watch` follows them step by step, in a run
or over the rows of ``metrics.jsonl``. ``python -m cluster.health docs/metrics.md`` writes the
tables of that page anew.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.known_metrics import GROUPS
from cluster.metric import Metric
from cluster.metrics import FILE_NAME, RESERVED, read_metrics

TABLES = re.compile(r"(?<=<!-- tables: begin -->\n).*(?=<!-- tables: end -->)", re.DOTALL)
"""Where the generated tables of ``docs/metrics.md`` stand."""


def find(name: str) -> Metric | None:
    """The record that describes a metric, or ``None``."""
    for _, metrics in GROUPS:
        for metric in metrics:
            if metric.names(name):
                return metric
    return None


def is_coarse(engine_dtype: object, ppo_bf16: object) -> bool:
    """Whether engine or learner compute in 16 bits, which widens some ranges."""
    return bool(ppo_bf16) or str(engine_dtype) in ("bfloat16", "float16")


@dataclass(kw_only=True)
class Excursion:
    """A metric's time outside its healthy range.

    Attributes:
        since: First step of the first excursion that outlasted the metric's patience; ``None``
            while there was none.
        steps_outside, steps: How many steps were outside, of how many.
        worst, worst_step: The value farthest outside, and its step.
        last_outside: The last step outside.
        ongoing: Whether the last step was outside.
    """

    name: str
    metric: Metric
    coarse: bool = False
    since: int | None = None
    steps_outside: int = 0
    steps: int = 0
    worst: float = 0.0
    worst_step: int = 0
    last_outside: int = 0
    ongoing: bool = False
    _streak: int = field(default=0, init=False)
    _streak_start: int = field(default=0, init=False)
    _farthest: float = field(default=0.0, init=False)

    def observe(self, step: int, value: float) -> bool:
        """Take a step's value in; true when this is the step at which it is to be told."""
        low, high = self.metric.limits(self.coarse)
        distance = max(low - value, value - high)
        self.steps += 1
        self.ongoing = distance > 0
        if not self.ongoing:
            self._streak = 0
            return False
        if self._streak == 0:
            self._streak_start = step
        self._streak += 1
        self.steps_outside += 1
        self.last_outside = step
        if distance > self._farthest:
            self._farthest, self.worst, self.worst_step = distance, value, step
        if self.since is not None or self._streak < self.metric.patience:
            return False
        self.since = self._streak_start
        return True

    @property
    def when(self) -> str:
        """``since step 5, in 12 of 40 steps``, to go behind the word "outside"."""
        count = f"in {self.steps_outside} of {self.steps} steps"
        if self.ongoing:
            return f"since step {self.since}, {count}"
        if self.last_outside == self.since:
            return f"in step {self.since} only"
        return f"from step {self.since} to {self.last_outside}, {count}; in range again"


class Watch:
    """Follows the metrics of a run and tells each one that leaves its range, once.

    Example:
        >>> watch = Watch()
        >>> for sentence in watch.step(12, {"ppo/clip_fraction": 0.6}):
        ...     reporter.warn(sentence)

    Args:
        coarse: Engine or learner compute in 16 bits.
    """

    def __init__(self, *, coarse: bool = False) -> None:
        self._coarse = coarse
        self._by_name: dict[str, Excursion | None] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take a step in; a sentence for each metric that has now left its range for the first
        time. Values that are missing (NaN) are passed over."""
        told = []
        for name, value in metrics.items():
            excursion = self._excursion(name)
            if excursion is None or math.isnan(value):
                continue
            if excursion.observe(step, value):
                metric = excursion.metric
                told.append(
                    f"{name} is {value:.4g} at step {step}, healthy is"
                    f" {metric.healthy(self._coarse)}. {metric.remedy}"
                )
        return told

    def catch_up(self, directory: Path, step: int) -> None:
        """Take in the steps up to ``step`` that a run being resumed has in ``metrics.jsonl``, so
        that nothing is told twice."""
        if not step or not (directory / FILE_NAME).is_file():
            return
        for row in read_metrics(directory).to_dict("records"):
            if row["step"] <= step:
                self.step(row["step"], {str(k): row[k] for k in row if k not in RESERVED})

    def excursions(self) -> list[Excursion]:
        """Those that lasted, the ones that still last first, else in the order of the records."""
        order = [metric.name for _, metrics in GROUPS for metric in metrics]
        found = [e for e in self._by_name.values() if e is not None and e.since is not None]
        return sorted(found, key=lambda e: (not e.ongoing, order.index(e.metric.name), e.name))

    @property
    def watched(self) -> int:
        """How many of the metrics seen have a healthy range."""
        return sum(e is not None for e in self._by_name.values())

    def _excursion(self, name: str) -> Excursion | None:
        if name not in self._by_name:
            metric = find(name)
            self._by_name[name] = (
                Excursion(name=name, metric=metric, coarse=self._coarse)
                if metric is not None and metric.has_range
                else None
            )
        return self._by_name[name]


def markdown_tables() -> str:
    """The tables of ``docs/metrics.md``."""
    parts = []
    for title, metrics in GROUPS:
        rows = ["| Metric | Meaning | Healthy | What to do |", "|---|---|---|---|"]
        for metric in metrics:
            healthy = metric.healthy()
            if metric.healthy(coarse=True) != healthy:
                healthy += f" (16 bits: {metric.healthy(coarse=True)})"
            if metric.patience > 1:
                healthy += f"; told after {metric.patience} steps in a row"
            cells = (f"`{metric.name}`", metric.meaning, healthy, metric.remedy)
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        parts.append("\n".join([f"## {title}", "", *rows, ""]))
    return "\n" + "\n".join(parts) + "\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    text = TABLES.sub(lambda _: markdown_tables(), page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
