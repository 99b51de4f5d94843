"""PPO's pieces in numpy and float64, written from the papers with loops over single numbers.

Nothing of the learner is used, and no way of computing is shared with it: rows are lists of
different lengths instead of masked tensors, sums run over tokens one by one.
"""

from __future__ import annotations

import math

import numpy as np

Rows = list[list[float]]


def rows_of(array: np.ndarray, lengths: list[int]) -> Rows:
    return [array[row, :length].tolist() for row, length in enumerate(lengths)]


def flat(rows: Rows) -> list[float]:
    return [x for row in rows for x in row]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    """Biased."""
    centre = mean(values)
    return math.fsum((x - centre) ** 2 for x in values) / len(values)


def whitened(rows: Rows, *, shift_mean: bool) -> Rows:
    centre, scale = mean(flat(rows)), math.sqrt(variance(flat(rows)) + 1e-8)
    return [[(x - centre) / scale + (0.0 if shift_mean else centre) for x in row] for row in rows]


def explained_variance(values: Rows, returns: Rows) -> float:
    errors = [r - v for v, r in zip(flat(values), flat(returns), strict=True)]
    return 1 - variance(errors) / variance(flat(returns))


def kl(difference: float, estimator: str) -> float:
    """http://joschu.net/blog/kl-approx.html with r = p_reference / p_policy = exp(-difference)."""
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference * difference / 2
    return math.exp(-difference) - 1 + difference


def clipped_surrogate(
    log_ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> float:
    """The loss of one token: arXiv 1707.06347, equation 7; 1912.09729, equation 5."""
    ratio = math.exp(log_ratio)
    gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    return -gain


def clipped_value_loss(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def controlled(
    coef: float, observed: list[tuple[float, int]], target: float, horizon: int
) -> float:
    """arXiv 1909.08593, section 2.2, over several batches of (KL, episodes)."""
    for kl_of_batch, episodes in observed:
        error = min(0.2, max(-0.2, (kl_of_batch - target) / target))
        coef = coef * (1 + error * episodes / horizon)
    return coef


def effective_share(log_weights: list[float]) -> float:
    """Kish's effective sample size of importance weights, as a share of the samples."""
    weights = [math.exp(x) for x in log_weights]
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / len(weights)
