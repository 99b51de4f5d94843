"""The real Serve application: over HTTP and over handles, against direct torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_service.client import HttpScorer
from reward_service.config import RewardServiceConfig
from reward_service.model import RewardModel
from reward_service.score import ScoreItem
from reward_service.service import RewardService

WORDS = ["storm", " Riverton", " council", " market", " rain", " bank", " river", " mayor"]


def item(number: int) -> ScoreItem:
    words = [WORDS[(number * 7 + j * j) % 8] for j in range(1 + number % 23)]
    return ScoreItem(prompt=f"item {number}: ", response="".join(words))


@pytest.fixture(scope="module")
def service(
    ray_session: None, reward_dir: Path, second_reward_dir: Path
) -> Iterator[RewardService]:
    config = RewardServiceConfig(port=0, max_items=64, max_chars=2000, token_budget=512)
    models = {"quality": reward_dir, "second": second_reward_dir}
    started = time.perf_counter()
    with RewardService.start(config, models) as running:
        print(f"service ready after {time.perf_counter() - started:.1f} s")
        yield running


def test_handle_and_http_equal_direct_torch(service: RewardService, reward_dir: Path) -> None:
    items = [item(i) for i in range(40)]
    direct = RewardModel.load(reward_dir).score(items)
    by_handle = service.scorer("quality").score(items)
    by_http = HttpScorer(service.url, items_per_request=16).score(items)
    # one forward pass for each sample on CPU: the same bits, whatever the batches were
    assert by_handle.scores == direct.scores
    assert by_http.scores == direct.scores
    assert by_handle.tokens == by_http.tokens == direct.tokens
    assert by_handle.version == by_http.version == direct.version
    assert by_http.fingerprint == direct.fingerprint
    assert len(set(direct.scores)) > 30
