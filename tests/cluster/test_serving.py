"""``rlhf serve`` before it starts anything, and as the client that asks for a reload."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.serving import ensembles
from reward_service.config import EnsembleConfig
from reward_service.security import TOKEN_VARIABLE


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def serve(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["serve", *arguments])
    return done.exit_code, done.output


def test_what_is_wrong_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serving.Session", None)  # starting one would raise
    code, said = serve("--model", "x=dir", "--host", "0.0.0.0")
    assert code == 1
    assert f"would listen on 0.0.0.0, where others can reach it, without tokens: set {TOKEN_VARIABLE}" in said  # fmt: skip  # noqa: E501
    code, said = serve("--model", "x=dir", "--ensemble", "both=mean:x,y")
    assert code == 1
    assert "members that are not served: ['y']" in said
    code, said = serve("--model", "x=dir", "--ensemble", "both=best:x,y")
    assert "must look like NAME=lower_bound:MEMBER,MEMBER" in said
    code, said = serve("--model", "x=dir", "--replicas", "3", "--max-replicas", "2")
    assert "min_replicas 3 is more than max_replicas 2" in said
    assert serve()[0] == 2


def test_ensembles_by_name() -> None:
    assert ensembles(["a=mean:x,y", "b=lower_bound:x,y,z"], 0.5) == {
        "a": EnsembleConfig(members=("x", "y"), combine="mean", penalty=0.5),
        "b": EnsembleConfig(members=("x", "y", "z"), combine="lower_bound", penalty=0.5),
    }


@pytest.fixture
def server() -> Iterator[tuple[int, list[Any]]]:
    """Answers PUT: a new version for the model ``good``, a refusal for any other."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, self.headers.get("Authorization")))
            good = self.path.endswith("/good")
            answer = {"version": "v2"} if good else {"error": {"message": "weights are damaged"}}
            self.send_response(200 if good else 422)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield http.server_port, seen
        http.shutdown()
        thread.join()


def test_a_reload_is_asked_of_the_server_that_runs(
    server: tuple[int, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = server
    monkeypatch.setenv(TOKEN_VARIABLE, "first-token-0123456789, second-token-0123456789")
    code, said = serve("--reload", f"good={tmp_path}", "--port", str(port))
    assert (code, said) == (0, "good is now version v2\n")
    assert seen == [
        ("/v1/models/good", {"directory": str(tmp_path)}, "Bearer first-token-0123456789")
    ]
    code, said = serve("--reload", f"bad={tmp_path}", "--port", str(port))
    assert code == 1
    assert "refused" in said
    assert "weights are damaged" in said
    assert "must look like name=directory" in serve("--reload", "x", "--port", str(port))[1]


def test_a_server_that_does_not_run_is_named(tmp_path: Path) -> None:
    code, said = serve("--reload", f"x={tmp_path}", "--port", "9")
    assert code == 1
    assert "http://127.0.0.1:9 does not answer (ConnectError)" in said
