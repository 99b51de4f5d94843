"""Load on a reward server while somebody disturbs it, every answer checked.

As a script it is the large form of the fault test, on a service of its own:

    python -m tests.reward_service.fault_load --requests 4000 --at-once 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.reward_service.test_service import ITEMS


@dataclass
class LoadReport:
    """What became of the requests. Each must have exactly one answer."""

    requests: int
    answered: int = 0
    tries: int = 0
    wrong: int = 0
    """Answers with a score that is not the one of direct torch."""
    mixed: int = 0
    """Answers whose scores are of several versions."""
    refused: dict[str, int] = field(default_factory=dict)
    """Tries that had to be repeated, by status or error."""
    versions: Counter[str] = field(default_factory=Counter)
    """Answers of each version."""
    most_in_flight: int = 0
    seconds: float = 0.0

    def wait_for_an_answer_of(self, version: str, timeout_s: float = 120.0) -> None:
        """Until another answer of that version has come: a reload is seen to serve, under load."""
        before, deadline = self.versions[version], time.monotonic() + timeout_s
        while self.versions[version] == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer of version {version} in {timeout_s:g} s: {self}")
            time.sleep(0.01)


def kill_one(deployment: str) -> None:
    """Kill one replica of a Serve deployment, as a machine that fails would."""
    import ray

    (name, *_) = sorted(
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == "serve" and f"#{deployment}#" in entry["name"]
    )
    ray.kill(ray.get_actor(name, namespace="serve"))


def run_load(
    url: str,
    token: str,
    model: str,
    expected: Mapping[str, tuple[float | None, ...]],
    *,
    requests: int,
    at_once: int,
    disturb: Callable[[LoadReport], None],
    timeout_s: float = 300.0,
) -> LoadReport:
    """Send requests, ``at_once`` of them in flight, and call ``disturb`` amid them.

    ``disturb`` gets the report as it grows.

    Every request carries a key and is tried again until it is answered, as a good client does.
    ``expected`` has the right scores of ``ITEMS`` for each version.
    """
    report = LoadReport(requests=requests)
    raised: list[BaseException] = []

    def run_disturbance() -> None:
        try:
            disturb(report)
        except BaseException as error:  # raised again in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run_disturbance)
    started = time.monotonic()
    asyncio.run(_load(report, url, token, model, expected, at_once, thread, timeout_s))
    thread.join()
    report.seconds = time.monotonic() - started
    if raised:
        raise raised[0]
    return report


async def _load(
    report: LoadReport,
    url: str,
    token: str,
    model: str,
    expected: Mapping[str, tuple[float | None, ...]],
    at_once: int,
    disturbance: threading.Thread,
    timeout_s: float,
) -> None:
    # aiohttp: httpx looks through all its connections at every request.
    headers = {"Authorization": f"Bearer {token}"}
    numbers = iter(range(10**9))
    in_flight = 0

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=at_once),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    ) as client:

        async def worker() -> None:
            nonlocal in_flight
            # Requests go on until the disturbance is over, so that all of it happens under load.
            while (number := next(numbers)) < report.requests or disturbance.is_alive():
                if number >= report.requests:
                    report.requests += 1
                in_flight += 1
                report.most_in_flight = max(report.most_in_flight, in_flight)
                await _one(report, client, url, model, expected, number)
                in_flight -= 1
                if report.answered >= at_once // 2 and disturbance.ident is None:
                    disturbance.start()

        await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(at_once))), timeout_s)


async def _one(
    report: LoadReport,
    client: aiohttp.ClientSession,
    url: str,
    model: str,
    expected: Mapping[str, tuple[float | None, ...]],
    number: int,
) -> None:
    rng = random.Random(number)
    start, count = rng.randrange(50), rng.randint(1, 8)
    items = [{"prompt": i.prompt, "response": i.response} for i in ITEMS[start : start + count]]
    body = {"items": items, "model": model}
    for tries in range(200):
        report.tries += 1
        try:
            async with client.post(
                f"{url}/v1/score", json=body, headers={"Idempotency-Key": f"r{number}"}
            ) as answer:
                if answer.status == 200:
                    _check(report, await answer.json(), expected, start, count)
                    return
                _count(report, str(answer.status))
                assert answer.status >= 500, await answer.text()
        except aiohttp.ClientError as error:
            _count(report, type(error).__name__)
        await asyncio.sleep(min(2.0, 0.1 * 2**tries) * (0.5 + rng.random()))
    raise AssertionError(f"request {number} was not answered")


def _count(report: LoadReport, why: str) -> None:
    report.refused[why] = report.refused.get(why, 0) + 1


def _check(
    report: LoadReport,
    answer: dict[str, Any],
    expected: Mapping[str, tuple[float | None, ...]],
    start: int,
    count: int,
) -> None:
    report.answered += 1
    report.versions[answer["version"]] += 1
    scores = tuple(row["score"] for row in answer["data"])
    if scores == expected[answer["version"]][start : start + count]:
        return
    report.wrong += 1
    every = {version: e[start : start + count] for version, e in expected.items()}
    found = [{v for v, e in every.items() if e[i] == s} for i, s in enumerate(scores)]
    if all(found) and not set.intersection(*found):
        report.mixed += 1


def main() -> None:
    """A service with two replicas and two ingresses, kills of both and three reloads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--at-once", type=int, default=1000)
    arguments = parser.parse_args()
    import os
    import shutil

    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    import torch

    from reward_service.config import RewardServiceConfig
    from reward_service.model import RewardModel
    from reward_service.service import RewardService
    from tests.conftest import make_llama
    from tests.reward_service.conftest import write_reward_model

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        base = make_llama(Path(place) / "base", tied=True)
        for seed, name in enumerate(("one", "two"), start=1):
            write_reward_model(base, Path(place) / name, seed=seed, gain=2.0, bias=-0.5)
        shutil.copytree(Path(place) / "one", Path(place) / "bad")
        (Path(place) / "bad" / "model.safetensors").write_bytes(b"\0")
        torch.set_num_threads(1)  # as a replica's: sums then have the same order, to the last bit
        models = [RewardModel.load(Path(place) / name) for name in ("one", "two")]
        expected = {model.version: model.score(ITEMS).scores for model in models}
        ray.init(num_cpus=16, include_dashboard=False, logging_level="warning")
        config = RewardServiceConfig(
            port=0, models_root=Path(place), num_replicas=2, ingress_replicas=2,
            num_cpus_per_replica=0.1, max_queued_requests=2000,
        )  # fmt: skip
        with RewardService.start(config, {"quality": Path(place) / "one"}) as service:

            def disturb(report: LoadReport) -> None:
                for directory, victim in (("two", "model-quality"), ("one", "Ingress"),
                                          ("two", "model-quality")):  # fmt: skip
                    status = service.reload("quality", Path(place) / directory)
                    report.wait_for_an_answer_of(status.version)
                    kill_one(victim)
                    time.sleep(5)

            report = run_load(
                service.url, "", "quality", expected, requests=arguments.requests,
                at_once=arguments.at_once, disturb=disturb, timeout_s=900,
            )  # fmt: skip
            statistics = service.statuses
        ray.shutdown()
    print(json.dumps(asdict(report), indent=1))
    assert statistics
    assert report.answered == report.requests
    assert report.wrong == report.mixed == 0
    assert len(report.versions) == 2


if __name__ == "__main__":
    main()
