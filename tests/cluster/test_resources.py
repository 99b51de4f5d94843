"""Waiting for resources is visible and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from cluster.config import ClusterConfig, RunConfig, build_config
from cluster.hub import local_model
from cluster.resources import _init_arguments, demand, wait_for_room
from cluster.stop import Stopped


def test_a_cluster_that_nobody_named_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would join one that was started on this machine by somebody else, and then fail."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _init_arguments(ClusterConfig(), 1.0)["address"] == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert _init_arguments(ClusterConfig(), 1.0)["address"] == "10.0.0.1:6379"
    assert _init_arguments(ClusterConfig(address="auto"), 1.0)["address"] == "auto"


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
    assert demand(config, learners=True, actors=0) == {"CPU": 1 + 2, "GPU": 2}
    assert demand(RunConfig(run_dir=Path("x")), learners=False) == {"CPU": 1, "GPU": 0}


def test_demand_counts_the_replicas_of_every_model() -> None:
    config = build_config(
        {
            "run_dir": "runs/x",
            "reward": {
                "terms": [{"name": "a", "model": "m"}, {"name": "b", "models": ["m", "n"]}],
                "service": {"autoscaling": {"max_replicas": 4}, "num_cpus_per_replica": 0.5},
            },
        },
        "test",
    )
    assert demand(config, learners=False) == {"CPU": 1 + 3 * 4 * 0.5, "GPU": 0}


def test_waiting_says_what_is_missing_and_gives_up(ray_session: None) -> None:
    said: list[str] = []
    wait_for_room(
        {"rollout actors": (1, {"CPU": 1, "GPU": 0}), "learners": (0, {})}, 1.0, say(said)
    )
    wait_for_room({"rollout actors": (2, {"CPU": 0, "GPU": 0})}, 1.0, say(said))
    assert said == []
    asked = {"rollout actors": (2, {"CPU": 1, "GPU": 1}), "learners": (1, {"GPU": 2})}
    with pytest.raises(TimeoutError, match=r"needs 2 CPU, 4 GPU .*4 GPU missing after 1 s: add"):
        wait_for_room(asked, 1.0, say(said))
    assert said[0].startswith("waiting for resources: the run needs 2 CPU, 4 GPU (2 rollout actors")
    assert "+ 1 learners of 2 GPU)" in said[0]
    assert not pending_groups()


def test_all_find_room_at_once_or_none(ray_session: None) -> None:
    """What others hold is told apart from what no cluster of this size has."""
    free, everything = (r()["CPU"] for r in (ray.available_resources, ray.cluster_resources))
    asked = {"rollout actors": (1, {"CPU": 1}), "learners": (1, {"CPU": free - 1})}
    wait_for_room(asked, 10.0, say([]))
    holder = ray.util.placement_group([{"CPU": 1}])
    assert holder.wait(10)
    with pytest.raises(TimeoutError, match=r"1 CPU of it in use by others after 1 s"):
        wait_for_room(asked, 1.0, say([]))
    ray.util.remove_placement_group(holder)
    too_large = {"learners": (1, {"CPU": everything + 1})}
    with pytest.raises(TimeoutError, match=r": 1 CPU missing"):
        wait_for_room(too_large, 1.0, say([]))
    with pytest.raises(Stopped):
        wait_for_room(too_large, 60.0, say([]), stop=lambda: True)
    assert not pending_groups()


def say(said: list[str]) -> Callable[[str], None]:
    return said.append


def pending_groups() -> list[str]:
    """Placement groups that nobody has removed."""
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    return [state for state in states if state != "REMOVED"]


def test_models_by_name(tmp_path: Path) -> None:
    assert local_model(str(tmp_path)) == tmp_path
    for name in ("/nowhere/model", "./nowhere", "a/b/c", "nothing"):
        with pytest.raises(FileNotFoundError, match="no model at"):
            local_model(name)
    with pytest.raises(FileNotFoundError, match="not to be had from the Hugging Face hub"):
        local_model("owner/model-that-is-not-cached")


STARTED_BY_US = """
import os
import psutil
from pathlib import Path
from cluster.config import RunConfig
from cluster.resources import ray_session
with ray_session(RunConfig(run_dir=Path("x"))) as started:
    from ray._raylet import AuthenticationMode, get_authentication_mode
    assert started
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    ray = [p for p in psutil.Process().children() if "raylet" in p.name() or "gcs" in p.name()]
    assert len(ray) == 2, ray
    assert os.getpgid(0) not in {os.getpgid(p.pid) for p in ray}
"""


def test_a_cluster_that_we_start_wants_a_token(tmp_path: Path) -> None:
    """In a process of its own, as the mode is one of the whole process; there is no home there.
    And a signal to that process's group reaches nothing of Ray's."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", STARTED_BY_US],
        env=environment | {"HOME": str(tmp_path / "nowhere")},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
