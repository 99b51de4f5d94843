"""Agreement against textbook values, hand-computed ones and judges with known biases."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from reward_service.comparison import (
    Annotator,
    Candidate,
    Choice,
    Comparison,
    Pair,
    Ranking,
    Rating,
)
from reward_service.feedback.agreement import (
    Counts,
    bootstrap_interval,
    cohen_kappa,
    counts_of_codes,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    mean_cohen_kappa,
    percent_agreement,
    wilson_interval,
)
from reward_service.feedback.agreement_report import (
    agreement_report,
    rating_report,
    store_report,
)
from reward_service.feedback.store import Entry, FeedbackStore
from reward_service.feedback.transfer import import_entries


def counts_of(rows: list[list[object]]) -> Counts:
    """Rows of units with one column a rater, None where missing."""
    labels = sorted({v for row in rows for v in row if v is not None}, key=str)
    return np.array([[Counter(row)[label] for label in labels] for row in rows])


def vote(
    item: str, judge: str, choice: Choice, *, a: str = "aa", b: str = "b", first: str = "a"
) -> Comparison:
    pair = Pair(item_id=item, prompt_id=item, prompt="p", a=Candidate(text=a), b=Candidate(text=b))
    annotator = Annotator(annotator_id=judge, kind="simulated")
    return Comparison(pair=pair, annotator=annotator, choice=choice, shown_first=first)


def reference_cases(shared_data: Path) -> list[dict]:
    path = shared_data / "agree_reference" / "cases.jsonl"
    if not path.is_file():
        pytest.skip("the textbook cases are not on this machine")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_textbook_cases(shared_data: Path) -> None:
    """Each published value by the coefficient that it is of; none is left out."""
    for case in reference_cases(shared_data):
        metric, _, detail = case["metric"].partition("/")
        data = case["data"]
        if metric == "krippendorff_alpha":
            values = sorted({v for row in data for v in row if v is not None}, key=str)
            value = krippendorff_alpha(
                counts_of(data), detail, values if detail == "interval" else None
            )
        elif metric == "percent_agreement":
            value = percent_agreement(counts_of(data))
        elif metric == "fleiss_kappa" or metric == "scott_pi":
            value = fleiss_kappa(counts_of(data))
        else:
            first, second = raters_of_table(data)
            value = cohen_kappa(first, second, linear_weights="linear" in detail)
        assert value == pytest.approx(case["expected"], abs=case["tol"]), case["id"]


def raters_of_table(table: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Two raters' labels with these counts."""
    cells = [
        (i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)
    ]
    first, second = zip(*cells, strict=True)
    return np.array(first), np.array(second)


def test_cohen_by_hand_with_missing_labels() -> None:
    # shared items: (0,0) (0,0) (1,1) (0,1): agreement 3/4, chance 3/4 * 1/2 + 1/4 * 1/2 = 1/2
    first = np.array([0, 0, 1, 0, -1, 1])
    second = np.array([0, 0, 1, 1, 0, -1])
    assert cohen_kappa(first, second) == pytest.approx(0.5)
    third = np.array([0, 0, 1, 1, -1, -1])  # with first as second has it, with second all the same
    codes = np.stack([first, second, third], axis=1)
    assert mean_cohen_kappa(codes) == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert counts_of_codes(codes, 2).tolist() == [[3, 0], [3, 0], [0, 3], [1, 2], [1, 0], [0, 1]]
    assert cohen_kappa(np.array([0, 0]), np.array([0, 0])) is None
    assert cohen_kappa(np.array([-1]), np.array([0])) is None


def test_graded_alpha_hears_the_strength() -> None:
    """Two judges of opposite sides: 'slightly' each is nearer than 'by far' each."""

    def judged(strength: int) -> float:
        votes = []
        for n in range(20):
            own = "a" if n % 2 else "b"
            votes += [vote(str(n), "x", own), vote(str(n), "y", own)]
        votes += [vote("z", "x", "a"), vote("z", "y", "b")]
        votes = [replace(v, strength=strength if v.pair.item_id == "z" else 3) for v in votes]
        return float(agreement_report(votes)["graded_alpha"]["value"])

    assert judged(1) > judged(3)


def test_ratings_agree_by_rank_and_by_value() -> None:
    data = [(1, 1), (2, 2), (5, 4), (3, 3), (4, 5)]
    ratings = [
        Rating(
            item_id=str(n), prompt_id="p", prompt="?", response=Candidate(text=str(n)),
            annotator=Annotator(annotator_id=f"j{j}", kind="human"), criterion="quality", value=v,
        )
        for n, pair in enumerate(data)
        for j, v in enumerate(pair)
    ]  # fmt: skip
    report = rating_report(ratings)["quality"]
    assert report["percent"]["value"] == pytest.approx(0.6)
    assert report["mean"] == pytest.approx(3.0)
    # interval: observed 2 * (1 + 1) / 10 = 0.4; expected: mean squared difference of two of
    # {1, 1, 2, 2, 3, 3, 4, 4, 5, 5} drawn without replacement = 2 * 20 / 9
    assert report["interval_alpha"]["value"] == pytest.approx(1 - 0.4 / (40 / 9))


def test_gwet_ac1_of_the_irrcac_manual() -> None:
    """cac.raw4raters of the irrCAC package: percent agreement 0.81818, AC1 0.77544."""
    raters = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    counts = counts_of([list(unit) for unit in zip(*raters, strict=True)])
    assert percent_agreement(counts) == pytest.approx(0.8181818, abs=1e-6)
    assert gwet_ac1(counts) == pytest.approx(0.77544, abs=1e-5)


def test_hand_computed_values() -> None:
    # (a,a) (a,a) (a,b) (b,b): agreement 3/4; p_a = 5/8, chance 2 * 5/8 * 3/8 = 15/32
    counts = np.array([[2, 0], [2, 0], [1, 1], [0, 2]])
    assert percent_agreement(counts) == 0.75
    assert gwet_ac1(counts) == pytest.approx((24 / 32 - 15 / 32) / (17 / 32))
    # alpha: observed disagreement 1/4, expected 2 * 5 * 3 / (8 * 7)
    assert krippendorff_alpha(counts) == pytest.approx(1 - (1 / 4) / (30 / 56))


def test_skewed_labels_fool_alpha_but_not_ac1() -> None:
    counts = np.array([[2, 0]] * 94 + [[1, 1]] * 6)
    assert percent_agreement(counts) == pytest.approx(0.94)
    assert krippendorff_alpha(counts) == pytest.approx(1 - 0.06 / (2 * 194 * 6 / (200 * 199)))
    assert gwet_ac1(counts) == pytest.approx((0.94 - 0.0582) / (1 - 0.0582))


def test_percent_agreement_is_that_of_pairs_of_judges() -> None:
    rng = np.random.default_rng(0)
    rows = [[int(v) for v in rng.integers(0, 3, int(rng.integers(2, 6)))] for _ in range(50)]
    by_hand = np.mean([np.mean([x == y for x, y in combinations(row, 2)]) for row in rows])
    assert percent_agreement(counts_of(rows)) == pytest.approx(by_hand)


def test_one_label_throughout_and_single_judgements_are_undefined() -> None:
    assert krippendorff_alpha(np.array([[2, 0], [3, 0]])) is None
    assert percent_agreement(np.array([[1, 0], [0, 1]])) is None
    report = agreement_report([vote("1", "x", "tie"), vote("1", "y", "tie")])
    assert report["alpha"] is None
    assert report["percent"]["value"] == 1.0
    assert report["ac1"]["value"] == 1.0
    assert "one choice only" in report["summary"]
    report = agreement_report([vote("1", "x", "a"), vote("2", "y", "b")])
    assert report["percent"] is None
    assert "unknown" in report["summary"]


def test_bootstrap_interval_covers_the_value_and_is_seeded() -> None:
    counts = np.array([[2, 0]] * 30 + [[1, 1]] * 10)
    low, high = bootstrap_interval(counts, percent_agreement, seed=1) or (0, 0)
    # standard error of a share of 0.75 over 40 items is 0.068
    assert low == pytest.approx(0.75 - 1.96 * 0.068, abs=0.04)
    assert high == pytest.approx(0.75 + 1.96 * 0.068, abs=0.04)
    assert bootstrap_interval(counts, percent_agreement, seed=1) == (low, high)


def test_wilson_interval_of_a_published_example() -> None:
    # 81 of 263, 95 %: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_leave_one_out_and_majority_accuracy_by_hand() -> None:
    votes = [
        # the others of each: x: (a, a) -> a hit; y: (a, a) hit; z: (a, a) hit
        *[vote("1", judge, "a") for judge in "xyz"],
        # x says b against (a, a); y and z see (b, a): no majority
        vote("2", "x", "b"),
        vote("2", "y", "a"),
        vote("2", "z", "a"),
    ]
    quality = {("1", "aa"): 1.0, ("1", "b"): 0.0, ("2", "aa"): 0.0, ("2", "b"): 1.0}
    report = agreement_report(votes, quality=lambda prompt, text: quality[prompt, text])
    assert report["leave_one_out"]["n"] == 4
    assert report["leave_one_out"]["value"] == pytest.approx(3 / 4)
    # the majority says a for both items: right for the first, wrong for the second
    assert report["majority_accuracy"]["value"] == 0.5
    json.dumps(report)


def test_the_last_judgement_of_a_judge_counts() -> None:
    votes = [vote("1", "x", "a"), vote("1", "y", "b"), vote("1", "y", "a")]
    report = agreement_report(votes)
    assert report["comparisons"] == 2
    assert report["choices"]["b"] == 0
    assert report["percent"]["value"] == 1.0


def test_intervals_over_rankings_are_as_wide_as_there_are_rankings(tmp_path: Path) -> None:
    """15 pairs that one ranking of 6 implies are one look at a task, not 15."""
    rng = np.random.default_rng(0)
    texts = tuple(Candidate(text=f"t{n}") for n in range(6))
    rankings = []
    for number in range(20):
        order = rng.permutation(6)
        for judge in "xy":
            says = order if judge == "x" or number % 2 else order[::-1]
            rankings.append(
                Ranking(item_id=f"k{number}", prompt_id=f"p{number}", prompt="?", candidates=texts,
                        annotator=Annotator(annotator_id=judge, kind="human"), seconds=60.0,
                        ranking=tuple(says.tolist()))
            )  # fmt: skip
    implied = [c for r in rankings for c in r.comparisons()]
    with FeedbackStore(tmp_path / "store.sqlite") as store:
        import_entries(store, [Entry(judgement=r) for r in rankings], manifest_hash="m", form="v")
        found = store_report(store)
    apart = agreement_report(implied)
    assert (found["percent"]["value"], found["percent"]["n"]) == (0.5, 20)
    assert (apart["percent"]["value"], apart["percent"]["n"]) == (0.5, 300)
    # half of 20 clusters that agree or differ as a whole: sqrt(0.25 / 20) each way, twice
    width = found["percent"]["high"] - found["percent"]["low"]
    assert width == pytest.approx(2 * 1.96 * (0.25 / 20) ** 0.5, rel=0.15)
    assert found["leave_one_out"]["n"] == 20
    assert found["leave_one_out"]["high"] - found["leave_one_out"]["low"] > 0.3
    assert found["per_judge"][0]["with_the_others"]["n"] == 20
    assert found["per_judge"][0]["seconds"] == 60.0
    one = agreement_report(rankings[0].comparisons(), tasks=dict.fromkeys(
        (c.pair.item_id for c in rankings[0].comparisons()), "k0"))  # fmt: skip
    assert one["leave_one_out"] is None
    both = [c for r in rankings[:2] for c in r.comparisons()]
    tasks = {c.pair.item_id: "k0" for c in both}
    alone = agreement_report(both, tasks=tasks)
    assert (alone["percent"]["n"], alone["percent"]["low"]) == (1, None), "one look tells no more"
    assert alone["leave_one_out"]["high"] - alone["leave_one_out"]["low"] > 0.5
