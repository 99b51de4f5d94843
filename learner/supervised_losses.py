"""The mathematics of supervised training: pure functions of tensors.

Every loss is a *sum*; the caller divides by the weight of the whole optimizer step, so that the
gradient does not depend on how a step is cut into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed.

    Args:
        logits: ``[n, V]`` logits of the positions that are trained, and of no others.
        targets: ``[n]`` the token that follows each of them.
    """
    # The log-softmax is taken in float32 even under autocast.
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def bradley_terry(
    reward_a: Tensor,
    reward_b: Tensor,
    preference: Tensor,
    *,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry negative log-likelihood of judgements, summed.

    P(a beats b) = sigmoid(r_a - r_b), Bradley and Terry 1952. A preference between 0 and 1 is a
    soft label: 0.5 for a tie pulls the two rewards together. A margin asks the preferred one to
    lead by that much (Llama 2, arXiv 2307.09288, eq. 2); it has no meaning for ties.

    Args:
        reward_a: ``[n]`` reward of response a.
        reward_b: ``[n]`` reward of response b.
        preference: ``[n]`` share of the judgement that is for a: 1, 0, 0.5 for a tie.
        margin: ``[n]`` lead that the preferred response must have, >= 0; ``None`` for 0.
        weight: ``[n]`` weight of each judgement, >= 0; ``None`` for 1.
    """
    difference = (reward_a - reward_b).float()
    lead = torch.zeros_like(difference) if margin is None else margin
    losses = -(
        preference * functional.logsigmoid(difference - lead)
        + (1 - preference) * functional.logsigmoid(-difference - lead)
    )
    return losses.sum() if weight is None else (losses * weight).sum()


def rating_error(reward: Tensor, rating: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Half the squared error of rewards ``[n]`` against standardised ratings ``[n]``, summed."""
    errors = 0.5 * (reward.float() - rating).square()
    return errors.sum() if weight is None else (errors * weight).sum()
