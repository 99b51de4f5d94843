"""What a served model says of itself: its version, and the distribution of its scores.

Statistics are kept for each version, so that a reload shows as a new distribution beside the old
one. ``drift`` compares scores with those of the samples on which the model was normalised: during
PPO it says how far the policy has gone from what the reward model was trained on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

REFERENCE_QUANTILES = 33
"""Evenly spaced quantiles of the reference scores, the least and the greatest among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionStatistics:
    """Scores that one version of a model has given."""

    version: str
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""
    least: float = math.inf
    greatest: float = -math.inf
    errors: int = 0
    """Items that could not be scored."""

    def merged(self, other: VersionStatistics) -> VersionStatistics:
        """Both as one (Chan, Golub and LeVeque 1979). Raises ValueError for another version."""
        if other.version != self.version:
            raise ValueError(f"statistics of {self.version} and {other.version} do not merge")
        count = self.count + other.count
        if count == 0:
            return replace(self, errors=self.errors + other.errors)
        difference = other.mean - self.mean
        return VersionStatistics(
            version=self.version,
            count=count,
            mean=self.mean + difference * other.count / count,
            squares=self.squares
            + other.squares
            + difference * difference * self.count * other.count / count,
            least=min(self.least, other.least),
            greatest=max(self.greatest, other.greatest),
            errors=self.errors + other.errors,
        )

    def with_scores(self, scores: Sequence[float | None]) -> VersionStatistics:
        """Further scores counted in; ``None`` is an error."""
        values = np.array([s for s in scores if s is not None], np.float64)
        errors = len(scores) - len(values)
        if not len(values):
            return replace(self, errors=self.errors + errors)
        return self.merged(
            VersionStatistics(
                version=self.version,
                count=len(values),
                mean=float(values.mean()),
                squares=float(((values - values.mean()) ** 2).sum()),
                least=float(values.min()),
                greatest=float(values.max()),
                errors=errors,
            )
        )

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def to_json(self) -> dict[str, Any]:
        scored = self.count > 0
        return {
            "version": self.version,
            "count": self.count,
            "errors": self.errors,
            "mean": self.mean if scored else None,
            "std": self.std if scored else None,
            "min": self.least if scored else None,
            "max": self.greatest if scored else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatus:
    """What one served model says of itself.

    Attributes:
        error: Why it cannot score at all (it could not be loaded), else ``None``.
        reload_error: Why the last reload was refused; the model before it still serves.
        reference: Quantiles of its scores on the samples of its normalisation, or empty.
        replicas: How many processes this was put together from.
    """

    model: str
    version: str = ""
    fingerprint: str = ""
    context: int | None = None
    vocabulary: int | None = None
    error: str | None = None
    reload_error: str | None = None
    reference: tuple[float, ...] = ()
    replicas: int = 1
    statistics: tuple[VersionStatistics, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "version": self.version,
            "fingerprint": self.fingerprint,
            "context": self.context,
            "vocabulary": self.vocabulary,
            "replicas": self.replicas,
            "error": self.error,
            "reload_error": self.reload_error,
            "statistics": [s.to_json() for s in self.statistics],
        }


def merged_status(statuses: Sequence[ModelStatus]) -> ModelStatus:
    """Replicas of one model as one: what most of them say, every error, all scores."""
    version = Counter(s.version for s in statuses).most_common(1)[0][0]
    by_version: dict[str, VersionStatistics] = {}
    for statistics in (s for status in statuses for s in status.statistics):
        seen = by_version.get(statistics.version)
        by_version[statistics.version] = seen.merged(statistics) if seen else statistics
    first = next(s for s in statuses if s.version == version)
    return replace(
        first,
        error=next((s.error for s in statuses if s.error), None),
        reload_error=next((s.reload_error for s in statuses if s.reload_error), None),
        replicas=sum(s.replicas for s in statuses),
        statistics=tuple(by_version.values()),
    )


def quantiles(scores: Sequence[float] | np.ndarray[Any, Any]) -> list[float]:
    """``REFERENCE_QUANTILES`` evenly spaced quantiles; empty without scores."""
    if len(scores) == 0:
        return []
    places = np.linspace(0, 1, REFERENCE_QUANTILES)
    found: list[float] = np.quantile(np.asarray(scores, np.float64), places).tolist()
    return found


def drift(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Mean distance between the quantiles of the scores and of the reference.

    That is the 1-Wasserstein distance of the two distributions, in units of score: the mean way
    that a score has to move to turn one into the other.

    Args:
        scores: At least one.
        reference: As ``quantiles`` gives them.
    """
    places = np.linspace(0, 1, len(reference))
    here = np.quantile(np.asarray(scores, np.float64), places)
    # Trapezoidal, so that the two ends weigh half.
    gaps = np.abs(here - np.asarray(reference, np.float64))
    return float(np.trapezoid(gaps, places))
