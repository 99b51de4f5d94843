"""How well judges agree, what sways them, and how to read it.

Agreement is over the four choices as names: a, b, tie, both_bad. Two chance-corrected measures
stand side by side, because each misleads on its own: Krippendorff's alpha collapses when one
choice is rare, Gwet's AC1 flatters when choices are even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import krippendorff
import numpy as np
import numpy.typing as npt

from reward_service.comparison import Choice, Comparison
from reward_service.feedback.judges import Quality

Counts = npt.NDArray[np.int64]
"""``[N, V]``: how many judges gave item n the label v."""

CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad")


def percent_agreement(counts: Counts) -> float | None:
    """Share of pairs of judges of the same item that agree, averaged over items.

    Items with one judgement say nothing; ``None`` when there are no others.
    """
    judges = counts.sum(axis=1)
    several = judges >= 2
    if not several.any():
        return None
    n, c = judges[several], counts[several]
    return float(((c * (c - 1)).sum(axis=1) / (n * (n - 1))).mean())


def krippendorff_alpha(counts: Counts, level: str = "nominal") -> float | None:
    """Krippendorff's alpha (2011). ``None`` when undefined: no item with two judgements, or one
    label throughout, so that chance agreement is 1."""
    several = counts[counts.sum(axis=1) >= 2]
    if not len(several) or (several.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=several, level_of_measurement=level))


def gwet_ac1(counts: Counts) -> float | None:
    """Gwet's AC1 (2008) for any number of judges, with missing judgements.

    Chance agreement is sum over labels of p (1 - p) / (V - 1), with p the mean share of a label
    over all items and V the number of labels (columns).
    """
    observed = percent_agreement(counts)
    if observed is None:
        return None
    judged = counts[counts.sum(axis=1) >= 1]
    shares = (judged / judged.sum(axis=1, keepdims=True)).mean(axis=0)  # [V]
    chance = float((shares * (1 - shares)).sum() / max(1, counts.shape[1] - 1))
    return (observed - chance) / (1 - chance)


def bootstrap_interval(
    counts: Counts,
    measure: Callable[[Counts], float | None],
    *,
    seed: int,
    resamples: int = 500,
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of a measure over resampled items; ``None`` where it is undefined."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        value = measure(counts[rng.integers(0, len(counts), len(counts))])
        if value is not None:
            values.append(value)
    if len(values) < resamples / 2:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def agreement_report(
    comparisons: Sequence[Comparison], *, quality: Quality | None = None, seed: int = 0
) -> dict[str, Any]:
    """Everything that is worth knowing of a set of judgements, as JSON-able values.

    The last judgement of a judge on an item counts. Shares come as ``{"value", "low", "high",
    "n"}`` with 95 % intervals; ``None`` stands for what these judgements cannot tell.

    Args:
        quality: True quality of (prompt_id, response text), where the data has one.

    Returns:
        ``comparisons``, ``items``, ``judges`` counts; ``choices`` count of each; ``percent``,
        ``alpha``, ``ac1``; ``leave_one_out`` (a judge against the majority of the others: what
        a reward model can hope for); ``per_judge`` list with biases; ``majority_accuracy``
        against true quality or ``None``; ``summary``, one paragraph on how to read it.
    """
    items = _by_item(comparisons)
    counts = _counts(items)
    others = _against_others(items)
    report: dict[str, Any] = {
        "comparisons": sum(len(votes) for votes in items.values()),
        "items": len(items),
        "judges": len({name for votes in items.values() for name in votes}),
        "choices": {
            choice: sum(c.choice == choice for votes in items.values() for c in votes.values())
            for choice in CHOICES
        },
        "percent": _measured(counts, percent_agreement, seed),
        "alpha": _measured(counts, krippendorff_alpha, seed),
        "ac1": _measured(counts, gwet_ac1, seed),
        "leave_one_out": _share([hit for hits in others.values() for hit in hits]),
        "per_judge": [
            _judge_report(name, items, others[name])
            for name in sorted({name for votes in items.values() for name in votes})
        ],
        "majority_accuracy": None if quality is None else _accuracy(items, quality),
    }
    report["summary"] = _summary(report)
    return report


Items = dict[str, dict[str, Comparison]]
"""item id -> judge -> judgement."""


def _by_item(comparisons: Sequence[Comparison]) -> Items:
    items: Items = {}
    for comparison in comparisons:
        votes = items.setdefault(comparison.pair.item_id, {})
        votes[comparison.annotator.annotator_id] = comparison
    return items


def _counts(items: Items) -> Counts:
    """``[N, V]`` over the choices that occur; at least two columns."""
    used = [c for c in CHOICES if any(v.choice == c for vs in items.values() for v in vs.values())]
    labels = used if len(used) >= 2 else CHOICES[:2]
    counts = np.zeros((len(items), len(labels)), np.int64)
    for row, votes in enumerate(items.values()):
        for vote in votes.values():
            if vote.choice in labels:
                counts[row, labels.index(vote.choice)] += 1
            else:  # the only label of all, and neither a nor b: which column does not matter
                counts[row, 0] += 1
    return counts


def _measured(
    counts: Counts, measure: Callable[[Counts], float | None], seed: int
) -> dict[str, Any] | None:
    value = measure(counts) if len(counts) else None
    if value is None:
        return None
    interval = bootstrap_interval(counts, measure, seed=seed)
    n = int((counts.sum(axis=1) >= 2).sum())
    low, high = interval if interval is not None else (None, None)
    return {"value": value, "low": low, "high": high, "n": n}


def _share(hits: Sequence[float]) -> dict[str, Any] | None:
    if not hits:
        return None
    low, high = wilson_interval(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "n": len(hits)}


def _majority(choices: Sequence[Choice]) -> Choice | None:
    """The most frequent choice, ``None`` when two are equally frequent."""
    ranked = sorted(((choices.count(c), c) for c in set(choices)), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _against_others(items: Items) -> dict[str, list[float]]:
    """For each judge, 1 or 0 for each item where the others have a majority."""
    hits: dict[str, list[float]] = {}
    for votes in items.values():
        for name, vote in votes.items():
            own = hits.setdefault(name, [])
            rest = _majority([v.choice for other, v in votes.items() if other != name])
            if rest is not None:
                own.append(float(vote.choice == rest))
    return hits


def _judge_report(name: str, items: Items, hits: Sequence[float]) -> dict[str, Any]:
    """What one judge does, and what sways them.

    ``first_share``: how often the response shown first wins; 0.5 without bias, as the order is
    random. ``longer_share``: how often the longer one wins. Longer may simply be better, so
    ``longer_excess`` takes off what the other judges said of the same items.
    """
    own = [votes[name] for votes in items.values() if name in votes]
    decided = [c for c in own if c.choice in ("a", "b")]
    longer: list[float] = []
    excess: list[float] = []
    for comparison in decided:
        mine = _chose_longer(comparison)
        if mine is None:
            continue
        longer.append(mine)
        votes = items[comparison.pair.item_id]
        rest = [_chose_longer(v) for other, v in votes.items() if other != name]
        known = [r for r in rest if r is not None]
        if known:
            excess.append(mine - sum(known) / len(known))
    return {
        "judge": name,
        "judgements": len(own),
        "with_the_others": _share(hits),
        "first_share": _share([float(c.choice == c.shown_first) for c in decided]),
        "longer_share": _share(longer),
        "longer_excess": _mean(excess),
        "tie_share": 1 - len(decided) / len(own),
        "seconds": float(np.median([c.seconds for c in own])),
    }


def _chose_longer(comparison: Comparison) -> float | None:
    """1 when the longer response won, 0 when the shorter, ``None`` when neither can be said."""
    difference = len(comparison.pair.a.text) - len(comparison.pair.b.text)
    if difference == 0 or comparison.choice not in ("a", "b"):
        return None
    return float((comparison.choice == "a") == (difference > 0))


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    """A mean with its normal 95 % interval."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = 1.959964 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def _accuracy(items: Items, quality: Quality) -> dict[str, Any] | None:
    """How often the majority preferred the truly better response, where there is one of each."""
    hits: list[float] = []
    for votes in items.values():
        pair = next(iter(votes.values())).pair
        winner = _majority([vote.choice for vote in votes.values()])
        a, b = quality(pair.prompt_id, pair.a.text), quality(pair.prompt_id, pair.b.text)
        if winner in ("a", "b") and a != b:
            hits.append(float((winner == "a") == (a > b)))
    return _share(hits)


def _summary(report: dict[str, Any]) -> str:
    """One paragraph in plain words."""
    many = f"{_number(report['judges'], 'judge')} compared {_number(report['items'], 'pair')}"
    percent, alpha, ac1 = report["percent"], report["alpha"], report["ac1"]
    if percent is None:
        return f"{many}; no pair was seen by two of them, so their agreement is unknown."
    text = f"{many}. Two judges of a pair say the same in {percent['value']:.0%} of cases"
    if alpha is None:
        return text + ", but all use one choice only, so nothing was told apart."
    text += f" (Krippendorff's alpha {_with_interval(alpha)}, Gwet's AC1 {_with_interval(ac1)}): "
    text += _words(alpha["value"]) + "."
    if ac1["value"] - alpha["value"] > 0.2:
        text += " One choice is so common that alpha is harsh here: AC1 is the fairer figure."
    if report["leave_one_out"] is not None:
        text += (
            f" One judge agrees with the majority of the others in "
            f"{report['leave_one_out']['value']:.0%} of pairs: about the best that a reward model "
            "can reach against single judgements."
        )
    if report["majority_accuracy"] is not None:
        text += (
            f" Where the majority prefers one, it is the truly better one in "
            f"{report['majority_accuracy']['value']:.0%}."
        )
    swayed = [j["judge"] for j in report["per_judge"] if _is_swayed(j)]
    if swayed:
        text += f" Position or length clearly sways {', '.join(swayed)}."
    return text


def _is_swayed(judge: dict[str, Any]) -> bool:
    first, longer = judge["first_share"], judge["longer_excess"]
    by_position = first is not None and not first["low"] <= 0.5 <= first["high"]
    return by_position or (longer is not None and not longer["low"] <= 0.0 <= longer["high"])


def _words(alpha: float) -> str:
    """Krippendorff's own bounds: 0.8 to rely on, 0.667 for tentative conclusions."""
    if alpha >= 0.8:
        return "judgements to rely on"
    if alpha >= 0.667:
        return "enough agreement for tentative conclusions"
    if alpha >= 0.2:
        return "agreement well beyond chance, but many pairs are matters of taste or noise"
    return "hardly more agreement than chance: look at the guidelines and the pairs"


def _with_interval(measured: dict[str, Any]) -> str:
    if measured["low"] is None:
        return f"{measured['value']:.2f}"
    return f"{measured['value']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}]"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
