"""A whole run while something is killed every half minute: ``python -m tests.chaos --place DIR``.

Three nodes (raylets of their own) beside a head, and on them a real run of ``rlhf ppo``: vLLM
actors, two learners, a reward model on Ray Serve. One of these is killed every ``--every`` seconds,
in an order that ``--seed`` chooses: a rollout actor, its node, another node, a learner, all
learners, a reward replica, the Serve controller. A node that was killed is replaced after
``--away`` seconds.

Prints a line for each kill with the seconds until the run is as it was: for a rollout actor until
as many serve as before, for learners until the next step beyond the furthest is finished. The last
line counts. It fails when the run fails, a sample is not accounted for, a process is left, or the
result differs in a single bit from an undisturbed run on the same cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RLHF_CHAOS"] = f"{os.getpid()}-{time.monotonic_ns()}"

from ray.cluster_utils import Cluster

from tests.elastic import NOTICE, add_node
from tests.kill_and_resume import ROOT, Place
from tests.processes import marked, title
from tests.same_run import differences

MARK = "RLHF_CHAOS"
"""In the environment of every process of the cluster and of the run."""

KIND = "served reward, one remote learner"
GONE_S = 120.0
TITLES = {
    "rollout actor": r"ray::RolloutActor",
    "learner": r"ray::_WrappedExecutable",
    "reward replica": r"ray::ServeReplica.*model-",
    "Serve controller": r"ray::ServeController",
}
"""What Ray calls their processes."""


@dataclass
class Kill:
    """One kill, and when the run was as it had been.

    Attributes:
        losses, restarts: Of rollout actors and of learners that had been told before.
    """

    what: str
    at: float
    step: int
    losses: int
    restarts: float
    normal: float | None = None


class Nodes:
    """The cluster; nodes come back."""

    def __init__(self, away_s: float) -> None:
        head = {
            "num_cpus": 0,
            "object_store_memory": 80_000_000,
            "include_dashboard": False,
            "_system_config": NOTICE,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._away_s = away_s
        self._due: list[float] = []
        for _ in range(3):
            add_node(self.cluster, num_cpus=2)

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
        self._due.append(time.monotonic() + self._away_s)

    def replace(self) -> None:
        """Add a node for each that has been away for long enough."""
        for due in [due for due in self._due if due < time.monotonic()]:
            self._due.remove(due)
            add_node(self.cluster, num_cpus=2)

    def of(self, process: psutil.Process) -> Any:
        """The node that a process belongs to: its raylet is an ancestor."""
        ancestors = {parent.pid for parent in process.parents()}
        for node in self.cluster.worker_nodes:
            raylets = node.all_processes.get("raylet", [])
            if any(raylet.process.pid in ancestors for raylet in raylets):
                return node
        return None


class Disturbed:
    """A run, and what is done to it."""

    def __init__(self, config: Path, nodes: Nodes, rng: random.Random) -> None:
        self.run_dir, self.log = config.with_suffix(""), config.with_suffix(".log")
        self.kills: list[Kill] = []
        self._nodes, self._rng = nodes, rng
        command = [sys.executable, "-m", "cluster.cli", "--debug", "ppo", "-c", str(config)]
        with self.log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    def finish(self, every_s: float | None, deadline_s: float) -> None:
        """Return when it has ended well; kill something every ``every_s`` seconds once it trains.

        Raises:
            RuntimeError: It failed, or did not end in time.
        """
        deadline, due = time.monotonic() + deadline_s, None
        try:
            while (code := self._process.poll()) is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"not done after {deadline_s:g} s:\n{self.tail()}")
                self._nodes.replace()
                self._note()
                if every_s is not None and self.steps():
                    due = due or time.monotonic()
                    if time.monotonic() >= due:
                        due = time.monotonic() + every_s
                        self._kill_something()
                time.sleep(0.1)
        finally:
            self._process.kill()
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.tail()}")

    def steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "ppo" / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _note(self) -> None:
        """See which kills are over."""
        waiting = [kill for kill in self.kills if kill.normal is None]
        if not waiting:
            return
        done, restarts = self._reached()
        told, serving = self._actors()
        for kill in waiting:
            if kill.what in ("rollout actor", "its node"):
                over = told > kill.losses and serving >= 2
            elif "learner" in kill.what:
                over = done > kill.step and restarts > kill.restarts
            else:
                over = done > kill.step
            if over:
                kill.normal = time.monotonic()
                print(
                    f"{kill.what} killed after step {kill.step}: {kill.normal - kill.at:.1f} s",
                    flush=True,
                )

    def _actors(self) -> tuple[int, int]:
        """Rollout actors that the run said were lost, and how many serve by what it said."""
        text = self.log.read_text(errors="replace")
        lost = Counter(re.findall(r"lost: (rollout-\d+)", text))
        back = Counter(re.findall(r"(rollout-\d+) serves", text))
        return sum(lost.values()), 2 - sum((lost - back).values())

    def _reached(self) -> tuple[int, float]:
        """The furthest step that is finished, and the learners' restarts until then."""
        last = max(self.steps(), key=lambda row: row["step"], default={"step": 0})
        return last["step"], last.get("recovery/learner_restarts", 0.0)

    def _kill_something(self) -> None:
        choices: list[tuple[str, Callable[[], bool]]] = [
            ("rollout actor", lambda: self._end(TITLES["rollout actor"], 1)),
            ("its node", lambda: self._end_node(TITLES["rollout actor"])),
            ("a node", lambda: self._end_node(r"ray::")),
            ("learner", lambda: self._end(TITLES["learner"], 1)),
            ("all learners", lambda: self._end(TITLES["learner"], 99)),
            ("reward replica", lambda: self._end(TITLES["reward replica"], 1)),
            ("Serve controller", lambda: self._end(TITLES["Serve controller"], 1)),
        ]
        self._rng.shuffle(choices)
        (step, restarts), (losses, _) = self._reached(), self._actors()
        for what, kill in choices:
            at = time.monotonic()
            if kill():
                self.kills.append(Kill(what, at, step, losses, restarts))
                return

    def _end(self, pattern: str, count: int) -> bool:
        found = list(processes(pattern))
        for process in self._rng.sample(found, min(count, len(found))):
            process.kill()
        return bool(found)

    def _end_node(self, pattern: str) -> bool:
        if len(self._nodes.cluster.worker_nodes) < 3:
            return False  # one is away already
        homes = [node for p in processes(pattern) if (node := self._nodes.of(p)) is not None]
        if homes:
            self._nodes.kill(self._rng.choice(homes))
        return bool(homes)


def processes(pattern: str = "") -> Iterator[psutil.Process]:
    """Living processes of this cluster with such a title, oldest first."""
    for process in marked(MARK, os.environ[MARK]):
        if process.pid != os.getpid() and re.search(pattern, title(process)):
            yield process


def wrong_accounts(steps: list[dict[str, Any]], count: int) -> list[str]:
    """What is wrong with the lines of metrics."""
    wrong = []
    if [row["step"] for row in steps] != list(range(1, count + 1)):
        wrong.append(f"steps {[row['step'] for row in steps]}")
    for row in steps:
        parts = [row[f"samples/{kind}"] for kind in ("trained", "filtered", "failed")]
        if row["samples/submitted"] != sum(parts):
            wrong.append(f"step {row['step']}: {row['samples/submitted']} submitted, {parts}")
    return wrong


def configure(place: Place, cluster: Cluster, name: str, steps: int) -> Path:
    rollout = {"num_actors": 2, "min_actors": 1, "max_actors": 2, "max_retries": 20}
    engine = {"kv_cache_gib": 0.1, "max_num_seqs": 8}
    return place.configure(
        KIND,
        name,
        learners={"num_learners": 2, "threads": 1, "timeout_s": 120, "max_restarts": 10},
        rollout=rollout | {"engine": engine},
        cluster={"address": cluster.address},
        ppo={"steps": steps, "checkpoint_every": 2, "prompts_per_step": 8},
    )


def left_processes() -> list[str]:
    deadline = time.monotonic() + GONE_S
    while (left := list(processes())) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [title(process) for process in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--place", type=Path, required=True, help="made, must not exist")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills")
    parser.add_argument("--away", type=float, default=10.0, help="seconds that a node is away")
    parser.add_argument("--deadline", type=float, default=3600.0, help="of one run, seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.place.mkdir(parents=True)
    place, rng = Place(options.place), random.Random(options.seed)
    nodes, wrong = Nodes(options.away), []
    try:
        runs = {}
        for name, every in (("reference", None), ("disturbed", options.every)):
            config = configure(place, nodes.cluster, name, options.steps)
            runs[name] = Disturbed(config, nodes, rng)
            runs[name].finish(every, options.deadline)
        wrong += wrong_accounts(runs["disturbed"].steps(), options.steps)
        wrong += differences(runs["reference"].run_dir, runs["disturbed"].run_dir)
    finally:
        nodes.cluster.shutdown()
    wrong += [f"left: {name}" for name in left_processes()]
    kills = runs["disturbed"].kills
    for what in sorted({kill.what for kill in kills}):
        took = [k.normal - k.at for k in kills if k.what == what and k.normal is not None]
        if took:
            print(
                f"{what}: {len(took)} kills, median {statistics.median(took):.1f} s, longest"
                f" {max(took):.1f} s"
            )
    last = runs["disturbed"].steps()[-1]
    recovery = {name: value for name, value in last.items() if name.startswith("recovery/")}
    print(f"{len(kills)} kills in {options.steps} steps; {recovery}; {wrong or 'the same bits'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
