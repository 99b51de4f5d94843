"""Filtering and replacing within a step: the accounts, the bound, and what a resumed run asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from actors.config import SamplingConfig
from actors.prompts import PromptStream
from actors.trajectory import Prompt, SampleFailure, Trajectory
from actors.weights import UpdateConfirmation, WeightUpdate
from cluster.step import Sample, Step
from cluster.train import train
from learner.batch import PPOBatch, ScoreScale
from learner.config import PPOConfig
from reward_service.score import Score

PROMPTS = [
    Prompt(prompt_id=f"p{i:02}", token_ids=np.array([3], np.int32), text="") for i in range(12)
]
SAMPLING = SamplingConfig(samples_per_prompt=2)


class Pool:
    """Answers every prompt with two responses of one token; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[str]]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        run_seed: int,
        round_index: int,
        busy: object = None,
        stop: object = None,
    ) -> Iterator[Trajectory | SampleFailure]:
        assert run_seed == 7
        self.asked.append((round_index, [p.prompt_id for p in prompts]))
        for prompt in reversed(prompts):
            for index in range(sampling.samples_per_prompt):
                if prompt.prompt_id == "p04":
                    yield SampleFailure(
                        prompt=prompt, sample_index=index, stage="generation", reason="lost"
                    )
                    continue
                yield Trajectory(
                    prompt=prompt,
                    sample_index=index,
                    response_ids=np.array([5], np.int32),
                    response_logprobs=np.zeros(1, np.float32),
                    policy_versions=np.full(1, round_index, np.int32),
                    response_text="",
                    finish_reason="stop",
                    seed=index,
                )

    def figures(self) -> dict[str, float]:
        return {"rollout/engines": 1}

    def load(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        return [
            UpdateConfirmation(
                actor="pool-0",
                version=update.version,
                probe_max_error=0.0,
                probe_mean_error=0.0,
                seconds_verify=0.0,
                seconds_load=0.0,
                seconds_probe=0.0,
            )
        ]


class EvenPromptsAreFlat:
    """The second response to an odd prompt scores higher; to an even prompt it does not."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score | SampleFailure]:
        return [
            Score(
                sample_id=t.sample_id,
                value=float(t.sample_index * (int(t.prompt.prompt_id[1:]) % 2)),
            )
            for t in trajectories
        ]


class Learners:
    def __init__(self) -> None:
        self.batches: list[PPOBatch] = []

    def update(self, batch: PPOBatch) -> dict[str, float]:
        self.batches.append(batch)
        return {
            "ppo/samples": float(len(batch)),
            "ppo/tokens": float(batch.response_tokens),
            "ppo/engine_delta_mean": 0.0,
            "ppo/engine_delta_max": 0.0,
            "ppo/effective_sample_size": 1.0,
            "ppo/engine_correlation": 1.0,
        }

    def have_lost(self) -> bool:
        return False

    def export_weights(
        self, version: int, probe_sequences: Sequence[Sequence[int]]
    ) -> WeightUpdate:
        return WeightUpdate(version=version, manifest={}, tensors={}, probe=None)


class Log:
    def __init__(self, next_step: int) -> None:
        self.next_step = next_step
        self.scale: ScoreScale | None = None
        self.ahead: Step | None = None
        self.metrics: list[Mapping[str, float]] = []
        self.samples: list[list[tuple[str, str | None]]] = []
        self.failures: list[list[str]] = []

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None:
        self.failures.append([f.sample_id for f in failures])

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        self.metrics.append(metrics)
        self.samples.append([(s.trajectory.sample_id, s.filtered) for s in samples])


def run(rounds: int, *, start: int = 0, share: float = 0.1) -> tuple[Pool, Learners, Log]:
    config = PPOConfig.model_validate(
        {
            "advantage": "rloo",
            "steps": 4,
            "prompts_per_step": 6,
            "minibatches": 1,
            "min_trained_share": share,
            "dynamic_sampling": {"max_extra_rounds": rounds},
        }
    )
    pool, learners, log = Pool(), Learners(), Log(start)
    train(
        config,
        SAMPLING,
        prompts=PromptStream(PROMPTS, 6, seed=0),
        rollouts=cast(Any, pool),
        reward=EvenPromptsAreFlat(),
        learners=cast(Any, learners),
        log=log,
        seed=7,
        measure=lambda _: {},
        stop=lambda: False,
        progress=lambda *_: None,
        warn=lambda _: None,
    )
    return pool, learners, log


def test_flat_groups_are_replaced_until_the_step_is_full_or_the_prompts_run_out() -> None:
    pool, learners, log = run(rounds=9)
    for step, (metrics, samples) in enumerate(zip(log.metrics, log.samples, strict=True)):
        asked = [ids for number, ids in pool.asked if number == step]
        every = [name for ids in asked for name in ids]
        assert len(set(every)) == len(every) <= 12, "no prompt twice in a step"
        flat = {name for name in every if int(name[1:]) % 2 == 0 and name != "p04"}
        # Each round asks one prompt for every flat group of the round before.
        for before, after in itertools.pairwise(asked):
            assert len(after) == min(len(flat & set(before)), 12 - every.index(after[0]))
        assert metrics["samples/submitted"] == 2 * len(every)
        assert metrics["samples/filtered"] == metrics["samples/filtered_no_spread"] == 2 * len(flat)
        assert metrics["samples/failed"] == 2 * ("p04" in every)
        assert metrics["samples/trained"] == len(learners.batches[step])
        assert metrics["samples/submitted"] == (
            metrics["samples/trained"] + metrics["samples/filtered"] + metrics["samples/failed"]
        )
        assert metrics["samples/extra_rounds"] == len(asked) - 1
        # The rewards are those of the policy, filtered samples included.
        assert metrics["reward/mean"] == pytest.approx(
            metrics["samples/trained"] / 2 / len(samples)
        )
        assert {name.split("#")[0] for name, reason in samples if reason} == flat
    assert len(log.metrics) == 4


def test_a_resumed_run_asks_the_same_prompts() -> None:
    whole, resumed = run(rounds=2)[0], run(rounds=2, start=2)[0]
    assert resumed.asked == [(number, ids) for number, ids in whole.asked if number >= 2]
    plain = PromptStream(PROMPTS, 6, seed=0)
    firsts = dict(reversed(whole.asked))
    assert firsts == {n: [p.prompt_id for p in plain.batch(n)] for n in range(4)}


def test_without_further_rounds_what_is_left_is_trained_or_too_little() -> None:
    pool, learners, log = run(rounds=0)
    assert [number for number, _ in pool.asked] == [0, 1, 2, 3]
    assert "samples/extra_rounds" not in log.metrics[0]
    assert all(0 < len(batch) < 12 for batch in learners.batches)
    with pytest.raises(RuntimeError, match=r"of 12 samples .* all rewards of its group are alike"):
        run(rounds=0, share=0.95)
