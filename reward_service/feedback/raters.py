"""How far each person can be relied on: gold items, second looks, bias and speed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_service.comparison import Comparison, Ranking
from reward_service.feedback.agreement import wilson_interval
from reward_service.feedback.store import Entry, FeedbackStore, identity
from reward_service.feedback.tasks import Answer

FAST = 3.5
"""Robust standard scores below which a person is unusually fast (Iglewicz and Hoaglin 1993)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A share with its 95 % Wilson interval, of ``n`` cases."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RaterQuality:
    """One person's figures; ``None`` where there is no case.

    Attributes:
        gold: How often right on items with a known answer (see ``agree``).
        self_consistency: How often the second look at an item says the same as the first.
        first_share: How often what was shown first wins; 0.5 without bias. Only judgements whose
            order is known count.
        longer_share: How often the longer one wins; longer may simply be better.
        seconds: Median time of a judgement.
        too_fast: Much faster than the others on the same kind of work, or below two seconds.
    """

    annotator_id: str
    judgements: int
    gold: Ratio | None
    self_consistency: Ratio | None
    first_share: Ratio | None
    longer_share: Ratio | None
    seconds: float | None
    too_fast: bool


def rater_quality(store: FeedbackStore) -> list[RaterQuality]:
    """Everybody who judged something, most judgements first."""
    history: list[Entry[Any]] = [
        *store.comparison_history(),
        *store.rating_history(),
        *store.ranking_history(),
    ]
    return quality_of(history, store.gold_answers())


def quality_of(history: Sequence[Entry[Any]], gold: Mapping[str, Answer]) -> list[RaterQuality]:
    """As ``rater_quality``, of a history and the known answers of gold items."""
    looks: dict[str, dict[tuple[str, int], Look]] = defaultdict(lambda: defaultdict(dict))
    for entry in history:
        item, who, criterion = identity(entry.judgement)
        look = looks[who][item, entry.repeat]
        if entry.withdrawn:
            look.pop(criterion, None)
        else:
            look[criterion] = entry.judgement
    said = {who: {place: look for place, look in own.items() if look} for who, own in looks.items()}
    timed = {
        who: [math.log(max(0.1, s)) for look in own.values() if (s := _seconds(look)) > 0]
        for who, own in said.items()
    }
    pace = {who: float(np.median(values)) for who, values in timed.items() if values}
    slow = _robust_scores(pace)
    found = [
        _one(who, own, gold, pace.get(who), slow.get(who, 0.0)) for who, own in said.items() if own
    ]
    return sorted(found, key=lambda quality: -quality.judgements)


def agree(one: Answer, other: Answer) -> bool:
    """The same choice, the same best text, or ratings within one point on each criterion."""
    if "choice" in one:
        return bool(one["choice"] == other["choice"])
    if "ranking" in one:
        return bool(one["ranking"][0] == other["ranking"][0])
    return all(
        abs(value - other["ratings"][criterion]) <= 1
        for criterion, value in one["ratings"].items()
        if criterion in other["ratings"]
    )


Look = dict[str, Any]
"""What one person said in one look at an item: criterion ("" without one) -> judgement."""


def _answer(look: Look) -> Answer:
    said = next(iter(look.values()))
    if isinstance(said, Comparison):
        return {"choice": said.choice}
    if isinstance(said, Ranking):
        return {"ranking": said.ranking}
    return {"ratings": {criterion: rating.value for criterion, rating in look.items()}}


def _seconds(look: Look) -> float:
    """Ratings have no time of their own."""
    return float(getattr(next(iter(look.values())), "seconds", 0.0))


def _one(
    who: str,
    own: Mapping[tuple[str, int], Look],
    gold: Mapping[str, Answer],
    pace: float | None,
    score: float,
) -> RaterQuality:
    first = {item: _answer(look) for (item, repeat), look in own.items() if repeat == 0}
    again = {item: _answer(look) for (item, repeat), look in own.items() if repeat == 1}
    compared = [c for look in own.values() for c in look.values() if isinstance(c, Comparison)]
    decided = [c for c in compared if c.choice in ("a", "b")]
    lengths = [(c, len(c.pair.a.text) - len(c.pair.b.text)) for c in decided]
    seconds = None if pace is None else math.exp(pace)
    return RaterQuality(
        annotator_id=who,
        judgements=len(own),
        gold=_ratio([agree(answer, gold[item]) for item, answer in first.items() if item in gold]),
        self_consistency=_ratio(
            [agree(first[item], answer) for item, answer in again.items() if item in first]
        ),
        first_share=_ratio([c.choice == c.shown_first for c in decided if c.shown_first]),
        longer_share=_ratio([(c.choice == "a") == (d > 0) for c, d in lengths if d]),
        seconds=seconds,
        too_fast=len(own) >= 10 and seconds is not None and (score < -FAST or seconds < 2.0),
    )


def _ratio(hits: Sequence[bool]) -> Ratio | None:
    if not hits:
        return None
    low, high = wilson_interval(sum(hits), len(hits))
    return Ratio(value=sum(hits) / len(hits), low=low, high=high, n=len(hits))


def _robust_scores(values: dict[str, float]) -> dict[str, float]:
    """0.6745 (x - median) / MAD: a few outliers do not hide each other. 0 for everybody when
    fewer than five can be compared."""
    if len(values) < 5:
        return {}
    numbers = np.array(list(values.values()))
    middle = float(np.median(numbers))
    # People whose pace is within 10 % of each other are not told apart.
    spread = max(0.1, float(np.median(np.abs(numbers - middle))))
    return {who: 0.6745 * (value - middle) / spread for who, value in values.items()}
