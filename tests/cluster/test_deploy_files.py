"""The cluster files: Ray's launcher and autoscaler take them, Kubernetes would, and a run fits.

Nothing here has a cloud. What is checked is all that can be without one: Ray's own schema and
preparation, the schemas of KubeRay, and that the names in the files are those that runs ask for.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from cluster.config import RunConfig, build_config, load_config
from cluster.resources import demand
from tests.kuberay import ROOT, schema_of

CLOUDS = ["ray_cluster.yaml", "deploy/cluster_gcp.yaml"]
LAUNCHED = [*CLOUDS, "deploy/cluster_on_premise.yaml"]
PROVIDER_KEYS = {
    "aws": {"region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "gcp": {"region", "availability_zone", "use_internal_ips", "project_id"},
    "local": {"head_ip", "worker_ips"},
}
ROLES = {"rlhf_learner", "rlhf_generator", "rlhf_reward"}


def read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return values


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(made)
    return made


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_the_file(name: str) -> None:
    config = read(name)
    made = prepared(config)
    provider = config["provider"]
    # Of these Ray's schema takes any spelling.
    assert set(provider) == PROVIDER_KEYS[provider["type"]] | {"type"}
    for remote, local in config["file_mounts"].items():
        assert local.startswith("~/") or (ROOT / local).exists(), (remote, local)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert "RAY_AUTH_MODE=token" in command
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in config["file_mounts"]
    types = made["available_node_types"]
    assert made["head_node_type"] in types
    assert all(t.get("min_workers", 0) <= t["max_workers"] for t in types.values())


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_is_given_no_work_and_generators_come_and_go(name: str) -> None:
    config = read(name)
    types = AutoscalingConfig(prepared(config)).get_node_type_configs()
    assert set(types) == {"head", "reward", "learner", "generator"}
    bounds = {n: (t.min_worker_nodes, t.max_worker_nodes) for n, t in types.items()}
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert types["head"].resources == {"CPU": 0}
    low, high = bounds["learner"]
    assert low == high > 0, "the number of learners is fixed"
    low, high = bounds["generator"]
    assert 0 < low < high
    workers = [high for role, (_, high) in bounds.items() if role != "head"]
    assert sum(workers) == config["max_workers"]
    for role, kind in types.items():
        assert kind.labels["rlhf.role"] == role
        assert {n for n in kind.resources if n.startswith("rlhf_")} == (
            {f"rlhf_{role}"} if role != "head" else set()
        )
    assert types["learner"].resources["rlhf_learner"] == types["learner"].resources["GPU"]
    assert types["generator"].resources["rlhf_generator"] == types["generator"].resources["GPU"]


MISTAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda c: c.update(idle_timeout_min=3),
    "an unknown key of a type": lambda c: c["available_node_types"]["learner"].update(max_worker=3),
    "more at least than in all": lambda c: c.update(max_workers=2),
    "no such head": lambda c: c.update(head_node_type="hed"),
    "half a CPU": lambda c: c["available_node_types"]["head"]["resources"].update(CPU=0.5),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_seen(mistake: str) -> None:
    config = read("ray_cluster.yaml")
    MISTAKES[mistake](config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared(config)


# ---- Kubernetes --------------------------------------------------------------------------------


def manifests(name: str) -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for d in yaml.safe_load_all((ROOT / "deploy" / name).read_text())}


def ray_clusters() -> dict[str, dict[str, Any]]:
    """The specification of the Ray cluster in each manifest."""
    return {
        "raycluster.yaml": manifests("raycluster.yaml")["RayCluster"]["spec"],
        "rayjob.yaml": manifests("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"],
        "rayservice.yaml": manifests("rayservice.yaml")["RayService"]["spec"]["rayClusterConfig"],
    }


@pytest.mark.parametrize(
    ("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")]
)
def test_the_manifests_fit_kuberay(name: str, kind: str) -> None:
    jsonschema.validate(manifests(name)[kind], schema_of(kind))


@pytest.mark.parametrize("name", ray_clusters())
def test_the_autoscaler_reads_the_manifest_and_asks_for_the_token(name: str) -> None:
    spec = ray_clusters()[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    resource = {"metadata": {"name": "rlhf", "namespace": "default"}, "spec": spec}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    if name == "rayservice.yaml":
        return
    assert types["learner"]["min_workers"] == types["learner"]["max_workers"] == 1
    assert 0 < types["generator"]["min_workers"] < types["generator"]["max_workers"]
    for role in ("learner", "generator", "reward"):
        resources = types[role]["resources"]
        per = "GPU" if role != "reward" else "CPU"
        assert {n: a for n, a in resources.items() if n.startswith("rlhf_")} == {
            f"rlhf_{role}": resources[per]
        }
        assert types[role]["labels"]["rlhf.role"] == role


def test_the_job_and_the_standing_cluster_are_alike() -> None:
    """The second manifest repeats the first; they differ by the configuration's volume only."""
    cluster, job = (ray_clusters()[n] for n in ("raycluster.yaml", "rayjob.yaml"))
    head = job["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    assert container["volumeMounts"].pop() == {"name": "config", "mountPath": "/etc/rlhf"}
    assert head["volumes"].pop() == {"name": "config", "configMap": {"name": "ppo-config"}}
    assert job == cluster


def test_the_job_runs_what_the_config_map_holds(tmp_path: Path) -> None:
    found = manifests("rayjob.yaml")
    job = found["RayJob"]["spec"]
    (file,) = found["ConfigMap"]["data"]
    assert f"--config /etc/rlhf/{file} --resume" in job["entrypoint"]
    path = tmp_path / file
    path.write_text(found["ConfigMap"]["data"][file])
    assert load_config(path) == load_config(ROOT / "configs" / "cluster.yaml")
    environment = yaml.safe_load(job["runtimeEnvYAML"])
    assert environment == read("deploy/runtime_env.yaml")


# ---- a run on them -----------------------------------------------------------------------------


def capacities() -> dict[str, dict[str, float]]:
    """All resources of each cluster when every node is there."""
    found = {}
    for name in CLOUDS:
        found[name] = prepared(read(name))["available_node_types"]
    for name in ("raycluster.yaml", "rayjob.yaml"):
        resource = {"metadata": {"name": "x", "namespace": "x"}, "spec": ray_clusters()[name]}
        found[name] = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    return {
        name: {
            resource: sum(
                t["max_workers"] * t["resources"].get(resource, 0) for t in kinds.values()
            )
            for resource in {"CPU", "GPU", *ROLES}
        }
        for name, kinds in found.items()
    }


def test_the_example_fits_each_cluster() -> None:
    config = load_config(ROOT / "configs" / "cluster.yaml")
    need = demand(config, learners=True)
    assert {n for n in need if n.startswith("rlhf_")} == ROLES
    for name, there in capacities().items():
        missing = {n: a - there[n] for n, a in need.items() if a > there[n]}
        assert missing == {}, name
    assert config.run_dir.is_absolute(), "a job's own directory is thrown away"


def test_custom_resources_are_counted() -> None:
    config: RunConfig = build_config(
        {
            "run_dir": "x",
            "reward": {
                "terms": [{"name": "a", "model": "m"}],
                "service": {"num_replicas": 3, "resources_per_replica": {"rlhf_reward": 0.5}},
            },
            "rollout": {"num_actors": 2, "resources_per_actor": {"rlhf_generator": 1}},
            "learners": {"num_learners": 4, "resources_per_learner": {"rlhf_learner": 1}},
        },
        "test",
    )
    need = demand(config, learners=True)
    assert {n: a for n, a in need.items() if n.startswith("rlhf_")} == {
        "rlhf_generator": 2, "rlhf_reward": 1.5, "rlhf_learner": 4,
    }  # fmt: skip
    assert math.isclose(demand(config, learners=False).get("rlhf_learner", 0), 0)


@pytest.mark.parametrize(
    ("role", "arguments"),
    [
        ("generator", ['--resources={"rlhf_generator": 5}', "--labels=rlhf.role=generator"]),
        (None, []),
    ],
)
def test_a_machine_of_ones_own_says_what_it_is_for(
    tmp_path: Path, role: str | None, arguments: list[str]
) -> None:
    """The start command of a worker, run by a shell with a `ray` that prints its arguments."""
    binaries = tmp_path / "rlhf" / "bin"
    binaries.mkdir(parents=True)
    for name, script in {"ray": 'printf "%s\\n" "$@"', "nproc": "echo 5", "ls": "exit 1"}.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    if role is not None:
        (tmp_path / "rlhf_role").write_text(f"{role}\n")
    done = subprocess.run(
        ["bash", "-c", read("deploy/cluster_on_premise.yaml")["worker_start_ray_commands"][-1]],
        env=os.environ | {"HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "start", "--address=10.0.0.1:6379", "--disable-usage-stats", *arguments,
    ]  # fmt: skip
