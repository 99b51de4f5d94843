"""Other systems' reward clients against our server, and our client against their servers.

The requests are what the clients' own code sends (OpenRLHF's remote_rm_utils, slime's rm_hub,
verl's reward loop) and the answers what it reads; both are written out here.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import requests
import uvicorn

from reward_service.client import HttpScorer
from reward_service.config import RewardServiceConfig
from reward_service.http_api import build_app
from reward_service.score import ItemIds, ScoreItem
from reward_service.wire_clients import SPOKEN
from tests.reward_service.test_http_api import StubBackend, send

USAGE = {"completion_tokens": 0, "prompt_tokens_details": None}
DIALOGUE = [{"role": "user", "content": "hi"}]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# (path, request, answer, what the model sees); the stub scores a text with its length
GOLDEN: dict[str, tuple[str, Any, Any, tuple[ScoreItem, ...]]] = {
    "openrlhf": (
        "/get_reward",
        {"query": ["ab", "abcd"], "prompts": ["a", "ab"], "labels": ["x", None]},
        {"rewards": [2.0, 4.0], "scores": [2.0, 4.0], "extra_logs": {}},
        (ScoreItem(response="ab"), ScoreItem(response="abcd")),
    ),
    "slime": (
        "/remote_rm",
        {"prompt": "Q: ", "response": "yes", "label": {"answer": 3}},
        3.0,
        (ScoreItem(prompt="Q: ", response="yes"),),
    ),
    "slime, messages": (
        "/remote_rm",
        {"prompt": DIALOGUE, "response": "yes", "label": None},
        3.0,
        (ScoreItem(messages=({"role": "user", "content": "hi"},), response="yes"),),
    ),
    "verl on vllm": (
        "/classify",
        {"model": "/models/Skywork-8B", "input": "abc", "use_activation": False},
        {
            "id": "classify-v1",
            "object": "list",
            "model": "first",
            "data": [{"index": 0, "label": "LABEL_0", "probs": [3.0], "num_classes": 1}],
            "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 3},
        },
        (ScoreItem(response="abc"),),
    ),
    "vllm, a probability by default": (
        "/classify",
        {"model": "second", "input": ["a", "bcd"]},
        {
            "id": "classify-v1",
            "object": "list",
            "model": "second",
            "data": [
                {"index": 0, "label": "LABEL_0", "probs": [sigmoid(1)], "num_classes": 1},
                {"index": 1, "label": "LABEL_0", "probs": [sigmoid(3)], "num_classes": 1},
            ],
            "usage": USAGE | {"prompt_tokens": 4, "total_tokens": 4},
        },
        (ScoreItem(response="a"), ScoreItem(response="bcd")),
    ),
    "vllm, chat": (
        "/classify",
        {
            "messages": [*DIALOGUE, {"role": "assistant", "content": "yes"}],
            "use_activation": False,
        },
        {
            "id": "classify-v1",
            "object": "list",
            "model": "first",
            "data": [{"index": 0, "label": "LABEL_0", "probs": [3.0], "num_classes": 1}],
            "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 3},
        },
        (ScoreItem(messages=({"role": "user", "content": "hi"},), response="yes"),),
    ),
    "sglang": (
        "/classify",
        {"model": "any", "text": ["a", "bcd"]},
        [
            {"embedding": [1.0], "meta_info": {"prompt_tokens": 1}},
            {"embedding": [3.0], "meta_info": {"prompt_tokens": 3}},
        ],
        (ScoreItem(response="a"), ScoreItem(response="bcd")),
    ),
    "sglang, one text": (
        "/classify",
        {"text": "abc"},
        {"embedding": [3.0], "meta_info": {"prompt_tokens": 3}},
        (ScoreItem(response="abc"),),
    ),
    "verl on sglang": (
        "/v1/embeddings",
        {"model": "/models/Skywork-8B", "input": "abc"},
        {
            "object": "list",
            "model": "first",
            "data": [{"object": "embedding", "index": 0, "embedding": [3.0]}],
            "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 3},
        },
        (ScoreItem(response="abc"),),
    ),
    "vllm score, one query": (
        "/score",
        {"model": "first", "queries": "q", "documents": ["a", "bc"], "use_activation": False},
        {
            "id": "score-v1",
            "object": "list",
            "model": "first",
            "data": [
                {"index": 0, "object": "score", "score": 1.0},
                {"index": 1, "object": "score", "score": 2.0},
            ],
            "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 3},
        },
        (ScoreItem(prompt="q", response="a"), ScoreItem(prompt="q", response="bc")),
    ),
    "vllm score, texts": (
        "/score",
        {"text_1": ["q", "r"], "text_2": ["a", "bc"]},
        {
            "id": "score-v1",
            "object": "list",
            "model": "first",
            "data": [
                {"index": 0, "object": "score", "score": sigmoid(1)},
                {"index": 1, "object": "score", "score": sigmoid(2)},
            ],
            "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 3},
        },
        (ScoreItem(prompt="q", response="a"), ScoreItem(prompt="r", response="bc")),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    path, request, expected, items = GOLDEN[name]
    backend = StubBackend()
    answer = send(backend, "POST", path, json=request)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if isinstance(body, dict) and "created" in body:
        assert isinstance(body.pop("created"), int)
    assert body == expected
    assert backend.call.items == items
    assert backend.call.truncation == "left"
    assert answer.headers["X-Reward-Model-Version"] == "v1"


@pytest.mark.parametrize("path", ["/classify", "/score"])
def test_a_classifiers_probability_is_not_squeezed_again(path: str) -> None:
    items: dict[str, Any] = {"input": ["abc"]}
    if path == "/score":
        items = {"queries": "q", "documents": ["abc"]}
    given: list[float] = []
    for activation in (True, False):
        backend = StubBackend(probability=0.98)
        body = send(backend, "POST", path, json=items | {"use_activation": activation}).json()
        row = body["data"][0]
        given.append(row["probs"][0] if path == "/classify" else row["score"])
    assert given[0] == 0.98
    assert given[1] == pytest.approx(3.8918203)  # ln(0.98 / 0.02)


def test_token_ids_as_vllm_takes_them() -> None:
    backend = StubBackend()
    send(backend, "POST", "/classify", json={"input": [5, 6], "use_activation": False})
    assert backend.call.items == (ScoreItem(ids=ItemIds(response=(5, 6))),)
    send(backend, "POST", "/classify", json={"input": [[5], [6, 7]]})
    assert [i.ids and i.ids.response for i in backend.call.items] == [(5,), (6, 7)]


def test_the_url_chooses_model_and_truncation() -> None:
    backend = StubBackend()
    body = {"query": ["ab"], "prompts": ["a"], "labels": [None]}
    send(backend, "POST", "/get_reward?model=second&truncation=error", json=body)
    assert (backend.call.model, backend.call.truncation) == ("second", "error")
    answer = send(backend, "POST", "/get_reward?model=third", json=body)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/get_reward", {"query": ["good", "bad"]}, "item 1 cannot be scored: too long"),
        ("/get_reward", {"query": []}, "nothing to score"),
        ("/get_reward", {"queries": ["x"]}, "Field required"),
        ("/remote_rm", {"prompt": "a"}, "Field required"),
        ("/classify", {"nothing": 1}, "Field required"),
        ("/classify", {"messages": DIALOGUE}, "must be the assistant's"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"]}, "2 queries and 1 documents"),
        ("/classify", {"text": ["a"] * 9}, "9 items in one request"),
    ],
)
def test_what_cannot_be_scored_is_refused_whole(path: str, body: Any, says: str) -> None:
    answer = send(StubBackend(), "POST", path, json=body)
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """A real HTTP server of ours that wants a token, as clients of others write its address."""
    digests = (hashlib.sha256(TOKEN.encode()).hexdigest(),)
    app = build_app(StubBackend(), RewardServiceConfig(), token_digests=digests)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # clients may come before the server is up: they wait
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"any:{TOKEN}@127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_clients_that_send_no_header_get_in_by_their_url(served: str) -> None:
    # as OpenRLHF's request_api_wrapper does
    body = {"query": ["ab", "abc"], "prompts": ["a", "a"], "labels": [None, None]}
    headers = {"Content-Type": "application/json"}
    answer = requests.post(url=f"http://{served}/get_reward", json=body, headers=headers)
    assert answer.json()["rewards"] == [2.0, 3.0]

    async def slime_and_verl() -> tuple[Any, Any]:
        async with aiohttp.ClientSession() as session:
            payload = {"prompt": "p", "response": "abcd", "label": "x"}
            async with session.post(f"http://{served}/remote_rm", json=payload) as found:
                reward = await found.json()
            payload = {"model": "/m", "input": "abc", "use_activation": False}
            async with session.post(f"http://{served}/classify", json=payload) as found:
                return reward, (await found.json())["data"][-1]["probs"][-1]

    assert asyncio.run(slime_and_verl()) == (4.0, 3.0)
    bare = served.partition("@")[2]
    assert requests.post(f"http://{bare}/get_reward", json=body).status_code == 401


@pytest.mark.parametrize("name", SPOKEN)
def test_our_client_speaks_what_our_server_speaks(served: str, name: Any) -> None:
    path = {"openrlhf": "/get_reward", "slime": "/remote_rm"}.get(name, "")
    items = [ScoreItem(prompt="p", response="r" * n) for n in (1, 2, 3)]
    answer = HttpScorer(f"http://{served}{path}", format=name).score(items)
    # formats of one text count the prompt too
    extra = 1 if name in ("openrlhf", "vllm", "sglang") else 0
    assert answer.scores == (1.0 + extra, 2.0 + extra, 3.0 + extra)
    assert (answer.model, answer.version) == ("first", "v1")
