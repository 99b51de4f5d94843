"""The service as people start it: ``rlhf serve``, and ``serve deploy`` on their own cluster."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import yaml

from reward_service.client import HttpScorer
from reward_service.model import RewardModel
from reward_service.security import TOKEN_VARIABLE
from tests.reward_service.page_load import free_port
from tests.reward_service.test_service import ITEMS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
WAIT_S = 240.0


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*", **changes}


@contextmanager
def running(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; it and whatever it started are ended afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file,
                                   start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        started = family(process)
        process.terminate()
        _, alive = psutil.wait_procs(started, timeout=60)
        for one in alive:
            one.kill()
        process.wait(60)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(met: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not met():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_requests_under_way_at_sigterm_are_answered_and_nothing_is_left(
    reward_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", f"quality={reward_dir}",
               "--port", "0"]  # fmt: skip
    long = [{"response_ids": [7] * 250}] * 64
    with running(command, log, environment()) as process:
        wait_until(lambda: "serving until Ctrl-C" in log.read_text(), process, log)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found is not None
        url = found.group()

        def in_flight() -> float:
            text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
            return sum(map(float, re.findall(r"requests_in_flight\{.*\} (.*)", text)))

        def ask(items: object) -> int:
            """Status of a request on a connection of its own; 0 when there is nobody."""
            try:
                return httpx.post(f"{url}/v1/score", json={"items": items}, timeout=WAIT_S,
                                  trust_env=False).status_code  # fmt: skip
            except httpx.ConnectError:
                return 0
            except httpx.TransportError:  # it came as the proxy went
                return -1

        with ThreadPoolExecutor(24) as pool:
            under_way = [pool.submit(ask, long) for _ in range(24)]

            def all_came() -> bool:
                ended = sum(call.done() for call in under_way)
                return ended + in_flight() - 1 >= 24  # it counts itself

            wait_until(all_came, process, log)
            ended = sum(call.done() for call in under_way)
            started = family(process)
            process.send_signal(signal.SIGTERM)
            late, stop = set[int](), threading.Event()

            def keep_asking() -> None:
                while not stop.is_set():
                    late.add(ask([{"text": "rain"}]))
                    time.sleep(0.05)

            asking = threading.Thread(target=keep_asking)
            asking.start()
            answers = [call.result() for call in under_way]
            code = process.wait(WAIT_S)
            stop.set()
            asking.join()
    assert ended < 24
    assert answers == [200] * 24
    assert late & {503, 404, 0}, "new requests were never refused"
    assert code == 0
    assert "answering what is under way" in log.read_text()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []


def test_serve_deploy_of_our_file_scores_and_reloads(
    reward_dir: Path, second_reward_dir: Path, tmp_path: Path
) -> None:
    """On a Ray head of its own with token authentication, as ``deploy/serve.yaml`` says."""
    root = tmp_path / "models"
    for name, source in (("quality", reward_dir), ("two", second_reward_dir)):
        shutil.copytree(source, root / name)
    dashboard, port = free_port(), free_port()
    values = yaml.safe_load(
        (ROOT / "deploy" / "serve.yaml").read_text().replace("/models", str(root))
    )
    values["http_options"]["port"] = port
    service = values["applications"][0]["args"]["service"]
    service |= {"ingress_replicas": 1, "num_cpus_per_replica": 0.1}  # cheap
    service["autoscaling"]["min_replicas"] = 1
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(values))
    token, ray_token = secrets.token_hex(16), secrets.token_hex(32)
    env = environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=ray_token, **{TOKEN_VARIABLE: token}
    )  # before ray start, as the file says
    url, log = f"http://127.0.0.1:{port}", tmp_path / "ray.log"
    applications = f"http://127.0.0.1:{dashboard}/api/serve/applications/"

    def seen(address: str, **headers: str) -> int:
        try:
            return httpx.get(address, headers=headers, timeout=60, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    with (
        tempfile.TemporaryDirectory(prefix="rlhf-ray-", ignore_cleanup_errors=True) as temp,
        running(
            [str(PROGRAMS / "ray"), "start", "--head", "--block", "--disable-usage-stats",
             "--num-cpus=8", "--object-store-memory=100000000", f"--temp-dir={temp}",
             f"--port={free_port()}", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={free_port()}",
             f"--dashboard-agent-grpc-port={free_port()}",
             f"--ray-client-server-port={free_port()}"],
            log, env,
        ) as head,
    ):  # fmt: skip
        wait_until(
            lambda: seen(applications, Authorization=f"Bearer {ray_token}") == 200, head, log
        )
        assert seen(applications) == 401  # nobody else may deploy
        deploy = [str(PROGRAMS / "serve"), "deploy", str(tmp_path / "serve.yaml"), "-a",
                  f"http://127.0.0.1:{dashboard}"]  # fmt: skip
        done = subprocess.run(deploy, env=env, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: seen(f"{url}/ready") == 200, head, log)
        assert seen(f"{url}/v1/models") == 401
        scorer = HttpScorer(url, token=token)
        first = RewardModel.load(reward_dir).score(ITEMS[:8])
        answer = scorer.score(ITEMS[:8])
        assert (answer.scores, answer.version) == (first.scores, first.version)
        reloaded = httpx.put(f"{url}/v1/models/quality", json={"directory": "two"}, timeout=WAIT_S,
                             headers={"Authorization": f"Bearer {token}"})  # fmt: skip
        assert reloaded.status_code == 200, reloaded.text
        assert scorer.score(ITEMS[:8]).scores == (
            RewardModel.load(second_reward_dir).score(ITEMS[:8]).scores
        )
        started = family(head)
        head.terminate()
        _, alive = psutil.wait_procs(started, timeout=60)
        assert alive == []
