"""The newest figures of a run, where Ray's Prometheus and Grafana find them.

``metrics.jsonl`` keeps every step; this shows the last one, as a gauge for each metric, named
``ray_rlhf_`` and the metric's name with ``_`` for ``/``, with the run directory's name as the label
``run``. ``python -m cluster.live_metrics deploy/grafana_dashboard.json`` writes the dashboard.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.health import find

PREFIX = "rlhf_"


class LiveMetrics:
    """The gauges of one run, on the node of its driver. Without Ray there is nobody to show to."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        import ray

        if not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in {**metrics, "step": step}.items():
            if name not in self._gauges:
                known = find(name)
                meaning = known.meaning if known else "PPO steps that are finished."
                self._gauges[name] = Gauge(
                    PREFIX + _plain(name),
                    # Ray takes nothing but ASCII here.
                    description=meaning.replace("Δ", "delta ").encode("ascii", "ignore").decode(),
                    tag_keys=("run",),
                )
            self._gauges[name].set(value, {"run": self._run})


AGREEMENT = ("ppo/engine_delta_mean", "ppo/stale_delta_mean")
ROWS: tuple[tuple[str, tuple[tuple[str, str, tuple[str, ...]], ...]], ...] = (
    (
        "Is it learning?",
        (
            ("Reward", "none", ("reward/mean", "reward/min", "reward/max")),
            ("KL to the reference, nats per response", "none", ("ppo/kl_sequence",)),
            ("Response length, tokens", "none", ("response/length_mean",)),
        ),
    ),
    (
        "Is it sound?",
        (
            ("Clipped tokens", "percentunit", ("ppo/clip_fraction",)),
            ("Engine against learner, mean |Δ log p|", "none", AGREEMENT),
            ("Entropy, nats per token", "none", ("ppo/entropy",)),
        ),
    ),
    (
        "What happens to the samples?",
        (
            (
                "Samples of a step",
                "none",
                ("samples/submitted", "samples/trained", "samples/filtered", "samples/failed"),
            ),
            (
                "Where a step's time goes",
                "s",
                ("seconds/generate", "seconds/learn", "seconds/broadcast", "seconds/step"),
            ),
            ("Tokens a second", "none", ("tokens/per_second",)),
        ),
    ),
)
"""Rows of the dashboard: their panels' titles, units (Grafana's names) and metrics."""


def dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard, to be imported, or put where Ray's own dashboards are."""
    panels: list[dict[str, Any]] = []
    for row, (title, charts) in enumerate(ROWS):
        top = 9 * row
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        for column, (name, unit, metrics) in enumerate(charts):
            panels.append(
                {
                    "type": "timeseries",
                    "title": name,
                    "description": " ".join(_meaning(metric) for metric in metrics[:1]),
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"x": 8 * column, "y": top + 1, "w": 8, "h": 8},
                    "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                    "targets": [
                        {
                            "refId": chr(ord("A") + number),
                            "expr": f'max by (run) (ray_{PREFIX}{_plain(metric)}{{run=~"$run"}})',
                            "legendFormat": f"{{{{run}}}} {metric}",
                        }
                        for number, metric in enumerate(metrics)
                    ],
                }
            )
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    return {
        "title": "RLHF",
        "uid": "rlhf",
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": f"label_values(ray_{PREFIX}step, run)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                },
            ]
        },
        "panels": panels,
    }


def _meaning(metric: str) -> str:
    known = find(metric)
    assert known is not None, f"{metric} is no metric of a step"
    return known.meaning


def _plain(name: str) -> str:
    """A metric's name as Prometheus allows it."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
