"""A node whose network is cut, not closed: ``python -m tests.netns DIR``.

Each node is a network namespace with an address of its own, and all hang on a bridge in one more;
nothing is made in the machine's own namespace. Needs root and iproute2. The driver, in the head's
namespace, takes the link of a node down while its actor generates. Prints as ``tests.elastic``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUBNET = "10.77.31"
HEAD = f"{SUBNET}.10"
TRIES = 3
"""Of starting a node: Ray gives a node's agent 15 seconds, which a busy machine may not have."""


def unable() -> str:
    """Why this system cannot do it; empty where it can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"rlhf{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


class Net:
    """A switch and the nodes that hang on it."""

    def __init__(self, tag: str, directory: Path) -> None:
        self.tag, self.switch = tag, f"{tag}-sw"
        self._directory = directory
        self._nodes: list[str] = []
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def add(self, *ray_start: str) -> None:
        """One more node, with a raylet that is started by ``ray start ray_start...``."""
        number = len(self._nodes)
        name, peer, address = f"{self.tag}-n{number}", f"p{number}", f"{SUBNET}.{10 + number}"
        ip("netns", "add", name)
        self._nodes.append(name)
        ip(
            "-n",
            self.switch,
            "link",
            "add",
            peer,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            name,
        )
        ip("-n", self.switch, "link", "set", peer, "master", "br0", "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", "start"),
            *(f"--node-ip-address={address}", f"--temp-dir={self._directory / name}"),
            *("--object-store-memory=80000000", "--disable-usage-stats", *ray_start),
        ]
        for _ in range(TRIES):
            log = self._directory / f"{name}.log"
            with log.open("w") as file:
                done = subprocess.run(
                    command, stdout=file, stderr=file, check=False, timeout=300, env=environment()
                )
            if done.returncode == 0:
                return
            self._end(name)
        raise RuntimeError(f"{name} does not start:\n{log.read_text()[-2000:]}")

    def close(self) -> None:
        for name in [*self._nodes, self.switch]:
            self._end(name)
            subprocess.run(["ip", "netns", "del", name], check=False)

    def _end(self, name: str) -> None:
        """End what runs in a namespace."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in ip("netns", "pids", name).split():
                try:
                    os.kill(int(pid), number)
                except ProcessLookupError:
                    continue
            time.sleep(1.0)


def environment() -> dict[str, str]:
    return os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }


@contextmanager
def three_nodes(tag: str) -> Iterator[Net]:
    """A head without room, and two nodes with room for one actor each."""
    from tests.elastic import NOTICE

    # Not under a long path: names of sockets are short.
    with tempfile.TemporaryDirectory(prefix="rlhf-net-", ignore_cleanup_errors=True) as directory:
        net = Net(tag, Path(directory))
        try:
            head = ("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
            system = f"--system-config={json.dumps(NOTICE)}"
            net.add(*head, system, '--resources={"head": 1}')
            for _ in range(2):
                net.add(f"--address={HEAD}:6379", "--num-cpus=1")
            yield net
        finally:
            net.close()


def main(directory: Path) -> None:
    tag = f"rlhf{os.getpid()}"
    with three_nodes(tag) as net:
        inside = [sys.executable, "-m", "tests.netns", str(directory), net.switch]
        command = ["ip", "netns", "exec", f"{tag}-n0", *inside]
        subprocess.run(command, check=True, cwd=ROOT, env=environment(), timeout=600)


def drive(directory: Path, switch: str) -> None:
    """The driver: runs on the head."""
    import ray

    from tests.elastic import CONFIG, Place

    ray.init(address=f"{HEAD}:6379", log_to_driver=False, logging_level="error")
    config = CONFIG.model_copy(update={"max_actors": 2, "min_actors": 2})
    place = Place(directory, config)
    with place.pool:
        place.load()
        cut = next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == f"{SUBNET}.12")
        wrong, by = place.generate(
            lambda: ip("-n", switch, "link", "set", "p2", "down") and None,
            lambda: cut not in place.healthy().values() and len(place.healthy()) == 1,
        )
        if len(by) != 1 and len(by) != 2:
            wrong.append(f"sampled by {by}")
        print(json.dumps(["the network of a node is cut", wrong]), flush=True)
        print(json.dumps(["told", [] if place.told else ["nothing was said"]]), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        drive(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
