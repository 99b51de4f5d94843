"""Estimates with confidence intervals, for samples that come in groups (several per prompt).

Samples of one prompt resemble each other, so they are never treated as independent: where there
are several a prompt, whole prompts are resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Groups = Sequence[Sequence[float]]
"""For each prompt the values of its samples; prompts without samples are left out before."""

_CELLS = 4_000_000
"""Random numbers drawn at once by the bootstrap, to bound its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and the interval that holds the true one with probability ``confidence``.

    Attributes:
        value: The mean over all samples.
        low: Lower end of the interval.
        high: Upper end.
        n: Prompts it rests on.
        method: ``"wilson"``, or ``"bootstrap"`` (percentile, over prompts).
        confidence: 0.95 says 95 %.
    """

    value: float
    low: float
    high: float
    n: int
    method: Literal["wilson", "bootstrap"]
    confidence: float = 0.95


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a share (Wilson 1927).

    ``successes`` may be fractional (a tie counts half). The interval then is on the safe side,
    because a variable in [0, 1] with mean p never varies more than a coin of that mean.

    Raises:
        ValueError: ``n`` is 0, or ``successes`` is not between 0 and ``n``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    # Rounding must not push the interval off its own estimate at p = 0 and p = 1.
    low, high = min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)
    return Estimate(value=p, low=low, high=high, n=n, method="wilson", confidence=confidence)


def bootstrap_mean(
    groups: Groups, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """Mean of all samples with a percentile interval from resampling whole prompts.

    Args:
        groups: Values of each prompt's samples.
        seed: The interval is a function of the values and this.
        resamples: Bootstrap replicates.

    Raises:
        ValueError: Fewer than two prompts, or a prompt without samples.
    """
    if len(groups) < 2:
        raise ValueError(
            f"an interval needs at least 2 prompts, got {len(groups)}: evaluate on more prompts"
        )
    sums: Float64Array = np.array([np.sum(g, dtype=np.float64) for g in groups])
    counts: Float64Array = np.array([float(len(g)) for g in groups])
    if not counts.all():
        raise ValueError("a prompt without samples has no place in a mean")
    rng = np.random.default_rng(seed)
    n = len(groups)
    means = []
    block = max(1, _CELLS // n)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, n, size=(min(block, resamples - start), n))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    value = float(sums.sum() / counts.sum())
    return Estimate(
        value=value,
        low=min(float(low), value),
        high=max(float(high), value),
        n=n,
        method="bootstrap",
        confidence=confidence,
    )


def share(groups: Groups, *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """A share, of values in [0, 1].

    Wilson's interval where every prompt has one sample. With several, the bootstrap over prompts;
    but where all prompts have the same mean every resample is the same and the bootstrap would
    claim certainty, so Wilson's interval on the number of prompts stands in.
    """
    values = [v for g in groups for v in g]
    if len(values) == len(groups):
        return wilson(sum(values), len(values), confidence)
    means = {sum(g) / len(g) for g in groups}
    if len(means) == 1:
        return wilson(means.pop() * len(groups), len(groups), confidence)
    return bootstrap_mean(groups, seed=seed, confidence=confidence)
