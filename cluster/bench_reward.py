"""``rlhf bench reward``: scoring over HTTP against bare torch on the same batch, in one run.

Both use the same number of threads, half of the cores: the other half belongs to the processes
that carry HTTP and, in PPO, to generation. Samples are padded together (``one_by_one: false``), as
a server for throughput would; on a CPU the default is a pass for each, for exact resume.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import RunConfig
from cluster.resources import ray_session
from reward_service.client import HttpScorer
from reward_service.config import RewardConfig, RewardServiceConfig
from reward_service.score import ItemIds, ScoreItem
from reward_service.service import RewardService

SAMPLES, TOKENS, VOCABULARY = 64, 128, 2048
CALLERS, CALLS_EACH, MOST_SAMPLES = 32, 4, 8


def bench_reward(reward_model: Path, repeats: int) -> dict[str, Any]:
    """One call of 64 samples, and 32 callers of 1 to 8 samples each, against bare torch.

    The floor is the best of one padded forward pass, and one pass for each sample, over the same
    ids; calls and floor are measured in turns.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    service_config = RewardServiceConfig(port=0, threads=threads, one_by_one=False)
    config = RunConfig(run_dir=Path(), reward=RewardConfig(service=service_config))
    items = _items(SAMPLES)
    direct = _Direct(reward_model, threads)
    with ray_session(config), RewardService.start(service_config, {"rm": reward_model}) as service:
        over_http = HttpScorer(service.url, items_per_request=SAMPLES)
        over_handle = service.scorer("rm")
        expected = direct.scores(items)
        found = over_http.score(items).scores  # warm, and right
        if not np.allclose(np.array(found, float), np.array(expected), atol=1e-4):
            raise RuntimeError("the service's scores are not those of bare torch")
        over_handle.score(items)
        one: dict[str, list[float]] = {"http": [], "handle": [], "floor": []}
        for _ in range(max(3, repeats)):
            one["floor"].append(direct.seconds(items))
            one["http"].append(_seconds(lambda: over_http.score(items)))
            one["handle"].append(_seconds(lambda: over_handle.score(items)))
        rates, floors = [], []
        for _ in range(repeats):
            floors.append(SAMPLES / direct.seconds(items))
            rates.append(_many_callers(service.url))
            floors.append(SAMPLES / direct.seconds(items))
    floor = statistics.median(one["floor"])
    return {
        "ratio_http_to_direct": statistics.median(one["http"]) / floor,
        "ratio_handle_to_direct": statistics.median(one["handle"]) / floor,
        "throughput_of_callers_to_direct": statistics.median(rates) / statistics.median(floors),
        "seconds_http": statistics.median(one["http"]),
        "seconds_handle": statistics.median(one["handle"]),
        "seconds_direct": floor,
        "samples_per_second_callers": statistics.median(rates),
        "samples_per_second_direct": statistics.median(floors),
        "direct_is": direct.best,
        "threads": threads,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "callers": CALLERS,
    }


class _Direct:
    """Bare torch on the checkpoint's network, in this process."""

    def __init__(self, directory: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(threads)
        self._network = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        self.best = "one pass"

    def seconds(self, items: Sequence[ScoreItem]) -> float:
        rows = _rows(items)
        ways = {
            "one pass": _seconds(lambda: self._forward(rows)),
            "a pass for each sample": _seconds(lambda: [self._forward([row]) for row in rows]),
        }
        self.best = min(ways, key=lambda way: ways[way])
        return ways[self.best]

    def scores(self, items: Sequence[ScoreItem]) -> list[float]:
        scores: list[float] = self._forward(_rows(items))
        return scores

    def _forward(self, rows: Sequence[Sequence[int]]) -> Any:
        import torch

        with torch.inference_mode():
            ids = torch.tensor(rows)  # [B, T], all of one length
            hidden = self._network.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return self._network.score(hidden[:, -1])[:, 0].tolist()


def _items(count: int, seed: int = 0) -> list[ScoreItem]:
    """Samples of ``TOKENS`` tokens, EOS (id 2) at the end."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (count, TOKENS - 1)).tolist()
    return [ScoreItem(ids=ItemIds(prompt=tuple(row[:32]), response=(*row[32:], 2))) for row in ids]


def _rows(items: Sequence[ScoreItem]) -> list[list[int]]:
    return [[*item.ids.prompt, *item.ids.response] for item in items if item.ids is not None]


def _many_callers(url: str) -> float:
    """Samples each second that 32 callers get scored, each with requests of 1 to 8 samples."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, MOST_SAMPLES + 1, (CALLERS, CALLS_EACH)).tolist()
    samples = _items(MOST_SAMPLES, seed=2)

    def call(requests: Sequence[int]) -> None:
        scorer = HttpScorer(url)
        for size in requests:
            scorer.score(samples[:size])
        scorer.close()

    with ThreadPoolExecutor(CALLERS) as pool:
        seconds = _seconds(lambda: list(pool.map(call, sizes)))
    return float(np.sum(sizes)) / seconds


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
