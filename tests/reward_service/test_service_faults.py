"""The real Serve application while things go wrong: kills, reloads, a full queue, more load."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.client import HttpScorer
from reward_service.config import AutoscalingConfig, RewardServiceConfig
from reward_service.model import RewardModel
from reward_service.security import TOKEN_VARIABLE
from reward_service.service import RewardService
from tests.reward_service.fault_load import LoadReport, kill_one, run_load
from tests.reward_service.test_service import ITEMS

TOKEN = "a-token-of-some-length"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def root(
    reward_dir: Path, second_reward_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A models root with two good versions and a broken one."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(reward_dir, root / "one")
    shutil.copytree(second_reward_dir, root / "two")
    broken = Path(shutil.copytree(reward_dir, root / "broken"))
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    return root


@pytest.fixture(scope="module")
def service(ray_session: None, root: Path) -> Iterator[RewardService]:
    """Two replicas behind two ingresses, with a token."""
    config = RewardServiceConfig(
        port=0,
        models_root=root,
        num_replicas=2,
        ingress_replicas=2,
        num_cpus_per_replica=0.1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        with RewardService.start(config, {"quality": root / "one"}) as running:
            yield running


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, tuple[float | None, ...]]:
    """Scores by direct torch, by version."""
    models = [RewardModel.load(root / name) for name in ("one", "two")]
    return {model.version: model.score(ITEMS).scores for model in models}


def get(service: RewardService, path: str) -> httpx.Response:
    return httpx.get(f"{service.url}{path}", headers=AUTH, timeout=60)


def put(service: RewardService, name: str, directory: str) -> httpx.Response:
    return httpx.put(
        f"{service.url}/v1/models/{name}",
        json={"directory": directory},
        headers=AUTH,
        timeout=120,
    )


def reload_surely(service: RewardService, directory: str) -> str:
    """The new version. A reload changes nothing when asked for twice, so it may be tried again."""
    for _ in range(60):
        answer = put(service, "quality", directory)
        if answer.status_code == 200:
            return str(answer.json()["version"])
        assert answer.status_code >= 500, answer.text
        time.sleep(0.5)
    raise AssertionError(answer.text)


def post(service: RewardService, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/score", json=body, headers=AUTH | headers, timeout=60)


def scored(service: RewardService) -> int:
    (model,) = get(service, "/v1/models").json()["data"]
    return sum(s["count"] for s in model["statistics"])


def test_tokens_are_wanted_of_everybody(service: RewardService) -> None:
    body = {"items": [{"text": "rain"}]}
    assert httpx.post(f"{service.url}/v1/score", json=body, timeout=60).status_code == 401
    assert post(service, body).status_code == 200
    assert HttpScorer(service.url, token=TOKEN).score(ITEMS[:1]).scores[0] is not None
    assert httpx.get(f"{service.url}/ready", timeout=60).json() == {"ready": True, "models": []}


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reward_service.md"
EXAMPLES = re.findall(
    r"```bash\n(curl .*?)```\n```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
)


def shape(value: Any) -> Any:
    """Keys and kinds of a JSON value; a list by its first element, any number as a number."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_document(service: RewardService, number: int) -> None:
    command, expected = EXAMPLES[number]
    address = service.url.removeprefix("http://")
    done = subprocess.run(
        ["bash", "-c", command.replace("localhost:8000", address)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, TOKEN_VARIABLE: TOKEN, "no_proxy": "*"},
    )
    answer, example = json.loads(done.stdout), json.loads(expected)
    if example == {"ready": True, "models": []}:  # shown without a token
        assert answer == example
        return
    if isinstance(answer, dict) and answer.get("statistics"):
        answer["statistics"] = []
    assert shape(answer) == shape(example), done.stdout


def test_the_document_has_an_example_of_everything() -> None:
    assert len(EXAMPLES) == 9


def test_a_repeated_request_is_scored_once_whichever_ingress_it_meets(
    service: RewardService,
) -> None:
    before = scored(service)
    body = {"items": [{"text": "storm in Riverton"}], "model": "quality"}
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(post, service, body, **{"Idempotency-Key": "k"}) for _ in range(12)]
        answers = {call.result().text for call in calls}
    assert len(answers) == 1
    assert scored(service) == before + 1
    reused = post(service, body | {"truncation": "left"}, **{"Idempotency-Key": "k"})
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "key_reused")


def test_every_request_is_answered_once_over_kills_and_reloads(
    service: RewardService, expected: dict[str, tuple[float, ...]]
) -> None:
    """The small form of ``tests/reward_service/fault_load.py``: a hundred requests in flight."""

    def disturb(report: LoadReport) -> None:
        report.wait_for_an_answer_of(reload_surely(service, "two"))
        kill_one("model-quality")
        report.wait_for_an_answer_of(reload_surely(service, "one"))
        kill_one("Ingress")
        report.wait_for_an_answer_of(reload_surely(service, "two"))

    report = run_load(service.url, TOKEN, "quality", expected, requests=400, at_once=100,
                      disturb=disturb)  # fmt: skip
    assert report.answered == report.requests >= 400
    assert report.wrong == report.mixed == 0
    assert set(report.versions) == set(expected)


def test_a_bad_reload_keeps_the_old_model_and_says_why(service: RewardService, root: Path) -> None:
    before = get(service, "/ready").json()["models"][0]
    refused = put(service, "quality", "broken")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "reload_refused")
    after = get(service, "/ready").json()
    assert after["ready"] is True
    assert after["models"][0]["version"] == before["version"]
    assert "weights cannot be loaded" in after["models"][0]["reload_error"]
    assert post(service, {"items": [{"text": "rain"}]}).status_code == 200
    for outside in ("../..", "/etc", "nowhere"):
        answer = put(service, "quality", outside)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_such_model")
    assert put(service, "third", "one").status_code == 404
    with pytest.raises(ValueError, match="was not reloaded: the model before it still serves"):
        service.reload("quality", root / "broken")
    assert service.reload("quality", root / "one").reload_error is None


def wait_for_replicas(service: RewardService) -> None:
    deadline = time.monotonic() + 240
    while True:
        ready = get(service, "/ready").json()["models"][0]
        if ready["replicas"] == 2:
            return
        assert time.monotonic() < deadline, ready
        time.sleep(0.5)


def test_scoring_goes_on_without_the_controller_which_comes_back(
    service: RewardService, expected: dict[str, tuple[float, ...]]
) -> None:
    """Replicas score while Serve's controller is dead; restarted, it replaces what dies then."""
    import ray

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    ray.kill(controller, no_restart=False)
    scorer = service.scorer("quality")
    for turn in range(20):
        if turn == 10:
            kill_one("model-quality")
        scored = scorer.score(ITEMS)
        assert list(scored.scores) == pytest.approx(list(expected[scored.version]))
    wait_for_replicas(service)


def test_a_replica_that_starts_after_a_reload_serves_the_new_version(
    service: RewardService, root: Path, expected: dict[str, tuple[float, ...]]
) -> None:
    version = service.reload("quality", root / "two").version
    kill_one("model-quality")
    wait_for_replicas(service)
    seen = {post(service, {"items": [{"text": "rain"}]}).json()["version"] for _ in range(20)}
    assert seen == {version}


def test_metrics_are_of_all_replicas(service: RewardService) -> None:
    text = get(service, "/metrics").text
    assert 'rlhf_reward_model_replicas{model="quality"} 2.0' in text
    assert "rlhf_reward_score_mean{" in text


@pytest.fixture(scope="module")
def scaled(service: RewardService, root: Path) -> Iterator[RewardService]:
    """A second application beside the first, whose calls wait: load without work."""
    config = RewardServiceConfig(
        models_root=root,
        num_cpus_per_replica=0.1,
        batch_wait_s=0.5,
        max_ongoing_requests=14,
        max_queued_requests=12,
        autoscaling=AutoscalingConfig(
            min_replicas=1,
            max_replicas=2,
            target_ongoing_requests=2,
            upscale_delay_s=0.5,
            downscale_delay_s=1.0,
            look_back_s=1.0,
        ),
    )
    with RewardService.start(config, {"x": root / "one"}, app_name="scaled") as running:
        yield running


def test_replicas_come_with_a_long_queue_and_go_with_a_short_one(scaled: RewardService) -> None:
    scorer, stop = scaled.scorer("x"), threading.Event()

    def replicas() -> int:
        from ray import serve

        deployment = serve.status().applications["scaled"].deployments["model-x"]
        return deployment.replica_states.get("RUNNING", 0)

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 240
        while replicas() != count:
            assert time.monotonic() < deadline, f"{replicas()} replicas, {count} wanted"
            time.sleep(0.2)

    def call() -> None:
        while not stop.is_set():
            scorer.score(ITEMS[:1])

    wait_for(1)
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(call) for _ in range(12)]
        try:
            wait_for(2)
        finally:
            stop.set()
    for one in calls:
        one.result()
    wait_for(1)


def test_a_full_queue_answers_503_and_says_when_to_come_back(scaled: RewardService) -> None:
    body = {"items": [{"text": "rain"}]}
    with ThreadPoolExecutor(60) as pool:
        answers = [f.result() for f in [pool.submit(post, scaled, body) for _ in range(60)]]
    assert {a.status_code for a in answers} == {200, 503}
    busy = next(a for a in answers if a.status_code == 503)
    assert int(busy.headers["Retry-After"]) >= 1
    # callers that try again are served in the end
    scorer = HttpScorer(scaled.url, token=TOKEN, max_retries=20)
    with ThreadPoolExecutor(40) as pool:
        results = list(pool.map(lambda _: scorer.score(ITEMS[:1]).scores[0], range(40)))
    assert len(set(results)) == 1


def test_a_reload_does_not_wait_behind_requests_for_scores(
    scaled: RewardService, expected: dict[str, tuple[float, ...]]
) -> None:
    """Many more callers than there is room for, at every moment."""
    body, stop = {"items": [{"text": "rain"}]}, threading.Event()

    def call() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(post(scaled, body).status_code)
            time.sleep(0.1)  # the machine has something else to do
        return seen

    with ThreadPoolExecutor(60) as pool:
        callers = [pool.submit(call) for _ in range(60)]
        try:
            answers = []
            for directory in ("two", "one", "two"):
                time.sleep(0.5)
                answers.append(put(scaled, "x", directory))  # once: none of them is refused
        finally:
            stop.set()
    assert [a.status_code for a in answers] == [200, 200, 200], [a.text for a in answers]
    assert {a.json()["version"] for a in answers} == set(expected)
    assert set.union(*(caller.result() for caller in callers)) == {200, 503}


def test_a_deadline_is_kept(scaled: RewardService) -> None:
    answer = post(scaled, {"items": [{"text": "rain"}], "timeout_s": 1e-6})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
