"""How well judges agree, what sways them, and how to read it: one report, as JSON-able values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_service.comparison import Choice, Comparison, Rating
from reward_service.feedback.agreement import (
    Array,
    Codes,
    Counts,
    bootstrap_interval,
    counts_of_codes,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    mean_cohen_kappa,
    percent_agreement,
)
from reward_service.feedback.agreement_words import reading, summary
from reward_service.feedback.judges import Quality
from reward_service.feedback.store import FeedbackStore
from reward_service.intervals import share

CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad")


def agreement_report(
    comparisons: Sequence[Comparison],
    *,
    quality: Quality | None = None,
    tasks: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is worth knowing of a set of judgements, as JSON-able values.

    The last judgement of a judge on an item counts. Shares come as ``{"value", "low", "high",
    "n"}`` with 95 % intervals; ``None`` stands for what these judgements cannot tell.

    Args:
        quality: True quality of (prompt_id, response text), where the data has one.
        tasks: item id -> the task that it was judged in, where one task gives several items: these
            depend on each other, so intervals are over tasks, and ``n`` counts tasks.

    Returns:
        ``comparisons``, ``items``, ``judges`` counts; ``choices`` count of each; ``percent``,
        ``cohen`` (mean over pairs of judges), ``fleiss``, ``alpha``, ``graded_alpha`` (ordinal,
        with the strength), ``ac1``, each with a sentence on how to read it; ``leave_one_out`` (a
        judge against the majority of the others: what a reward model can hope for);
        ``per_judge`` list with biases; ``majority_accuracy`` against true quality or ``None``;
        ``summary``, one paragraph on how to read it.
    """
    items = _by_item(comparisons)
    codes, graded = _codes(items), _graded(items)
    labels = max(2, int(codes.max(initial=0)) + 1)
    counts = counts_of_codes(codes, labels)
    tasks = tasks or {}
    judged_in = [tasks.get(item, item) for item in items] if tasks else None
    others = _against_others(items)
    report: dict[str, Any] = {
        "comparisons": sum(len(votes) for votes in items.values()),
        "items": len(items),
        "judges": len({name for votes in items.values() for name in votes}),
        "choices": {
            choice: sum(c.choice == choice for votes in items.values() for c in votes.values())
            for choice in CHOICES
        },
        "percent": measured("percent", counts, percent_agreement, seed, tasks=judged_in),
        "cohen": measured("cohen", codes, mean_cohen_kappa, seed, resamples=200, tasks=judged_in),
        "fleiss": measured("fleiss", counts, fleiss_kappa, seed, tasks=judged_in),
        "alpha": measured("alpha", counts, krippendorff_alpha, seed, tasks=judged_in),
        "graded_alpha": measured(
            "graded_alpha",
            counts_of_codes(graded, 7),
            lambda c: krippendorff_alpha(c, "ordinal"),
            seed,
            tasks=judged_in,
        ),
        "ac1": measured("ac1", counts, gwet_ac1, seed, tasks=judged_in),
        "leave_one_out": _share([hit for hits in others.values() for hit in hits], tasks),
        "per_judge": [
            _judge_report(name, items, others[name], tasks)
            for name in sorted({name for votes in items.values() for name in votes})
        ],
        "majority_accuracy": None if quality is None else _share(_right(items, quality), tasks),
    }
    report["summary"] = summary(report)
    return report


def store_report(store: FeedbackStore, *, seed: int = 0) -> dict[str, Any]:
    """``agreement_report`` of all that was said: comparisons and those that rankings imply.

    ``rankings`` is their count and ``ratings`` the ``rating_report``; the summary names both.
    """
    rankings = store.rankings()
    implied = [(c, ranking.item_id) for ranking in rankings for c in ranking.comparisons()]
    said = store.comparisons() + [c for c, _ in implied]
    tasks = {c.pair.item_id: task for c, task in implied}
    report = agreement_report(said, tasks=tasks, seed=seed) | {
        "rankings": len(rankings),
        "ratings": rating_report(store.ratings(), seed=seed),
    }
    return report | {"summary": summary(report)}


Items = dict[str, dict[str, Comparison]]
"""item id -> judge -> judgement."""


def _by_item(comparisons: Sequence[Comparison]) -> Items:
    items: Items = {}
    for comparison in comparisons:
        votes = items.setdefault(comparison.pair.item_id, {})
        votes[comparison.annotator.annotator_id] = comparison
    return items


def _codes(items: Items) -> Codes:
    """``[N, J]`` over the choices that occur, numbered in the order of ``CHOICES``."""
    judges = sorted({name for votes in items.values() for name in votes})
    used = [c for c in CHOICES if any(v.choice == c for vs in items.values() for v in vs.values())]
    return _table(items, judges, lambda vote: used.index(vote.choice))


def _graded(items: Items) -> Codes:
    """``[N, J]`` 0 (a by far) to 6 (b by far); 3 is a tie of either kind."""
    judges = sorted({name for votes in items.values() for name in votes})

    def grade(vote: Comparison) -> int:
        sign = {"a": -1, "b": 1}.get(vote.choice, 0)
        return 3 + sign * vote.strength

    return _table(items, judges, grade)


def _table(items: Items, judges: Sequence[str], code: Callable[[Comparison], int]) -> Codes:
    codes = np.full((len(items), len(judges)), -1, np.int64)
    column = {name: number for number, name in enumerate(judges)}
    for row, votes in enumerate(items.values()):
        for name, vote in votes.items():
            codes[row, column[name]] = code(vote)
    return codes


def choice_counts(choices: Sequence[Sequence[Choice]]) -> Counts:
    """``[N, 4]`` of the choices made on each item."""
    return np.array([[votes.count(c) for c in CHOICES] for votes in choices], np.int64)


def rating_report(ratings: Sequence[Rating], *, seed: int = 0) -> dict[str, Any]:
    """Agreement on ratings, criterion by criterion: percent, ordinal and interval alpha."""
    report: dict[str, Any] = {}
    for criterion in sorted({r.criterion for r in ratings}):
        own = [r for r in ratings if r.criterion == criterion]
        items = sorted({r.item_id for r in own})
        judges = sorted({r.annotator.annotator_id for r in own})
        codes = np.full((len(items), len(judges)), -1, np.int64)
        for r in own:
            codes[items.index(r.item_id), judges.index(r.annotator.annotator_id)] = r.value - 1
        counts = counts_of_codes(codes, 5)
        report[criterion] = {
            "ratings": len(own),
            "mean": float(np.mean([r.value for r in own])),
            "percent": measured("percent", counts, percent_agreement, seed),
            "ordinal_alpha": measured(
                "alpha", counts, lambda c: krippendorff_alpha(c, "ordinal"), seed
            ),
            "interval_alpha": measured(
                "alpha", counts, lambda c: krippendorff_alpha(c, "interval"), seed
            ),
        }
    return report


def measured(
    name: str,
    items: Array,
    measure: Callable[[Array], float | None],
    seed: int,
    *,
    resamples: int = 500,
    tasks: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """A coefficient with its interval and how to read it; ``None`` where it is undefined.

    Args:
        tasks: ``[N]`` the task that each item was judged in; default: each is one of its own.
    """
    value = measure(items) if len(items) else None
    if value is None:
        return None
    interval = bootstrap_interval(items, measure, seed=seed, resamples=resamples, clusters=tasks)
    counted = (items >= 0).sum(axis=1) if name == "cohen" else items.sum(axis=1)
    shared = np.flatnonzero(counted >= 2).tolist()
    low, high = interval if interval is not None else (None, None)
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": len(shared) if tasks is None else len({tasks[i] for i in shared}),
        "reading": reading(name, value),
    }


Hit = tuple[str, float]
"""(item id, a value in [0, 1])"""


def _share(hits: Sequence[Hit], tasks: Mapping[str, str]) -> dict[str, Any] | None:
    """A share whose interval is over tasks, where one has given several items."""
    if not hits:
        return None
    by_task: dict[str | int, list[float]] = {}
    for number, (item, value) in enumerate(hits):
        by_task.setdefault(tasks.get(item, number), []).append(value)
    found = share(list(by_task.values()))
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _majority(choices: Sequence[Choice]) -> Choice | None:
    """The most frequent choice, ``None`` when two are equally frequent."""
    ranked = sorted(((choices.count(c), c) for c in set(choices)), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _against_others(items: Items) -> dict[str, list[Hit]]:
    """For each judge, 1 or 0 for each item where the others have a majority."""
    hits: dict[str, list[Hit]] = {}
    for item, votes in items.items():
        for name, vote in votes.items():
            own = hits.setdefault(name, [])
            rest = _majority([v.choice for other, v in votes.items() if other != name])
            if rest is not None:
                own.append((item, float(vote.choice == rest)))
    return hits


def _judge_report(
    name: str, items: Items, hits: Sequence[Hit], tasks: Mapping[str, str]
) -> dict[str, Any]:
    """What one judge does, and what sways them.

    ``first_share``: how often the response shown first wins, where the order is known; 0.5 without
    bias, as it is random. ``longer_share``: how often the longer one wins. Longer may simply be
    better, so ``longer_excess`` takes off what the other judges said of the same items.
    """
    own = [votes[name] for votes in items.values() if name in votes]
    decided = [c for c in own if c.choice in ("a", "b")]
    longer: list[Hit] = []
    excess: dict[str, list[float]] = {}
    for comparison in decided:
        mine = _chose_longer(comparison)
        if mine is None:
            continue
        item = comparison.pair.item_id
        longer.append((item, mine))
        votes = items[item]
        rest = [_chose_longer(v) for other, v in votes.items() if other != name]
        known = [r for r in rest if r is not None]
        if known:
            excess.setdefault(tasks.get(item, item), []).append(mine - sum(known) / len(known))
    seconds = {tasks.get(c.pair.item_id, c.pair.item_id): c.seconds for c in own}
    first = [(c.pair.item_id, float(c.choice == c.shown_first)) for c in decided if c.shown_first]
    return {
        "judge": name,
        "judgements": len(own),
        "with_the_others": _share(hits, tasks),
        "first_share": _share(first, tasks),
        "longer_share": _share(longer, tasks),
        "longer_excess": _mean([float(np.mean(found)) for found in excess.values()]),
        "tie_share": 1 - len(decided) / len(own),
        "seconds": float(np.median(list(seconds.values()))),
    }


def _chose_longer(comparison: Comparison) -> float | None:
    """1 when the longer response won, 0 when the shorter, ``None`` when neither can be said."""
    difference = len(comparison.pair.a.text) - len(comparison.pair.b.text)
    if difference == 0 or comparison.choice not in ("a", "b"):
        return None
    return float((comparison.choice == "a") == (difference > 0))


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    """A mean with its normal 95 % interval; ``None`` where the values cannot tell one."""
    if len(values) < 2 or len(set(values)) == 1:
        return None
    mean = float(np.mean(values))
    half = 1.959964 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def _right(items: Items, quality: Quality) -> list[Hit]:
    """Whether the majority preferred the truly better response, where there is one of each."""
    hits: list[Hit] = []
    for item, votes in items.items():
        pair = next(iter(votes.values())).pair
        winner = _majority([vote.choice for vote in votes.values()])
        a, b = quality(pair.prompt_id, pair.a.text), quality(pair.prompt_id, pair.b.text)
        if winner in ("a", "b") and a != b:
            hits.append((item, float((winner == "a") == (a > b))))
    return hits
