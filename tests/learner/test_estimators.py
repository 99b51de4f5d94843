"""Advantages without a critic: by hand, at the edges, and by definition in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from learner.advantages import (
    estimate_advantages,
    grpo,
    rewards_to_go,
    rloo,
    subtract_group_mean,
)
from learner.config import GROUP_ESTIMATORS, PPOConfig

NAN = float("nan")
# Two prompts: three responses of 2, 1 and 2 tokens, and two of 1 and 2.
MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, True]])
GROUPS = torch.tensor([0, 0, 0, 1, 1])
# Rewards of the responses as wholes: 1, 2, 6 and 4, 3.
REWARDS = torch.tensor([[0.0, 1.0], [2.0, NAN], [1.0, 5.0], [4.0, NAN], [0.0, 3.0]])
ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def spread(*per_response: float) -> Tensor:
    return torch.where(MASK, torch.tensor(per_response)[:, None], 0.0)


def configured(advantage: str, **changes: Any) -> PPOConfig:
    kl = {"where": "off"}
    return PPOConfig.model_validate({"advantage": advantage, "kl": kl} | changes)


def test_grpo_by_hand() -> None:
    """Means 3 and 3.5; sample variances (4 + 1 + 9) / 2 = 7 and (0.25 + 0.25) / 1 = 0.5."""
    a, b = math.sqrt(7), math.sqrt(0.5)
    got = grpo(REWARDS, MASK, GROUPS, divide_by_std=True)
    torch.testing.assert_close(got, spread(-2 / a, -1 / a, 3 / a, 0.5 / b, -0.5 / b))
    got = grpo(REWARDS, MASK, GROUPS, divide_by_std=False)
    torch.testing.assert_close(got, spread(-2.0, -1.0, 3.0, 0.5, -0.5))


def test_rloo_by_hand() -> None:
    """The others' means: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2, and 3 and 4."""
    got = rloo(REWARDS, MASK, GROUPS)
    torch.testing.assert_close(got, spread(1 - 4.0, 2 - 3.5, 6 - 1.5, 1.0, -1.0))


def test_rewards_to_go_by_hand() -> None:
    got = rewards_to_go(REWARDS, MASK, gamma=0.5)
    expected = torch.tensor([[0.5, 1.0], [2.0, 0.0], [3.5, 5.0], [4.0, 0.0], [1.5, 3.0]])
    torch.testing.assert_close(got, expected)


def test_the_groups_mean_is_taken_off_at_the_last_token() -> None:
    got = subtract_group_mean(REWARDS, MASK, GROUPS)
    expected = torch.tensor([[0.0, -2.0], [-1.0, 0.0], [1.0, 2.0], [0.5, 0.0], [0.0, -0.5]])
    torch.testing.assert_close(got, expected)


def test_reinforce_plus_plus_whitens_over_all_tokens_by_hand() -> None:
    """Tokens 3, 3, 1: mean 7 / 3, biased variance (4/9 + 4/9 + 16/9) / 3 = 8 / 9."""
    mask = torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[0.0, 3.0], [1.0, NAN]])
    got, returns = estimate_advantages(
        configured("reinforce_plus_plus"),
        rewards=rewards,
        values=None,
        mask=mask,
        groups=torch.tensor([0, 1]),
    )
    root = math.sqrt(8 / 9)
    high, low = (3 - 7 / 3) / root, (1 - 7 / 3) / root
    torch.testing.assert_close(got, torch.tensor([[high, high], [low, 0.0]]))
    assert returns is None


def test_reinforce_plus_plus_charges_each_token_the_kl_that_is_still_to_come() -> None:
    """A score of 2 on the last of three tokens, and a KL penalty of 0.1, 0.2 and 0.3."""
    shaped = torch.tensor([[-0.1, -0.2, 2.0 - 0.3]])
    got = rewards_to_go(shaped, torch.ones(1, 3, dtype=torch.bool), gamma=1.0)
    torch.testing.assert_close(got, torch.tensor([[1.4, 1.5, 1.7]]))


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_equal_rewards_give_zeros(advantage: str) -> None:
    """Exactly, although the mean of three times 0.1 is not 0.1 in binary."""
    rewards = torch.tensor([[0.0, 0.1], [0.1, NAN], [0.0, 0.1], [0.1, NAN], [0.0, 0.1]])
    got, _ = estimate_advantages(
        configured(advantage), rewards=rewards, values=None, mask=MASK, groups=GROUPS
    )
    assert torch.equal(got, torch.zeros(5, 2))


@pytest.mark.parametrize("advantage", GROUP_ESTIMATORS)
def test_a_group_of_one_has_nothing_to_be_compared_with(advantage: str) -> None:
    got, _ = estimate_advantages(
        configured(advantage),
        rewards=torch.tensor([[5.0], [1.0], [3.0]]),
        values=None,
        mask=torch.ones(3, 1, dtype=torch.bool),
        groups=torch.tensor([0, 1, 1]),
    )
    assert float(got[0, 0]) == 0.0
    assert float(got[1, 0]) == -float(got[2, 0]) < 0


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_one_response_of_one_token(advantage: str) -> None:
    got, _ = estimate_advantages(
        configured(advantage),
        rewards=torch.tensor([[7.0]]),
        values=None,
        mask=torch.tensor([[True]]),
        groups=torch.tensor([0]),
    )
    assert torch.equal(got, torch.zeros(1, 1))


Case = tuple[np.ndarray, list[int], np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rewards per token ``[B, R]``, lengths and groups, in any order of the groups."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=9))
    members = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    groups = np.unique(members, return_inverse=True)[1]
    # Whole numbers: whether two sums are equal is then the same in every implementation.
    numbers = st.integers(-4, 4).map(float)
    width = max(lengths) + draw(st.integers(0, 2))
    rows = st.lists(numbers, min_size=width, max_size=width)
    rewards = draw(st.lists(rows, min_size=len(lengths), max_size=len(lengths)))
    return np.array(rewards), lengths, groups


def by_definition(
    advantage: str, rewards: np.ndarray, lengths: list[int], groups: np.ndarray, gamma: float
) -> np.ndarray:
    """One response after the other, in numpy, by the formulas of the papers."""
    result = np.zeros(rewards.shape)
    totals = np.array([rewards[i, :n].sum() for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        mine = totals[groups == groups[i]]
        others = np.delete(totals, i)[np.delete(groups, i) == groups[i]]
        for t in range(n):
            if advantage == "rloo":
                result[i, t] = totals[i] - others.mean() if len(others) else 0.0
            elif advantage == "grpo":
                std = mine.std(ddof=1) if len(mine) > 1 else 0.0
                result[i, t] = (totals[i] - mine.mean()) / (std + 1e-6)
            else:
                row = rewards[i, :n].copy()
                if advantage == "reinforce_plus_plus_baseline":
                    row[-1] -= mine.mean()
                result[i, t] = (gamma ** np.arange(n - t) * row[t:]).sum()
    if advantage.startswith("reinforce"):
        mask = np.arange(rewards.shape[1]) < np.array(lengths)[:, None]
        real = result[mask]
        white = (result - real.mean()) / np.sqrt(((real - real.mean()) ** 2).mean() + 1e-8)
        result = np.where(mask, white, 0.0)
    return result


@pytest.mark.parametrize("advantage", ESTIMATORS)
@given(data=cases(), gamma=st.floats(0.5, 1.0), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_estimators_equal_their_definitions_in_any_order_and_with_any_padding(
    advantage: str, data: Case, gamma: float, order: Any
) -> None:
    rewards, lengths, groups = data
    gamma = gamma if advantage.startswith("reinforce") else 1.0
    mask = np.arange(rewards.shape[1]) < np.array(lengths)[:, None]
    want = by_definition(advantage, rewards, lengths, groups, gamma)

    def estimate(rows: np.ndarray) -> np.ndarray:
        got, _ = estimate_advantages(
            configured(advantage, gamma=gamma),
            rewards=torch.tensor(np.where(mask, rewards, np.nan)[rows]),
            values=None,
            mask=torch.tensor(mask[rows]),
            groups=torch.tensor(groups[rows]),
        )
        return got.numpy()

    rows = np.arange(len(lengths))
    np.testing.assert_allclose(estimate(rows), want, atol=1e-9)
    order.shuffle(rows)
    np.testing.assert_allclose(estimate(rows), want[rows], atol=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"advantage": "grpo"}, "a KL penalty in the reward would weigh differently"),
        (
            {"advantage": "rloo", "shared_trunk": True},
            "shared_trunk adds a value head, but ppo.adv",
        ),
        ({"advantage": "rloo", "gamma": 0.9}, r"gamma 0.9 discounts token by token, but .* 'rloo'"),
        ({"advantage": "rloo", "whiten_rewards": True}, "whiten_rewards scales"),
        ({"advantage": "rloo", "group_std": False}, "group_std false is Dr. GRPO, but"),
        ({"advantage": "reinforce_plus_plus", "whiten_advantages": False}, "takes away"),
        ({"dynamic_sampling": {}}, "only a group estimator learns nothing from, but .* 'gae'"),
        ({"length_penalty": {"max_tokens": 8, "cache_tokens": 8}}, "cache_tokens 8 must be less"),
    ],
)
def test_settings_that_contradict_the_estimator_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PPOConfig.model_validate(values)


def test_which_estimators_whiten_and_which_have_values() -> None:
    whitens = {name: configured(name).whitens_advantages for name in ("gae", *ESTIMATORS)}
    assert whitens == {
        "gae": True,
        "grpo": False,
        "rloo": False,
        "reinforce_plus_plus": True,
        "reinforce_plus_plus_baseline": True,
    }
    assert configured("rloo", whiten_advantages=True).whitens_advantages
    assert not configured("gae", whiten_advantages=False).whitens_advantages
    assert configured("gae").has_critic
    assert not configured("gae", shared_trunk=True).has_critic
    assert not any(configured(name).has_values for name in ESTIMATORS)
