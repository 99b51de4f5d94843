"""The real Serve application: over HTTP and over handles, against direct torch."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from reward_service.client import HttpScorer
from reward_service.config import EnsembleConfig, RewardConfig, RewardServiceConfig, RewardTerm
from reward_service.model import RewardModel
from reward_service.rewards import build_reward
from reward_service.score import ModelScores, Score, ScoreItem
from reward_service.scoring import score_stream
from reward_service.service import RewardService

WORDS = ["storm", " Riverton", " council", " market", " rain", " bank", " river", " mayor"]


def item(number: int) -> ScoreItem:
    words = [WORDS[(number * 7 + j * j) % 8] for j in range(1 + number % 23)]
    return ScoreItem(prompt=f"item {number}: ", response="".join(words))


ITEMS = [item(n) for n in range(60)]


@pytest.fixture(scope="module")
def service(
    ray_session: None, reward_dir: Path, second_reward_dir: Path
) -> Iterator[RewardService]:
    config = RewardServiceConfig(
        port=0,
        max_items=64,
        max_chars=2000,
        token_budget=512,
        num_cpus_per_replica=0.1,
        ensembles={"both": EnsembleConfig(members=("quality", "second"), combine="minimum")},
    )
    models = {"quality": reward_dir, "second": second_reward_dir}
    with RewardService.start(config, models) as running:
        yield running


@pytest.fixture(scope="module")
def direct(reward_dir: Path) -> ModelScores:
    return RewardModel.load(reward_dir).score(ITEMS)


def test_handle_and_http_equal_direct_torch(service: RewardService, direct: ModelScores) -> None:
    by_handle = service.scorer("quality").score(ITEMS)
    by_http = HttpScorer(service.url, items_per_request=16).score(ITEMS)
    # one forward pass for each sample on a CPU: the same bits, whatever the batches were
    assert by_handle.scores == direct.scores
    assert by_http.scores == direct.scores
    assert by_handle.tokens == by_http.tokens == direct.tokens
    assert by_handle.version == by_http.version == direct.version
    assert by_handle.fingerprint == by_http.fingerprint == direct.fingerprint
    assert len(set(direct.scores)) > 50


def test_models_are_served_by_name(service: RewardService, second_reward_dir: Path) -> None:
    expected = RewardModel.load(second_reward_dir)
    answer = HttpScorer(service.url, model="second").score(ITEMS[:5])
    assert answer.scores == expected.score(ITEMS[:5]).scores
    assert (answer.model, answer.version) == ("second", expected.version)
    with pytest.raises(ValueError, match=r"answered 404: no model is called 'third'"):
        HttpScorer(service.url, model="third").score(ITEMS[:1])
    with pytest.raises(ValueError, match="no model is served as 'third'"):
        service.scorer("third")
    listed = httpx.get(f"{service.url}/v1/models").json()["data"]
    versions = {name: status.version for name, status in service.statuses.items()}
    versions["both"] = f"{versions['quality']}+{versions['second']}"
    assert {m["id"]: m["version"] for m in listed} == versions
    assert httpx.get(f"{service.url}/ready").json()["ready"] is True
    assert httpx.get(f"{service.url}/health").status_code == 200


def test_an_ensemble_answers_as_one_model_over_both_ways(
    service: RewardService, direct: ModelScores, second_reward_dir: Path
) -> None:
    other = RewardModel.load(second_reward_dir).score(ITEMS)
    least = tuple(map(min, direct.scores, other.scores))
    assert service.scorer("both").score(ITEMS).scores == least
    answer = HttpScorer(service.url, model="both").score(ITEMS)
    assert answer.scores == least
    assert answer.version == f"{direct.version}+{other.version}"
    refused = httpx.put(f"{service.url}/v1/models/both", json={"directory": "x"})
    assert refused.json()["error"]["code"] == "reload_off"
    body = {"items": [{"text": "rain"}], "model": "both", "per_token": True}
    refused = httpx.post(f"{service.url}/v1/score", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "per_token")


def test_token_ids_and_values_per_token(service: RewardService, reward_dir: Path) -> None:
    model = RewardModel.load(reward_dir)
    inputs, _ = model.encode_all(ITEMS[:1])
    assert inputs[0] is not None
    ids, start = inputs[0].encoded.ids, inputs[0].encoded.response_start
    body = {"items": [{"prompt_ids": ids[:start], "response_ids": ids[start:]}], "per_token": True}
    (row,) = httpx.post(f"{service.url}/v1/score", json=body).json()["data"]
    assert tuple(row["per_token"]) == model.score(ITEMS[:1], per_token=True).per_token[0]
    assert row["per_token"][-1] == row["score"]
    body = {"items": [{"response_ids": [5, 512]}]}
    refused = httpx.post(f"{service.url}/v1/score", json=body).json()["error"]
    assert "token id 512 at position 1" in refused["message"]


def test_many_callers_at_once_each_get_their_own(
    service: RewardService, direct: ModelScores
) -> None:
    scorer = HttpScorer(service.url)
    handle = service.scorer("quality")

    def call(number: int) -> bool:
        start, size = number % 50, 1 + number % 8
        way = scorer if number % 3 else handle
        found = way.score(ITEMS[start : start + size])
        return found.scores == direct.scores[start : start + size]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(call, range(200)))


def test_wrong_requests_get_4xx_and_harm_nobody(
    service: RewardService, direct: ModelScores
) -> None:
    url = f"{service.url}/v1/score"
    good = {"prompt": ITEMS[0].prompt, "response": ITEMS[0].response}
    for body, status, code in [
        ({"items": "all"}, 422, "invalid_request"),
        ({"items": [good] * 65}, 422, "too_many_items"),
        ({"items": [{"text": "a" * 2001}]}, 422, "item_too_long"),
        ({"items": [{"text": "rain " * 390}]}, 422, "invalid_items"),  # over the context
        ({"items": [good], "model": "third"}, 404, "unknown_model"),
    ]:
        answer = httpx.post(url, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    mixed = {"items": [{"text": "rain " * 390}, good, {"text": "half \ud800"}]}
    data = httpx.post(url, content=_ascii_json(mixed), headers=_JSON).json()["data"]
    assert [entry["score"] for entry in data] == [None, direct.scores[0], None]
    assert "context is 256" in data[0]["error"]
    cut = httpx.post(url, json={"items": [{"text": "rain " * 390}], "truncation": "left"})
    assert cut.json()["data"][0]["tokens"] == 256


def test_ppo_scores_through_the_service(service: RewardService, trajectory) -> None:
    config = RewardConfig(
        terms=(
            RewardTerm(name="quality", model="unused here"),
            RewardTerm(name="second", weight=0.5, url=service.url),
            RewardTerm(name="length", weight=-0.1, function="reward_service.examples:new_words"),
        )
    )
    reward = build_reward(config, service.scorers())
    samples = [trajectory(i.response, prompt=i.prompt, number=n) for n, i in enumerate(ITEMS)]
    results = list(score_stream(reward, samples, batch=16))
    scored = {r[0].sample_id: r[1] for r in results if isinstance(r, tuple)}
    assert len(scored) == len(ITEMS)
    expected = service.scorer("quality").score(ITEMS).scores
    for sample, value in zip(samples, expected, strict=True):
        score: Score = scored[sample.sample_id]
        assert score.components["quality"] == value
        # the URL term asks for the default model, which is "quality" too
        assert score.value == pytest.approx(1.5 * value - 0.1 * score.components["length"])
        assert score.per_token is not None
        assert score.model_version == ",".join(
            [f"quality@{service.statuses['quality'].version}"] * 2
        )


def test_a_killed_replica_loses_no_request(service: RewardService, second_reward_dir: Path) -> None:
    import ray

    expected = RewardModel.load(second_reward_dir).score(ITEMS).scores
    scorer = HttpScorer(service.url, model="second")
    handle = service.scorer("second")
    (name,) = [
        entry
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == "serve" and "model-second" in entry["name"]
    ]
    in_flight = threading.Event()

    def call(number: int) -> bool:
        if number == 20:
            in_flight.set()
        way = scorer if number % 2 else handle
        return way.score(ITEMS).scores == expected

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(call, number) for number in range(60)]
        assert in_flight.wait(60)
        ray.kill(ray.get_actor(name["name"], namespace="serve"))
        assert all(result.result(timeout=120) for result in results)


def test_a_model_that_cannot_be_loaded_is_reported_and_taken_down(
    service: RewardService, reward_dir: Path, tmp_path: Path
) -> None:
    from ray import serve

    broken = Path(shutil.copytree(reward_dir, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{{ messages }}")
    # Serve runs already: the second application joins it under its own path
    with pytest.raises(RuntimeError, match=r"'bad' cannot be served: .*the tokenizer or chat"):
        RewardService.start(
            RewardServiceConfig(port=1, num_cpus_per_replica=0.1), {"bad": broken}, app_name="other"
        )
    assert set(serve.status().applications) == {"reward"}
    assert HttpScorer(service.url).score(ITEMS[:1]).scores[0] is not None


def test_directories_are_checked_before_anything_starts(ray_session: None, tmp_path: Path) -> None:
    config = RewardServiceConfig(port=0)
    with pytest.raises(ValueError, match="was given no model"):
        RewardService.start(config, {})
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        RewardService.start(config, {"x": tmp_path / "nowhere"})


def test_shutdown_leaves_nothing_and_then_a_port_in_use_is_named(
    service: RewardService, reward_dir: Path
) -> None:
    import ray

    address = httpx.URL(service.url)
    service.shutdown()
    named = ray.util.list_named_actors(all_namespaces=True)
    assert [entry for entry in named if entry["namespace"] == "serve"] == []
    with socket.socket() as probe:
        assert probe.connect_ex((address.host, address.port)) != 0
    service.shutdown()  # again is harmless
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"127\.0\.0\.1:{port} .*reward\.service\.port"):
            RewardService.start(RewardServiceConfig(port=port), {"quality": reward_dir})
    with pytest.raises(RuntimeError, match=r"cannot be reached .*2 times"):
        HttpScorer(service.url, max_retries=1).score(ITEMS[:1])


_JSON = {"Content-Type": "application/json"}


def _ascii_json(body: object) -> bytes:
    import json

    return json.dumps(body).encode("ascii")
