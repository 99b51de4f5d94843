"""Record of a score: what a reward says about one trajectory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from actors.trajectory import Float32Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Score:
    """The reward of one sample.

    Attributes:
        sample_id: The trajectory's ``sample_id``.
        value: The sequence reward. With per-token rewards, their sum.
        per_token: ``[R]`` a reward for each response token (R = sum of r_i), or ``None`` when
            the reward belongs to the sequence as a whole.
        components: The unweighted value of each term of a weighted sum, by name.
        model_version: Which reward model and version gave it, empty for functions.
    """

    sample_id: str
    value: float
    per_token: Float32Array | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    model_version: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"sample {self.sample_id}: the reward is {self.value}")
        if self.per_token is not None and not np.isclose(
            float(self.per_token.sum(dtype=np.float64)), self.value, rtol=1e-4, atol=1e-5
        ):
            raise ValueError(
                f"sample {self.sample_id}: per-token rewards sum to {self.per_token.sum()}, "
                f"the value is {self.value}"
            )
