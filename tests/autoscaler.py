"""A cluster that grows with what is asked for and shrinks when idle: ``python -m tests.autoscaler
DIR``.

Ray's own autoscaler, with Ray's provider of fake nodes: each is a raylet of its own on this
machine. The pool's actors are those of ``tests/actors/stand_in.py``. Prints one JSON line for each
event: its name, and what was wrong.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray

from actors.worker import State
from cluster.resources import wait_for_room
from tests.elastic import CONFIG, DEADLINE_S, Place
from tests.processes import marked

MARK = "RLHF_AUTOSCALER_TEST"
"""In the environment of every process of the cluster."""
HOST = "127.0.0.1"
MOST = 3
IDLE_MINUTES = 0.3


@contextmanager
def autoscaling_cluster() -> Iterator[str]:
    """Address of a head without CPUs whose autoscaler may add ``MOST`` nodes of one CPU each."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    address = f"{HOST}:{port}"
    # Not under a long path: names of sockets are short.
    with tempfile.TemporaryDirectory(prefix="rlhf-as-", ignore_cleanup_errors=True) as home:
        config = Path(home) / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(address)))
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *(f"--node-ip-address={HOST}", f"--port={port}", "--num-cpus=0"),
            *(f"--autoscaling-config={config}", "--include-dashboard=false"),
            *(f"--temp-dir={home}/ray", "--object-store-memory=80000000"),
            '--resources={"head": 1}',
        ]
        environment = os.environ | {
            MARK: mark, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }  # fmt: skip
        try:
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            yield address
        finally:
            end_marked(mark)


def autoscaling_config(address: str) -> dict[str, object]:
    return {
        "cluster_name": "fake",
        "max_workers": MOST,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all have the same
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {}, "min_workers": 0, "max_workers": MOST,
            },
        },
        "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip


def end_marked(mark: str) -> None:
    """End every process that the cluster has started, and nobody else's."""
    found: set[psutil.Process] = set()
    for process in marked(MARK, mark):
        with suppress(psutil.NoSuchProcess):
            # Some of Ray's own lose their environment when they take a title.
            found |= {process, *process.children(recursive=True)}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(found, timeout=10)


def nodes() -> int:
    """Living nodes beside the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def comes_to(count: int) -> list[str]:
    """What is wrong when there are not ``count`` nodes in time."""
    deadline = time.monotonic() + DEADLINE_S
    while nodes() != count and time.monotonic() < deadline:
        time.sleep(0.2)
    return [] if nodes() == count else [f"{nodes()} nodes instead of {count}"]


def events(directory: Path) -> Iterator[tuple[str, list[str]]]:
    yield "nothing is asked for", comes_to(0)

    said: list[str] = []
    tell: Callable[[str], None] = said.append
    asked = {"rollout actors": (1, {"CPU": 1.0}), "learners": (1, {"CPU": 1.0})}
    wait_for_room(asked, DEADLINE_S, tell)
    wrong = [] if nodes() == 2 else [f"{nodes()} nodes"]
    if not said or "2 CPU missing" not in said[0]:
        wrong.append(f"said: {said}")
    yield "two ask for room: two nodes come", wrong
    yield "nobody uses it: they go", comes_to(0)

    # One is enough to begin with; two are wanted; a third node is not, whoever could use it.
    place = Place(directory, CONFIG.model_copy(update={"max_actors": 2}))
    with place.pool:
        place.load()
        wrong, by = place.generate(lambda: None, lambda: len(place.healthy()) == 2)
        if len(by) != 2:
            wrong.append(f"sampled by {by}")
        wrong += comes_to(2)
        yield "two actors are wanted: two nodes come", wrong
        victim = next(iter(place.pool._fleet.of_state(State.HEALTHY)))
        assert victim.info is not None
        pid, life = victim.info.pid, victim.handle
        wrong, _ = place.generate(
            lambda: os.kill(pid, signal.SIGKILL),
            lambda: victim.handle is not life and victim.state is State.HEALTHY,
        )
        yield "an actor dies: nothing is added for it", wrong + comes_to(2)
    yield "the pool ends: the nodes go", comes_to(0)


def main(directory: Path) -> None:
    with autoscaling_cluster() as address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            for name, wrong in events(directory):
                print(json.dumps([name, wrong]), flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
