"""Figures of a batch, by hand."""

from __future__ import annotations

import pytest
import torch

from learner.statistics import correlation


def test_correlation_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 4.0, 6.0, 9.0])
    # Sxy = 11.5, Sxx = 5, Syy = 26.75
    assert float(correlation(a, b)) == pytest.approx(11.5 / (5 * 26.75) ** 0.5)
    assert float(correlation(a, -b)) == pytest.approx(-11.5 / (5 * 26.75) ** 0.5)
    assert float(correlation(a, 3 * a - 7)) == pytest.approx(1.0)


def test_correlation_of_what_does_not_vary_is_not_left_to_rounding() -> None:
    still = torch.tensor([-0.1, -0.1 + 1e-7, -0.1])
    assert float(correlation(still, still.flip(0) + 1e-7)) == 1.0
    assert float(correlation(still, torch.tensor([-1.0, -2.0, -3.0]))) == 0.0


def test_rounding_does_not_spoil_the_correlation_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a = -6 + torch.randn(1000, generator=generator)
    assert float(correlation(a, a + 1e-6 * torch.randn(1000, generator=generator))) > 1 - 1e-9
