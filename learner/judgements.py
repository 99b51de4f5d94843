"""What judges said of pairs, and how often a scorer or another judge agrees with them.

Comparisons become one :class:`JudgedPair` a pair. ``tie`` and ``both_bad`` both say that neither
response is better: they count as half a vote for each in training, and are left out where
agreement is counted. When a judge judged a pair more than once, the last judgement counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.trajectory import Message
from reward_service.comparison import Comparison, Rating, prompt_groups
from reward_service.intervals import bootstrap_mean, wilson

FloatArray = npt.NDArray[np.float64]

PREFERENCE: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""Share of one judgement that is for response a."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """What training makes of votes; measuring always takes them as they are.

    Attributes:
        weights: Judge -> weight of their judgements; 1 for those not named.
        labels: Item -> probability that a is better, in the place of its votes.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One judge's word on a pair."""

    annotator_id: str
    preference: float
    strength: int
    weight: float = 1.0
    """In training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedPair:
    """A pair and all judgements of it."""

    item_id: str
    prompt_id: str
    """The same for all pairs that show the same prompt, whatever ids their files gave them."""
    prompt: str
    messages: tuple[Message, ...]
    a: str
    b: str
    judgements: tuple[Judgement, ...]
    label: float | None = None
    """In training: probability that a is better, in the place of each judgement's preference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedResponse:
    """A response and the mean of its ratings, over judges and criteria."""

    item_id: str
    prompt_id: str
    prompt: str
    response: str
    mean: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share of ``n`` cases with its 95 % confidence interval; ``None`` when n is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def judged_pairs(
    comparisons: Sequence[Comparison], teaching: Teaching | None = None
) -> list[JudgedPair]:
    """One record a pair, in order of first appearance.

    Raises:
        ValueError: Two comparisons of one item id show different texts.
    """
    teaching = teaching or Teaching()
    by_item: dict[str, dict[str, Comparison]] = {}
    for comparison in comparisons:
        judged = by_item.setdefault(comparison.pair.item_id, {})
        for earlier in judged.values():
            if earlier.pair != comparison.pair:
                raise ValueError(
                    f"item {comparison.pair.item_id!r} stands for two different pairs: give each "
                    "pair an item_id of its own"
                )
            break
        judged[comparison.annotator.annotator_id] = comparison
    shown = [next(iter(judged.values())).pair for judged in by_item.values()]
    groups = prompt_groups((p.prompt_id, p.prompt, p.messages) for p in shown)
    pairs: list[JudgedPair] = []
    for (item_id, judged), pair, group in zip(by_item.items(), shown, groups, strict=True):
        judgements = tuple(
            Judgement(
                annotator_id=who,
                preference=PREFERENCE[c.choice],
                strength=c.strength,
                weight=teaching.weights.get(who, 1.0),
            )
            for who, c in judged.items()
        )
        pairs.append(
            JudgedPair(
                item_id=item_id,
                prompt_id=group,
                prompt=pair.prompt,
                messages=pair.messages,
                a=pair.a.text,
                b=pair.b.text,
                judgements=judgements,
                label=teaching.labels.get(item_id),
            )
        )
    return pairs


def disagreements(
    pairs: Sequence[JudgedPair], differences: FloatArray, *, most: int
) -> list[dict[str, Any]]:
    """Where a scorer prefers the other response than most judges, the surest first.

    Args:
        differences: ``[n]`` score of a minus score of b.
    """
    found = []
    for pair, difference in zip(pairs, differences.tolist(), strict=True):
        choice = majority(pair.judgements)
        if choice is None or _hit(difference, choice) != 0.0:
            continue
        votes = [j.preference for j in pair.judgements]
        share = sum(votes) / len(votes)
        found.append(
            {
                "item_id": pair.item_id,
                "prompt": pair.prompt,
                "preferred": pair.a if choice == 1.0 else pair.b,
                "other": pair.b if choice == 1.0 else pair.a,
                "share": share if choice == 1.0 else 1 - share,
                "margin": abs(difference),
            }
        )
    return sorted(found, key=lambda entry: -entry["margin"])[:most]


def rated_responses(ratings: Sequence[Rating]) -> list[RatedResponse]:
    """One record a response, in order of first appearance."""
    groups: dict[tuple[str, str, str], list[Rating]] = defaultdict(list)
    prompts = prompt_groups((r.prompt_id, r.prompt, ()) for r in ratings)
    for rating, group in zip(ratings, prompts, strict=True):
        groups[group, rating.prompt, rating.response.text].append(rating)
    return [
        RatedResponse(
            item_id=found[0].item_id,
            prompt_id=prompt_id,
            prompt=prompt,
            response=response,
            mean=float(np.mean([r.value for r in found])),
            count=len(found),
        )
        for (prompt_id, prompt, response), found in groups.items()
    ]


def majority(judgements: Sequence[Judgement]) -> float | None:
    """1.0 when more judges prefer a, 0.0 when more prefer b, ``None`` when neither leads."""
    lead = sum(j.preference - 0.5 for j in judgements)
    return None if lead == 0 else float(lead > 0)


def majority_accuracy(pairs: Sequence[JudgedPair], differences: FloatArray) -> Share:
    """How often a scorer prefers the majority's choice, with Wilson's interval.

    Args:
        pairs: Judged pairs; those without a majority are left out.
        differences: ``[n]`` score of a minus score of b. A difference of 0 counts half.
    """
    hits = [
        _hit(difference, choice)
        for pair, difference in zip(pairs, differences, strict=True)
        if (choice := majority(pair.judgements)) is not None
    ]
    return share_of(sum(hits), len(hits))


def judgement_accuracy(pairs: Sequence[JudgedPair], differences: FloatArray, *, seed: int) -> Share:
    """How often a scorer agrees with a single judgement, ties left out.

    Judgements of one prompt depend on each other: the interval is a bootstrap over prompts.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, difference in zip(pairs, differences, strict=True):
        by_prompt[pair.prompt_id] += [
            _hit(difference, j.preference) for j in pair.judgements if j.preference != 0.5
        ]
    return share_over_groups(by_prompt.values(), seed=seed)


def judge_agreement(pairs: Sequence[JudgedPair], *, seed: int) -> Share:
    """How often one judge agrees with the majority of the others (leave one out).

    Cases are single judgements that are no tie, of pairs where the other judges have a majority.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, judgement, others in _left_out(pairs):
        by_prompt[pair.prompt_id].append(float(judgement.preference == others))
    return share_over_groups(by_prompt.values(), seed=seed)


def accuracy_beside_judges(
    pairs: Sequence[JudgedPair], differences: FloatArray, *, seed: int
) -> Share:
    """The scorer in the place of the judge left out: the same cases as ``judge_agreement``."""
    difference_of = {pair.item_id: float(d) for pair, d in zip(pairs, differences, strict=True)}
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, _, others in _left_out(pairs):
        by_prompt[pair.prompt_id].append(_hit(difference_of[pair.item_id], others))
    return share_over_groups(by_prompt.values(), seed=seed)


def share_of(hits: float, n: int) -> Share:
    """Of ``n`` independent cases, with Wilson's interval."""
    if n == 0:
        return Share(value=None, low=None, high=None, n=0)
    found = wilson(hits, n)
    return Share(value=found.value, low=found.low, high=found.high, n=n)


def share_over_groups(groups: Collection[Sequence[float]], *, seed: int) -> Share:
    """Of cases that depend on each other within a group; ``n`` counts cases."""
    filled = [group for group in groups if group]
    cases = sum(map(len, filled))
    if len(filled) < 2:
        return share_of(sum(map(sum, filled)), cases)
    found = bootstrap_mean(filled, seed=seed)
    return Share(value=found.value, low=found.low, high=found.high, n=cases)


def _hit(difference: float, choice: float) -> float:
    """1 when the sign of the difference is the choice's, 0 when not, 0.5 without difference."""
    return 0.5 if difference == 0 else float((difference > 0) == (choice == 1.0))


def _left_out(pairs: Sequence[JudgedPair]) -> list[tuple[JudgedPair, Judgement, float]]:
    """(pair, the judgement left out, majority of the others) wherever both are no tie."""
    found = []
    for pair in pairs:
        for index, judgement in enumerate(pair.judgements):
            others = majority(pair.judgements[:index] + pair.judgements[index + 1 :])
            if others is not None and judgement.preference != 0.5:
                found.append((pair, judgement, others))
    return found
