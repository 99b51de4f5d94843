"""The PPO learner on batches at the edge of what can come from generation and scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.advantages import whiten
from learner.batch import PPOBatch
from learner.config import KLConfig
from tests.learner.plain_ppo import PlainModels, plain_iteration
from tests.learner.ppo_samples import in_process, random_batch, weights
from tests.learner.test_ppo import ppo


def with_lengths(batch: PPOBatch, responses: list[int], rewards: list[float]) -> PPOBatch:
    """The batch with responses of other lengths, and a reward on the last token of each."""
    lengths = np.array(responses, np.int32)
    needed = int((batch.prompt_lengths + lengths).max())
    room = max(0, needed - batch.input_ids.shape[1])
    placed = np.zeros((len(batch), max(responses)), np.float32)
    placed[np.arange(len(batch)), lengths - 1] = rewards
    changes = {
        "input_ids": np.pad(batch.input_ids, ((0, 0), (0, room)), constant_values=77),
        "response_lengths": lengths,
        "rewards": placed,
        "scores": np.array(rewards, np.float32),
        "engine_logprobs": batch.engine_logprobs[:, : max(responses)],
    }
    return PPOBatch(**(dict(batch.columns) | changes))


def unmoved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> bool:
    tensors = [n for n in before if n.startswith(name)]
    assert tensors
    return all(torch.equal(before[n], after[n]) for n in tensors)


def test_responses_of_one_token_are_trained_as_the_formulas_say(
    tiny_llama: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    """An empty response is one too: EOS at once, which is trained on like any other token."""
    batch = with_lengths(random_batch(5, seed=1), [1] * 5, [1.0, -0.5, 0.2, 2.0, -1.0])
    config = ppo(minibatches=2)
    plain = PlainModels(tiny_llama, tiny_llama_untied, shared_trunk=False)
    start = {name: t.detach().clone() for name, t in plain.policy.state_dict().items()}
    plain_iteration(plain, batch, config, temperature=1.0, seed=0)
    learners = in_process(config, tiny_llama, reference_dir=tiny_llama_untied)
    metrics = learners.update(batch)
    got = weights(learners, tmp_path)
    for name, expected in plain.policy.state_dict().items():
        moved = (expected - start[name]).abs().max()
        assert moved > 1e-5
        assert (got[f"policy/model.{name}"] - expected).abs().max() < 2e-3 * moved, name
    assert metrics["ppo/response_length"] == 1.0


def test_one_sample_of_one_token_teaches_only_the_critic(tiny_llama: Path, tmp_path: Path) -> None:
    """Whitened, an only advantage is 0."""
    batch = with_lengths(random_batch(1, seed=2), [1], [1.5])
    learners = in_process(ppo(), tiny_llama)
    before = weights(learners, tmp_path / "before")
    metrics = learners.update(batch)
    after = weights(learners, tmp_path / "after")
    assert unmoved(before, after, "policy")
    assert not unmoved(before, after, "critic")
    assert metrics["ppo/explained_variance"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("reward", [0.1, -3.3, 0.0])
def test_rewards_that_are_all_equal_leave_the_policy_as_it_is(
    reward: float, tiny_llama: Path, tmp_path: Path
) -> None:
    """With lambda 1 and no KL every advantage is the same number: bit for bit nothing to learn.
    0.1 has no exact float32, so a mean with rounding would differ from the values it is of."""
    responses = [3, 20, 7, 1, 12, 9, 5]
    batch = with_lengths(random_batch(7, seed=3), responses, [reward] * 7)
    learners = in_process(ppo(lam=1.0, kl=KLConfig(where="off")), tiny_llama)
    before = weights(learners, tmp_path / "before")
    metrics = learners.update(batch)
    assert unmoved(before, weights(learners, tmp_path / "after"), "policy")
    assert metrics["ppo/score_std"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["ppo/grad_norm_policy"] == 0.0
    assert metrics["ppo/explained_variance"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_whitening_equal_values_gives_exact_zeros_whatever_the_value() -> None:
    for value in (0.1, -3.3, 1 / 3, 1e-4, 12345.678):
        for count in (3, 77, 1000):
            mask = torch.ones(1, count, dtype=torch.bool)
            assert not whiten(torch.full((1, count), value), mask).any(), (value, count)


def test_equal_rewards_with_the_default_settings_stay_finite(tiny_llama: Path) -> None:
    batch = with_lengths(random_batch(7, seed=4), [3, 20, 7, 1, 12, 9, 5], [0.1] * 7)
    learners = in_process(ppo(), tiny_llama)
    for _ in range(2):
        assert all(np.isfinite(value) for value in learners.update(batch).values())


def test_a_sample_that_fills_the_context_is_trained_to_its_last_position(
    tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    """255 tokens of prompt and one of response, and the other way round, in a context of 256."""
    rng = np.random.default_rng(0)
    full = {
        "input_ids": rng.integers(0, 512, (2, 256)).astype(np.int32),
        "prompt_lengths": np.array([255, 1], np.int32),
        "response_lengths": np.array([1, 255], np.int32),
        "engine_logprobs": np.full((2, 255), -6.0, np.float32),
        "rewards": np.pad([[1.0], [0.0]], ((0, 0), (0, 254))).astype(np.float32),
        "scores": np.array([1.0, 0.0], np.float32),
    }
    batch = PPOBatch(**(dict(random_batch(2, seed=0).columns) | full))
    plain = PlainModels(tiny_llama, tiny_llama_untied, shared_trunk=False)
    config = ppo(minibatches=1, epochs=1)
    want = plain_iteration(plain, batch, config, temperature=1.0, seed=0)
    metrics = in_process(config, tiny_llama, reference_dir=tiny_llama_untied).update(batch)
    assert metrics["ppo/kl_sequence"] == pytest.approx(want["kl_sequence"], rel=1e-4)
    assert metrics["ppo/entropy"] == pytest.approx(want["entropy"], rel=1e-4)


@pytest.mark.parametrize("bad", [-1, 512])
def test_ids_outside_the_vocabulary_are_refused_at_either_end(bad: int, tiny_llama: Path) -> None:
    columns = dict(random_batch(4, seed=1).columns)
    ids = columns["input_ids"].copy()
    ids[2, 0] = bad
    with pytest.raises(ValueError, match=f"token id {bad}, the policy's vocabulary ends at 511"):
        in_process(ppo(), tiny_llama).update(PPOBatch(**(columns | {"input_ids": ids})))
