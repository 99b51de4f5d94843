"""Metrics of PPO that left their healthy range, for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.health import Excursion, Watch, is_coarse
from cluster.plots import compact
from cluster.run_files import RunFiles

if TYPE_CHECKING:
    import pandas as pd

Pieces = tuple[tuple[str, bool], ...]
"""Text in pieces, each with whether it is code."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A metric that left its range: the value farthest outside, when, and what to do."""

    name: str
    value: str
    healthy: str
    when: str
    meaning: Pieces
    remedy: Pieces
    ongoing: bool


@dataclass(frozen=True, kw_only=True)
class Health:
    """What the section begins with. ``watched`` metrics have a healthy range."""

    alerts: tuple[Alert, ...] = ()
    watched: int = 0

    @property
    def verdict(self) -> str:
        if not self.watched:
            return ""
        if not self.alerts:
            return f"All {self.watched} metrics that have a healthy range stayed in it."
        ongoing = sum(alert.ongoing for alert in self.alerts)
        verb = "is" if ongoing == 1 else "are"
        tail = f"; {ongoing} {verb} still outside" if ongoing else "; all are in it again"
        return f"{len(self.alerts)} of {self.watched} metrics left their healthy range{tail}."


def ppo_health(run: RunFiles, frame: pd.DataFrame) -> Health:
    """Walk through the steps of a run as it would have done itself."""
    import pandas as pd

    coarse = is_coarse(run.setting("rollout.engine.dtype"), run.setting("ppo.bf16"))
    watch = Watch(coarse=coarse)
    numbers = [c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])]
    for row in frame[numbers].astype(float).to_dict("records"):
        watch.step(int(row["step"]), {str(name): value for name, value in row.items()})
    alerts = tuple(_alert(excursion) for excursion in watch.excursions())
    return Health(alerts=alerts, watched=watch.watched)


def _alert(excursion: Excursion) -> Alert:
    metric = excursion.metric
    return Alert(
        name=excursion.name,
        value=compact(excursion.worst),
        healthy=metric.healthy(excursion.coarse),
        when=excursion.when,
        meaning=_pieces(metric.meaning),
        remedy=_pieces(metric.remedy),
        ongoing=excursion.ongoing,
    )


def _pieces(text: str) -> Pieces:
    """Split at backticks."""
    return tuple((part, bool(i % 2)) for i, part in enumerate(text.split("`")) if part)
