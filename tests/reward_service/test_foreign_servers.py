"""PPO with a reward server of another system: what we send, and what a bad item costs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from actors.trajectory import SampleFailure
from reward_service import client
from reward_service.client import HttpScorer
from reward_service.config import RetryConfig, RewardConfig, RewardServiceConfig, RewardTerm
from reward_service.rewards import build_reward
from reward_service.score import ModelScores, Score, ScoreItem
from reward_service.scoring import score_stream
from reward_service.wire_clients import SPOKEN
from reward_service.wire_formats import SERVED
from tests.reward_service.conftest import TrajectoryMaker
from tests.reward_service.test_client import StubServer

FOREIGN: dict[str, tuple[str, Any, Any]] = {
    "openrlhf": (
        "/get_reward",
        {"query": ["pa", "pbc"], "prompts": ["p", "p"], "labels": [None, None]},
        {"rewards": [0.5, -1.0], "scores": [0.5, -1.0], "extra_logs": {"n": [1, 2]}},
    ),
    "vllm": (
        "",
        {"input": ["pa", "pbc"], "use_activation": False, "model": "rm"},
        {"data": [{"index": 1, "probs": [-1.0]}, {"index": 0, "probs": [0.5]}]},
    ),
    "vllm_score": (
        "",
        {"queries": ["p", "p"], "documents": ["a", "bc"], "use_activation": False, "model": "rm"},
        {"data": [{"index": 0, "score": 0.5}, {"index": 1, "score": -1.0}]},
    ),
    "sglang": (
        "",
        {"text": ["pa", "pbc"], "model": "rm"},
        [{"embedding": [0.1, 0.5]}, {"embedding": [-1.0]}],
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_ppo_uses_a_server_of_another_system(
    name: Any, trajectory: TrajectoryMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, request, answer = FOREIGN[name]
    server = StubServer(lambda _: (200, answer))
    monkeypatch.setenv("THEIR_TOKEN", "secret")
    term = RewardTerm(
        name="theirs",
        url=server.url + path,
        format=name,
        served_model=None if name == "openrlhf" else "rm",
        token_env="THEIR_TOKEN",
    )
    try:
        samples = [trajectory(t, prompt="p", number=n) for n, t in enumerate(["a", "bc"])]
        scored = build_reward(RewardConfig(terms=(term,))).score(samples)
    finally:
        server.close()
    assert [s.value for s in scored if isinstance(s, Score)] == [0.5, -1.0]
    (sent,) = server.requests
    assert sent.pop("path") == path + SPOKEN[name].path
    assert sent == request


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("openrlhf", {"scores": [1.0]}, "KeyError: 'rewards'"),
        ("openrlhf", {"rewards": [1.0] * 9}, "9 scores for 1 items"),
        ("slime", "[" * 100_000, "recursion"),
        ("vllm", {"data": []}, "no rows for 1 items"),
        ("vllm", {"data": [{"index": 7, "probs": [1.0]}]}, "has index 7, of 1 items"),
        ("vllm", {"data": [{"index": 0, "probs": [1.0]}] * 2}, "has index 0, of 1 items"),
        ("vllm", "<html>", "Expecting value"),
        ("sglang", "3", "no rows for 1 items"),
    ],
)
def test_nonsense_of_another_server_is_never_taken_for_a_score(
    name: Any, answer: Any, says: str
) -> None:
    server = StubServer(lambda _: (200, answer))
    try:
        scorer = HttpScorer(server.url, format=name)
        (error,) = scorer.score([ScoreItem(response="a")]).errors
        assert re.search(rf"answered nonsense: .*{says}", str(error))
        with pytest.raises(RuntimeError, match="answered nonsense"):  # it never was anything else
            scorer.score([ScoreItem(response="a" * n) for n in range(4)])
    finally:
        server.close()


BAD = {
    "NaN": "its score is nan",
    "Infinity": "its score is inf",
    "null": "the answer has no score for it",
    '"0.5"': "its score is a str",
    "true": "its score is a bool",
    "1" + "0" * 400: "its score is beyond all floating-point numbers",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("openrlhf", '{"rewards": [1.5, %s, -1.5]}'),
        ("vllm", '{"data": [{"index": 2, "probs": [-1.5]}, {"index": 0, "probs": [1.5]}, '
                 '{"index": 1, "probs": [0.0, %s]}]}'),
        ("vllm_score", '{"data": [{"index": 0, "score": 1.5}, {"index": 1, "score": %s}, '
                       '{"index": 2, "score": -1.5}]}'),
        ("sglang", '[{"embedding": [1.5]}, {"embedding": [%s]}, {"embedding": [-1.5]}]'),
    ],
)  # fmt: skip
def test_one_bad_value_of_another_server_sets_one_sample_aside(
    name: Any, answer: str, bad: str, trajectory: TrajectoryMaker
) -> None:
    server = StubServer(lambda _: (200, answer % bad))
    try:
        reward = build_reward(
            RewardConfig(terms=(RewardTerm(name="t", url=server.url, format=name),))
        )
        first, second, third = reward.score([trajectory("r", number=n) for n in range(3)])
    finally:
        server.close()
    assert isinstance(first, Score)
    assert isinstance(third, Score)
    assert (first.value, third.value) == (1.5, -1.5)
    assert isinstance(second, SampleFailure)
    assert second.reason.startswith("term 't': http://127.0.0.1")
    assert second.reason.endswith(BAD[bad])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("vllm", {"data": [{"index": 1, "probs": [0.5]}]}),  # of a row that is not there
        ("vllm", {"data": [{"index": 1, "probs": [0.5]}, {"index": 0, "probs": []}]}),
        ("vllm_score", {"data": [{"index": 1, "score": 0.5}, {"index": 0}]}),
        ("sglang", [None, {"embedding": [0.5]}]),
    ],
)
def test_what_is_missing_or_malformed_is_missing_for_one_item(name: Any, answer: Any) -> None:
    server = StubServer(lambda _: (200, answer))
    try:
        scorer = HttpScorer(server.url, format=name)
        found = scorer.score([ScoreItem(response="a"), ScoreItem(response="b")])
    finally:
        server.close()
    assert found.scores == (None, 0.5)
    assert re.search("no score for it|malformed", str(found.errors[0]))


@pytest.mark.parametrize("status", [400, 413, 422, 500])
@pytest.mark.parametrize("name", SPOKEN)
def test_a_run_goes_on_when_another_server_will_not_score_one_sample(
    name: Any, status: int, trajectory: TrajectoryMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY_PAUSES_S", (0.01,))
    spoken = next(served for served in SERVED if served.name == name)

    def reply(request: dict[str, Any]) -> tuple[int, Any]:
        read = spoken.read(spoken.body.model_validate(request))
        if any("poison" in item.response for item in read.items):
            return status, "no"
        scores = tuple(float(len(item.response)) for item in read.items)
        tokens, errors = (1,) * len(scores), (None,) * len(scores)
        answer = ModelScores(model="m", version="v", fingerprint="f", scores=scores,
                             tokens=tokens, errors=errors)  # fmt: skip
        return 200, spoken.write(read, answer, 0)

    server = StubServer(reply)
    try:
        term = RewardTerm(name="t", url=server.url, format=name)
        service = RewardServiceConfig(max_retries=1)
        reward = build_reward(RewardConfig(terms=(term,), service=service))
        texts = ["poison" if n == 5 else "r" * n for n in range(9)]
        samples = [trajectory(text, prompt="", number=n) for n, text in enumerate(texts)]
        retry = RetryConfig(max_retries=1, pause_s=0.0)
        results = list(score_stream(reward, samples, batch=4, retry=retry))
    finally:
        server.close()
    scores = {r[0].sample_id: r[1].value for r in results if not isinstance(r, SampleFailure)}
    assert scores == {f"p{n}#0": float(n) for n in range(9) if n != 5}
    (failure,) = [r for r in results if isinstance(r, SampleFailure)]
    assert failure.sample_id == "p5#0"
    assert f"answered {status}: no" in failure.reason


def test_a_secret_belongs_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name that in token_env"):
        RewardTerm(name="x", url="http://me:secret@host:1/get_reward")
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    term = RewardTerm(name="x", url="http://host:1", token_env="NO_SUCH_TOKEN")
    with pytest.raises(ValueError, match="NO_SUCH_TOKEN, which should hold"):
        build_reward(RewardConfig(terms=(term,)))
