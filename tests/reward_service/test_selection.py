"""Selection by uncertainty: values by hand, and fewer comparisons for the same accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from reward_service.comparison import Candidate, Pair
from reward_service.feedback.judges import SimulatedJudge
from reward_service.feedback.selection import most_uncertain, uncertainty


def test_one_model_is_least_sure_at_a_half() -> None:
    values = uncertainty(np.array([[0.0, np.log(3.0), -np.log(3.0), 40.0]]))
    # entropy of 3/4: 2 - 3/4 log2 3
    assert values == pytest.approx(
        [1.0, 2 - 0.75 * np.log2(3), 2 - 0.75 * np.log2(3), 0.0], abs=1e-9
    )


def test_an_ensemble_is_asked_where_it_disagrees() -> None:
    # all say a half: taste; one says yes and one no: worth asking; both say yes: known
    values = uncertainty(np.array([[0.0, 50.0, 50.0], [0.0, -50.0, 50.0]]))
    assert values == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    assert most_uncertain(["x", "y", "z"], values, 1) == ["y"]
    assert most_uncertain([1, 2, 3], np.array([0.5, 0.5, 0.9]), 2) == [3, 1]
    with pytest.raises(ValueError, match="not finite"):
        uncertainty(np.array([[np.nan]]))


# --- fewer comparisons for the same accuracy -------------------------------------------------

FEATURES, POOL, HELD_OUT = 24, 1500, 1000
BATCH, START, BUDGET = 15, 30, 180
MEMBERS = 6


def fit(x: np.ndarray, y: np.ndarray, decay: float = 0.3) -> np.ndarray:
    """Bradley-Terry on feature differences by Newton's method, with weight decay."""
    w = np.zeros(x.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - y) + decay * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + decay * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    return w


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pool [P, F], held out [H, F], judged [P], truth [H]) of feature differences.

    A few features matter in most texts and the others in some, as faults of texts do.
    """
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal(FEATURES)
    share = np.linspace(0.9, 0.05, FEATURES)

    def texts(count: int) -> np.ndarray:
        return (rng.random((count, FEATURES)) < share) * rng.standard_normal((count, FEATURES))

    pool = (texts(POOL), texts(POOL))
    held_out = texts(HELD_OUT) - texts(HELD_OUT)
    spread = float(np.std(held_out @ quality))
    judge = SimulatedJudge(
        name="judge", noise=0.1, position_bias=0.02, length_bias=0.0, tie_margin=0.0,
        both_bad_below=-9, seed=seed,
    )  # fmt: skip
    scores = {
        f"{side}{n}": 0.5 + 0.3 * float(row @ quality) / spread
        for side, rows in zip("ab", pool, strict=True)
        for n, row in enumerate(rows)
    }
    judged = np.array(
        [
            judge.judge(
                Pair(
                    item_id=f"{seed}/{n}", prompt_id="p", prompt="",
                    a=Candidate(text=f"a{n}"), b=Candidate(text=f"b{n}"),
                ),
                lambda _, text: scores[text],
            ).choice
            == "a"
            for n in range(POOL)
        ]
    )  # fmt: skip
    return pool[0] - pool[1], held_out, judged.astype(float), held_out @ quality > 0


def curve(seed: int, active: bool) -> list[float]:
    """Held-out accuracy after each batch of comparisons."""
    pool, held_out, judged, truth = world(seed)
    rng = np.random.default_rng(1000 + seed)
    order = rng.permutation(POOL)
    asked, left = list(order[:START]), list(order[START:])
    accuracy = []
    while True:
        w = fit(pool[asked], judged[asked])
        accuracy.append(float(((held_out @ w > 0) == truth).mean()))
        if len(asked) >= BUDGET:
            return accuracy
        if active:
            members = [rng.choice(asked, len(asked)) for _ in range(MEMBERS)]
            margins = np.stack([pool[left] @ fit(pool[m], judged[m]) for m in members])
            chosen = most_uncertain(left, uncertainty(margins), BATCH)
        else:
            chosen = left[:BATCH]
        asked += chosen
        taken = set(chosen)
        left = [n for n in left if n not in taken]


def comparisons_needed(accuracy: list[float], wanted: float) -> int:
    for number, value in enumerate(accuracy):
        if value >= wanted:
            return START + number * BATCH
    return BUDGET + BATCH


def test_active_selection_needs_fewer_comparisons_than_random() -> None:
    """Simulated judges, a small Bradley-Terry model, 24 worlds: the mean difference of paired
    runs, with a bootstrap interval that excludes no difference."""
    seeds = range(24)
    active = [curve(seed, True) for seed in seeds]
    random = [curve(seed, False) for seed in seeds]
    gained, saved = [], []
    for a, r in zip(active, random, strict=True):
        gained.append(a[-1] - r[-1])
        wanted = r[-1]  # what random reaches with all of its budget
        saved.append(1 - comparisons_needed(a, wanted) / comparisons_needed(r, wanted))
    rng = np.random.default_rng(0)

    def interval(values: list[float]) -> tuple[float, float, float]:
        drawn = rng.choice(values, (4000, len(values))).mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(np.mean(values)), float(low), float(high)

    accuracy, comparisons = interval(gained), interval(saved)
    print(f"accuracy +{accuracy[0]:.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}] with {BUDGET}")
    print(f"saved {comparisons[0]:.0%} [{comparisons[1]:.0%}, {comparisons[2]:.0%}]")
    assert accuracy[1] > 0
    assert comparisons[1] > 0
