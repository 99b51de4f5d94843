"""Rewards, returns and advantages of responses, as pure functions of tensors.

``estimate_advantages`` is the one interface: it calls the estimator that the configuration names.
``gae`` needs the values of a critic; all others compare responses with each other.

Shapes: B samples, R response positions. ``mask`` is ``[B, R]`` bool, true at real response
tokens, which stand at the left of each row, one or more. Whatever stands at masked positions, NaN
included, never reaches a result; masked positions of every result are 0. ``groups`` is ``[B]``
int64, equal for responses to the same prompt. A response's reward as a whole is the sum of its
tokens' rewards, KL penalty included when the KL is in the reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.config import PPOConfig

WHITEN_EPS = 1e-8
GROUP_STD_EPS = 1e-6


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with 0 where ``mask`` is false. A product would turn NaN into NaN, not 0."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true positions of ``mask``, of which there must be one or more.

    Added up in float64, so that the mean of equal float32 numbers is that number: the difference
    to it, 0, is what whitening would otherwise divide by next to nothing.
    """
    return (masked(values, mask).sum(dtype=torch.float64) / mask.sum()).to(values.dtype)


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


def estimate_advantages(
    config: PPOConfig, *, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Advantages by the estimator and with the whitening that ``config`` names.

    Args:
        rewards: ``[B, R]`` with the KL penalty when the KL is in the reward.
        values: ``[B, R]`` of the critic; only ``gae`` has and needs them.

    Returns:
        ``(advantages, returns)``, both ``[B, R]``; returns are what a critic learns, None without
        one.
    """
    returns = None
    match config.advantage:
        case "gae":
            assert values is not None, "gae is configured with a value model"
            if config.whiten_rewards:
                rewards = whiten(rewards, mask, shift_mean=False)
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        case "grpo":
            advantages = grpo(rewards, mask, groups, divide_by_std=config.group_std)
        case "rloo":
            advantages = rloo(rewards, mask, groups)
        case "reinforce_plus_plus":
            advantages = rewards_to_go(rewards, mask, config.gamma)
        case "reinforce_plus_plus_baseline":
            centred = subtract_group_mean(rewards, mask, groups)
            advantages = rewards_to_go(centred, mask, config.gamma)
    if config.whitens_advantages:
        advantages = whiten(advantages, mask)
    return advantages, returns


def grpo(rewards: Tensor, mask: Tensor, groups: Tensor, *, divide_by_std: bool) -> Tensor:
    """Group relative advantages with outcome supervision (arXiv 2402.03300, section 4.1.2).

    ``A_{i,t} = (R_i - mean(R)) / (std(R) + 1e-6)`` over the G responses to a prompt, alike for
    every token of response i. The std is that of a sample, divided by G - 1, as TRL and verl have
    it; the paper does not say. ``divide_by_std=False`` is the advantage of Dr. GRPO
    (arXiv 2503.20783), ``R_i - mean(R)``: the std weighs prompts that are nearly always or nearly
    never answered well more than others.

    A group whose rewards are all equal, and a group of one, get exactly 0.
    """
    totals = sequence_rewards(rewards, mask)
    group = _Groups(groups)
    difference = totals - group.mean(totals)[groups]
    if divide_by_std:
        variance = group.sum(difference**2) / (group.sizes - 1).clamp(min=1)
        difference = difference / (variance.sqrt() + GROUP_STD_EPS)[groups]
    # The mean of equal numbers may miss them by rounding, and so may the std miss 0.
    difference = torch.where(group.equal(totals)[groups], 0.0, difference)
    return _on_every_token(difference, rewards, mask)


def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740; the estimator is Kool et al.'s, 2019).

    ``A_i = R_i - mean of the R_j of the other G - 1 responses``, alike for every token: the whole
    response is one action. As a loss summed over tokens its gradient is the paper's; here the
    ratio is clipped as in PPO, which changes nothing in the first optimizer step.

    A group whose rewards are all equal, and a group of one, get exactly 0.
    """
    totals = sequence_rewards(rewards, mask)
    group = _Groups(groups)
    others = (group.sizes - 1).clamp(min=1)
    baseline = (group.sum(totals)[groups] - totals) / others[groups]
    difference = torch.where(group.equal(totals)[groups], 0.0, totals - baseline)
    return _on_every_token(difference, rewards, mask)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``A_t = r_t + gamma * A_{t+1}``: the return from each token on, without a baseline, which
    is GAE with lambda 1 and no values.

    With gamma 1, the score on the last token and the KL penalty on every token this is REINFORCE++
    (arXiv 2501.03262), ``A_t = r - coef * sum of kl_u over u >= t``, before its whitening over the
    global batch.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def subtract_group_mean(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Rewards less the mean of their group, which is taken off at the last token.

    The baseline of REINFORCE++ with baseline (arXiv 2501.03262): ``R_i - mean(R)`` is what the
    rewards of response i then sum to. Where scores stand on the last tokens, a group whose rewards
    are all equal, and a group of one, get exactly 0.
    """
    totals = sequence_rewards(rewards, mask)
    group = _Groups(groups)
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    mean = torch.where(group.equal(totals)[groups], totals, group.mean(totals)[groups])
    return masked(rewards - torch.where(last, mean[:, None], 0.0), mask).to(rewards.dtype)


def sequence_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` the reward of each response as a whole, in float64."""
    return masked(rewards, mask).double().sum(1)


class _Groups:
    """Statistics over the responses to each prompt; all are ``[G]`` tensors, float64."""

    def __init__(self, groups: Tensor) -> None:
        self._groups = groups
        self._count = int(groups.max()) + 1
        self.sizes = self.sum(torch.ones_like(groups, dtype=torch.float64))

    def sum(self, values: Tensor) -> Tensor:
        zeros = torch.zeros(self._count, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self._groups, values)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes.clamp(min=1)

    def equal(self, values: Tensor) -> Tensor:
        """Whether all values of a group are the same number."""
        zeros = torch.zeros(self._count, dtype=values.dtype, device=values.device)
        # Which member stands for its group is open, and makes no difference.
        member = zeros.index_copy(0, self._groups, values)
        return self.sum((values != member[self._groups]).double()) == 0


def _on_every_token(per_response: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` spread out to ``[B, R]``, of the type of the rewards."""
    return masked(per_response.to(rewards.dtype)[:, None].expand(mask.shape), mask)


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
