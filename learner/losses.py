"""The losses of PPO, as pure functions: everything is ``[N]``, one entry per response token.

No padding gets here: the learner gathers the response tokens of a micro-batch before the
losses, so nothing needs a mask. All inputs are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actors.trajectory import Int32Array
from learner.config import PPOConfig
from learner.kl import MAX_EXPONENT, kl_estimate


def policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate of PPO (arXiv 1707.06347, equation 7), as a loss per token.

    Args:
        log_ratio: ``[N]`` log pi_new - log pi_old, in nats.
        advantages: ``[N]``.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high]; an upper clip
            beyond the lower lets rare tokens rise faster (DAPO, arXiv 2503.14476, equation 10).
        dual_clip: With c, a token of negative advantage never loses more than c * |A|
            (arXiv 1912.09729, equation 5).

    Returns:
        ``(loss, ratio, clipped)``; ``clipped`` is true where the clipped term was taken.
    """
    ratio = torch.exp(log_ratio.clamp(max=MAX_EXPONENT))
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, limited)
    clipped = limited > unclipped
    if dual_clip is not None:
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > bound)
        loss = torch.where(beyond, bound, loss)
        clipped = clipped | beyond
    return loss, ratio, clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """``0.5 * max((V - R)^2, (V_clipped - R)^2)`` with V_clipped within ``clip`` of the old value.

    Returns:
        ``(loss, clipped)``, both ``[N]``; ``clipped`` is true where the clipped term was taken.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, limited = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, limited), limited > unclipped


Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """``[B, R]`` float32: how much the loss of each response token counts in a step's sum.

    The sum of weighted losses over an optimizer step, divided by ``loss_divisor``, is

    - ``token_mean``: the mean over all tokens of the step (DAPO, arXiv 2503.14476, equation 12);
    - ``sequence_mean``: each response's mean over its tokens, then the mean over the responses
      (GRPO, arXiv 2402.03300, equation 3), so that a token of a long response counts less.
    """
    if aggregation == "token_mean":
        return mask.float()
    return mask / mask.sum(1, keepdim=True)


def loss_divisor(response_lengths: Int32Array, aggregation: Aggregation) -> int:
    """What the weighted sum of an optimizer step is divided by, over all learners: its tokens, or
    its responses."""
    return int(response_lengths.sum()) if aggregation == "token_mean" else len(response_lengths)


def importance_weights(old_logprobs: Tensor, engine_logprobs: Tensor, cap: float | None) -> Tensor:
    """Truncated importance weight min(pi_learner / pi_engine, cap) per token; 1 without a cap.

    Corrects for the engine having sampled with slightly other numbers than the learner computes.
    """
    if cap is None:
        return torch.ones_like(old_logprobs)
    return torch.exp((old_logprobs - engine_logprobs).clamp(max=MAX_EXPONENT)).clamp(max=cap)


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """The policy's loss per token, and detached parts of it for the metrics; all ``[N]``."""

    loss: Tensor
    surrogate: Tensor
    log_ratio: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    engine_logprobs: Tensor,
    advantages: Tensor,
    kl_coef: float,
    config: PPOConfig,
) -> PolicyTerms:
    """Everything that the policy is trained on: surrogate, entropy bonus and KL in the loss.

    Args:
        logprobs: ``[N]`` of the policy being trained, with gradient.
        entropy: ``[N]`` with gradient; needed when ``config.entropy_coef`` is not 0.
        kl_coef: Coefficient of the KL term of the loss; 0 when the KL is in the reward.
    """
    log_ratio = logprobs - old_logprobs
    high = config.clip if config.clip_high is None else config.clip_high
    loss, ratio, clipped = policy_loss(log_ratio, advantages, config.clip, high, config.dual_clip)
    if config.importance_limit is not None:
        loss = loss * importance_weights(old_logprobs, engine_logprobs, config.importance_limit)
    surrogate = loss.detach()
    if config.entropy_coef:
        assert entropy is not None
        loss = loss - config.entropy_coef * entropy
    if kl_coef:
        loss = loss + kl_coef * kl_estimate(logprobs - reference_logprobs, config.kl.estimator)
    with torch.no_grad():
        # Schulman's k3 of KL(old || new) from samples of the old policy.
        approx_kl = ratio - 1 - log_ratio
    return PolicyTerms(loss, surrogate, log_ratio.detach(), ratio.detach(), clipped, approx_kl)
