"""Simulated judges: each with noise and biases of its own, on a true quality given by a function.

A judgement is a pure function of (seed, judge, item): judging again, in any order, gives the same
one. Their judgements go through the same records and store as people's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_service.comparison import Annotator, Choice, Comparison, Pair
from reward_service.config import JudgeConfig

Quality = Callable[[str, str], float]
"""True quality of (prompt_id, response text), about 0 to 1."""

CLEARLY, FAR = 0.15, 0.35
"""Perceived differences from which a preference is clear (2), and far better (3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedJudge:
    """Perceives ``quality + noise``, and favours position and length a little.

    Attributes:
        name: Its pseudonym.
        noise: Standard deviation added to the quality of each response.
        position_bias: Added to the response shown first; negative favours the second.
        length_bias: Added to a response for each time that it is twice as long as the other.
        tie_margin: A smaller perceived difference is a tie, or both bad.
        both_bad_below: Of two that tie, both perceived below this are both bad.
        seed: Seed of the run.
    """

    name: str
    noise: float
    position_bias: float
    length_bias: float
    tie_margin: float
    both_bad_below: float
    seed: int

    def judge(self, pair: Pair, quality: Quality) -> Comparison:
        """This judge's judgement of a pair. Raises ValueError when a quality is not finite."""
        rng = _rng(self.seed, self.name, pair.item_id)
        shown_first: Choice = "a" if rng.random() < 0.5 else "b"
        perceived = []
        for candidate in (pair.a, pair.b):
            true = quality(pair.prompt_id, candidate.text)
            if not math.isfinite(true):
                raise ValueError(f"item {pair.item_id}: the quality of a response is {true}")
            perceived.append(true + self.noise * rng.standard_normal())
        doublings = math.log2(max(1, len(pair.a.text)) / max(1, len(pair.b.text)))
        difference = perceived[0] - perceived[1] + self.length_bias * doublings
        difference += self.position_bias if shown_first == "a" else -self.position_bias
        choice: Choice
        if abs(difference) >= self.tie_margin and difference != 0:
            choice = "a" if difference > 0 else "b"
        else:
            choice = "both_bad" if max(perceived) < self.both_bad_below else "tie"
        size = abs(difference)
        return Comparison(
            pair=pair,
            annotator=Annotator(annotator_id=self.name, kind="simulated"),
            choice=choice,
            strength=1 + (size >= CLEARLY) + (size >= FAR),
            shown_first="a" if shown_first == "a" else "b",
        )


def make_judges(config: JudgeConfig, seed: int) -> list[SimulatedJudge]:
    """The judges of a run. Noise lies within half and one and a half times ``config.noise``;
    biases are normal around 0 with the configured spread, so judges differ in sign."""
    judges = []
    for number in range(config.judges):
        name = f"judge-{number + 1}"
        rng = _rng(seed, name)
        judges.append(
            SimulatedJudge(
                name=name,
                noise=config.noise * rng.uniform(0.5, 1.5),
                position_bias=config.position_bias * rng.standard_normal(),
                length_bias=config.length_bias * rng.standard_normal(),
                tie_margin=config.tie_margin,
                both_bad_below=config.both_bad_below,
                seed=seed,
            )
        )
    return judges


def assign(
    pair: Pair, judges: Sequence[SimulatedJudge], per_pair: int, seed: int
) -> list[SimulatedJudge]:
    """``per_pair`` different judges for a pair, drawn at random but always the same ones."""
    if not 1 <= per_pair <= len(judges):
        raise ValueError(f"cannot assign {per_pair} of {len(judges)} judges to a pair")
    chosen = _rng(seed, "assign", pair.item_id).permutation(len(judges))[:per_pair]
    return [judges[number] for number in sorted(chosen)]


def is_shared(pair: Pair, share: float, seed: int) -> bool:
    """Whether several judges see this pair; always the same answer for a pair."""
    return bool(_rng(seed, "shared", pair.item_id).random() < share)


def _rng(seed: int, *key: str) -> np.random.Generator:
    text = "\x00".join([str(seed), *key])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
