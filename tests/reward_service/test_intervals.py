"""Intervals against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reward_service.intervals import bootstrap_mean, share, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 12), (1, 30), (15, 30), (118, 128), (12, 12)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(k: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    got = wilson(k, n, confidence)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert got.value == k / n
    assert got.low <= got.value <= got.high


def test_wilson_refuses_nonsense() -> None:
    for successes, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="a share needs"):
            wilson(successes, n)


def test_bootstrap_of_single_samples_is_the_usual_standard_error() -> None:
    values = np.random.default_rng(5).normal(2.0, 1.5, size=400)
    got = bootstrap_mean([[v] for v in values], resamples=4000)
    half = 1.96 * values.std() / 20  # the normal interval, sqrt(400) = 20
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.012)
    assert got.high == pytest.approx(values.mean() + half, abs=0.012)
    assert got == bootstrap_mean([[v] for v in values], resamples=4000)


def test_bootstrap_resamples_prompts_not_samples() -> None:
    """Ten copies of one sample say no more than one: the interval must not shrink."""
    values = np.random.default_rng(6).normal(size=60)
    once = bootstrap_mean([[v] for v in values])
    copied = bootstrap_mean([[v] * 10 for v in values])
    assert copied.low == pytest.approx(once.low)
    assert copied.high == pytest.approx(once.high)


def test_bootstrap_weighs_samples_equally_and_agrees_with_scipy() -> None:
    rng = np.random.default_rng(7)
    groups = [list(rng.normal(size=rng.integers(1, 5))) for _ in range(80)]
    got = bootstrap_mean(groups, resamples=5000)
    assert got.value == pytest.approx(np.concatenate(groups).mean())
    sums, counts = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    independent = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx(tuple(independent), abs=0.02)


def test_bootstrap_needs_two_prompts() -> None:
    with pytest.raises(ValueError, match="at least 2 prompts"):
        bootstrap_mean([[1.0, 2.0]])
    with pytest.raises(ValueError, match="without samples"):
        bootstrap_mean([[1.0], []])


def test_share_chooses_the_apt_interval() -> None:
    assert share([[1], [0], [0.5], [1]]) == wilson(2.5, 4)
    several = share([[1, 0], [1, 1], [0, 0]])
    assert (several.method, several.value) == ("bootstrap", 0.5)
    # All alike: every resample is 1, and the bootstrap would claim certainty.
    assert share([[1, 1], [1, 1], [1, 1]]) == wilson(3, 3)
