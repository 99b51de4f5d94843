"""Several reward models as one: pure combination of their scores, and a scorer that asks them all.

A policy that exploits the mistakes of one model rarely exploits those of all (Coste et al. 2023,
arXiv 2310.02743): the minimum and the lower confidence bound pay only for what all believe in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from reward_service.config import Combination, EnsembleConfig
from reward_service.encoding import Truncation
from reward_service.score import ModelScores, ScoreItem, Scorer


def combined(scores: Sequence[float], how: Combination, penalty: float) -> float:
    """One score of several models' scores.

    ``lower_bound`` is mean - penalty x standard deviation, that of a sample (n - 1 below).
    """
    mean = math.fsum(scores) / len(scores)
    if how == "mean":
        return mean
    if how == "minimum":
        return min(scores)
    squares = math.fsum((score - mean) ** 2 for score in scores)
    return mean - penalty * math.sqrt(squares / (len(scores) - 1))


def combine_answers(
    name: str, answers: Sequence[ModelScores], config: EnsembleConfig
) -> ModelScores:
    """Members' answers to the same items as one answer.

    An item that one member cannot score has no score. Versions and fingerprints are the members',
    joined by ``+``. Per-token values are left out: members may cut texts into other tokens.
    """
    scores: list[float | None] = []
    errors: list[str | None] = []
    rows = zip(*(a.scores for a in answers), strict=True)
    reasons = zip(*(a.errors for a in answers), strict=True)
    for row, row_errors in zip(rows, reasons, strict=True):
        failed = [
            f"{answer.model}: {error}"
            for answer, error in zip(answers, row_errors, strict=True)
            if error is not None
        ]
        found = [score for score in row if score is not None]
        errors.append(failed[0] if failed else None)
        scores.append(None if failed else combined(found, config.combine, config.penalty))
    return ModelScores(
        model=name,
        version="+".join(a.version for a in answers),
        fingerprint="+".join(a.fingerprint for a in answers),
        scores=tuple(scores),
        tokens=tuple(map(max, *(a.tokens for a in answers))),
        errors=tuple(errors),
        members={answer.model: answer.scores for answer in answers},
        probability=all(answer.probability for answer in answers),
    )


class EnsembleScorer:
    """Asks all members at the same time and combines what they say."""

    def __init__(self, name: str, members: Sequence[Scorer], config: EnsembleConfig) -> None:
        self._name = name
        self._members = list(members)
        self._config = config

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        with ThreadPoolExecutor(len(self._members)) as pool:
            answers = list(pool.map(lambda member: member.score(items, truncation), self._members))
        return combine_answers(self._name, answers, self._config)
