"""KL-shaped rewards, GAE and whitening against numbers by hand and a loop in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from learner.advantages import explained_variance, gae, masked_mean, shape_rewards, whiten

MASK = torch.tensor([[True, True, True], [True, False, False]])
NAN = float("nan")


def test_shaped_rewards_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 2.0], [1.0, NAN, NAN]])
    kl = torch.tensor([[0.5, -0.2, 1.0], [0.1, NAN, NAN]])
    shaped = shape_rewards(rewards, kl, 0.1, MASK)
    expected = torch.tensor([[-0.05, 0.02, 1.9], [0.99, 0.0, 0.0]])
    torch.testing.assert_close(shaped, expected)


def test_no_kl_coefficient_keeps_rewards_even_where_the_kl_is_infinite() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    shaped = shape_rewards(rewards, torch.full((2, 3), math.inf), 0.0, MASK)
    assert torch.equal(shaped, rewards)


def test_gae_by_hand() -> None:
    """gamma = 0.5, lambda = 0.5. First row, from the end:
    t=2: delta = 2 - 3 = -1, A = -1. t=1: delta = 0 + 0.5*3 - 2 = -0.5, A = -0.5 + 0.25*-1 = -0.75.
    t=0: delta = 1 + 0.5*2 - 1 = 1, A = 1 + 0.25*-0.75 = 0.8125. Second row: delta = 5 - 2 = 3."""
    rewards = torch.tensor([[1.0, 0.0, 2.0], [5.0, NAN, NAN]])
    values = torch.tensor([[1.0, 2.0, 3.0], [2.0, NAN, 9.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.8125, -0.75, -1.0], [3.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.8125, 1.25, 2.0], [5.0, 0.0, 0.0]]))


def test_gae_with_lambda_one_and_gamma_one_returns_the_rewards_to_go() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [5.0, 0.0, 0.0]])
    _, returns = gae(rewards, torch.randn(2, 3), MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 2.0, 2.0], [5.0, 0.0, 0.0]]))


def test_whitening_by_hand() -> None:
    """Values 1, 2, 3, 6: mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    root = math.sqrt(3.5)
    expected = torch.tensor([[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, MASK), expected)
    shifted = torch.where(MASK, expected + 3.0, torch.zeros(()))
    torch.testing.assert_close(whiten(values, MASK, shift_mean=False), shifted)


def test_whitening_equal_values_gives_zeros() -> None:
    """Exactly, also when float32 cannot add them up exactly."""
    assert torch.equal(whiten(torch.full((2, 3), 0.1), MASK), torch.zeros(2, 3))
    many = torch.full((1, 9999), 0.1)
    assert torch.equal(whiten(many, many > 0), torch.zeros(1, 9999))


def test_explained_variance_by_hand() -> None:
    """Returns 1, 2, 3, 6 have variance 3.5; errors 1, 1, -1, -1 have variance 1."""
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    values = torch.tensor([[0.0, 1.0, 4.0], [7.0, NAN, NAN]])
    assert float(explained_variance(values, returns, MASK)) == pytest.approx(1 - 1 / 3.5)
    assert float(explained_variance(returns, returns, MASK)) == 1.0
    assert float(explained_variance(values, torch.ones(2, 3), MASK)) == 0.0


def test_masked_mean_ignores_nan() -> None:
    assert float(masked_mean(torch.tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]]), MASK)) == 3.0


def loop_gae(
    rewards: np.ndarray, values: np.ndarray, lengths: list[int], gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, as a sum over the future: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        value = [*values[row, :length], 0.0]
        deltas = [rewards[row, t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            future = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
            advantages[row, t], returns[row, t] = future, future + value[t]
    return advantages, returns


@st.composite
def episodes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shape = (len(lengths), max(lengths) + draw(st.integers(0, 2)))
    numbers = npst.arrays(np.float64, shape, elements=st.floats(-5, 5, width=32))
    return draw(numbers), draw(numbers), draw(numbers), lengths


Episodes = tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]


@given(episodes(), st.floats(0.1, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=150, deadline=None)
def test_the_chain_from_scores_to_whitened_advantages_equals_a_loop(
    data: tuple[np.ndarray, np.ndarray, np.ndarray, list[int]],
    gamma: float,
    lam: float,
    coef: float,
) -> None:
    rewards, values, kl, lengths = data
    mask = np.arange(rewards.shape[1]) < np.array(lengths)[:, None]
    # Garbage at masked positions must not reach any result.
    dirty = [torch.tensor(np.where(mask, a, np.nan)) for a in (rewards, values, kl)]
    keep = torch.tensor(mask)
    shaped = shape_rewards(dirty[0], dirty[2], coef, keep)
    advantages, returns = gae(shaped, dirty[1], keep, gamma, lam)

    want_advantages, want_returns = loop_gae(rewards - coef * kl, values, lengths, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), want_advantages, atol=1e-10)
    np.testing.assert_allclose(returns.numpy(), want_returns, atol=1e-10)

    real = np.concatenate([want_advantages[i, :n] for i, n in enumerate(lengths)])
    scale = math.sqrt(float(np.mean((real - real.mean()) ** 2)) + 1e-8)
    white = whiten(advantages, keep).numpy()
    got = np.concatenate([white[i, :n] for i, n in enumerate(lengths)])
    np.testing.assert_allclose(got, (real - real.mean()) / scale, atol=1e-6)
    assert not white[~mask].any()
