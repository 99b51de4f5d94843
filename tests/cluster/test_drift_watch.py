"""Thresholds of drift, and what verifying weights is said to cost."""

from __future__ import annotations

import math

import pytest

from actors.weights import TensorInfo, UpdateConfirmation, WeightUpdate
from cluster.drift_watch import DriftWatch, weight_metrics
from learner.config import BFLOAT16_DRIFT, DriftConfig, PPOConfig

HEALTHY = {
    "ppo/engine_delta_mean": 2e-6,
    "ppo/engine_delta_max": 3e-5,
    "ppo/effective_sample_size": 1.0,
    "ppo/engine_correlation": 1.0,
}


def confirmation(
    actor: str, *, seconds: float, error: float, refusal: str = ""
) -> UpdateConfirmation:
    return UpdateConfirmation(
        actor=actor,
        version=7,
        probe_max_error=error,
        probe_mean_error=error,
        seconds_verify=seconds,
        seconds_load=2 * seconds,
        seconds_probe=3 * seconds,
        refusal=refusal,
    )


@pytest.mark.parametrize(
    ("metric", "warned", "stopped", "setting"),
    [
        ("ppo/engine_delta_mean", 2e-4, 0.02, "mean"),
        ("ppo/engine_delta_max", 0.02, 1.5, "max"),
        ("ppo/effective_sample_size", 0.98, 0.8, "sample_size"),
        ("ppo/engine_correlation", 0.99, 0.5, "correlation"),
    ],
)
def test_each_figure_warns_once_and_then_stops_the_run(
    metric: str, warned: float, stopped: float, setting: str
) -> None:
    told: list[str] = []
    watch = DriftWatch(DriftConfig(), told.append)
    watch.check(0, HEALTHY)
    assert told == []
    watch.check(3, HEALTHY | {metric: warned})
    watch.check(4, HEALTHY | {metric: warned})
    assert len(told) == 1
    assert told[0].startswith("PPO step 4: ")
    assert f"is {warned:.3g}, " in told[0]
    assert f"(ppo.drift.warn_{setting})" in told[0]
    for value in (stopped, math.nan):
        with pytest.raises(RuntimeError, match=rf"PPO step 6: .*ppo\.drift\.abort_{setting}\)"):
            watch.check(5, HEALTHY | {metric: value})
    assert "rlhf doctor --drift" in told[0]


def test_thresholds_follow_the_learners_precision_unless_configured() -> None:
    assert PPOConfig().drift_limits == DriftConfig()
    assert PPOConfig(bf16=True).drift_limits == BFLOAT16_DRIFT
    own = DriftConfig(abort_mean=None)
    assert PPOConfig(bf16=True, drift=own).drift_limits == own
    DriftWatch(own, lambda _: None).check(0, HEALTHY | {"ppo/engine_delta_mean": 9.0})


def test_the_cost_of_verification_by_hand() -> None:
    update = WeightUpdate(
        version=7,
        manifest={"w": TensorInfo(dtype="bfloat16", shape=(500, 1000), checksum=0)},
        tensors={},
        probe=None,
        seconds_checksum=0.25,
        seconds_probe=0.5,
    )
    told: list[str] = []
    confirmations = [
        confirmation("a-0", seconds=0.25, error=1e-6),
        confirmation("a-1", seconds=0.5, error=3e-6, refusal="tensor 'w' is corrupt"),
    ]
    assert weight_metrics(update, confirmations, 100.0) == {
        "weights/seconds_checksum": 0.25 + 0.5,
        "weights/seconds_probe": 0.5 + 1.5,
        "weights/seconds_load": 1.0,
        "weights/verify_share": pytest.approx(0.0275),
        "weights/megabytes": 1.0,
        "weights/reloads": 1.0,
        "weights/probe_error_max": 3e-6,
    }
    DriftWatch(DriftConfig(), told.append).loaded(confirmations)
    assert told == [
        "weight version 7 was loaded again into a-1, and confirmed then. At first: tensor 'w' is"
        " corrupt"
    ]
