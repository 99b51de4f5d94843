"""The HTTP client against servers that are slow, busy, broken or lying."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from reward_service import client
from reward_service.client import HttpScorer
from reward_service.score import RewardUnavailable, ScoreItem

ITEMS = [ScoreItem(prompt="p", response="r" * n) for n in range(1, 6)]
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


class StubServer:
    """Answers each request with the next of the given replies, the last one for ever."""

    def __init__(self, *replies: Reply) -> None:
        requests: list[dict[str, Any]] = []
        self.requests = requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                requests.append(json.loads(self.rfile.read(length)) | {"path": self.path})
                reply = replies[min(len(requests), len(replies)) - 1]
                status, body = reply(requests[-1])
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StubServer]]:
    monkeypatch.setattr(client, "RETRY_PAUSES_S", (0.01,))
    servers: list[StubServer] = []

    def start(*replies: Reply) -> StubServer:
        servers.append(StubServer(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def right(request: dict[str, Any]) -> tuple[int, Any]:
    data = [
        {"index": i, "score": float(len(item["response"])), "tokens": 2}
        for i, item in enumerate(request["items"])
    ]
    return 200, {"model": "m", "version": "v", "data": data}


def answering(status: int, body: Any) -> Reply:
    return lambda _: (status, body)


def data(*scores: Any) -> Any:
    entries = [{"index": i, "score": s, "tokens": 1} for i, s in enumerate(scores)]
    return {"model": "m", "version": "v", "data": entries}


def test_a_long_list_is_split_and_joined_in_order(serve) -> None:
    server = serve(right)
    answer = HttpScorer(server.url + "/", items_per_request=2).score(ITEMS, "left")
    assert answer.scores == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert [len(r["items"]) for r in server.requests] == [2, 2, 1]
    assert server.requests[0]["path"] == "/v1/score"
    assert server.requests[0]["truncation"] == "left"
    assert "model" not in server.requests[0]


def test_a_busy_or_broken_server_is_asked_again(serve) -> None:
    busy = answering(503, {"error": {"message": "queue full"}})
    server = serve(busy, answering(502, "<html>bad gateway</html>"), right)
    assert HttpScorer(server.url).score(ITEMS).scores[4] == 5.0
    assert len(server.requests) == 3
    server = serve(busy)
    with pytest.raises(RuntimeError, match=r"answered 503: queue full, 3 times"):
        HttpScorer(server.url, max_retries=2).score(ITEMS)


def refusing(status: int, *bad: int) -> Reply:
    """Refuses every request with an item of one of these lengths; scores all others."""

    def reply(request: dict[str, Any]) -> tuple[int, Any]:
        if any(len(item["response"]) in bad for item in request["items"]):
            return status, {"error": {"message": "a bad item"}}
        return right(request)

    return reply


def test_one_bad_item_fails_alone_where_the_request_is_refused_for_it(serve) -> None:
    server = serve(refusing(422, 4))
    answer = HttpScorer(server.url).score(ITEMS)
    assert answer.scores == (1.0, 2.0, 3.0, None, 5.0)
    assert answer.errors[3] == f"{server.url}/v1/score answered 422: a bad item"
    assert (answer.model, answer.version) == ("m", "v")
    # 1-5, 1-2, 3-5, 3, 4-5, 4, 5
    assert [len(r["items"]) for r in server.requests] == [5, 2, 3, 1, 2, 1, 1]
    # the sample is tried again by itself later: still nothing that ends a run
    assert HttpScorer(server.url).score(ITEMS[3:4]).scores == (None,)


def test_an_item_that_breaks_the_server_fails_alone(serve) -> None:
    server = serve(refusing(500, 4))
    scorer = HttpScorer(server.url, max_retries=2)
    assert scorer.score(ITEMS).scores == (1.0, 2.0, 3.0, None, 5.0)
    # waited for only once: three tries of all five, then one of each half
    assert [len(r["items"]) for r in server.requests] == [5, 5, 5, 2, 3, 1, 2, 1, 1]
    alone = scorer.score(ITEMS[3:4])
    assert alone.scores == (None,)
    assert "answered 500: a bad item" in str(alone.errors[0])
    # what was scored before is asked for again: it is the item, not the server
    assert server.requests[-1]["items"] == [{"prompt": "p", "response": "r"}]


def test_a_server_that_breaks_altogether_is_waited_for(serve) -> None:
    server = serve(right, answering(500, "out of memory"))
    scorer = HttpScorer(server.url, max_retries=1)
    assert scorer.score(ITEMS).scores[0] == 1.0
    with pytest.raises(RewardUnavailable, match="answered 500: out of memory, 1 times"):
        scorer.score(ITEMS)
    assert len(server.requests) == 4  # two tries, and once what was scored before
    with pytest.raises(RewardUnavailable, match="answered 500"):
        HttpScorer(server.url, max_retries=0).score(ITEMS[:1])


def test_a_server_that_refuses_everything_from_the_start_is_an_error(serve) -> None:
    server = serve(answering(422, {"error": {"message": "no such field"}}))
    with pytest.raises(ValueError, match="answered 422: no such field"):
        HttpScorer(server.url).score(ITEMS)
    assert len(server.requests) == 2 * 5 - 1
    server = serve(answering(404, {"error": {"message": "no such path"}}))
    with pytest.raises(ValueError, match="answered 404: no such path"):
        HttpScorer(server.url).score(ITEMS)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("not json", "Invalid JSON"),
        ({"rewards": [1.0]}, "model: Field required"),
        (data(*[1.0] * 9), "9 scores for 1 items"),
        ('{"model":"m","version":"v","data":[{"index":0,"score":NaN,"tokens":1}]}', "finite"),
        (data("high"), "valid number"),
        (data(None), "a score or an error, not both"),
    ],
)
def test_nonsense_is_never_taken_for_a_score(serve, body: Any, says: str) -> None:
    server = serve(answering(200, body))
    answer = HttpScorer(server.url).score(ITEMS[:1])
    assert answer.scores == (None,)
    assert re.search(rf"answered nonsense: .*{says}", str(answer.errors[0]))
    with pytest.raises(RuntimeError, match="answered nonsense"):
        HttpScorer(server.url).score(ITEMS)


def test_two_versions_never_mix_in_one_call(serve) -> None:
    old, new = answering(200, data(1.0)), answering(200, data(2.0) | {"version": "w"})
    server = serve(old, new, new, new)
    answer = HttpScorer(server.url, items_per_request=1).score(ITEMS[:2])
    assert (answer.version, answer.scores) == ("w", (2.0, 2.0))
    assert len(server.requests) == 4  # both items again, of one version
    server = serve(*[old, new] * 4)
    with pytest.raises(RuntimeError, match=r"changed between versions \['v', 'w'\] .* 3 calls"):
        HttpScorer(server.url, items_per_request=1, max_retries=2).score(ITEMS[:2])


def test_a_slow_server_meets_the_deadline(serve) -> None:
    asked_to_end = threading.Event()

    def slow(request: dict[str, Any]) -> tuple[int, Any]:
        asked_to_end.wait(30)
        return right(request)

    server = serve(slow)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s"):
        HttpScorer(server.url, timeout_s=0.2).score(ITEMS)
    assert time.perf_counter() - started < 15
    asked_to_end.set()


def test_a_token_in_the_url_is_never_shown(serve) -> None:
    server = serve(answering(422, "no"))
    url = f"http://me:secret-token@127.0.0.1:{server.port}"
    with pytest.raises(ValueError, match="answered 422") as caught:
        HttpScorer(url).score(ITEMS)
    assert "secret" not in str(caught.value)
    server.close()
    with pytest.raises(RuntimeError, match=r"cannot be reached \(ConnectError\)") as lost:
        HttpScorer(url, max_retries=1).score(ITEMS)
    assert "secret" not in str(lost.value)


def test_a_url_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="must begin with http://host"):
        HttpScorer("localhost:8000")
