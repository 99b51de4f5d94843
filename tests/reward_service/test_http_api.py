"""The HTTP interface alone: limits, errors and malformed requests, without Ray or a model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_service.config import RewardServiceConfig
from reward_service.encoding import Truncation
from reward_service.http_api import ModelStatus, RequestError, build_app
from reward_service.score import ModelScores, ScoreItem

CONFIG = RewardServiceConfig(max_items=8, max_chars=100, max_body_bytes=4096)
AS_JSON = {"Content-Type": "application/json"}
KEYS = ["items", "model", "text", "prompt", "response", "role", "content", "\udfff"]


class StubBackend:
    """Scores with the number of characters; fails as it is told to."""

    model_names = ("first", "second")

    def __init__(self) -> None:
        self.error: RequestError | None = None
        self.load_error: str | None = None
        self.seen: list[ScoreItem] = []

    async def score(
        self, model: str, items: Sequence[ScoreItem], truncation: Truncation
    ) -> ModelScores:
        if self.error is not None:
            raise self.error
        self.seen = list(items)
        scores = [None if "bad" in i.response else float(len(i.response)) for i in items]
        return ModelScores(
            model=model,
            version="v1",
            fingerprint="f",
            scores=tuple(scores),
            tokens=tuple(len(i.response) for i in items),
            errors=tuple("too long" if s is None else None for s in scores),
        )

    async def statuses(self) -> Mapping[str, ModelStatus]:
        return {
            "first": ModelStatus(model="first", version="v1", fingerprint="f", context=64),
            "second": ModelStatus(model="second", error=self.load_error),
        }


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


def send(backend: StubBackend, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(backend, CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(call())


def score(backend: StubBackend, body: Any) -> httpx.Response:
    return send(backend, "POST", "/v1/score", json=body)


def test_an_answer_carries_version_and_fingerprint(backend: StubBackend) -> None:
    items = [
        {"prompt": "ab", "response": "cde"},
        {"prompt": [{"role": "user", "content": "hi"}], "response": "yes!"},
        {"text": "plain"},
    ]
    answer = score(backend, {"items": items})
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "first",
        "version": "v1",
        "fingerprint": "f",
        "data": [
            {"index": 0, "score": 3.0, "tokens": 3},
            {"index": 1, "score": 4.0, "tokens": 4},
            {"index": 2, "score": 5.0, "tokens": 5},
        ],
    }
    assert backend.seen == [
        ScoreItem(prompt="ab", response="cde"),
        ScoreItem(messages=({"role": "user", "content": "hi"},), response="yes!"),
        ScoreItem(response="plain"),
    ]
    assert score(backend, {"items": items, "model": "second"}).json()["model"] == "second"


def test_an_item_that_cannot_be_scored_fails_alone(backend: StubBackend) -> None:
    answer = score(backend, {"items": [{"text": "bad"}, {"text": "good"}]})
    assert answer.status_code == 200
    assert answer.json()["data"] == [
        {"index": 0, "score": None, "tokens": 3, "error": "too long"},
        {"index": 1, "score": 4.0, "tokens": 4},
    ]
    answer = score(backend, {"items": [{"text": "bad"}]})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_items"


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    [
        ({}, 422, "invalid_request", "items", "Field required"),
        ({"items": []}, 422, "invalid_request", "items", "at least 1"),
        ([], 422, "invalid_request", None, "valid dictionary"),
        ({"items": [{}]}, 422, "invalid_request", "items.0", "either text, or prompt and"),
        ({"items": [{"prompt": "a"}]}, 422, "invalid_request", "items.0", "either text"),
        (
            {"items": [{"text": "a", "response": "b"}]},
            422,
            "invalid_request",
            "items.0",
            "either text",
        ),
        (
            {"items": [{"prompt": [], "response": "b"}]},
            422,
            "invalid_request",
            "items.0",
            "no messages",
        ),
        ({"items": [{"text": 3}]}, 422, "invalid_request", "items.0.text", "valid string"),
        ({"items": [{"text": "a", "x": 1}]}, 422, "invalid_request", "items.0.x", "Extra"),
        ({"items": [{"text": "a"}], "truncation": "up"}, 422, "invalid_request", "truncation", "'"),
        ({"items": [{"text": "a"}] * 9}, 422, "too_many_items", "items", "9 items.*limit is 8"),
        (
            {"items": [{"text": "a"}, {"prompt": "a" * 60, "response": "b" * 41}]},
            422,
            "item_too_long",
            "items.1",
            "101 characters, the limit of one item is 100",
        ),
        (
            {"items": [{"text": "a"}], "model": "third"},
            404,
            "unknown_model",
            "model",
            "'third'; served: first, second",
        ),
    ],
)
def test_a_wrong_request_is_explained(
    backend: StubBackend, body: Any, status: int, code: str, param: str | None, message: str
) -> None:
    answer = score(backend, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert re.search(message, error["message"])


def test_what_is_no_json_or_no_route_is_explained(backend: StubBackend) -> None:
    answer = send(backend, "POST", "/v1/score", content=b'{"items": [', headers=AS_JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    answer = send(backend, "POST", "/v1/score", content=b'{"items": [{"text": "a"}]}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json")
    answer = send(backend, "GET", "/v1/score")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    answer = send(backend, "GET", "/v2/score")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_body_over_the_limit_is_refused_announced_or_not(backend: StubBackend) -> None:
    body = json.dumps({"items": [{"text": "a" * 5000}]}).encode()

    async def in_chunks():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, in_chunks()):
        answer = send(backend, "POST", "/v1/score", content=content, headers=AS_JSON)
        assert answer.status_code == 413
        assert "limit of 4096 bytes" in answer.json()["error"]["message"]


def test_errors_of_the_backend_keep_status_and_retry_after(backend: StubBackend) -> None:
    backend.error = RequestError(503, "overloaded", "try again", retry_after_s=2)
    answer = score(backend, {"items": [{"text": "a"}]})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert answer.json()["error"] == {"code": "overloaded", "message": "try again", "param": None}


def test_health_models_and_readiness(backend: StubBackend) -> None:
    assert send(backend, "GET", "/health").json() == {"status": "ok"}
    assert send(backend, "GET", "/ready").status_code == 200
    models = send(backend, "GET", "/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["first", "second"]
    assert (models[0]["version"], models[0]["context"]) == ("v1", 64)
    backend.load_error = "weights are damaged"
    answer = send(backend, "GET", "/ready")
    assert answer.status_code == 503
    assert answer.json()["models"][1]["error"] == "weights are damaged"
    assert send(backend, "GET", "/health").status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=12)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(JSON, st.fixed_dictionaries({"items": st.lists(JSON, max_size=3)})))
def test_no_json_crashes_the_server(body: Any) -> None:
    content = json.dumps(body).encode()
    answer = send(StubBackend(), "POST", "/v1/score", content=content, headers=AS_JSON)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"code", "message", "param"}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "x/y"]))
def test_no_bytes_crash_the_server(body: bytes, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    answer = send(StubBackend(), "POST", "/v1/score", content=body, headers=headers)
    assert 400 <= answer.status_code < 500


def test_deep_nesting_does_not_crash_the_server(backend: StubBackend) -> None:
    answer = send(backend, "POST", "/v1/score", content=b"[" * 2000, headers=AS_JSON)
    assert answer.status_code == 400
