"""How far each person can be relied on: gold items, second looks, bias and speed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import select

from reward_service.comparison import Comparison
from reward_service.feedback.agreement import wilson_interval
from reward_service.feedback.schema import tasks
from reward_service.feedback.store import Entry, FeedbackStore, identity

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
        gold: How often right on items with a known answer.
        self_consistency: How often the second look at an item says the same as the first.
        first_share: How often what was shown first wins; 0.5 without bias.
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
    """Everybody who compared something, most judgements first."""
    query = select(tasks.c.task_id, tasks.c.gold).where(tasks.c.gold.is_not(None))
    known = store.database.read(lambda c: {r.task_id: r.gold for r in c.execute(query)})
    gold = {task: answer["choice"] for task, answer in known.items() if "choice" in answer}
    return quality_of(store.comparison_history(), gold)


def quality_of(history: Sequence[Entry[Comparison]], gold: dict[str, str]) -> list[RaterQuality]:
    """As ``rater_quality``, of a history and the known choices of gold items."""
    looks: dict[str, dict[tuple[str, int], Comparison]] = defaultdict(dict)
    for entry in history:
        item, who, _ = identity(entry.judgement)
        if entry.withdrawn:
            looks[who].pop((item, entry.repeat), None)
        else:
            looks[who][item, entry.repeat] = entry.judgement
    pace = {
        who: float(np.median([math.log(max(0.1, c.seconds)) for c in own.values()]))
        for who, own in looks.items()
        if own and any(c.seconds > 0 for c in own.values())
    }
    slow = _robust_scores(pace)
    found = [
        _one(who, own, gold, pace.get(who), slow.get(who, 0.0)) for who, own in looks.items() if own
    ]
    return sorted(found, key=lambda quality: -quality.judgements)


def _one(
    who: str,
    own: dict[tuple[str, int], Comparison],
    gold: dict[str, str],
    pace: float | None,
    score: float,
) -> RaterQuality:
    first_looks = {item: c for (item, repeat), c in own.items() if repeat == 0}
    again = {item: c for (item, repeat), c in own.items() if repeat == 1}
    decided = [c for c in own.values() if c.choice in ("a", "b")]
    lengths = [(c, len(c.pair.a.text) - len(c.pair.b.text)) for c in decided]
    seconds = None if pace is None else math.exp(pace)
    return RaterQuality(
        annotator_id=who,
        judgements=len(own),
        gold=_ratio([c.choice == gold[i] for i, c in first_looks.items() if i in gold]),
        self_consistency=_ratio(
            [first_looks[i].choice == c.choice for i, c in again.items() if i in first_looks]
        ),
        first_share=_ratio([c.choice == c.shown_first for c in decided]),
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
