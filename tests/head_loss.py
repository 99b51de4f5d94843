"""The head of a cluster dies in the middle of a run: ``python -m tests.head_loss --place DIR``.

A head without work and a node with it; on them a real ``rlhf ppo`` with a reward model on Serve
and a learner in a process of its own. The head is killed, and so is its control store. The run must
end by itself and say why; on a new cluster ``--resume`` must end with the bits of one that nothing
happened to, and no process may be left. Prints how long the run took to end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

from tests.chaos import KIND
from tests.elastic import add_node
from tests.kill_and_resume import Place, Run
from tests.same_run import differences

ENDS_WITHIN_S = 180.0


def start_cluster() -> Cluster:
    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    add_node(cluster, num_cpus=4)
    return cluster


def configure(place: Place, cluster: Cluster, name: str) -> Path:
    return place.configure(KIND, name, cluster={"address": cluster.address})


def lose_the_head(place: Place) -> tuple[Run, float]:
    """A run whose head is killed after a few steps; it, and the seconds that it took to end."""
    cluster = start_cluster()
    try:
        run = Run(configure(place, cluster, "disturbed"), resume=False)
        run.wait_for_lines(4)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        began = time.monotonic()
        run.process.wait(ENDS_WITHIN_S)
        return run, time.monotonic() - began
    finally:
        cluster.shutdown()


def resume(place: Place) -> list[str]:
    """What is wrong with the result of the run that goes on, and with how that of another is."""
    cluster = start_cluster()
    try:
        found: list[Any] = []
        for name, again in (("reference", False), ("disturbed", True)):
            run = Run(configure(place, cluster, name), resume=again)
            run.finish()
            found.append(run)
        wrong = differences(*(run.run_dir for run in found))
    finally:
        cluster.shutdown()
    return wrong + [f"left: {name}" for run in found for name in run.left()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--place", type=Path, required=True, help="made, must not exist")
    options = parser.parse_args()
    options.place.mkdir(parents=True)
    place = Place(options.place)
    run, seconds = lose_the_head(place)
    print(
        f"the run ended after {seconds:.1f} s with {run.process.returncode}; it said:\n{run.tail()}"
    )
    wrong = [f"left: {name}" for name in run.left()]
    if run.process.returncode == 0:
        wrong.append("the run says that it went well")
    wrong += resume(place)
    print(wrong or "the same bits")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
