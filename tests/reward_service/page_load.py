"""Many simulated people on the page, a process of its own, over HTTP.

    python -m tests.reward_service.page_load --people 50 --seconds 60 [--store URL] [--kill]

Prints one JSON line: latencies of the page, and whether every acknowledged judgement is in the
store exactly once. With --kill the page is killed with SIGKILL in the middle and started
again; what it had acknowledged must be there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from reward_service.comparison import Candidate
from reward_service.config import PeopleConfig
from reward_service.feedback import people
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.page.texts import CONSENT
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ("first_3", "first_2", "first_1", "tie", "second_1", "second_2", "second_3", "both_bad")
HIDDEN = re.compile(r'type="hidden" name="(form|assignment)" value="([^"]*)"')


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_page(run_dir: Path, port: int) -> subprocess.Popen[bytes]:
    """The page by the command line, once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "collect", "--serve", "--config",
         str(run_dir / "config.yaml"), "--port", str(port)],
        cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the page ended with {process.returncode}")
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=2)
        except httpx.HTTPError:
            time.sleep(0.1)
        else:
            return process
    process.kill()
    raise TimeoutError("the page did not answer within 60 s")


Ended = Callable[["Crowd"], bool]


class Crowd:
    """Simulated people and what they saw."""

    def __init__(self, url: str, think_s: float) -> None:
        self.url = url
        self.think_s = think_s
        self.latencies: list[float] = []
        self.acknowledged: Counter[str] = Counter()  # assignment -> answers acknowledged
        self.failed = 0
        self.started = 0.0

    async def person(self, client: httpx.AsyncClient, html: str, seed: int, end: Ended) -> None:
        """Judges until the end; after an error loads the page again, as a person would."""
        rng = random.Random(seed)
        while not end(self):
            await asyncio.sleep(self.think_s * rng.uniform(0.5, 1.5))
            try:
                html = await self.judge(client, html, rng)
            except httpx.HTTPError:
                self.failed += 1
                html = ""

    async def signed_in(self, client: httpx.AsyncClient, token: str) -> str:
        page = await client.get(f"/join/{token}")
        fields = dict(HIDDEN.findall(page.text))
        page = await client.post("/sign-in", data={**fields, "token": token})
        assert page.status_code == 303, page.text
        return (await client.get("/judge")).text

    async def judge(self, client: httpx.AsyncClient, html: str, rng: random.Random) -> str:
        fields = dict(HIDDEN.findall(html))
        if "assignment" not in fields:
            return (await client.get("/judge")).text
        start = time.perf_counter()
        answer = await client.post("/judge", data={**fields, "choice": rng.choice(CHOICES)})
        self.latencies.append(time.perf_counter() - start)
        if answer.status_code == 303:
            self.acknowledged[fields["assignment"]] += 1
        start = time.perf_counter()
        page = await client.get("/judge")
        self.latencies.append(time.perf_counter() - start)
        return page.text


async def crowd_of(
    url: str, tokens: list[str], think_s: float, end: Ended, half: Ended, half_way: Any
) -> Crowd:
    """Everybody signs in; then they judge until ``end``, and ``half_way`` is called at ``half``."""
    crowd = Crowd(url, think_s)
    clients = [httpx.AsyncClient(base_url=url, timeout=60) for _ in tokens]
    pages = [
        await crowd.signed_in(client, token) for client, token in zip(clients, tokens, strict=True)
    ]
    crowd.started = time.monotonic()
    work = [
        asyncio.create_task(crowd.person(client, page, seed, end))
        for seed, (client, page) in enumerate(zip(clients, pages, strict=True))
    ]
    if half_way is not None:
        while not half(crowd):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(half_way)
    await asyncio.gather(*work)
    for client in clients:
        await client.aclose()
    return crowd


def run(
    run_dir: Path,
    *,
    count: int,
    think_s: float,
    store: str,
    kill: bool,
    seconds: float | None = None,
    answers: int | None = None,
) -> dict[str, Any]:
    """Prepare a store, let the crowd work, and compare what they were told with what is there.

    They work for so many seconds, or until so many answers have been acknowledged.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(
        json.dumps(
            {
                "run_dir": str(run_dir),
                "collect": {
                    "store": store,
                    "people": {"overlap": 3, "repeat_share": 0.05, "repeat_gap": 3},
                },
            }
        )
    )
    text = "The bridge over the river closed on Tuesday after heavy rain. " * 8
    with FeedbackStore(store) as opened:
        Assignments(opened, PeopleConfig()).add_tasks(
            [
                Task(
                    task_id=f"t{n}", kind="comparison", prompt_id=f"p{n}", prompt=f"News {n}",
                    candidates=(Candidate(text=f"{n} {text}"), Candidate(text=f"{text} {n}")),
                    overlap=3,
                )
                for n in range(1500)
            ]
        )  # fmt: skip
        tokens = []
        for _ in range(count):
            name, token = people.invite(opened.database, days=1)
            people.agree(opened.database, name, text=CONSENT["en"], language="en")
            tokens.append(token)
    port = free_port()
    page = [start_page(run_dir, port)]

    def kill_and_restart() -> None:
        page[0].send_signal(signal.SIGKILL)
        page[0].wait()
        page[0] = start_page(run_dir, port)

    try:
        crowd = asyncio.run(
            crowd_of(
                f"http://127.0.0.1:{port}", tokens, think_s,
                _after(seconds, answers, 1.0), _after(seconds, answers, 0.5),
                kill_and_restart if kill else None,
            )
        )  # fmt: skip
    finally:
        page[0].send_signal(signal.SIGTERM)
        page[0].wait(timeout=30)
    return compare(store, crowd)


def _after(seconds: float | None, answers: int | None, share: float) -> Ended:
    """When so large a share of the work is done; a crowd that is stuck ends after three minutes."""

    def reached(crowd: Crowd) -> bool:
        passed = time.monotonic() - crowd.started
        if seconds is not None:
            return passed > share * seconds
        assert answers is not None
        return len(crowd.acknowledged) >= share * answers or passed > 180

    return reached


def compare(location: str, crowd: Crowd) -> dict[str, Any]:
    from sqlalchemy import select

    from reward_service.feedback.schema import assignments

    with FeedbackStore(location) as store:
        rows = store.database.read(
            lambda c: (
                c.execute(select(assignments.c.assignment_id).where(assignments.c.state == "done"))
                .scalars()
                .all()
            )
        )
        said = store.comparison_history()
    done = {str(row) for row in rows}
    per_item = Counter(e.judgement.pair.item_id for e in said if not e.repeat)
    looks = Counter(
        (e.judgement.pair.item_id, e.judgement.annotator.annotator_id, e.repeat) for e in said
    )
    latencies = np.array(crowd.latencies) * 1000
    return {
        "acknowledged": len(crowd.acknowledged),
        "stored": len(said),
        "lost": len(set(crowd.acknowledged) - done),
        "doubled": sum(n - 1 for n in looks.values()),
        "over_overlap": sum(n > 3 for n in per_item.values()),
        "requests": len(latencies),
        "failed_requests": crowd.failed,
        "median_ms": round(float(np.median(latencies)), 1),
        "p95_ms": round(float(np.quantile(latencies, 0.95)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=3.0, help="mean seconds between answers")
    parser.add_argument("--store", help="SQLAlchemy URL; default: SQLite in a temporary folder")
    parser.add_argument("--kill", action="store_true", help="SIGKILL the page half-way")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run(
            Path(directory) / "run",
            count=given.people,
            seconds=given.seconds,
            think_s=given.think,
            store=given.store or str(Path(directory) / "feedback.sqlite"),
            kill=given.kill,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
