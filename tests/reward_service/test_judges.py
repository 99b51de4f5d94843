"""Simulated judges: deterministic, and their biases can be measured back."""

from __future__ import annotations

import numpy as np
import pytest

from reward_service.comparison import Candidate, Pair
from reward_service.config import JudgeConfig
from reward_service.feedback.agreement_report import agreement_report
from reward_service.feedback.judges import SimulatedJudge, assign, make_judges


def pair(number: int, a: str = "good", b: str = "bad") -> Pair:
    return Pair(
        item_id=f"i{number}",
        prompt_id=f"p{number}",
        prompt="",
        a=Candidate(text=a),
        b=Candidate(text=b),
    )


def judge(name: str = "j", **values: float) -> SimulatedJudge:
    defaults = {"noise": 0.0, "position_bias": 0.0, "length_bias": 0.0}
    return SimulatedJudge(
        name=name, tie_margin=0.05, both_bad_below=0.2, seed=3, **(defaults | values)
    )


def test_without_noise_the_choice_and_strength_follow_the_quality() -> None:
    qualities = {"good": 0.0, "bad": 0.0}

    def choice(a: float, b: float) -> tuple[str, int]:
        qualities.update(good=a, bad=b)
        made = judge().judge(pair(1), lambda _, text: qualities[text])
        return made.choice, made.strength

    assert choice(0.9, 0.5) == ("a", 3)
    assert choice(0.7, 0.5) == ("a", 2)
    assert choice(0.5, 0.6) == ("b", 1)
    assert choice(0.52, 0.5) == ("tie", 1)
    assert choice(0.1, 0.12) == ("both_bad", 1)


def test_a_judgement_depends_on_judge_and_item_only() -> None:
    config = JudgeConfig(judges=4, judgements_per_pair=2)
    judges = make_judges(config, seed=5)
    assert judges == make_judges(config, seed=5)
    assert judges != make_judges(config, seed=6)
    assert len({j.noise for j in judges}) == 4
    items = [pair(n) for n in range(20)]

    def quality(prompt_id: str, text: str) -> float:
        return 0.5

    forward = [judges[0].judge(item, quality) for item in items]
    backward = [judges[0].judge(item, quality) for item in reversed(items)]
    assert forward == backward[::-1]
    assert len({c.choice for c in forward}) > 1
    assert {c.shown_first for c in forward} == {"a", "b"}


def test_assignment_is_balanced_and_stable() -> None:
    judges = make_judges(JudgeConfig(judges=5), seed=1)
    panels = [assign(pair(n), judges, 3, seed=1) for n in range(500)]
    assert panels == [assign(pair(n), judges, 3, seed=1) for n in range(500)]
    assert all(len({j.name for j in panel}) == 3 for panel in panels)
    loads = [sum(j in panel for panel in panels) for j in judges]
    assert all(abs(load - 300) < 60 for load in loads)  # 5 standard deviations
    with pytest.raises(ValueError, match="cannot assign 6 of 5"):
        assign(pair(1), judges, 6, seed=1)


def test_the_signs_of_biases_are_recovered() -> None:
    rng = np.random.default_rng(0)
    quality_of: dict[tuple[str, str], float] = {}
    items = []
    for n in range(600):
        texts = ["x" * int(rng.integers(20, 200)) + side for side in "ab"]
        items.append(pair(n, *texts))
        for text in texts:  # longer is truly better here, a little
            quality_of[f"p{n}", text] = float(rng.uniform()) + len(text) / 1000
    judges = [
        judge("plain-1", noise=0.1),
        judge("plain-2", noise=0.1),
        judge("first", noise=0.1, position_bias=0.3),
        judge("second", noise=0.1, position_bias=-0.3),
        judge("long", noise=0.1, length_bias=0.3),
        judge("short", noise=0.1, length_bias=-0.3),
    ]
    votes = [j.judge(item, lambda p, t: quality_of[p, t]) for j in judges for item in items]
    report = agreement_report(votes, quality=lambda p, t: quality_of[p, t])
    measured = {entry["judge"]: entry for entry in report["per_judge"]}
    assert measured["first"]["first_share"]["low"] > 0.6
    assert measured["second"]["first_share"]["high"] < 0.4
    assert measured["long"]["longer_excess"]["low"] > 0.1
    assert measured["short"]["longer_excess"]["high"] < -0.1
    for name in ("plain-1", "plain-2"):
        assert 0.42 < measured[name]["first_share"]["value"] < 0.58
        assert abs(measured[name]["longer_excess"]["value"]) < 0.1
        assert measured[name]["longer_share"]["value"] > 0.5  # rightly so
        others = measured[name]["with_the_others"]["value"]
        assert others > measured["first"]["with_the_others"]["value"]
    # six judges whose biases cancel see more than one
    assert report["majority_accuracy"]["value"] > 0.9
    assert "first" in report["summary"]
    assert "sways" in report["summary"]


def test_a_quality_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"item i1: the quality of a response is nan"):
        judge().judge(pair(1), lambda _, __: float("nan"))
