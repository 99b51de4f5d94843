"""Batches from trajectories and scores, and their division into micro-batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import Prompt, Trajectory
from learner.batch import (
    ScoreScale,
    build_batch,
    micro_batches,
    minibatch_rows,
    overlong_penalty,
    place_score,
    split_over_ranks,
    take_rows,
)
from learner.config import LengthPenaltyConfig, PPOConfig
from reward_service.score import Score

EOS = 2


def trajectory(name: str, prompt: list[int], response: list[int], index: int = 0) -> Trajectory:
    ids = np.array(response, np.int32)
    return Trajectory(
        prompt=Prompt(prompt_id=name, token_ids=np.array(prompt, np.int32), text=name),
        sample_index=index,
        response_ids=ids,
        response_logprobs=-0.1 * np.arange(1, len(ids) + 1, dtype=np.float32),
        policy_versions=np.zeros(len(ids), np.int32),
        response_text="",
        finish_reason="stop" if response[-1] == EOS else "length",
        seed=1,
    )


def score(name: str, value: float, per_token: list[float] | None = None) -> Score:
    tokens = None if per_token is None else np.array(per_token, np.float32)
    return Score(sample_id=name, value=value, per_token=tokens)


SAMPLES = [trajectory("b", [7, 8], [9, 9, EOS]), trajectory("a", [5, 6, 7], [4])]


def test_arrays_by_hand_in_an_order_that_arrival_does_not_change() -> None:
    scores = [score("b#0", 0.5), score("a#0", -20.0)]
    batch = build_batch(SAMPLES, scores, PPOConfig(), pad_token_id=EOS)
    again = build_batch(SAMPLES[::-1], scores[::-1], PPOConfig(), pad_token_id=EOS)
    mixed = build_batch(SAMPLES, scores[::-1], PPOConfig(), pad_token_id=EOS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 4, EOS], [7, 8, 9, 9, EOS]]
    assert batch.prompt_lengths.tolist() == [3, 2]
    assert batch.response_lengths.tolist() == [1, 3]
    assert batch.rewards.tolist() == [[-10.0, 0, 0], [0, 0, 0.5]]  # -20 is clipped
    assert batch.scores.tolist() == [-20.0, 0.5]
    assert batch.stopped.tolist() == [False, True]
    assert batch.groups.tolist() == [0, 1]
    np.testing.assert_allclose(batch.engine_logprobs, [[-0.1, 0, 0], [-0.1, -0.2, -0.3]])
    for other in (again, mixed):
        for name, column in batch.columns.items():
            np.testing.assert_array_equal(column, other.columns[name])


@pytest.mark.parametrize(
    ("truncated", "expected"), [("score", 0.75), ("penalty", -0.25), ("fixed", -1.0)]
)
def test_a_response_cut_off_gets_what_the_configuration_says(
    truncated: str, expected: float
) -> None:
    config = PPOConfig.model_validate({"truncated": truncated, "truncated_value": -1.0})
    cut, ended = trajectory("a", [5], [4, 4]), trajectory("b", [5], [4, EOS])
    batch = build_batch([cut, ended], [score("a#0", 0.75), score("b#0", 0.75)], config)
    assert batch.rewards.tolist() == [[0, expected], [0, 0.75]]
    assert batch.input_ids[0].tolist() == [5, 4, 4]  # no EOS was added


def test_per_token_rewards_are_placed_and_clipped_one_by_one() -> None:
    scores = [score("b#0", 12.5, [0.5, 12.0, 0.0]), score("a#0", 1.0, [1.0])]
    batch = build_batch(SAMPLES, scores, PPOConfig())
    assert batch.rewards.tolist() == [[1.0, 0, 0], [0.5, 10.0, 0.0]]


def test_fixed_score_of_a_truncated_response_replaces_per_token_rewards() -> None:
    config = PPOConfig(truncated="fixed", truncated_value=-1.0)
    batch = build_batch([trajectory("a", [5], [4, 4])], [score("a#0", 3.0, [1.0, 2.0])], config)
    assert batch.rewards.tolist() == [[0.0, -1.0]]


def test_misaligned_scores_are_named() -> None:
    with pytest.raises(ValueError, match="2 samples came with 1 scores"):
        build_batch(SAMPLES, [score("a#0", 1.0)], PPOConfig())
    with pytest.raises(ValueError, match="no score, the first is 'b#0'"):
        build_batch(SAMPLES, [score("a#0", 1.0), score("c#0", 1.0)], PPOConfig())
    with pytest.raises(ValueError, match="sample b#0: 2 per-token rewards for a response of 3"):
        build_batch(SAMPLES, [score("b#0", 2.0, [1, 1]), score("a#0", 1.0)], PPOConfig())
    with pytest.raises(ValueError, match="no sample to train on"):
        build_batch([], [], PPOConfig())


def test_the_same_prompt_twice_in_a_step_is_matched_by_position() -> None:
    samples = [trajectory("a", [5], [4, EOS]), trajectory("a", [5], [4, EOS])]
    batch = build_batch(samples, [score("a#0", 1.0), score("a#0", 2.0)], PPOConfig())
    assert batch.rewards[:, 1].tolist() == [1.0, 2.0]


def test_rows_of_a_micro_batch_by_hand() -> None:
    batch = build_batch(SAMPLES, [score("b#0", 1.0), score("a#0", 1.0)], PPOConfig())
    cut = take_rows(
        np.array([1, 0]), batch.input_ids, batch.prompt_lengths, batch.response_lengths, 3
    )
    # Inputs end before the last token; row 1 has prompt 7 8 and response 9 9 EOS.
    assert cut.input_ids.tolist() == [[7, 8, 9, 9], [5, 6, 7, 4]]
    assert cut.positions.tolist() == [1, 2, 3, 4 + 2]
    assert cut.targets.tolist() == [9, 9, EOS, 4]
    assert cut.slots.tolist() == [3, 4, 5, 0]


def test_a_row_without_response_still_has_an_input() -> None:
    """What a learner takes that has no sample in a step, when the prompt is a single token."""
    none = np.array([0], np.int32)
    cut = take_rows(np.array([0]), np.array([[5, 9]], np.int32), none + 1, none, 3)
    assert cut.input_ids.tolist() == [[5]]
    assert len(cut.positions) == len(cut.targets) == len(cut.slots) == 0


lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(lengths_of, st.integers(1, 6), st.integers(1, 120), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_an_epoch_trains_every_row_once_within_the_budget(
    lengths: list[int], minibatches: int, budget: int, ranks: int, epoch: int
) -> None:
    sizes = np.array(lengths, np.int32)
    steps = minibatch_rows(len(lengths), minibatches, seed=3, update=1, epoch=epoch)
    assert len(steps) == min(minibatches, len(lengths))
    assert max(map(len, steps)) - min(map(len, steps)) <= 1
    trained: list[int] = []
    for rows in steps:
        shares = split_over_ranks(rows, sizes, ranks)
        loads = [int(sizes[share].sum()) for share in shares]
        # Longest first, each to the least loaded: no share is ahead by more than its last row.
        assert max(loads) - min(loads) <= max(lengths)
        for share in shares:
            for group in micro_batches(share, sizes, budget):
                longest = int(sizes[group].max())
                assert len(group) == 1 or longest * len(group) <= budget
                trained += group.tolist()
    assert sorted(trained) == list(range(len(lengths)))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 200), st.integers(0, 60)
)
@settings(max_examples=150, deadline=None)
def test_micro_batches_waste_no_more_than_the_best_of_all_divisions(
    lengths: list[int], budget: int, overhead: int
) -> None:
    def cost(groups: list[list[int]]) -> float:
        padded = [max(group) * len(group) for group in groups]
        fits = all(p <= budget or len(g) == 1 for p, g in zip(padded, groups, strict=True))
        return sum(padded) + overhead * len(groups) if fits else float("inf")

    ordered = sorted(lengths)
    divisions = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        groups = [[ordered[0]]]
        for cut, length in zip(cuts, ordered[1:], strict=True):
            groups.append([length]) if cut else groups[-1].append(length)
        divisions.append(groups)
    sizes = np.array(lengths, np.int32)
    got = micro_batches(np.arange(len(lengths)), sizes, budget, overhead)
    longest = [int(sizes[group].max()) for group in got]
    assert longest == sorted(longest, reverse=True)
    assert cost([sizes[group].tolist() for group in got]) == min(map(cost, divisions))


def test_shuffles_depend_on_seed_update_and_epoch_alone() -> None:
    def order(seed: int, update: int, epoch: int) -> list[int]:
        parts = minibatch_rows(32, 4, seed=seed, update=update, epoch=epoch)
        return np.concatenate(parts).tolist()

    assert order(0, 0, 0) == order(0, 0, 0)
    different = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)]
    assert len({tuple(o) for o in different}) == 4


def test_groups_are_prompts_whatever_the_order_and_the_number_of_responses() -> None:
    names = [("b", 1), ("a", 0), ("b", 0), ("c", 2), ("b", 3)]
    samples = [trajectory(name, [5], [9, EOS], index) for name, index in names]
    scores = [score(f"{name}#{index}", float(index)) for name, index in names]
    batch = build_batch(samples, scores, PPOConfig())
    assert batch.groups.tolist() == [0, 1, 1, 1, 2]
    assert batch.scores.tolist() == [0.0, 0.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (6, 0.0), (7, -0.5), (8, -1.0), (10, -2.0), (11, -2.0)]
)
def test_soft_overlong_punishment_by_hand(length: int, penalty: float) -> None:
    """At most 10 tokens, the last 4 of which cost half a point each."""
    config = LengthPenaltyConfig(max_tokens=10, cache_tokens=4, factor=2.0)
    assert overlong_penalty(length, config) == penalty


def test_the_length_penalty_is_added_at_the_last_token_after_the_score_is_clipped() -> None:
    penalty = LengthPenaltyConfig(max_tokens=4, cache_tokens=2)
    config = PPOConfig(score_clip=1.0, length_penalty=penalty)
    sample = trajectory("a", [5], [7, 8, EOS])
    assert place_score(sample, score("a#0", -9.0), config).tolist() == [0, 0, -1.5]
    spread = place_score(sample, score("a#0", 0.75, per_token=[0.25, 0.25, 0.25]), config)
    assert spread.tolist() == [0.25, 0.25, -0.25]
    fixed = PPOConfig(truncated="fixed", truncated_value=-3.0, length_penalty=penalty)
    assert place_score(trajectory("a", [5], [7, 8, 9]), score("a#0", 1.0), fixed)[-1] == -3.0


def test_scores_of_the_first_step_decide_how_all_are_scaled() -> None:
    """Scores 38, 44 and 47 have mean 43 and standard deviation sqrt(14)."""
    config = PPOConfig(normalize_scores=True, score_clip=3.0)
    first = [score("a#0", 38.0), score("b#0", 47.0), score("c#0", 44.0)]
    scale = ScoreScale.of_first_step(first, config)
    assert scale.gain == pytest.approx(14**-0.5)
    assert scale.bias == pytest.approx(-43 / 14**0.5)
    assert scale == ScoreScale.of_first_step(first[::-1], config)

    sample = trajectory("a", [5], [7, 8, 9])
    placed = place_score(sample, score("a#0", 50.0), config, scale)
    np.testing.assert_allclose(placed, [0, 0, 7 / 14**0.5], rtol=1e-6)
    assert place_score(sample, score("a#0", 100.0), config, scale)[-1] == 3.0  # clipped afterwards
    spread = place_score(sample, score("a#0", 50.0, per_token=[20.0, 20.0, 10.0]), config, scale)
    assert spread.sum() == pytest.approx(3.0 + 3.0 - 3.0)
    mild = PPOConfig(normalize_scores=True, score_clip=100.0)
    spread = place_score(sample, score("a#0", 50.0, per_token=[20.0, 20.0, 10.0]), mild, scale)
    assert spread.sum() == pytest.approx(7 / 14**0.5, abs=1e-5)


def test_scores_stay_as_they_are_unless_they_are_to_be_normalised() -> None:
    assert ScoreScale.of_first_step([score("a#0", 38.0)], PPOConfig()) == ScoreScale()
    alike = ScoreScale.of_first_step([score("a#0", 4.0)] * 3, PPOConfig(normalize_scores=True))
    assert alike == ScoreScale(gain=1.0, bias=-4.0)
