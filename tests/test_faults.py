"""Fault injection: one value is corrupted, and the run says so. None of these may pass silently.

A flipped bit of a checkpoint is in ``tests/kill_points.py``, beside the run that goes on from the
checkpoint before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.accounting import Generation
from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, SampleFailure
from cluster.step import Sample, Step
from cluster.train import train
from learner.batch import PPOBatch, ScoreScale
from learner.config import LearnersConfig, PPOConfig
from learner.group import PPOLearners
from reward_service.config import RetryConfig
from reward_service.rewards import FunctionReward, Reward

PPO = PPOConfig(steps=2, prompts_per_step=8, epochs=1, minibatches=1)
VICTIM = "p3#1"


class Log:
    def __init__(self) -> None:
        self.next_step = 0
        self.scale: ScoreScale | None = None
        self.ahead: Step | None = None
        self.metrics: list[Mapping[str, float]] = []
        self.failures: list[SampleFailure] = []

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None:
        self.failures += failures

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        self.metrics.append(metrics)


@pytest.fixture(scope="module")
def pool(ray_session: None, tiny_llama: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(
        engine=EngineConfig(max_num_seqs=32, kv_cache_gib=0.1), retry_pause_s=0.01
    )
    with RolloutPool(tiny_llama, config) as started:
        yield started


@pytest.fixture
def learners(tiny_llama: Path) -> Iterator[PPOLearners]:
    arguments = (PPO, LearnersConfig(num_learners=0), tiny_llama, tiny_llama, None, 1.0, 2, 0)
    with PPOLearners(*arguments) as started:
        yield started


@pytest.fixture
def run(
    pool: RolloutPool, learners: PPOLearners, tiny_llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Log]:  # fmt: skip
    """Two PPO steps with a reward that is the Python expression given."""

    def start(expression: str = "1.0 * len(response_ids)", log: Log | None = None) -> Log:
        (tmp_path / "fault_rewards.py").write_text(
            f"def f(*, prompt, response_ids, **_):\n    return {expression}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "fault_rewards", raising=False)
        reward: Reward = FunctionReward("fault_rewards:f")
        rng = np.random.default_rng(0)
        prompts = [
            Prompt(
                prompt_id=f"p{i}",
                token_ids=rng.integers(3, 512, 5).astype(np.int32),
                text=f"p{i}",
            )
            for i in range(8)
        ]
        log = log or Log()
        pool.load_checkpoint(tiny_llama, version=0)
        train(
            PPO,
            SamplingConfig(max_new_tokens=8, samples_per_prompt=2),
            prompts=PromptStream(prompts, 8, 0),
            rollouts=pool,
            reward=reward,
            learners=learners,
            log=log,
            seed=0,
            measure=lambda _: {},
            stop=lambda: False,
            progress=lambda *_: None,
            warn=lambda _: None,
            retry=RetryConfig(pause_s=0.01),
        )
        return log

    return start


def corrupt_completions(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Mapping[str, Any]]
) -> None:
    """Every completion of one sample arrives with some fields changed."""
    finish = Generation._finish

    def corrupted(self: Generation, sample: Any, completion: Any, worker: Any) -> Any:
        if f"{sample.prompt.prompt_id}#{sample.index}" == VICTIM:
            completion = replace(completion, **change(completion))
        return finish(self, sample, completion, worker)

    monkeypatch.setattr(Generation, "_finish", corrupted)


def set_aside(log: Log) -> set[tuple[str, str, int]]:
    """And the accounts of both steps balance."""
    for metrics in log.metrics:
        assert metrics["samples/submitted"] == 16 == (
            metrics["samples/trained"] + metrics["samples/filtered"] + metrics["samples/failed"]
        )  # fmt: skip
    assert [m["samples/failed"] for m in log.metrics] == [len(log.failures) / 2] * 2
    return {(f.sample_id, f.reason, f.attempts) for f in log.failures}


def test_without_a_fault_nothing_is_reported(run: Callable[..., Log]) -> None:
    log = run()
    assert set_aside(log) == set()
    assert all(m["ppo/engine_delta_max"] < 1e-3 for m in log.metrics)


def test_a_weight_tensor_in_transit(
    run: Callable[..., Log], learners: PPOLearners, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    export = learners.export_weights
    name = "model.layers.1.mlp.up_proj.weight"

    def corrupted(*arguments: Any) -> Any:
        update = export(*arguments)
        tensors = dict(ray.get(update.tensors))
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1).view(np.uint8)[77] ^= 1
        return replace(update, tensors=tensors)

    monkeypatch.setattr(learners, "export_weights", corrupted)
    with pytest.raises(RuntimeError, match=name):
        run()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"logprobs": c.logprobs * np.nan}, "a log-probability of NaN"),
        (lambda c: {"logprobs": c.logprobs + 20}, "which no probability has"),
        (lambda c: {"logprobs": c.logprobs[:-1]}, "lengths must be equal"),
        (lambda c: {"token_ids": c.token_ids[:0], "logprobs": c.logprobs[:0]}, "must be equal and"),
    ],
)
def test_a_completion_that_cannot_be_right(
    run: Callable[..., Log], monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    corrupt_completions(monkeypatch, change)
    failures = set_aside(run())
    assert {(sample, attempts) for sample, _, attempts in failures} == {(VICTIM, 3)}
    assert all(says in reason for _, reason, _ in failures)


def test_a_log_probability_that_could_be_right(
    run: Callable[..., Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(completion: Any) -> Mapping[str, Any]:
        logprobs = completion.logprobs.copy()
        logprobs[0] -= 9.0
        return {"logprobs": logprobs}

    corrupt_completions(monkeypatch, change)
    log = Log()
    try:
        run(log=log)
    except RuntimeError as error:
        assert "log" in str(error)  # noqa: PT017  (an error is as good as a figure)
    else:
        assert all(m["ppo/engine_delta_max"] > 8.9 for m in log.metrics)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("float('nan')", "NaN or infinity"),
        ("[1.0] * (len(response_ids) + 1)", "rewards for"),
        ("'good'", "must return a number"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_reward(run: Callable[..., Log], value: str, says: str) -> None:
    log = run(f"({value}) if prompt == 'p3' else 1.0")
    failures = set_aside(log)
    assert {sample for sample, _, _ in failures} == {"p3#0", "p3#1"}
    assert all(says in reason and attempts == 3 for _, reason, attempts in failures)
    assert all(f.response is not None for f in log.failures)


@pytest.mark.parametrize("change", [-1, 1])
def test_the_mask_of_a_trajectory_on_its_way_to_the_learner(
    run: Callable[..., Log], learners: PPOLearners, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    update = learners.update

    def corrupted(batch: PPOBatch) -> Any:
        batch.response_lengths[int(np.argmin(batch.response_lengths))] += change
        return update(batch)

    monkeypatch.setattr(learners, "update", corrupted)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"beyond the end|longer than its|masks or lengths"
    ):
        run()
