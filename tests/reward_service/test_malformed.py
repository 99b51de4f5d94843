"""Requests made from the OpenAPI document and then broken: no 5xx, whatever they are."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_service.http_api import build_app
from reward_service.openapi import document
from tests.reward_service.malformed import Requests
from tests.reward_service.test_http_api import AS_JSON, CONFIG, StubBackend, send

REQUESTS = Requests(document())


def answers(backend: StubBackend, requests: list[dict[str, Any]]) -> list[httpx.Response]:
    """All requests to one application."""

    async def calls() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_app(backend, CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(**request) for request in requests]

    return asyncio.run(calls())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_nothing_made_from_the_document_crashes_the_server(rng: random.Random) -> None:
    """The small form of ``tests/reward_service/malformed.py``."""
    drawn = [REQUESTS.draw(rng) for _ in range(20)]
    for request, answer in zip(drawn, answers(StubBackend(), drawn), strict=True):
        assert answer.status_code < 500, request
        if answer.status_code >= 400 and request["method"] != "HEAD":
            assert set(answer.json()["error"]) == {"code", "message", "param"}


def test_some_of_what_is_made_from_the_document_is_accepted() -> None:
    rng = random.Random(0)
    drawn = [REQUESTS.draw(rng) for _ in range(300)]
    seen = [a.status_code for a in answers(StubBackend(), drawn)]
    assert {200, 404, 405, 415, 422} <= set(seen)
    assert 30 < seen.count(200) < 200


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "x/y"])
def test_no_bytes_crash_the_server(content_type: str) -> None:
    rng = random.Random(0)
    headers = {"Content-Type": content_type}
    for path in ("/v1/score", "/get_reward", "/classify", "/v1/embeddings"):
        bodies = [rng.randbytes(rng.randrange(200)) for _ in range(20)]
        requests = [
            {"method": "POST", "url": path, "content": body, "headers": headers} for body in bodies
        ]
        for answer in answers(StubBackend(), requests):
            assert 400 <= answer.status_code < 500


def test_deep_nesting_does_not_crash_the_server() -> None:
    answer = send(StubBackend(), "POST", "/v1/score", content=b"[" * 2000, headers=AS_JSON)
    assert answer.status_code == 400
