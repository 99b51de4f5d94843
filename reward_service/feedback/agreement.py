"""Coefficients of agreement: pure functions of who said what, with missing judgements.

Chance-corrected measures stand side by side, because each misleads on its own: alpha and the
kappas collapse when one choice is rare, Gwet's AC1 flatters when choices are even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import krippendorff
import numpy as np
import numpy.typing as npt

from reward_service.intervals import wilson

Counts = npt.NDArray[np.int64]
"""``[N, V]``: how many judges gave item n the label v."""

Codes = npt.NDArray[np.int64]
"""``[N, J]``: the label (0 to V - 1) that judge j gave item n, -1 where there is none."""

Level = Literal["nominal", "ordinal", "interval"]

Array = npt.NDArray[np.int64]
"""Counts or codes, one row an item."""


def counts_of_codes(codes: Codes, labels: int) -> Counts:
    """``[N, V]`` of ``[N, J]``."""
    return np.stack([(codes == label).sum(axis=1) for label in range(labels)], axis=1)


def percent_agreement(counts: Counts) -> float | None:
    """Share of pairs of judges of the same item that agree, averaged over items.

    Items with one judgement say nothing; ``None`` when there are no others.
    """
    judges = counts.sum(axis=1)
    several = judges >= 2
    if not several.any():
        return None
    n, c = judges[several], counts[several]
    return float(((c * (c - 1)).sum(axis=1) / (n * (n - 1))).mean())


def krippendorff_alpha(
    counts: Counts, level: Level = "nominal", values: Sequence[float] | None = None
) -> float | None:
    """Krippendorff's alpha (2011), with missing judgements.

    ``None`` when undefined: no item with two judgements, or one label throughout, so that chance
    agreement is 1.

    Args:
        level: How far apart two labels are: all alike, by rank, or by value.
        values: ``[V]`` the labels' values, for ``interval``; default 0, 1, 2, ...
    """
    several = counts[counts.sum(axis=1) >= 2]
    if not len(several) or (several.sum(axis=0) > 0).sum() < 2:
        return None
    domain = list(range(counts.shape[1])) if values is None else list(values)
    return float(
        krippendorff.alpha(value_counts=several, value_domain=domain, level_of_measurement=level)
    )


def fleiss_kappa(counts: Counts) -> float | None:
    """Fleiss' kappa (1971); items with fewer than two judgements are left out.

    Chance agreement is that of labels drawn from all judgements together. Fleiss has equally many
    judges for each item; with different numbers, observed agreement is averaged over items.
    """
    several = counts[counts.sum(axis=1) >= 2]
    observed = percent_agreement(several) if len(several) else None
    if observed is None:
        return None
    shares = several.sum(axis=0) / several.sum()  # [V]
    chance = float((shares**2).sum())
    return None if chance == 1 else (observed - chance) / (1 - chance)


def cohen_kappa(
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    *,
    linear_weights: bool = False,
) -> float | None:
    """Cohen's kappa (1960) of two judges; ``None`` where chance agreement is 1 or nothing shared.

    Args:
        first, second: ``[n]`` labels of the same items, -1 where a judge has none.
        linear_weights: Disagreement grows with the distance of the labels (Cohen 1968).
    """
    both = (first >= 0) & (second >= 0)
    if not both.any():
        return None
    size = int(max(first[both].max(), second[both].max())) + 1
    table = np.zeros((size, size))
    np.add.at(table, (first[both], second[both]), 1.0)
    table /= table.sum()
    labels = np.arange(size)
    apart: npt.NDArray[np.float64] = np.abs(labels[:, None] - labels[None, :]).astype(float)
    if not linear_weights:
        apart = (apart > 0).astype(float)
    by_chance = float((apart * np.outer(table.sum(axis=1), table.sum(axis=0))).sum())
    return None if by_chance == 0 else 1 - float((apart * table).sum()) / by_chance


def mean_cohen_kappa(codes: Codes) -> float | None:
    """Mean over all pairs of judges who share items, each pair weighted by how many."""
    kappas, weights = [], []
    for i in range(codes.shape[1]):
        for j in range(i + 1, codes.shape[1]):
            shared = int(((codes[:, i] >= 0) & (codes[:, j] >= 0)).sum())
            kappa = cohen_kappa(codes[:, i], codes[:, j])
            if kappa is not None:
                kappas.append(kappa)
                weights.append(shared)
    return float(np.average(kappas, weights=weights)) if kappas else None


def gwet_ac1(counts: Counts) -> float | None:
    """Gwet's AC1 (2008) for any number of judges, with missing judgements.

    Chance agreement is sum over labels of p (1 - p) / (V - 1), with p the mean share of a label
    over all items and V the number of labels (columns).
    """
    observed = percent_agreement(counts)
    if observed is None:
        return None
    judged = counts[counts.sum(axis=1) >= 1]
    shares = (judged / judged.sum(axis=1, keepdims=True)).mean(axis=0)  # [V]
    chance = float((shares * (1 - shares)).sum() / max(1, counts.shape[1] - 1))
    return (observed - chance) / (1 - chance)


def bootstrap_interval(
    items: Array,
    measure: Callable[[Array], float | None],
    *,
    seed: int,
    resamples: int = 500,
    confidence: float = 0.95,
    clusters: Sequence[str] | None = None,
) -> tuple[float, float] | None:
    """Percentile interval of a measure over resampled items; ``None`` where it is undefined.

    Args:
        items: ``[N, ...]`` counts or codes; rows are resampled.
        clusters: ``[N]`` which rows come together, as what one look at a task has given; whole
            clusters are resampled then. Default: each row is one.
    """
    rng = np.random.default_rng(seed)
    rows = None
    if clusters is not None:
        names, number = np.unique(np.array(clusters), return_inverse=True)
        rows = [np.flatnonzero(number == i) for i in range(len(names))]
    count = len(items) if rows is None else len(rows)
    values = []
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        if rows is not None:
            chosen = np.concatenate([rows[i] for i in chosen])
        value = measure(items[chosen])
        if value is not None:
            values.append(value)
    if len(values) < resamples / 2 or (clusters is not None and len(set(values)) == 1):
        return None  # a few tasks that are all alike would claim certainty
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    found = wilson(hits, n)
    return found.low, found.high
