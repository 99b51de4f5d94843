"""Dawid and Skene against its own likelihood, Bradley and Terry against an optimiser."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.feedback.aggregate import (
    bradley_terry,
    consensus,
    dawid_skene,
    model_strengths,
)
from reward_service.feedback.raters import quality_of
from reward_service.feedback.store import Entry


def votes(
    rng: np.random.Generator, items: int, skill: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(truth [N], codes [N, J]) of judges who are right with the given probability, else random."""
    truth = rng.integers(0, 3, items)
    said = rng.integers(0, 3, (items, len(skill)))
    right = rng.random((items, len(skill))) < np.array(skill)
    codes = np.where(right, truth[:, None], said)
    codes[rng.random(codes.shape) < 0.2] = -1
    codes[(codes < 0).all(axis=1), 0] = 0
    return truth, codes


def test_dawid_skene_is_at_a_maximum_of_the_likelihood_and_knows_who_is_good() -> None:
    truth, codes = votes(np.random.default_rng(0), 400, [0.95, 0.8, 0.0, 0.0])
    fitted = dawid_skene(codes, 3, smoothing=1e-6, steps=2000, tolerance=1e-10)

    def log_likelihood(confusion: np.ndarray, prior: np.ndarray) -> float:
        total = 0.0
        for row in codes:
            parts = prior.copy()
            for judge, label in enumerate(row):
                if label >= 0:
                    parts = parts * confusion[judge, :, label]
            total += float(np.log(parts.sum()))
        return total

    best = log_likelihood(fitted.confusion, fitted.prior)
    assert best == pytest.approx(fitted.log_likelihood, rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(20):
        moved = fitted.confusion * np.exp(0.02 * rng.standard_normal(fitted.confusion.shape))
        moved /= moved.sum(axis=2, keepdims=True)
        assert log_likelihood(moved, fitted.prior) < best
    majority = np.array([Counter(r[r >= 0].tolist()).most_common(1)[0][0] for r in codes])
    inferred = fitted.posterior.argmax(axis=1)
    assert (inferred == truth).mean() > (majority == truth).mean() + 0.03
    accuracy = np.einsum("t,jtt->j", fitted.prior, fitted.confusion)
    # right with probability s, and by luck in a third of the rest
    assert accuracy == pytest.approx([0.967, 0.867, 0.333, 0.333], abs=0.06)
    with pytest.raises(ValueError, match="every item needs a judgement"):
        dawid_skene(np.array([[0, 1], [-1, -1]]), 2)


def said(item: int, judge: str, choice: str, **changes: object) -> Comparison:
    pair = Pair(
        item_id=f"i{item}", prompt_id=f"p{item}", prompt="?",
        a=Candidate(text="long text", model="m1"), b=Candidate(text="short", model="m2"),
    )  # fmt: skip
    base = Comparison(
        pair=pair,
        annotator=Annotator(annotator_id=judge, kind="human"),
        choice=choice,  # type: ignore[arg-type]
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_consensus_weighs_good_judges_more_and_keeps_ties_in_between() -> None:
    rng = np.random.default_rng(3)
    _, codes = votes(rng, 200, [0.95, 0.9, 0.85, 0.0])
    names = ["a", "b", "tie"]
    comparisons = [
        said(item, f"j{judge}", names[label])
        for item, row in enumerate(codes)
        for judge, label in enumerate(row)
        if label >= 0
    ]
    found = consensus(comparisons)
    weight = found.reliability
    assert weight["j0"] > weight["j2"] > 4 * weight["j3"]
    used = Counter(c.annotator.annotator_id for c in comparisons)
    assert sum(weight[j] * n for j, n in used.items()) / len(comparisons) == pytest.approx(1)
    unanimous = [f"i{n}" for n, row in enumerate(codes) if (row[:3] == 0).all() and row[3] == 1]
    assert unanimous
    assert all(found.preference[item] > 0.95 for item in unanimous)
    both_tie = [f"i{n}" for n, row in enumerate(codes) if (row[:3] == 2).all()]
    assert all(found.preference[item] == pytest.approx(0.5, abs=0.05) for item in both_tie)


def test_bradley_terry_equals_an_independent_optimum() -> None:
    wins = np.array([[0, 7, 9, 3], [3, 0, 6, 2], [1, 4, 0, 2.5], [2, 3, 2.5, 0]])

    def loss(free: np.ndarray) -> float:
        s = np.append(free, -free.sum())
        padded = wins + 0.1 * (1 - np.eye(4))
        return -float((padded * np.log(expit(s[:, None] - s[None, :]))).sum())

    best = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    assert bradley_terry(wins) == pytest.approx(np.append(best, -best.sum()), abs=1e-5)
    # two players, 3 wins to 1, no prior: the odds are 3
    two = bradley_terry(np.array([[0, 3], [1, 0]]), prior=0.0)
    assert two[0] - two[1] == pytest.approx(np.log(3))


def test_models_are_ranked_by_what_is_preferred() -> None:
    comparisons = [said(n, "j", "a" if n % 4 else "b") for n in range(60)]
    rows = model_strengths(comparisons, seed=0)
    assert [row[0] for row in rows] == ["m1", "m2"]
    _, strength, low, high, count = rows[0]
    # 45 wins to 15 with 0.1 half wins of prior: half the log odds
    assert strength == pytest.approx(np.log(45.1 / 15.1) / 2)
    assert low < strength < high
    assert count == 60
    same = replace(comparisons[0].pair, b=Candidate(text="x", model="m1"))
    assert model_strengths([replace(comparisons[0], pair=same)], seed=0) == []


def test_quality_of_people_by_hand() -> None:
    history = [
        Entry(judgement=said(1, "x", "a", shown_first="a", seconds=4.0)),
        Entry(judgement=said(2, "x", "b", shown_first="a", seconds=4.0)),
        Entry(judgement=said(2, "x", "b", shown_first="b", seconds=4.0), repeat=1),
        Entry(judgement=said(1, "x", "tie", seconds=4.0), repeat=1),
        Entry(judgement=said(9, "x", "b", shown_first="b", seconds=4.0)),
        Entry(judgement=said(3, "x", "a", seconds=4.0)),
        Entry(judgement=said(3, "x", "a", seconds=4.0), withdrawn=True),
        Entry(judgement=said(4, "x", "b", seconds=4.0)),  # in what order is not known
    ]
    (found,) = quality_of(history, {"i9": {"choice": "a"}, "i1": {"choice": "a"}})
    assert found.judgements == 6
    assert (found.gold.value, found.gold.n) == (0.5, 2)
    assert (found.self_consistency.value, found.self_consistency.n) == (0.5, 2)
    # shown first wins in items 1, 2 again and 9 of the four that are decided
    assert (found.first_share.value, found.first_share.n) == (0.75, 4)
    assert (found.longer_share.value, found.longer_share.n) == (0.2, 5)
    assert found.seconds == pytest.approx(4.0)
    assert not found.too_fast


def test_gold_and_second_looks_of_ratings_and_rankings_by_hand() -> None:
    who = Annotator(annotator_id="x", kind="human")
    texts = tuple(Candidate(text=t) for t in "uvw")

    def rated(item: str, criterion: str, value: int, repeat: int = 0) -> Entry[Rating]:
        rating = Rating(
            item_id=item, prompt_id="p", prompt="?", response=texts[0], annotator=who,
            criterion=criterion, value=value,
        )  # fmt: skip
        return Entry(judgement=rating, repeat=repeat)

    def ranked(item: str, *ranking: int) -> Entry[Ranking]:
        return Entry(
            judgement=Ranking(
                item_id=item, prompt_id="p", prompt="?", candidates=texts, annotator=who,
                ranking=ranking, seconds=8.0,
            )
        )  # fmt: skip

    history = [
        rated("r1", "quality", 4), rated("r1", "style", 2),  # within one of 5 and 2: right
        rated("r2", "quality", 5), rated("r2", "style", 4),  # two from 2: wrong
        rated("r1", "quality", 2, repeat=1), rated("r1", "style", 2, repeat=1),  # 4, then 2
        ranked("k1", 1, 0, 2),  # the same best as 1, 2, 0: right
        ranked("k2", 0, 1, 2),
    ]  # fmt: skip
    gold = {
        "r1": {"ratings": {"quality": 5, "style": 2}},
        "r2": {"ratings": {"quality": 5, "style": 2}},
        "k1": {"ranking": [1, 2, 0]},
    }
    (found,) = quality_of(history, gold)
    assert found.judgements == 5, "a look at an item is one judgement, whatever the criteria"
    assert (found.gold.value, found.gold.n) == (pytest.approx(2 / 3), 3)
    assert (found.self_consistency.value, found.self_consistency.n) == (0, 1)
    assert found.seconds == pytest.approx(8.0)
    assert found.first_share is None
    withdrawn = [replace(e, withdrawn=True) for e in history]
    assert quality_of([*history, *withdrawn], gold) == []


def test_speed_outliers_stand_out() -> None:
    history = [
        Entry(judgement=said(n, f"j{judge}", "a", seconds=seconds))
        for judge, seconds in enumerate((20, 22, 25, 18, 21, 3))
        for n in range(12)
    ]
    fast = [q.annotator_id for q in quality_of(history, {}) if q.too_fast]
    assert fast == ["j5"]
