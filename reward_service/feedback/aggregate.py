"""What many judges together say: labels by Dawid and Skene, strengths by Bradley and Terry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reward_service.comparison import Comparison, prompt_groups
from reward_service.feedback.agreement import Codes

FloatArray = npt.NDArray[np.float64]

LABELS = {"a": 0, "b": 1, "tie": 2, "both_bad": 2}
"""Ties of either kind are one label: both say that neither response is better."""


@dataclass(frozen=True, kw_only=True)
class DawidSkene:
    """The fitted model of Dawid and Skene (1979).

    Attributes:
        posterior: ``[N, V]`` probability of each label of each item.
        confusion: ``[J, V, V]`` probability that judge j says the column where the row is true.
        prior: ``[V]`` share of each label.
        log_likelihood: Of the judgements, after the last step.
    """

    posterior: FloatArray
    confusion: FloatArray
    prior: FloatArray
    log_likelihood: float


def dawid_skene(
    codes: Codes, labels: int, *, smoothing: float = 0.01, steps: int = 200, tolerance: float = 1e-7
) -> DawidSkene:
    """Expectation maximisation from the shares of votes.

    Args:
        codes: ``[N, J]`` labels, -1 where a judge did not judge an item.
        smoothing: Added to every count, so that what a judge never said stays possible.
        steps: At most so many.
        tolerance: Ends when no posterior changes by more.

    Raises:
        ValueError: An item without a judgement.
    """
    said = np.stack([codes == label for label in range(labels)], axis=2).astype(float)  # [N, J, V]
    votes = said.sum(axis=1)  # [N, V]
    if len(codes) == 0 or (votes.sum(axis=1) == 0).any():
        raise ValueError("every item needs a judgement before labels can be inferred")
    posterior: FloatArray = votes / votes.sum(axis=1, keepdims=True)
    likelihood = 0.0
    for _ in range(steps):
        prior = posterior.sum(axis=0) + smoothing
        prior /= prior.sum()
        confusion = np.einsum("nt,njs->jts", posterior, said) + smoothing
        confusion /= confusion.sum(axis=2, keepdims=True)
        joint = np.log(prior) + np.einsum("njs,jts->nt", said, np.log(confusion))  # [N, V]
        peak = joint.max(axis=1, keepdims=True)
        updated = np.exp(joint - peak)
        total = updated.sum(axis=1, keepdims=True)
        likelihood = float((np.log(total) + peak).sum())
        updated /= total
        change = float(np.abs(updated - posterior).max())
        posterior = updated
        if change < tolerance:
            break
    return DawidSkene(
        posterior=posterior, confusion=confusion, prior=prior, log_likelihood=likelihood
    )


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What a set of comparisons says together.

    Attributes:
        preference: Item -> probability that a is better, a tie counting half.
        reliability: Annotator -> weight of their judgements, mean 1 over judgements.
    """

    preference: Mapping[str, float]
    reliability: Mapping[str, float]


def consensus(comparisons: Sequence[Comparison]) -> Consensus:
    """Soft labels and reliability weights of judges, by Dawid and Skene's model.

    A judge's weight is how often they name the true label by the model, above chance
    (Youden-like: mean of the confusion's diagonal, chance taken off), at least 0.05. Judges who
    share too little with others to be told apart get about the same weight.
    """
    items = list(dict.fromkeys(c.pair.item_id for c in comparisons))
    judges = list(dict.fromkeys(c.annotator.annotator_id for c in comparisons))
    row = {name: number for number, name in enumerate(items)}
    column = {name: number for number, name in enumerate(judges)}
    codes = np.full((len(items), len(judges)), -1, np.int64)
    for c in comparisons:
        codes[row[c.pair.item_id], column[c.annotator.annotator_id]] = LABELS[c.choice]
    # A judgement or two says little of a judge: ten imagined ones, mostly right, hold them back.
    fitted = dawid_skene(codes, 3)
    counts = (codes >= 0).sum(axis=0)
    correct = np.einsum("t,jtt->j", fitted.prior, fitted.confusion)
    correct = (correct * counts + 0.7 * 10) / (counts + 10)
    chance = float((fitted.prior**2).sum())
    weights = np.maximum(0.05, (correct - chance) / max(1e-9, 1 - chance))
    weights = weights / np.average(weights, weights=counts)
    return Consensus(
        preference={
            name: float(p[0] + p[2] / 2) for name, p in zip(items, fitted.posterior, strict=True)
        },
        reliability={name: float(w) for name, w in zip(judges, weights, strict=True)},
    )


def bradley_terry(
    wins: FloatArray, *, prior: float = 0.1, steps: int = 10_000, tolerance: float = 1e-10
) -> FloatArray:
    """Strengths in logits, mean 0, by the minorisation of Hunter (2004, equation 3).

    P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    Args:
        wins: ``[M, M]`` how often the row beat the column; a tie is half a win for each.
        prior: Half wins added to every pair, so that one never beaten stays finite.
    """
    size = len(wins)
    padded = wins + prior * (1 - np.eye(size))
    games = padded + padded.T
    won = padded.sum(axis=1)
    strength = np.ones(size)
    for _ in range(steps):
        shares = games / (strength[:, None] + strength[None, :])
        np.fill_diagonal(shares, 0.0)
        updated = won / shares.sum(axis=1)
        updated /= np.exp(np.log(updated).mean())
        if np.abs(np.log(updated / strength)).max() < tolerance:
            strength = updated
            break
        strength = updated
    return np.log(strength)


def model_strengths(
    comparisons: Sequence[Comparison], *, seed: int, resamples: int = 200
) -> list[tuple[str, float, float, float, int]]:
    """(model, strength, low, high, judgements) of the models that wrote the candidates, best first.

    Only pairs of different models say anything. Intervals resample prompts.
    """
    between = [c for c in comparisons if c.pair.a.model != c.pair.b.model]
    names = sorted({m for c in between for m in (c.pair.a.model, c.pair.b.model)})
    if len(names) < 2:
        return []
    number = {name: n for n, name in enumerate(names)}
    groups = prompt_groups((c.pair.prompt_id, c.pair.prompt, c.pair.messages) for c in between)
    prompts = sorted(set(groups))
    place = {prompt: n for n, prompt in enumerate(prompts)}
    table = np.zeros((len(prompts), len(names), len(names)))
    for c, group in zip(between, groups, strict=True):
        a, b = number[c.pair.a.model], number[c.pair.b.model]
        share = {"a": 1.0, "b": 0.0}.get(c.choice, 0.5)
        table[place[group], a, b] += share
        table[place[group], b, a] += 1 - share
    rng = np.random.default_rng(seed)
    drawn = [
        bradley_terry(table[rng.integers(0, len(prompts), len(prompts))].sum(axis=0), steps=200)
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    strength = bradley_terry(table.sum(axis=0))
    judged = [sum(name in (c.pair.a.model, c.pair.b.model) for c in between) for name in names]
    rows = [
        (name, float(strength[n]), float(low[n]), float(high[n]), judged[n])
        for n, name in enumerate(names)
    ]
    return sorted(rows, key=lambda entry: -entry[1])
