"""The HTTP interface alone: limits, errors and malformed requests, without Ray or a model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.config import RewardServiceConfig
from reward_service.http_api import RequestError, build_app
from reward_service.openapi import document
from reward_service.score import ItemIds, ModelScores, ScoreCall, ScoreItem
from reward_service.statistics import ModelStatus, VersionStatistics

CONFIG = RewardServiceConfig(max_items=8, max_chars=100, max_tokens=20, max_body_bytes=4096)
AS_JSON = {"Content-Type": "application/json"}


class StubBackend:
    """Scores with the number of characters, or a classifier's one answer; fails as it is told."""

    model_names = ("first", "second")

    def __init__(self, probability: float | None = None) -> None:
        self.probability = probability
        self.error: RequestError | None = None
        self.load_error: str | None = None
        self.reload_error: str | None = None
        self.call = ScoreCall(model="", items=(), timeout_s=0.0)

    async def score(self, call: ScoreCall) -> ModelScores:
        if self.error is not None:
            raise self.error
        self.call = call
        scores = [None if "bad" in i.response else length(i) for i in call.items]
        if self.probability is not None:
            scores = [self.probability for _ in call.items]
        return ModelScores(
            model=call.model,
            version="v1",
            fingerprint="f",
            scores=tuple(scores),
            tokens=tuple(int(length(i)) for i in call.items),
            errors=tuple("too long" if s is None else None for s in scores),
            probability=self.probability is not None,
            per_token=tuple(None if s is None else (0.5, s) for s in scores)
            if call.per_token
            else (),
        )

    async def statuses(self) -> Mapping[str, ModelStatus]:
        return {
            "first": ModelStatus(
                model="first",
                version="v1",
                fingerprint="f",
                context=64,
                reload_error=self.reload_error,
                statistics=(VersionStatistics(version="v1").with_scores([1.0, 3.0, None]),),
            ),
            "second": ModelStatus(model="second", error=self.load_error),
        }

    async def reload(self, model: str, directory: str) -> ModelStatus:
        if directory == "broken":
            raise RequestError(422, "reload_refused", "weights are damaged")
        return ModelStatus(model=model, version="v2")


def length(item: ScoreItem) -> float:
    return float(len(item.ids.response) if item.ids else len(item.response))


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


def send(
    backend: StubBackend,
    method: str,
    path: str,
    *,
    config: RewardServiceConfig = CONFIG,
    token_digests: tuple[str, ...] = (),
    **kwargs: Any,
) -> httpx.Response:
    async def call() -> httpx.Response:
        app = build_app(backend, config, token_digests=token_digests)
        transport = httpx.ASGITransport(app)
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
    assert answer.headers["X-Reward-Model-Version"] == "v1"
    assert answer.headers["X-Reward-Model-Fingerprint"] == "f"
    assert backend.call == ScoreCall(
        model="first",
        items=(
            ScoreItem(prompt="ab", response="cde"),
            ScoreItem(messages=({"role": "user", "content": "hi"},), response="yes!"),
            ScoreItem(response="plain"),
        ),
        timeout_s=CONFIG.timeout_s,
    )
    assert score(backend, {"items": items, "model": "second"}).json()["model"] == "second"


def test_token_ids_values_per_token_and_what_else_a_caller_may_choose(
    backend: StubBackend,
) -> None:
    body = {
        "items": [{"prompt_ids": [1, 5], "response_ids": [7, 8, 2]}, {"response_ids": [9]}],
        "per_token": True,
        "truncation": "left",
        "timeout_s": 1.5,
    }
    headers = {"Idempotency-Key": "abc"}
    answer = send(backend, "POST", "/v1/score", json=body, headers=headers)
    assert [row["per_token"] for row in answer.json()["data"]] == [[0.5, 3.0], [0.5, 1.0]]
    assert backend.call == ScoreCall(
        model="first",
        items=(
            ScoreItem(ids=ItemIds(prompt=(1, 5), response=(7, 8, 2))),
            ScoreItem(ids=ItemIds(response=(9,))),
        ),
        timeout_s=1.5,
        truncation="left",
        per_token=True,
        key="abc",
    )
    score(backend, {"items": [{"text": "a"}], "timeout_s": 10_000})
    assert backend.call.timeout_s == CONFIG.timeout_s


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
        ({"items": [{"response_ids": [1] * 21}]}, 422, "item_too_long", "items.0", "21 token ids"),
        (
            {"items": [{"response_ids": [-1]}]},
            422,
            "invalid_request",
            "items.0.response_ids.0",
            "greater than or equal to 0",
        ),
        (
            {"items": [{"response_ids": ["7"]}]},
            422,
            "invalid_request",
            "items.0.response_ids.0",
            "valid integer",
        ),
        ({"items": [{"prompt_ids": [1]}]}, 422, "invalid_request", "items.0", "or response_ids"),
        ({"items": [{"text": "a"}], "timeout_s": 0}, 422, "invalid_request", "timeout_s", "than 0"),
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


def test_readiness_says_why_a_reload_was_refused(backend: StubBackend) -> None:
    backend.reload_error = "no such file"
    answer = send(backend, "GET", "/ready")
    assert answer.status_code == 200
    assert answer.json()["models"][0]["reload_error"] == "no such file"
    assert send(backend, "PUT", "/v1/models/first", json={"directory": "next"}).json()[
        "version"
    ] == ("v2")
    refused = send(backend, "PUT", "/v1/models/first", json={"directory": "broken"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "reload_refused")
    unknown = send(backend, "PUT", "/v1/models/third", json={"directory": "next"})
    assert unknown.status_code == 404


def test_statistics_are_of_each_version_and_prometheus_reads_them(backend: StubBackend) -> None:
    model = send(backend, "GET", "/v1/models").json()["data"][0]
    assert model["statistics"] == [
        {"version": "v1", "count": 2, "errors": 1, "mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}
    ]

    async def scrape() -> str:
        app = build_app(backend, CONFIG)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/score", json={"items": [{"text": "abc"}, {"text": "bad"}]})
            await client.post("/v1/score", json={"items": []})
            await client.get("/secret/path")
            return (await client.get("/metrics")).text

    lines = asyncio.run(scrape()).splitlines()
    for line in (
        'rlhf_reward_requests_total{ingress="0",route="/v1/score",status="200"} 1.0',
        'rlhf_reward_requests_total{ingress="0",route="/v1/score",status="422"} 1.0',
        'rlhf_reward_requests_total{ingress="0",route="other",status="404"} 1.0',
        'rlhf_reward_items_total{ingress="0",model="first",outcome="scored"} 1.0',
        'rlhf_reward_items_total{ingress="0",model="first",outcome="failed"} 1.0',
        'rlhf_reward_score_mean{model="first",version="v1"} 2.0',
        'rlhf_reward_scores_total{model="first",version="v1"} 2.0',
        'rlhf_reward_requests_in_flight{ingress="0"} 1.0',
    ):
        assert line in lines
    assert "secret" not in "".join(lines)


TOKEN = "a-token-of-some-length"
DIGESTS = (hashlib.sha256(TOKEN.encode()).hexdigest(),)


def test_without_a_token_only_probes_are_answered(backend: StubBackend) -> None:
    body = {"items": [{"text": "a"}]}
    for method, path in (
        ("POST", "/v1/score"),
        ("POST", "/get_reward"),
        ("GET", "/v1/models"),
        ("PUT", "/v1/models/first"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ):
        answer = send(backend, method, path, json=body, token_digests=DIGESTS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised")
        assert "Basic" in answer.headers["WWW-Authenticate"]
    assert send(backend, "GET", "/health", token_digests=DIGESTS).status_code == 200
    ready = send(backend, "GET", "/ready", token_digests=DIGESTS)
    assert ready.json() == {"ready": True, "models": []}
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for known in ({"headers": bearer}, {"auth": ("any", TOKEN)}):
        answer = send(backend, "POST", "/v1/score", json=body, token_digests=DIGESTS, **known)
        assert answer.status_code == 200
    ready = send(backend, "GET", "/ready", token_digests=DIGESTS, headers=bearer)
    assert len(ready.json()["models"]) == 2


def test_no_text_reaches_a_log(backend: StubBackend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for body in (
        {"items": [{"text": "private words"}]},
        {"items": [{"text": "private words", "private key": 1}]},
        {"items": [{"prompt": "private words"}]},
    ):
        score(backend, body)
    answer = send(backend, "POST", "/v1/score", content=b'{"private', headers=AS_JSON)
    assert answer.status_code == 400
    assert "private" not in caplog.text


def test_the_openapi_document_is_the_one_of_its_version(backend: StubBackend) -> None:
    """When this fails, raise ``API_VERSION`` and write the document again (see the message)."""
    path = Path(__file__).resolve().parents[2] / "docs" / "reward_service.openapi.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(document())), (
        f"{path} differs: python -m reward_service.openapi > {path}"
    )
