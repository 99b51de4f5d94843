"""Malformed requests made from the OpenAPI document: values that its schemas allow, broken.

As a script it sends many of them to the real service and watches its memory:

    python -m tests.reward_service.malformed --requests 10000
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

Schema = dict[str, Any]
Value = Callable[[random.Random], Any]

ODD_VALUES: tuple[Value, ...] = (
    lambda _: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2**31, 2**63, -(2**70), 10**400]),
    lambda rng: rng.choice([1.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")]),
    lambda rng: odd_text(rng),
    lambda _: [],
    lambda _: {},
    lambda rng: [None] * rng.randint(1, 600),
    lambda rng: {odd_text(rng): odd_text(rng)},
    lambda rng: nested(rng.randint(1, 300)),
)


def odd_text(rng: random.Random) -> str:
    pieces = [
        "",
        "a",
        "rain " * 30,
        "\ud800",
        "\x00",
        "河城🌧",
        "</s>",
        "../..",
        "{{",
        "\u202e",
        "A" * 5000,
    ]
    return rng.choice(pieces) + rng.choice(pieces)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class Requests:
    """Draws requests from an OpenAPI document."""

    def __init__(self, document: Schema, *, broken: float = 0.15) -> None:
        self._document = document
        self._broken = broken
        self._operations = [
            (method, path, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Arguments of ``httpx``'s ``request``."""
        method, path, operation = rng.choice(self._operations)
        query: dict[str, str] = {}
        headers: dict[str, str] = {}
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                text = quote(rng.choice(["quality", odd_text(rng)]), safe="", errors="replace")
                path = path.replace(f"{{{parameter['name']}}}", text or "x")
            elif rng.random() < 0.3:
                value = str(self.value(parameter["schema"], rng))
                if parameter["in"] == "query":
                    query[parameter["name"]] = value.encode("utf-8", "replace").decode()
                else:
                    headers[parameter["name"]] = _header(value)
        if rng.random() < 0.05:
            method = rng.choice(["get", "post", "put", "delete", "patch", "options", "head"])
        request: dict[str, Any] = {"method": method.upper(), "url": path, "params": query}
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]["schema"]
            request["content"] = self._bytes(self.value(content, rng), rng)
            headers["Content-Type"] = rng.choice(["application/json"] * 9 + ["text/plain"])
        return request | {"headers": headers}

    def value(self, schema: Schema, rng: random.Random) -> Any:
        """A value that the schema allows, or, now and then, one that it does not."""
        if rng.random() < self._broken:
            return rng.choice(ODD_VALUES)(rng)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self.value(self._document["components"]["schemas"][name], rng)
        for either in ("anyOf", "oneOf"):
            if either in schema:
                return self.value(rng.choice(schema[either]), rng)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        return self._of_type(schema.get("type"), schema, rng)

    def _of_type(self, kind: str | None, schema: Schema, rng: random.Random) -> Any:
        if kind == "object":
            required = schema.get("required", [])
            properties = schema.get("properties", {})
            chosen = [k for k in properties if k in required or rng.random() < 0.4]
            made = {k: self.value(properties[k], rng) for k in chosen if rng.random() > 0.03}
            if rng.random() < 0.1:
                made[odd_text(rng)] = odd_text(rng)
            return made
        if kind == "array":
            return [self.value(schema["items"], rng) for _ in range(rng.choice([0, 1, 1, 2, 9]))]
        if kind == "integer":
            return rng.randint(
                int(schema.get("minimum", -5)), min(600, int(schema.get("maximum", 600)))
            )
        if kind == "number":
            return rng.choice([rng.random() * 10, 1e-9, 1e9])
        if kind == "boolean":
            return rng.choice([True, False])
        if kind == "null":
            return None
        return rng.choice(["rain", "storm in Riverton", odd_text(rng)])

    def _bytes(self, value: Any, rng: random.Random) -> bytes:
        content = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode(
            "utf-8", "surrogatepass"
        )
        luck = rng.random()
        if luck < 0.03:
            return content[: rng.randrange(len(content) + 1)]
        if luck < 0.06:
            place = rng.randrange(len(content) + 1)
            return content[:place] + bytes([rng.randrange(256)]) + content[place:]
        if luck < 0.07:
            return b"[" * rng.randint(1, 50_000)
        return content


def _header(text: str) -> str:
    """What a client's own library lets through."""
    kept = [c for c in text if c in string.ascii_letters + string.digits + " -_"]
    return "".join(kept)[:300].strip()


def main() -> None:
    """The real service with a tiny model; memory after a tenth of the requests and at the end."""
    import os

    os.environ["RAY_AUTH_MODE"] = "disabled"
    import psutil
    import ray

    from reward_service.config import RewardServiceConfig
    from reward_service.openapi import document
    from reward_service.service import RewardService
    from tests.conftest import make_llama
    from tests.reward_service.conftest import write_reward_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    wanted = parser.parse_args().requests

    kinds = {"Ingress": "reward:Ingress", "replica": "reward:model-", "proxy": "ProxyActor"}

    def memory() -> dict[str, int]:
        """Resident MiB of each kind of process."""
        found = dict.fromkeys(kinds, 0)
        for process in psutil.process_iter():
            try:
                title, size = " ".join(process.cmdline()), process.memory_info().rss >> 20
            except psutil.Error:  # it has ended meanwhile
                continue
            for kind, word in kinds.items():
                found[kind] += size if word in title else 0
        return found

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        base = make_llama(Path(place) / "base", tied=True)
        model = write_reward_model(base, Path(place) / "rm", seed=1, gain=1.0, bias=0.0)
        ray.init(num_cpus=16, include_dashboard=False, logging_level="warning")
        config = RewardServiceConfig(port=0, num_cpus_per_replica=0.1, models_root=Path(place))
        rng, requests = random.Random(0), Requests(document())
        statuses: dict[int, int] = {}
        started = time.monotonic()
        with (
            RewardService.start(config, {"quality": model}) as service,
            httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client,
        ):
            early: dict[str, int] = {}
            for number in range(wanted):
                request = requests.draw(rng)
                answer = client.request(**request)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                # A deadline of the caller's own may be too short to keep.
                in_time = b"timeout_s" not in request.get("content", b"")
                allowed = answer.status_code < 500 or (answer.status_code == 504 and not in_time)
                assert allowed, (request, answer.text)
                if number == wanted // 10:
                    early = memory()
            late = memory()
            assert client.get("/ready").json()["ready"]
        ray.shutdown()
    seconds = round(time.monotonic() - started)
    print(
        json.dumps({"statuses": statuses, "seconds": seconds, "mib_early": early, "mib_late": late})
    )


if __name__ == "__main__":
    main()
