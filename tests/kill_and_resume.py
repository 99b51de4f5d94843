"""Kills whole runs at random moments and resumes them, on real parts.

    python -m tests.kill_and_resume --kills 20 --seed 0 --place /tmp/kills

Each time a run of ten steps (Ray, vLLM, RLlib, and in every other run a reward model on Ray Serve
and a learner in a process of its own) is killed with SIGKILL at a random moment of its training,
every process that it had started must be gone, and ``--resume`` must end with the bits of a run
that nobody killed. The last line of the output counts the results that did.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import make_llama
from tests.processes import marked, title
from tests.reward_service.conftest import write_reward_model
from tests.same_run import differences, write_config

ROOT = Path(__file__).resolve().parents[1]
MARK = "RLHF_TEST_RUN"
"""Environment variable by which the processes of a run are found, whoever their parent is now."""

STEPS = 10
START_S = 900.0
GONE_S = 120.0
"""Ray's agents try for up to a minute to report that their raylet died, to a GCS that died too."""

Kind = str
KINDS: dict[Kind, dict[str, Any]] = {
    "function reward, learner in the driver": {},
    "served reward, one remote learner": {"learners": {"num_learners": 1, "threads": 1}},
    "two remote learners": {"learners": {"num_learners": 2, "threads": 1}},
    "served reward, generated ahead": {
        "learners": {"num_learners": 1, "threads": 1},
        "ppo": {"max_staleness": 1},
    },
}


class Run:
    """One process of ``rlhf ppo``, or of another command."""

    def __init__(self, config: Path, *, resume: bool, command: str = "ppo") -> None:
        self.run_dir = config.with_suffix("")
        self.mark = f"{config.stem}-{os.getpid()}-{time.monotonic_ns()}"
        self.log = config.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "--debug", command, "-c", str(config)]
                + ["--resume"] * resume,
                cwd=ROOT,
                env=os.environ | {MARK: self.mark, "RAY_AUTH_MODE": "disabled"},
                stdout=log,
                stderr=log,
            )

    def finish(self) -> float:
        """Wait for a good end; returns the seconds that it took."""
        began = time.monotonic()
        try:
            code = self.process.wait(START_S)
        finally:
            self.process.kill()
        if code:
            raise RuntimeError(f"{self.log} ends with exit code {code}:\n{self.tail()}")
        return time.monotonic() - began

    def wait_for_lines(self, count: int) -> None:
        """Return when ``count`` lines of metrics are written; 0 is when training begins."""
        path = self.run_dir / "ppo" / "metrics.jsonl"
        deadline = time.monotonic() + START_S
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"{self.log} does not come to line {count}:\n{self.tail()}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL the driver, and nothing else."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[str]:
        """Names of the processes that outlive their driver for too long."""
        deadline = time.monotonic() + GONE_S
        while (left := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [title(process) for process in left]

    def processes(self) -> Iterator[psutil.Process]:
        """Every living process that this run has started."""
        return marked(MARK, self.mark)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Place:
    """A directory with a model, a reward model, and runs beside each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = make_llama(path / "model", tied=True)
        self.scorer = write_reward_model(self.model, path / "scorer", seed=1, gain=1.0, bias=0.0)

    def configure(self, kind: Kind, name: str, **changes: Any) -> Path:
        changes = KINDS[kind] | changes
        if "served" in kind:
            term = {"name": "scorer", "model": str(self.scorer), "weight": 0.2}
            other = {"name": "picky", "function": "tests.same_run:picky"}
            reward = {"terms": [other, term], "retry": {"pause_s": 0.0}, "service": {"port": 0}}
            changes = changes | {"reward": reward}
        return write_config(self.path, self.path / name, self.model, **changes)

    def reference(self, kind: Kind) -> tuple[Path, float]:
        """A run that nobody kills, and the seconds of one of its steps."""
        number = list(KINDS).index(kind)
        run = Run(self.configure(kind, f"reference{number}"), resume=False)
        run.wait_for_lines(0)
        began = time.monotonic()
        run.wait_for_lines(STEPS)
        seconds = time.monotonic() - began
        run.finish()
        return run.run_dir, seconds / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, required=True, help="made, must not exist")
    options = parser.parse_args()
    options.place.mkdir(parents=True)
    place = Place(options.place)
    references = {kind: place.reference(kind) for kind in KINDS}
    rng = random.Random(options.seed)
    same = orphans = 0
    earlier: list[Run] = []
    for number in range(options.kills):
        kind = list(KINDS)[number % len(KINDS)]
        reference, step_s = references[kind]
        config = place.configure(kind, f"run{number}")
        run = Run(config, resume=False)
        lines, pause = rng.randrange(STEPS), rng.random() * step_s
        run.wait_for_lines(lines)
        time.sleep(pause)
        run.kill()
        written = (run.run_dir / "ppo" / "metrics.jsonl").read_bytes().count(b"\n")
        resumed = Run(config, resume=True)
        resumed.finish()
        wrong = differences(reference, run.run_dir)
        same += not wrong
        print(
            f"kill {number + 1}: {kind}, {pause * 1000:.0f} ms after line {lines} ({written} "
            f"written): {wrong or 'the same bits'}",
            flush=True,
        )
        orphans += report_left(earlier)  # they had this whole kill's time to go
        earlier = [run, resumed]
    orphans += report_left(earlier)
    print(f"{same} of {options.kills} results bit-identical, {orphans} processes left behind")
    sys.exit(same < options.kills or orphans > 0)


def report_left(runs: list[Run]) -> int:
    """Print the processes that runs have left behind; returns their number."""
    left = [name for run in runs for name in run.left()]
    if left:
        print(f"{runs[0].run_dir} left {left}", flush=True)
    return len(left)


if __name__ == "__main__":
    main()
