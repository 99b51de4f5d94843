"""The record of one metric: what it means, where it is healthy, what to do when it is not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric, or all that a pattern such as ``reward/<term>`` names.

    Example:
        >>> Metric(name="ppo/clip_fraction", meaning="Share of tokens whose update was clipped.",
        ...        high=0.25, patience=3, remedy="Lower the learning rate.")

    Attributes:
        meaning: One or two sentences.
        unit: Of the values; empty for counts, shares and ratios.
        low, high: Ends of the healthy range, both inside it; ``None`` where it is open.
        coarse_low, coarse_high: The ends when engine or learner compute in 16 bits; ``None`` where
            precision makes no difference.
        patience: Steps in a row outside the range before it counts: 1 for what must never be.
        trend: What a healthy curve looks like, for a metric without a range.
        remedy: What to do outside the range, or when the trend is another.
    """

    name: str
    meaning: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    coarse_low: float | None = None
    coarse_high: float | None = None
    patience: int = 1
    trend: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.has_range == bool(self.trend):
            raise ValueError(f"metric {self.name!r} needs either a range or a trend")
        if self.has_range and not self.remedy:
            raise ValueError(f"metric {self.name!r} has a range but no remedy")
        for coarse in (False, True):
            low, high = self.limits(coarse)
            if not low < high and self.has_range and not low == high:
                raise ValueError(f"metric {self.name!r} has an empty range, {low} to {high}")
        if self.patience < 1:
            raise ValueError(f"metric {self.name!r} has a patience of {self.patience}, at least 1")

    @property
    def has_range(self) -> bool:
        return self.low is not None or self.high is not None

    def limits(self, coarse: bool) -> tuple[float, float]:
        """Ends of the healthy range; infinite where it is open."""
        low = self.coarse_low if coarse and self.coarse_low is not None else self.low
        high = self.coarse_high if coarse and self.coarse_high is not None else self.high
        return -math.inf if low is None else low, math.inf if high is None else high

    def healthy(self, coarse: bool = False) -> str:
        """``at most 0.25``, ``0.9 to 1.1``, or the trend."""
        if not self.has_range:
            return self.trend
        low, high = self.limits(coarse)
        unit = f" {self.unit}" if self.unit else ""
        if low == high:
            return f"{low:g}{unit}"
        if math.isinf(low):
            return f"at most {high:g}{unit}"
        if math.isinf(high):
            return f"at least {low:g}{unit}"
        return f"{low:g} to {high:g}{unit}"

    def names(self, name: str) -> bool:
        """Whether this record describes the metric called ``name``."""
        pattern = re.sub(r"<[^>]+>", "[^/]+", self.name)
        return re.fullmatch(pattern, name) is not None
