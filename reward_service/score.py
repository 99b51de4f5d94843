"""Records of scoring: what is scored, what a model answers, and the reward of one trajectory."""

from __future__ import annotations

import hashlib
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
        components: The unweighted value of each term of a weighted sum, by name; and of each
            member of an ensemble among them.
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
class ItemIds:
    """A prompt and a response as token ids; EOS at the end may be there or not."""

    prompt: tuple[int, ...] = ()
    response: tuple[int, ...]


class NotLoaded(RuntimeError):
    """A replica has no model, as its files could not be read: another one may have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """One text to score: a response after its prompt, or after a dialogue.

    ``prompt`` is ignored when there are ``messages``; a bare text is a response to "". With
    ``ids`` (those of the reward model's own tokenizer) the texts are ignored altogether.
    """

    response: str = ""
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    ids: ItemIds | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreCall:
    """What a caller of the service asks for.

    ``timeout_s`` is the time that is left for it. Calls with the same ``key`` are scored once.
    """

    model: str
    items: tuple[ScoreItem, ...]
    timeout_s: float
    truncation: Truncation = "error"
    per_token: bool = False
    key: str = ""

    def content(self) -> str:
        """Hash of all that decides the answer."""
        parts = (self.model, self.items, self.truncation, self.per_token)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


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
        per_token: Empty when it was not asked for. Else for each item what the scalar head says
            (normalised as the score is) at each token of its response, EOS included: the score
            that the text would have if it were read there. The last one is the score. They are
            values of prefixes: rewards that sum to the score are their differences.
        probability: Scores are probabilities already, as a classifier's are.
    """

    model: str
    version: str
    fingerprint: str
    scores: tuple[float | None, ...]
    tokens: tuple[int, ...]
    errors: tuple[str | None, ...]
    per_token: tuple[tuple[float, ...] | None, ...] = ()
    members: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    probability: bool = False

    def __post_init__(self) -> None:
        if self.per_token and len(self.per_token) != len(self.scores):
            raise ValueError(
                f"model {self.model}: {len(self.per_token)} lists of per-token values for "
                f"{len(self.scores)} items"
            )
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
        for values in self.per_token:
            if values is not None and not all(map(math.isfinite, values)):
                raise ValueError(f"model {self.model}: a per-token value is not finite")


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
