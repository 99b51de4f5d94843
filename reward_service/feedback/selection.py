"""Which pairs are worth asking about: those about which the reward model is least sure.

The prediction for a pair is Bradley and Terry's, p = sigmoid(score a - score b). One model is
least sure where p is near a half. Several models trained on the same judgements disagree where
judgements would teach most: that part of their uncertainty, the mutual information between the
answer and the model (Houlsby et al. 2011, BALD), is what an ensemble is asked for. Pairs that are
a matter of taste, on which all members say a half, do not count as uncertain then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Item = TypeVar("Item")


def uncertainty(margins: FloatArray) -> FloatArray:
    """``[N]`` between 0 and 1, from ``[M, N]`` score of a minus score of b by each of M models.

    Raises:
        ValueError: A margin that is not a number.
    """
    if not np.isfinite(margins).all():
        raise ValueError("a reward model gave a score that is not finite")
    p = 1 / (1 + np.exp(-np.clip(margins, -50, 50)))
    together = _entropy(p.mean(axis=0))
    if len(margins) == 1:
        return together
    disagreement: FloatArray = together - _entropy(p).mean(axis=0)
    return disagreement


def most_uncertain(items: Sequence[Item], values: FloatArray, count: int) -> list[Item]:
    """``count`` of the items, the highest values first; equal ones in the order given."""
    order = np.argsort(-values, kind="stable")
    return [items[int(n)] for n in order[:count]]


def _entropy(p: FloatArray) -> FloatArray:
    """In bits."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    entropy: FloatArray = -(q * np.log2(q) + (1 - q) * np.log2(1 - q))
    return entropy
