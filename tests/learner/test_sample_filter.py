"""Which samples are filtered: cut-off ones, and groups whose rewards are all alike."""

from __future__ import annotations

import itertools

import pytest

from actors.trajectory import Trajectory
from learner.batch import build_batch
from learner.config import PPOConfig
from learner.sample_filter import filter_reasons
from reward_service.score import Score
from tests.learner.test_batch import EOS, score, trajectory


def samples(*rows: tuple[str, float, bool]) -> tuple[list[Trajectory], list[Score]]:
    """One sample for each (prompt, reward, whether it ended by itself)."""
    counts = {name: itertools.count() for name, _, _ in rows}
    made = [
        trajectory(name, [5], [7, EOS] if ended else [7, 8], next(counts[name]))
        for name, _, ended in rows
    ]
    return made, [score(t.sample_id, row[1]) for t, row in zip(made, rows, strict=True)]


def config(**changes: object) -> PPOConfig:
    return PPOConfig.model_validate({"advantage": "rloo", **changes})


def test_nothing_is_filtered_by_default() -> None:
    assert filter_reasons(*samples(("a", 1.0, False), ("a", 1.0, True)), config()) == {}


def test_responses_that_were_cut_off_are_filtered_and_never_get_into_a_batch() -> None:
    made, scores = samples(("a", 1.0, False), ("a", 2.0, True), ("b", 0.0, False))
    asked = config(truncated="filter")
    assert filter_reasons(made, scores, asked) == {"a#0": "truncated", "b#0": "truncated"}
    with pytest.raises(ValueError, match=r"sample a#0 was cut off .* ppo.truncated is 'filter'"):
        build_batch(made, scores, asked)
    assert len(build_batch(made[1:2], scores[1:2], asked)) == 1


def test_groups_without_spread_are_filtered_whole() -> None:
    """b is flat, c is alone, d differs by less than what counts."""
    made, scores = samples(
        ("b", 2.0, True), ("a", 1.0, True), ("c", 9.0, True), ("d", 0.0, True),
        ("a", 2.0, True), ("b", 2.0, True), ("d", 0.25, True),
    )  # fmt: skip
    expected = {"b#0", "b#1", "c#0"}
    assert set(filter_reasons(made, scores, config(dynamic_sampling={}))) == expected
    tolerant = config(dynamic_sampling={"min_spread": 0.25})
    assert set(filter_reasons(made, scores, tolerant)) == expected | {"d#0", "d#1"}
    backwards = filter_reasons(made[::-1], scores[::-1], tolerant)
    assert (
        backwards == dict.fromkeys(backwards, "no_spread") == filter_reasons(made, scores, tolerant)
    )


def test_the_spread_is_that_of_what_is_trained_on() -> None:
    """Scores beyond the clip are equal; without the one cut off, the rest of b is alike."""
    made, scores = samples(
        ("a", 11.0, True), ("a", 99.0, True), ("b", 1.0, True), ("b", 1.0, True), ("b", 5.0, False)
    )
    both = config(dynamic_sampling={}, truncated="filter")
    assert filter_reasons(made, scores, both) == {
        "a#0": "no_spread", "a#1": "no_spread", "b#0": "no_spread", "b#1": "no_spread",
        "b#2": "truncated",
    }  # fmt: skip
    wide = config(dynamic_sampling={}, score_clip=100)
    assert filter_reasons(made, scores, wide) == {}
