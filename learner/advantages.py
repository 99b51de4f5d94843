"""Rewards, returns and advantages of responses, as pure functions of tensors.

Shapes: B samples, R response positions. ``mask`` is ``[B, R]`` bool, true at real response
tokens, which stand at the left of each row. Whatever stands at masked positions, NaN included,
never reaches a result; masked positions of every result are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with 0 where ``mask`` is false. A product would turn NaN into NaN, not 0."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true positions of ``mask``, of which there must be one or more."""
    return masked(values, mask).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Biased variance (divided by n, not n - 1) over the true positions of ``mask``."""
    mean = masked_mean(values, mask)
    return masked_mean((values - mean) ** 2, mask)


def shape_rewards(rewards: Tensor, kl: Tensor, coef: float, mask: Tensor) -> Tensor:
    """Rewards minus the KL penalty, ``r_t - coef * kl_t`` (arXiv 1909.08593, equation 2).

    Args:
        rewards: ``[B, R]`` the score: on the last generated token, or per token.
        kl: ``[B, R]`` a per-token estimate of KL(policy || reference) in nats.
        coef: Weight of the penalty; 0 leaves the rewards as they are.
    """
    return masked(rewards - coef * kl, mask) if coef else masked(rewards, mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) over response tokens.

    ``delta_t = r_t + gamma * V_{t+1} - V_t`` and ``A_t = delta_t + gamma * lam * A_{t+1}``, where
    the value and the advantage after the last token of a response are 0.

    Args:
        rewards: ``[B, R]`` shaped rewards.
        values: ``[B, R]`` value of the state before each response token.

    Returns:
        ``(advantages, returns)``, both ``[B, R]``; ``returns = advantages + values``, with the
        advantages not whitened.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        # Right of the last token everything is 0 already, so the recursion starts there by itself.
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = masked(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, masked(advantages + values, mask)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over all true positions, and to mean 0 unless ``shift_mean`` is false.

    The variance is biased and eps is 1e-8, as in the N implementation details of RLHF with PPO.
    """
    # In float32 the mean of equal values is off by its rounding, which the division by
    # sqrt(eps) makes 1e4 times larger and Adam a full step. In float64 their sum is exact, so
    # equal values become exact zeros.
    wide = values.double()
    mean = masked_mean(wide, mask)
    scaled = (wide - mean) * torch.rsqrt(masked_var(wide, mask) + WHITEN_EPS)
    return masked((scaled if shift_mean else scaled + mean).to(values.dtype), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)``: 1 is a perfect critic, 0 a constant one.

    0 when the returns do not vary by more than their rounding: there is nothing to explain.
    """
    largest = torch.maximum(masked(returns, mask).abs().max(), masked(values, mask).abs().max())
    rounding = 8 * torch.finfo(returns.dtype).eps * largest.double()
    variance = masked_var(returns.double(), mask)
    if not variance > rounding**2:
        return torch.zeros_like(largest)
    explained = 1 - masked_var((returns - values).double(), mask) / variance
    return explained.to(returns.dtype)
