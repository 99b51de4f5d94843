"""What the learner computes does not depend on padding, company, or who finished first.

The tolerances, and those of the tests elsewhere, are in ``docs/correctness.md``. In float32 the
result of a matrix product depends in its last bits on the shape of the matrices: where shapes are
the same the bits must be, where they differ the tolerance is that of rounding.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.trajectory import Prompt, Trajectory
from cluster.step import Step, collect
from learner.batch import PPOBatch, build_batch
from learner.config import PPOConfig
from learner.group import PPOLearners
from learner.ppo import Annotations
from reward_service.score import Score
from tests.learner.ppo_samples import in_process, random_batch, weights
from tests.learner.test_ppo import ppo


def padded(batch: PPOBatch, *, columns: int, slots: int, fill: int) -> PPOBatch:
    """The same samples with more room on the right, and other rubbish in the padding (but for
    rewards, which a batch refuses to hold beyond the end of a response)."""
    rows = len(batch)
    ids = np.full((rows, batch.input_ids.shape[1] + columns), fill, np.int32)
    placed = {
        name: np.full((rows, batch.rewards.shape[1] + slots), rubbish, np.float32)
        for name, rubbish in (("engine_logprobs", np.nan), ("rewards", 0.0))
    }
    for row in range(rows):
        length = int(batch.prompt_lengths[row] + batch.response_lengths[row])
        ids[row, :length] = batch.input_ids[row, :length]
        response = int(batch.response_lengths[row])
        for name, array in placed.items():
            array[row, :response] = getattr(batch, name)[row, :response]
    return PPOBatch(**(dict(batch.columns) | {"input_ids": ids} | placed))


@pytest.mark.parametrize("changes", [{}, {"whiten_rewards": True, "importance_cap": 2.0}])
def test_amount_and_content_of_the_padding_change_no_bit(
    changes: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """Id 2 is EOS, so this is also padding with EOS; NaN stands where the engine said nothing."""
    batch = random_batch(7, seed=3)
    results, metrics = [], []
    variants = [
        padded(batch, columns=0, slots=0, fill=0),
        padded(batch, columns=0, slots=0, fill=2),
        padded(batch, columns=37, slots=5, fill=511),
    ]
    for number, variant in enumerate(variants):
        learners = in_process(ppo(tokens_per_micro_batch=60, **changes), tiny_llama)
        metrics.append(learners.update(variant))
        results.append(weights(learners, tmp_path / str(number)))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
    for other in metrics[1:]:
        for name, value in metrics[0].items():
            if "seconds" not in name:
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_side_of_the_padding_changes_nothing_but_rounding(tiny_llama: Path) -> None:
    """The learner pads on the right and builds no mask. Hugging Face, padded on the left with an
    attention mask and positions from the mask, computes the same log-probabilities."""
    batch = random_batch(8, seed=9)
    learner = in_process(ppo(), tiny_llama)._group._learner
    learner.batch = batch
    ours = learner._annotate().old_logprobs
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    lengths = batch.prompt_lengths + batch.response_lengths
    width = int(lengths.max()) + 3
    ids = torch.full((8, width), 2)
    mask = torch.zeros(8, width, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        ids[row, width - length :] = torch.tensor(batch.input_ids[row, :length])
        mask[row, width - length :] = 1
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    for row, response in enumerate(batch.response_lengths.tolist()):
        torch.testing.assert_close(
            ours[row, :response], chosen[row, -response:], atol=2e-5, rtol=1e-5
        )


def annotated(learners: PPOLearners, batch: PPOBatch) -> Annotations:
    learner = learners._group._learner
    learner.batch = batch
    return learner._annotate()


def alone(batch: PPOBatch, row: int) -> PPOBatch:
    return PPOBatch(**{name: column[row : row + 1] for name, column in batch.columns.items()})


@pytest.mark.parametrize(("budget", "tolerance"), [(1, 0.0), (8192, 2e-5)])
def test_a_sample_is_judged_alike_in_any_company(
    budget: int, tolerance: float, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    """Log-probabilities, values and entropy of a sample alone and among others. With a micro-batch
    for each sample the operations are the same, and so are the bits."""
    batch = random_batch(6, seed=4)
    learners = in_process(
        ppo(tokens_per_micro_batch=budget), tiny_llama, reference_dir=tiny_llama_untied
    )
    together = annotated(learners, batch)
    for row in range(6):
        length = int(batch.response_lengths[row])
        by_itself = annotated(learners, alone(batch, row))
        for name in ("old_logprobs", "reference_logprobs", "values", "entropy"):
            one, many = getattr(by_itself, name), getattr(together, name)
            torch.testing.assert_close(
                one[0, :length], many[row, :length], atol=tolerance, rtol=0.0, msg=name
            )


def samples(count: int) -> tuple[list[Trajectory], list[Score]]:
    rng = np.random.default_rng(0)
    trajectories, scores = [], []
    for number in range(count):
        for index in range(2):
            response = rng.integers(3, 512, rng.integers(1, 15)).astype(np.int32)
            trajectory = Trajectory(
                prompt=Prompt(
                    prompt_id=f"p{number}",
                    token_ids=rng.integers(3, 512, rng.integers(1, 9)).astype(np.int32),
                    text="",
                ),
                sample_index=index,
                response_ids=response,
                response_logprobs=rng.normal(-5, 1, len(response)).astype(np.float32),
                policy_versions=np.zeros(len(response), np.int32),
                response_text="",
                finish_reason="length" if rng.random() < 0.5 else "stop",
                seed=0,
            )
            trajectories.append(trajectory)
            scores.append(Score(sample_id=trajectory.sample_id, value=float(rng.normal())))
    return trajectories, scores


def test_the_order_of_arrival_changes_no_bit(tiny_llama: Path, tmp_path: Path) -> None:
    """Through the loop's own sorting and through ``build_batch`` with scores in another order."""
    trajectories, scores = samples(12)
    score_of = {score.sample_id: score for score in scores}
    expected = build_batch(trajectories, scores, PPOConfig())
    shuffle = random.Random(1)
    for _ in range(20):
        shuffle.shuffle(trajectories)
        shuffle.shuffle(scores)
        step = Step(submitted=[])
        arriving = iter([(t, score_of[t.sample_id]) for t in trajectories])
        collect(step, arriving, measure=lambda _: {}, stop=lambda: False)
        sorted_by_loop = build_batch(
            [s.trajectory for s in step.samples], [s.score for s in step.samples], PPOConfig()
        )
        for batch in (build_batch(trajectories, scores, PPOConfig()), sorted_by_loop):
            for name, array in expected.columns.items():
                np.testing.assert_array_equal(batch.columns[name], array)
    results = []
    for number, batch in enumerate((expected, sorted_by_loop)):
        learners = in_process(ppo(), tiny_llama)
        learners.update(batch)
        results.append(weights(learners, tmp_path / str(number)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
