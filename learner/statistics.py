"""What a PPO iteration reports: figures of the batch, and sums gathered over optimizer steps."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.advantages import explained_variance, masked, masked_mean
from learner.batch import PPOBatch
from learner.losses import PolicyTerms
from learner.sample_filter import group_spread

if TYPE_CHECKING:
    from learner.ppo import Annotations


def batch_metrics(
    batch: PPOBatch,
    mask: Tensor,
    notes: Annotations,
    *,
    difference: Tensor,
    engine: Tensor,
    shaped: Tensor,
    returns: Tensor | None,
) -> dict[str, float]:
    """Figures of the batch before the first optimizer step; of values only where there are any.

    Args:
        mask: ``[B, R]`` true at response tokens; all other tensors are ``[B, R]`` as well.
        difference: log p_policy - log p_reference.
        engine: The rollout engine's log-probabilities.
        shaped: Rewards with the KL penalty.
    """
    delta = masked(notes.old_logprobs - engine, mask)
    log_weights = delta[mask] - delta[mask].max()
    weights = torch.exp(log_weights)
    scores = torch.tensor(batch.scores, dtype=torch.float64)  # equal scores have deviation 0
    figures = {
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "reward_shaped": masked(shaped, mask).sum(1).mean(),
        "kl_sequence": masked(difference, mask).sum(1).mean(),
        "kl_token": masked_mean(difference, mask),
        "entropy": masked_mean(notes.entropy, mask),
        "engine_delta_mean": delta.abs().sum() / mask.sum(),
        "engine_delta_max": delta.abs().max(),
        # Share of the sample that is left when engine and learner disagree: 1 when they agree.
        "effective_sample_size": weights.sum() ** 2 / (weights**2).sum() / mask.sum(),
        "engine_correlation": correlation(notes.old_logprobs[mask], engine[mask]),
    }
    if notes.values is not None and returns is not None:
        figures["value"] = masked_mean(notes.values, mask)
        figures["explained_variance"] = explained_variance(notes.values, returns, mask)
    if int(batch.groups.max()) + 1 < len(batch):  # a prompt has several responses
        spread = group_spread(batch.rewards.sum(1), batch.groups)
        figures["groups_without_spread"] = torch.tensor((spread == 0).mean())
    metrics = {f"ppo/{name}": float(value) for name, value in figures.items()}
    metrics["ppo/eos_rate"] = float(batch.stopped.mean())
    metrics["ppo/response_length"] = float(batch.response_lengths.mean())
    metrics["ppo/samples"] = float(len(batch))
    metrics["ppo/tokens"] = float(batch.response_tokens)
    return metrics


# Standard deviation of log-probabilities, in nats, below which they are all alike: rounding would
# decide their correlation.
_ALL_ALIKE = 1e-3


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two ``[N]``, in float64.

    Two tensors that do not vary (a policy that is certain of every token) correlate perfectly;
    one that varies with one that does not, not at all.
    """
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    spread_a, spread_b = a.square().mean().sqrt(), b.square().mean().sqrt()
    smaller, larger = sorted([float(spread_a), float(spread_b)])
    if larger < 2 * _ALL_ALIKE:
        return torch.ones((), dtype=torch.float64)
    if smaller < _ALL_ALIKE / 2:
        return torch.zeros((), dtype=torch.float64)
    return (a * b).mean() / (spread_a * spread_b)


class TokenSums:
    """What one trainer did in an iteration: sums over response tokens, norms, seconds."""

    def __init__(self, device: Any) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self.norms: list[float] = []
        self.ratio_max = torch.zeros((), device=device)
        self.log_ratio_max = torch.zeros((), device=device)
        self.first_log_ratio_max: float | None = None
        self.seconds_forward_backward = 0.0
        self.seconds_optimizer = 0.0

    def add_policy(self, terms: PolicyTerms) -> None:
        figures = {
            "loss_policy": terms.surrogate,
            "clip_fraction": terms.clipped,
            "ratio_mean": terms.ratio,
            "approx_kl": terms.approx_kl,
        }
        self._add(figures)
        if len(terms.ratio):
            # Not the logarithm of the ratio, which is 0 or clamped where they are far apart.
            largest = terms.log_ratio.abs().max()
            self.ratio_max = torch.maximum(self.ratio_max, terms.ratio.max())
            self.log_ratio_max = torch.maximum(self.log_ratio_max, largest)

    def add_value(self, loss: Tensor, clipped: Tensor) -> None:
        self._add({"loss_value": loss.detach(), "value_clip_fraction": clipped})

    def _add(self, figures: dict[str, Tensor]) -> None:
        for name, values in figures.items():
            self._sums[name] += values.sum()
            self._sums[f"{name}/tokens"] += len(values)

    def reduce(self, group: Any) -> None:
        """Add up over the learners; gradient norms are the same on all of them already."""
        if group is None:
            return
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(stacked, group=group)
        self._sums.update(zip(names, stacked.unbind(), strict=True))
        for largest in (self.ratio_max, self.log_ratio_max):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)

    def metrics(self, module: str) -> dict[str, float]:
        """Means over all tokens of all optimizer steps; norms over the steps that were taken."""
        names = [name for name in self._sums if not name.endswith("/tokens")]
        metrics = {
            f"ppo/{name}": float(self._sums[name] / self._sums[f"{name}/tokens"]) for name in names
        }
        if self.first_log_ratio_max is not None:
            metrics["ppo/ratio_max"] = float(self.ratio_max)
            metrics["ppo/log_ratio_max"] = float(self.log_ratio_max)
            metrics["ppo/first_log_ratio_max"] = self.first_log_ratio_max
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        metrics[f"ppo/grad_norm_{module}"] = sum(finite) / len(finite) if finite else 0.0
        metrics[f"ppo/skipped_steps_{module}"] = float(len(self.norms) - len(finite))
        metrics["ppo/optimizer_steps"] = float(len(self.norms))
        return metrics
