"""The simulation of large clusters: each cause alone, by hand, and what they do together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.scaling import CAUSES, Assumptions, default_nodes, describe, simulate

PERFECT = Assumptions(
    sample_sigma=0.0, node_sigma=0.0, weight_gib=0.0, gradient_gib=0.0, hop_seconds=0.0,
    load_seconds=0.0, driver_seconds_per_sample=0.0, driver_serial_seconds_per_sample=0.0,
    learner_seconds_per_sample=0.0, sample_bytes=0.0, node_mtbf_hours=1e12,
)  # fmt: skip
NODES = [4, 64, 1024]


def causes(
    assumptions: Assumptions, nodes: list[int] = NODES, steps: int = 200
) -> dict[str, list[float]]:
    found = simulate(assumptions, nodes, steps=steps)
    return {cause: found.causes[:, i].tolist() for i, cause in enumerate(CAUSES)}


def test_without_losses_throughput_grows_with_the_nodes() -> None:
    found = simulate(PERFECT, NODES, steps=5)
    assert found.efficiency == pytest.approx([1.0, 1.0, 1.0])
    assert found.seconds.mean() == pytest.approx(30.0 + 30.0)
    assert found.throughput[0] == pytest.approx(4 * 32 / 60.0)
    assert found.half() is None
    assert "more than half of the throughput is left at 1024 nodes" in describe(found)


def test_the_mean_of_times_that_are_cut_off_is_that_of_draws() -> None:
    cut = replace(PERFECT, sample_sigma=0.6, longest_over_median=2.0)
    draws = np.exp(0.6 * np.random.default_rng(1).standard_normal(1_000_000))
    expected = 30.0 * np.minimum(draws, 2.0).mean()
    assert causes(cut)["work"][0] == pytest.approx(expected + 30.0, rel=2e-3)


def test_the_slowest_sample_grows_with_their_number_until_the_limit() -> None:
    found = causes(replace(PERFECT, sample_sigma=0.6, longest_over_median=8.0))
    waits = [s + w for s, w in zip(found["stragglers"], found["work"], strict=True)]
    # 32,768 samples: the largest of so many normal draws is about 4.2 deviations out.
    assert waits[2] > waits[1] > waits[0]
    assert waits[2] == pytest.approx(30 + 30 * min(8.0, math.exp(0.6 * 4.2)), rel=0.05)


def test_the_largest_of_many_draws_has_the_distribution_of_draws() -> None:
    from cluster.scaling import _largest_normal

    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((4000, 50)).max(axis=1)
    assert _largest_normal(50, 4000, rng).mean() == pytest.approx(drawn.mean(), abs=0.03)
    assert _largest_normal(50, 4000, rng).std() == pytest.approx(drawn.std(), abs=0.03)
    assert np.isfinite(_largest_normal(10**9, 100, rng)).all()


def test_the_network_by_hand() -> None:
    slow = replace(
        PERFECT, weight_gib=8.0, gradient_gib=4.0, network_gib_per_s=2.0, optimizer_steps=3
    )
    found = causes(slow, [8], steps=2)  # 2 learners, 6 engines
    assert found["broadcast"] == [3 * 4.0]  # the seven with the source are three doublings away
    assert found["exchange"] == [3 * 2 * 0.5 * 2.0]


def test_the_driver_is_waited_for_when_it_cannot_keep_up() -> None:
    busy = replace(PERFECT, driver_seconds_per_sample=0.01, driver_serial_seconds_per_sample=0.001)
    found = causes(busy)
    samples = [32 * n for n in NODES]
    assert found["driver"] == pytest.approx(
        [max(0.0, 0.01 * n - 30.0) + 0.001 * n for n in samples]
    )
    grown = simulate(busy, NODES, steps=5)
    assert grown.half() == (1024, "driver")


def test_failures_come_as_often_as_nodes_and_time_say() -> None:
    failing = replace(
        PERFECT, node_mtbf_hours=10.0, learner_restart_seconds=0.0, checkpoint_every=0
    )
    # About a thousand failures: three standard deviations are a tenth.
    found = causes(failing, [4], steps=200_000)
    chance = 1 - math.exp(-60.0 / 36_000 * 3)  # of the three engines, in a step of a minute
    assert found["failures"][0] == pytest.approx(chance * 90.0, rel=0.1)


def test_the_same_seed_gives_the_same_and_impossible_assumptions_are_refused() -> None:
    a, b = (simulate(Assumptions(), [4, 16], steps=20, seed=3) for _ in range(2))
    assert (a.seconds == b.seconds).all()
    assert a.seconds.sum(axis=1) == pytest.approx(20 * a.causes.sum(axis=1))
    with pytest.raises(ValueError, match="no room for engines and learners"):
        simulate(Assumptions(), [1])
    with pytest.raises(ValueError, match="learner_share"):
        Assumptions(learner_share=1.0)
    assert default_nodes(64) == [4, 8, 16, 32, 64]


def test_the_command_draws_a_plot_and_says_where_it_stops(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["plan", "--simulate", str(tmp_path / "s.svg"), "--nodes", "64"]
    )
    assert result.exit_code == 0, result.output
    assert "efficiency" in result.output
    assert (tmp_path / "s.svg").read_text().count("<svg") == 1
    result = CliRunner().invoke(
        main, ["plan", "--simulate", str(tmp_path / "s.gif"), "--nodes", "64"]
    )
    assert result.exit_code == 1
    assert "is written as .svg or .png" in result.output
