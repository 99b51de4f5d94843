"""A pool of rollout actors on nodes that come and go: ``python -m tests.elastic DIR``.

Real raylets on one machine, real processes that are killed, frozen and drained; the actors are
those of ``tests/actors/stand_in.py``. Prints one JSON line for each event: its name, and what was
wrong with the samples of the generation that it fell into, or with the pool afterwards. A node
whose network is cut is in ``tests/netns.py``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

import actors.fleet
from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.rollout import RolloutPool
from actors.weights import WeightsLost
from actors.worker import State
from tests.actors.stand_in import RUN_SEED, Publisher, StandIn, prompts, wrong_samples

EARLY, LATE = 12, 30
TRIES = 3
"""Of starting a node: Ray gives a node's agent 15 seconds, which a busy machine may not have."""
NOTICE = {  # a node that is cut off is given up after about ten seconds instead of a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
CONFIG = RolloutConfig(
    num_actors=2,
    min_actors=1,
    max_actors=3,
    num_cpus_per_actor=1,
    heartbeat_timeout_s=6,
    start_timeout_s=120,
    engine=EngineConfig(max_num_seqs=4),
)
DEADLINE_S = 120.0


class Place:
    """One pool, and what is asked of it."""

    def __init__(self, directory: Path, config: RolloutConfig = CONFIG) -> None:
        actors.fleet.RolloutActor = StandIn  # type: ignore[assignment, misc]
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            (directory / name).write_bytes(b"{}")
        self.gate = directory / "gate"
        self.told: list[str] = []
        self.pool = RolloutPool(directory, config, name="w", tell=self.told.append)
        self.version = 0
        self.publisher: Any = None

    def load(self) -> None:
        """The next version of the weights, from a process of its own."""
        if self.publisher is not None:
            ray.kill(self.publisher)
        self.publisher = Publisher.remote()
        self.version += 1
        self.pool.load(ray.get(self.publisher.publish.remote(self.version)))

    def healthy(self) -> dict[str, str]:
        """Node by name of the actors that serve."""
        workers = self.pool._fleet.of_state(State.HEALTHY)
        return {w.name: w.info.node_id for w in workers if w.info is not None}

    def generate(
        self, event: Callable[[], None], until: Callable[[], bool]
    ) -> tuple[list[str], set[str]]:
        """Samples, with an event after the first of them; most end only when ``until`` is true.

        Returns what is wrong, and who sampled.
        """
        self.gate.unlink(missing_ok=True)
        asked, over = prompts(EARLY, LATE), threading.Event()

        def watch() -> None:
            deadline = time.monotonic() + DEADLINE_S
            while not until() and time.monotonic() < deadline and not over.is_set():
                time.sleep(0.05)
            self.gate.touch()

        records: list[Any] = []
        sampling = SamplingConfig(max_new_tokens=8)
        for record in self.pool.generate(asked, sampling, run_seed=RUN_SEED, round_index=0):
            records.append(record)
            if len(records) == 1:
                event()
                threading.Thread(target=watch, daemon=True).start()
        reached = until()
        over.set()
        wrong = wrong_samples(records, asked, self.version)
        if not reached:
            wrong.append(f"it did not come to that: {self.healthy()}, {self.told[-4:]}")
        return wrong, {getattr(record, "response_text", "") for record in records}


def events(place: Place, cluster: Cluster) -> Iterator[tuple[str, list[str]]]:
    first = add_node(cluster, num_cpus=1)
    with place.pool:
        wrong = [] if len(place.healthy()) == 1 else ["it did not start with the room there was"]
        place.load()
        yield "two are wanted, one has room", wrong

        nodes: list[Any] = []
        for count, what in ((2, "the second"), (3, "an extra one")):
            wrong, by = place.generate(
                lambda: nodes.append(add_node(cluster, num_cpus=1)),
                lambda count=count: len(place.healthy()) == count,
            )
            if len(by) != count:
                wrong.append(f"sampled by {by}")
            yield f"a node joins: {what}", wrong

        place.load()
        if len(place.healthy()) != 3:
            wrong = [f"serving: {place.healthy()}"]
        yield "all have the next weights", wrong

        lost = nodes.pop()
        wrong, _ = place.generate(
            lambda: cluster.remove_node(lost, allow_graceful=False),
            lambda: lost.node_id not in place.healthy().values() and len(place.healthy()) == 2,
        )
        yield "a node dies", wrong

        (frozen,) = [
            w for w in place.pool._fleet.workers if w.info and w.info.node_id == first.node_id
        ]
        pid, life = frozen.info.pid, frozen.handle
        wrong, _ = place.generate(
            lambda: os.kill(pid, signal.SIGSTOP),
            lambda: frozen.handle is not life and frozen.state is State.HEALTHY,
        )
        if not any("did not answer for 6 s" in text for text in place.told):
            wrong.append(f"told: {place.told}")
        yield "an actor hangs", wrong

        victim = next(iter(place.pool._fleet.of_state(State.HEALTHY)))
        pid, life = victim.info.pid, victim.handle
        wrong, _ = place.generate(
            lambda: os.kill(pid, signal.SIGKILL),
            lambda: victim.handle is not life and victim.state is State.HEALTHY,
        )
        yield "an actor dies", wrong

        (left,) = nodes
        wrong, _ = place.generate(
            lambda: drain(cluster, left.node_id),
            lambda: left.node_id not in place.healthy().values() and bool(place.healthy()),
        )
        if not any("is being drained" in text for text in place.told):
            wrong.append(f"told: {place.told}")
        yield "a node is pre-empted", wrong

        ray.kill(place.publisher)
        (last,) = place.pool._fleet.of_state(State.HEALTHY)
        os.kill(last.info.pid, signal.SIGKILL)
        try:
            place.generate(lambda: None, lambda: True)
            wrong = ["samples without weights"]
        except WeightsLost:
            wrong = []
        place.publisher = None
        place.load()
        again, _ = place.generate(lambda: None, lambda: True)
        yield "an actor dies after the learner that held the weights", wrong + again


def add_node(cluster: Cluster, **options: Any) -> Any:
    """One more node, which is up when this returns."""
    for left in reversed(range(TRIES)):
        try:
            return cluster.add_node(object_store_memory=80_000_000, **options)
        except Exception:  # Ray's own word for a raylet that ended
            if not left:
                raise
    return None


def drain(cluster: Cluster, node_id: str) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline = int((time.time() + 600) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node_id, reason, "pre-empted by the test", deadline
    )
    assert accepted, why


def main(directory: Path) -> None:
    head = {
        "num_cpus": 0,
        "resources": {"head": 1},
        "object_store_memory": 80_000_000,
        "include_dashboard": False,
        "_system_config": NOTICE,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        for name, wrong in events(Place(directory), cluster):
            print(json.dumps([name, wrong]), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
