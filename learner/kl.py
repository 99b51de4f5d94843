"""Estimators of the KL divergence to the reference model, and control of its coefficient.

The estimators are John Schulman's, http://joschu.net/blog/kl-approx.html: each is a function of
``d = log p_policy(token) - log p_reference(token)`` for tokens sampled from the policy.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from learner.config import KLConfig

Estimator = Literal["k1", "k2", "k3", "k3_st_k2"]

# exp(20) is far beyond any sane ratio and far from overflow in float32.
MAX_EXPONENT = 20.0
MAX_PROPORTIONAL_ERROR = 0.2


def kl_estimate(difference: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, same shape as ``difference``.

    k1 = d is unbiased, of high variance and may be negative. k2 = d^2 / 2 is biased in value, but
    its gradient is the gradient of the KL. k3 = exp(-d) - 1 + d is unbiased and never negative,
    but its gradient is that of the reversed KL; ``k3_st_k2`` has k3's value and k2's gradient.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    k3 = torch.exp((-difference).clamp(max=MAX_EXPONENT)) - 1 + difference
    if estimator == "k3":
        return k3
    k2 = 0.5 * difference**2
    return k2 + (k3 - k2).detach()


class KLController:
    """Holds the coefficient of the KL term; adapts it when the configuration says so.

    Adaptive control is that of arXiv 1909.08593, section 2.2: with the measured KL of a batch of
    n episodes, in nats per sequence, ``error = clip(kl / target - 1, -0.2, 0.2)`` and
    ``coef *= 1 + error * n / horizon``.
    """

    def __init__(self, config: KLConfig) -> None:
        self._config = config
        self.coef = 0.0 if config.where == "off" else config.coef

    @property
    def in_reward(self) -> float:
        """Coefficient of the KL penalty inside the rewards, else 0."""
        return self.coef if self._config.where == "reward" else 0.0

    @property
    def in_loss(self) -> float:
        """Coefficient of the KL term of the loss, else 0."""
        return self.coef if self._config.where == "loss" else 0.0

    def observe(self, sequence_kl: float, episodes: int) -> None:
        """Adapt to the mean KL per sequence (nats) of a batch of ``episodes`` samples."""
        if not self._config.adaptive or self._config.where == "off":
            return
        if not math.isfinite(sequence_kl):
            raise ValueError(f"the KL of a batch is {sequence_kl}: cannot adapt its coefficient")
        error = sequence_kl / self._config.target - 1
        error = max(-MAX_PROPORTIONAL_ERROR, min(MAX_PROPORTIONAL_ERROR, error))
        self.coef *= 1 + error * episodes / self._config.horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        """Take the coefficient over. A fixed coefficient is the configuration's, not the state's:
        someone who changes it and resumes means the new one."""
        if self._config.adaptive and self._config.where != "off":
            self.coef = float(state["coef"])
