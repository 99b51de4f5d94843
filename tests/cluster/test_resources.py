"""Waiting for resources is visible and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import RunConfig, build_config
from cluster.hub import local_model
from cluster.resources import demand, wait_for_room


def test_demand_counts_every_part() -> None:
    config = build_config(
        {
            "run_dir": "runs/x", "reward_model": {}, "rollout": {"num_actors": 3},
            "reward": {"service": {"num_replicas": 2, "num_cpus_per_replica": 0.5}},
            "learners": {"num_learners": 2, "num_gpus_per_learner": 1},
        },
        "test",
    )  # fmt: skip
    assert demand(config, learners=True) == {"CPU": 3 + 1 + 2, "GPU": 2}
    assert demand(config, learners=False) == {"CPU": 3 + 1, "GPU": 0}
    assert demand(RunConfig(run_dir=Path("x")), learners=False) == {"CPU": 1, "GPU": 0}


def test_waiting_says_what_is_missing_and_gives_up(ray_session: None) -> None:
    said: list[str] = []
    wait_for_room({"CPU": 1, "GPU": 0}, 1.0, said.append)
    assert said == []
    with pytest.raises(TimeoutError, match=r"needs 2 CPU, 4 GPU.*4 GPU missing after 1 s: add"):
        wait_for_room({"CPU": 2, "GPU": 4}, 1.0, said.append)
    assert "waiting for resources" in said[0]


def test_models_by_name(tmp_path: Path) -> None:
    assert local_model(str(tmp_path)) == tmp_path
    for name in ("/nowhere/model", "./nowhere", "a/b/c", "nothing"):
        with pytest.raises(FileNotFoundError, match="no model at"):
            local_model(name)
    with pytest.raises(FileNotFoundError, match="not to be had from the Hugging Face hub"):
        local_model("owner/model-that-is-not-cached")
