"""Figures for Prometheus, and a dashboard that asks for nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import ray.util.metrics

from cluster.health import find
from cluster.live_metrics import ROWS, LiveMetrics, dashboard
from tests.kuberay import ROOT


def test_every_figure_becomes_a_gauge_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert name not in made, "one gauge for each name"
            assert description
            assert tag_keys == ("run",)
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            made[self.name] = value, tags

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    live = LiveMetrics("mine")
    live.show(1, {"reward/mean": 0.25})
    live.show(2, {"reward/mean": -0.5, "ppo/kl_sequence": 3.0})
    assert made == {
        "rlhf_step": (2, {"run": "mine"}),
        "rlhf_reward_mean": (-0.5, {"run": "mine"}),
        "rlhf_ppo_kl_sequence": (3.0, {"run": "mine"}),
    }


def test_without_ray_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    LiveMetrics("mine").show(1, {"reward/mean": 0.25})


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    named = [metric for _, charts in ROWS for _, _, metrics in charts for metric in metrics]
    assert [metric for metric in named if find(metric) is None] == []
    panels: list[dict[str, Any]] = dashboard()["panels"]
    asked = [t["expr"] for p in panels if p["type"] == "timeseries" for t in p["targets"]]
    found = [re.search(r"ray_rlhf_(\w+)\{", text) for text in asked]
    assert [match and match[1] for match in found] == [m.replace("/", "_") for m in named]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_file_is_the_one_of_this_version() -> None:
    """When this fails: ``python -m cluster.live_metrics deploy/grafana_dashboard.json``."""
    path = ROOT / "deploy" / "grafana_dashboard.json"
    assert json.loads(path.read_text(encoding="utf-8")) == dashboard()
