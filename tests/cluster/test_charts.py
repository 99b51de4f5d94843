"""Which chart a metric ends up in, and what an SVG on the page is made of."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from cluster.charts import draw_panels, draw_phases, draw_unknown, reward_terms
from cluster.panels import HEALTH, LEARNED, SUPERVISED, Panel
from cluster.plots import Band, Line, histogram, line_chart
from cluster.svg import PLACEHOLDERS


def frame(**columns: list[float]) -> pd.DataFrame:
    steps = len(next(iter(columns.values())))
    names = {name.replace("__", "/"): values for name, values in columns.items()}
    return pd.DataFrame({"step": range(1, steps + 1), **names})


def paths(svg: str) -> list[list[float]]:
    """Heights of the points of every drawn curve; a larger number is further down."""
    return [
        [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path)]
        for path in re.findall(r'<path d="([^"]+)" clip-path', svg)
    ]


def test_a_panel_takes_the_first_name_that_is_there() -> None:
    table = frame(ppo__score=[9.0] * 3 + [8.0], reward__mean=[0.0, 1.0, 2.0, 3.0])
    (chart,) = draw_panels(table, LEARNED, x_label="PPO step")
    assert (chart.title, chart.first, chart.last) == ("Reward", "0", "3")
    (chart,) = draw_panels(table.drop(columns="reward/mean"), LEARNED, x_label="PPO step")
    assert (chart.first, chart.last) == ("9", "8")


def test_the_curve_goes_where_the_numbers_go() -> None:
    (chart,) = draw_panels(frame(ppo__entropy=[1.0, 3.0, 2.0]), LEARNED, x_label="x")
    curve = paths(chart.svg)[-1]
    assert len(curve) == 3
    assert curve[0] > curve[2] > curve[1]
    assert curve[0] - curve[2] == pytest.approx(curve[2] - curve[1], abs=1e-3)


def test_gaps_are_left_out_and_ends_are_means_of_a_tenth() -> None:
    values = [1.0, 2.0, *[5.0] * 17, 7.0, 9.0, np.nan]
    (chart,) = draw_panels(frame(ppo__entropy=values), LEARNED, x_label="x")
    assert (chart.first, chart.last) == ("1.5", "8")  # 21 numbers: two at each end
    assert "nan" not in chart.svg


def test_a_metric_without_a_number_draws_nothing() -> None:
    table = frame(ppo__entropy=[np.nan, np.nan])
    assert draw_panels(table, LEARNED, x_label="x") == []
    assert draw_unknown(table, HEALTH, x_label="x") == ([], [])


def test_without_a_critic_its_charts_are_left_out() -> None:
    rising = [1.0, 2.0, 3.0]
    table = frame(
        ppo__clip_fraction=rising, ppo__grad_norm_policy=rising, ppo__groups_without_spread=rising
    )
    charts = {chart.title: chart for chart in draw_panels(table, HEALTH, x_label="PPO step")}
    assert set(charts) == {"Clipped tokens", "Gradient norm", "Groups without spread"}
    assert charts["Gradient norm"].legend == ()


def test_what_never_moves_is_flat() -> None:
    charts = draw_panels(
        frame(ppo__kl_coef=[0.05] * 4, samples__failed=[0, 0, 1, 0]), HEALTH, x_label="x"
    )
    assert {c.title: c.flat for c in charts} == {"KL coefficient": True, "Failed samples": False}


def test_unknown_metrics_are_shown_too() -> None:
    table = frame(loss=[2.0, 1.0], novel__figure=[1.0, 2.0], learning_rate=[0.1, 0.05])
    charts, rest = draw_unknown(table, SUPERVISED, x_label="step")
    assert [c.title for c in charts] == ["novel/figure"]
    assert rest == [("learning_rate", "0.1", "0.05")]


def test_terms_of_a_composed_reward_share_a_chart() -> None:
    one = frame(reward__mean=[1.0], reward__model=[1.0])
    assert reward_terms(one) == []
    (drift,) = reward_terms(one.assign(**{"reward/quality_drift": [0.5]}))
    assert (drift.title, drift.lines) == ("Drift of the score", (("", ("reward/quality_drift",)),))
    (panel,) = reward_terms(one.assign(**{"reward/length": [2.0]}))
    assert panel.lines == (("model", ("reward/model",)), ("length", ("reward/length",)))


def test_phases_add_up_and_the_rest_of_learning_is_named() -> None:
    table = frame(
        seconds__generate=[2.0, 2.0],
        seconds__learn=[4.0, 4.0],
        ppo__seconds_annotate=[1.0, 1.0],
        ppo__seconds_forward_backward=[2.5, 2.5],
        seconds__broadcast=[0.5, 0.5],
    )
    chart = draw_phases(table, x_label="PPO step")
    assert chart is not None
    assert chart.explain.startswith("6.5 s on average")
    assert "other learning 0.5 s" in chart.explain
    assert len({colour for _, colour in chart.legend}) == len(chart.legend) == 5
    assert draw_phases(frame(loss=[1.0]), x_label="x") is None


def test_an_svg_is_part_of_the_page() -> None:
    x = np.arange(200.0)
    svg = line_chart(
        [Line(name="a", x=x, y=1 + np.sin(x) ** 2), Line(name="b", x=x, y=x + 1, colour="third")],
        label='"quoted" & <tagged>',
        x_label="step",
        band=Band(x=x, low=x, high=x + 2),
        log=True,
        marks=((10.0, "mark $x_1$ 汉字"),),
    )
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == '"quoted" & <tagged>'
    assert "http" not in svg
    assert not [colour for colour in PLACEHOLDERS.values() if colour in svg]
    assert "var(--third)" in svg
    assert "mark $x_1$ 汉字" in svg
    assert "DejaVu" not in svg
    other = line_chart([Line(name="a", x=x, y=x)], label="other", x_label="step")
    ids = [set(re.findall(r'\bid="([^"]+)"', s)) for s in (svg, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_a_histogram_of_one_value() -> None:
    svg = histogram([("sft", np.zeros(5), "before")], label="all the same", x_label="score")
    assert "nan" not in svg
    ET.fromstring(svg.replace("xlink:href", "href"))


def test_every_panel_names_its_metrics_once() -> None:
    for panels in (LEARNED + HEALTH, SUPERVISED):
        names = [name for p in panels for _, alternatives in p.lines for name in alternatives]
        assert len(names) == len(set(names))
        assert all(isinstance(p, Panel) and p.explain for p in panels)
