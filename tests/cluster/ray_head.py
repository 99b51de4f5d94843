"""A real Ray head of its own: its ports, its token, its processes, ended by their ids."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.processes import marked

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "RLHF_TEST_HEAD"
START_S = 200.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where the head's job API answers, and what its users need in their environment."""

    url: str
    metrics_url: str
    token: str
    environment: dict[str, str]
    log: Path

    def get(self, path: str, *, token: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30.0)

    def job(self, submission_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/api/jobs/{submission_id}", token=self.token).json()
        return found

    def logs(self, submission_id: str) -> str:
        answer = self.get(f"/api/jobs/{submission_id}/logs", token=self.token)
        return str(answer.json()["logs"])

    def metrics(self) -> str:
        return httpx.get(f"{self.metrics_url}/metrics", timeout=30.0).text

    def submit(self, submission_id: str, entrypoint: str, *, like: str) -> httpx.Response:
        """Submit by the API, with the code that another job has brought."""
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": self.job(like)["runtime_env"],
        }
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.post(f"{self.url}/api/jobs/", json=body, headers=headers, timeout=60.0)

    def run(self, *command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A command of somebody who works with this cluster, from the top of the repository."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def wait(self, submission_id: str, timeout_s: float = 240.0) -> dict[str, Any]:
        """The job when it has ended."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(submission_id))["status"] in ("PENDING", "RUNNING"):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {submission_id}: {job}\n{self.logs(submission_id)[-3000:]}"
                )
            time.sleep(0.2)
        return job


@contextmanager
def ray_head(resources: dict[str, float]) -> Iterator[Head]:
    """Start a head with token authentication; end every process that it has started.

    Ray gives its raylet half a minute to come up, which a busy machine may not have: tried thrice.
    """
    # Not pytest's directory: the paths of sockets may have 107 characters only.
    place = Path(tempfile.mkdtemp(prefix="rlhf-head-"))
    try:
        for attempt in range(3):
            head, process = _start(place / str(attempt), resources)
            try:
                if _is_ready(head, process):
                    yield head
                    return
            finally:
                _end(process, head.environment[MARK])
        raise RuntimeError(f"no Ray head starts here:\n{head.log.read_text()[-3000:]}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _start(place: Path, resources: dict[str, float]) -> tuple[Head, subprocess.Popen[bytes]]:
    place.mkdir()
    token = secrets.token_hex(32)
    token_file = place / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A raylet gives up when its agent is not there after some seconds of a busy machine.
        "RAY_agent_register_timeout_ms": "200000",
        "RAY_metrics_report_interval_ms": "1000",
        MARK: f"{os.getpid()}-{time.monotonic_ns()}",
    }
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    log = place / "head.log"
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--port={gcs}", f"--temp-dir={place}/ray",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        "--num-cpus=8", f"--resources={json.dumps(resources)}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=place)
    head = Head(
        url=f"http://127.0.0.1:{dashboard}",
        metrics_url=f"http://127.0.0.1:{metrics}",
        token=token,
        environment=environment,
        log=log,
    )
    return head, process


def _is_ready(head: Head, process: subprocess.Popen[bytes]) -> bool:
    """Whether jobs may be submitted; False when it gave up starting or takes too long."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            # Ray says so when the raylet is there as well.
            ready = "Ray runtime started" in head.log.read_text()
            if ready and head.get("/api/jobs/", token=head.token).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    return False


def processes(mark: str) -> list[psutil.Process]:
    """Every living process that this head, or a job on it, has started."""
    return list(marked(MARK, mark))


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    process.terminate()
    try:
        process.wait(15.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in processes(mark):
        left.kill()


def _free_ports(count: int) -> list[int]:
    """Different free ports; all are held until the last is found."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
