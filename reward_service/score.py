"""Records of scoring: what is scored, what a model answers, and the reward of one trajectory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from actors.trajectory import Float32Array, Message
from reward_service.encoding import Truncation


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """One text to score: a response after its prompt, or after a dialogue.

    ``prompt`` is ignored when there are ``messages``; a bare text is a response to "".
    """

    response: str
    prompt: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScores:
    """What one reward model answers to a list of items, in their order.

    Attributes:
        model: The name it is served under.
        version: Hash of its weights and normalisation.
        fingerprint: Of its tokenizer and chat template.
        scores: The normalised score of each item, ``None`` where there is an error instead.
        tokens: How many tokens of each item were scored, 0 where there is an error.
        errors: Why an item could not be scored, ``None`` where it was.
    """

    model: str
    version: str
    fingerprint: str
    scores: tuple[float | None, ...]
    tokens: tuple[int, ...]
    errors: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.tokens) == len(self.errors):
            raise ValueError(
                f"model {self.model}: {len(self.scores)} scores, {len(self.tokens)} token counts "
                f"and {len(self.errors)} errors must be equally many"
            )
        for score, error in zip(self.scores, self.errors, strict=True):
            if (score is None) == (error is None):
                raise ValueError(f"model {self.model}: an item has a score or an error, not both")
            if score is not None and not math.isfinite(score):
                raise ValueError(f"model {self.model}: a score is {score}")


class RewardUnavailable(RuntimeError):
    """Nothing can be scored for now: a server is down, overloaded or changing its model. The same
    call may succeed later."""


class Scorer(Protocol):
    """A reward model wherever it runs: in this process, behind a handle, or behind a URL."""

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        """Score every item, in order. Safe to call from any thread.

        Raises:
            RewardUnavailable, TimeoutError: Not now; trying again later makes sense.
        """
        ...
