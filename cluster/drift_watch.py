"""Engine against learner, in every step: thresholds of drift, and what verifying weights costs.

Both compute log-probabilities from the same weights, so a difference beyond rounding means that
PPO corrects for samples of another distribution than it believes: stale weights, a sampling
filter, a temperature that only one side applies, another precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.weights import UpdateConfirmation, WeightUpdate
from learner.config import DriftConfig

Warn = Callable[[str], None]

REMEDY = (
    "`rlhf doctor --drift` with this configuration says which setting is to blame; if it is"
    " bfloat16 and meant to be, raise the threshold"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A metric of drift, in words, and the end of the names of the settings that limit it."""

    metric: str
    words: str
    setting: str
    small_is_good: bool

    def within(self, value: float, limit: float) -> bool:
        """False for NaN."""
        return value <= limit if self.small_is_good else value >= limit


FIGURES = (
    Figure(
        metric="ppo/engine_delta_mean", words="mean |Δ log p|", setting="mean", small_is_good=True
    ),
    Figure(
        metric="ppo/engine_delta_max", words="largest |Δ log p|", setting="max", small_is_good=True
    ),
    Figure(
        metric="ppo/effective_sample_size",
        words="effective sample size",
        setting="sample_size",
        small_is_good=False,
    ),
    Figure(
        metric="ppo/engine_correlation",
        words="correlation of log-probabilities",
        setting="correlation",
        small_is_good=False,
    ),
)


STALE_NAMES = {
    "ppo/engine_delta_mean": "ppo/stale_delta_mean",
    "ppo/engine_delta_max": "ppo/stale_delta_max",
    "ppo/effective_sample_size": "ppo/stale_sample_size",
    "ppo/engine_correlation": "ppo/stale_correlation",
}


class DriftWatch:
    """Looks at every step's figures; warns once a run for each, and stops it where it must.

    Args:
        warn: Called with a sentence, at most once for each figure and once a reloaded update.
    """

    def __init__(self, limits: DriftConfig, warn: Warn) -> None:
        self._limits = limits
        self._warn = warn
        self._warned: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called between the update and the broadcast: what is stopped here was written nowhere.

        Raises:
            RuntimeError: A figure is beyond its abort threshold; names value, threshold, remedy.
        """
        for _, sentence in violations(metrics, self._limits, "abort"):
            raise RuntimeError(
                f"PPO step {step + 1}: {sentence}. The step is given up and nothing of it was"
                f" saved. {REMEDY}"
            )
        for setting, sentence in violations(metrics, self._limits, "warn"):
            if setting not in self._warned:
                self._warned.add(setting)
                self._warn(f"PPO step {step + 1}: {sentence}; told once. {REMEDY}")

    def loaded(self, confirmations: Sequence[UpdateConfirmation]) -> None:
        """Tell of actors that had to be given an update twice."""
        for confirmation in confirmations:
            if confirmation.refusal:
                self._warn(
                    f"weight version {confirmation.version} was loaded again into"
                    f" {confirmation.actor}, and confirmed then. At first: {confirmation.refusal}"
                )


def violations(
    metrics: Mapping[str, float], limits: DriftConfig, level: str
) -> Iterator[tuple[str, str]]:
    """Setting and sentence of each figure beyond its threshold; ``level`` is warn or abort."""
    for figure in FIGURES:
        setting = f"{level}_{figure.setting}"
        limit: float | None = getattr(limits, setting)
        value = metrics[figure.metric]
        if limit is not None and not figure.within(value, limit):
            side = "above" if figure.small_is_good else "below"
            yield (
                setting,
                f"{figure.words} between engine and learner is {value:.3g}, {side}"
                f" {limit:g} (ppo.drift.{setting})",
            )


def as_stale(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of a step whose samples older weights made, under names of their own.

    They then say how far the policy has moved since (what ``ppo.importance_cap`` corrects for),
    not whether engine and learner agree: the probe alone shows that, when weights are loaded.
    """
    return {STALE_NAMES.get(name, name): value for name, value in metrics.items()}


def weight_metrics(
    update: WeightUpdate, confirmations: Sequence[UpdateConfirmation], step_seconds: float
) -> dict[str, float]:
    """What an update was and what proving it cost, named ``weights/...``.

    Costs are of the learner and of the slowest actor. On the learner the probe is computed while
    the tensors are copied, so the sum is an upper bound of what the step would be shorter by.

    Args:
        step_seconds: The whole step, broadcast included.
    """
    checksum = update.seconds_checksum + max(c.seconds_verify for c in confirmations)
    probe = update.seconds_probe + max(c.seconds_probe for c in confirmations)
    errors = [c.probe_max_error for c in confirmations if not math.isnan(c.probe_max_error)]
    figures = {
        "seconds_checksum": checksum,
        "seconds_probe": probe,
        "seconds_load": max(c.seconds_load for c in confirmations),
        "verify_share": (checksum + probe) / step_seconds,
        "megabytes": update.nbytes / 1e6,
        "reloads": float(sum(bool(c.refusal) for c in confirmations)),
    }
    if errors:
        figures["probe_error_max"] = max(errors)
    return {f"weights/{name}": value for name, value in figures.items()}
