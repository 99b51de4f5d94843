"""PPO's losses and the KL estimators: numbers by hand, a float64 loop, numerical gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from learner.config import KLConfig, PPOConfig
from learner.kl import KLController, kl_estimate
from learner.losses import (
    importance_weights,
    loss_divisor,
    policy_loss,
    policy_terms,
    token_weights,
    value_loss,
)


def log(*values: float) -> Tensor:
    return torch.log(torch.tensor(values, dtype=torch.float64))


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5, 0.5 and 1.1 with advantages of both signs, clip 0.2."""
    ratios = log(1.5, 1.5, 0.5, 0.5, 1.1)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    loss, ratio, clipped = policy_loss(ratios, advantages, 0.2, 0.2)
    expected = torch.tensor([-2.4, 3.0, -1.0, 1.6, -3.3], dtype=torch.float64)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, True, False]


def test_clip_higher_moves_only_the_upper_bound() -> None:
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss, _, clipped = policy_loss(log(1.5, 0.5), advantages, 0.2, 0.4)
    torch.testing.assert_close(loss, torch.tensor([-1.4, 0.8], dtype=torch.float64))
    assert clipped.tolist() == [True, True]


def test_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    advantages = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    loss, _, clipped = policy_loss(log(10.0, 10.0, 2.0), advantages, 0.2, 0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([3.0, -1.2, 2.0], dtype=torch.float64))
    assert clipped.tolist() == [True, True, False]


def test_value_loss_by_hand() -> None:
    """Old value 1, return 3, clip 0.2: a value of 2 is held at 1.2, error 1.8; the value -1 is
    held at 0.8, whose error 2.2 is smaller than 4."""
    values = torch.tensor([2.0, -1.0, 1.1])
    old, returns = torch.ones(3), torch.full((3,), 3.0)
    loss, clipped = value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([1.62, 8.0, 1.805]))
    assert clipped.tolist() == [True, False, False]


def test_kl_estimators_by_hand() -> None:
    """d = log 2: k1 = 0.693, k2 = 0.240, k3 = 1/2 - 1 + 0.693."""
    d = log(2.0, 0.5)
    ln2 = math.log(2)
    k3 = [0.5 - 1 + ln2, 2 - 1 - ln2]
    assert kl_estimate(d, "k1").tolist() == pytest.approx([ln2, -ln2])
    assert kl_estimate(d, "k2").tolist() == pytest.approx([ln2**2 / 2] * 2)
    assert kl_estimate(d, "k3").tolist() == pytest.approx(k3)
    assert kl_estimate(d, "k3_st_k2").tolist() == pytest.approx(k3)


def test_k3_does_not_overflow() -> None:
    assert torch.isfinite(kl_estimate(torch.tensor([-200.0, 200.0]), "k3")).all()


def test_k3_and_k1_are_unbiased_and_k2s_gradient_is_the_gradient_of_the_kl() -> None:
    """Expectations over all actions of a small categorical policy, no sampling involved."""
    torch.manual_seed(0)
    theta = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(7, dtype=torch.float64), 0)
    logp = torch.log_softmax(theta, 0)
    p = logp.detach().exp()
    exact = (logp.exp() * (logp - reference)).sum()
    for name in ("k1", "k3"):
        estimate = (p * kl_estimate((logp - reference).detach(), name)).sum()
        torch.testing.assert_close(estimate, exact.detach())
    (want,) = torch.autograd.grad(exact, theta, retain_graph=True)
    for name in ("k2", "k3_st_k2"):
        expected = (p * kl_estimate(logp - reference, name)).sum()
        (got,) = torch.autograd.grad(expected, theta, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_importance_weights_are_truncated() -> None:
    old, engine = log(0.5, 0.9, 0.1), log(0.1, 0.9, 0.2)
    assert importance_weights(old, engine, 2.0).tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert importance_weights(old, engine, None).tolist() == [1.0, 1.0, 1.0]


def test_stale_samples_are_weighted_unless_configured_otherwise() -> None:
    assert PPOConfig().importance_limit is None
    assert PPOConfig(max_staleness=1).importance_limit == 2.0
    assert PPOConfig(max_staleness=1, importance_cap=5.0).importance_limit == 5.0
    assert PPOConfig(importance_cap=5.0).importance_limit == 5.0
    # One token, sampled by weights that gave it 0.2, of a policy that gives it 0.3: weight 1.5.
    now = log(0.3).requires_grad_()
    terms = policy_terms(
        now,
        None,
        old_logprobs=log(0.3),
        reference_logprobs=log(0.3),
        engine_logprobs=log(0.2),
        advantages=torch.tensor([2.0], dtype=torch.float64),
        kl_coef=0.0,
        config=PPOConfig(max_staleness=1),
    )
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(-2.0 * 1.5)
    assert now.grad is not None
    assert now.grad.item() == pytest.approx(-2.0 * 1.5)  # ratio 1: the gradient is the loss


def test_kl_in_the_loss_with_a_biased_gradient_is_refused() -> None:
    with pytest.raises(ValidationError, match="biased gradient"):
        KLConfig(where="loss", estimator="k1")
    with pytest.raises(ValidationError, match="is for kl"):
        KLConfig(where="reward", estimator="k3_st_k2")


def test_adaptive_controller_by_hand() -> None:
    """The KL of 64 episodes is 9 at a target of 6: the error 0.5 is clipped to 0.2."""
    controller = KLController(KLConfig(adaptive=True, coef=0.15))
    controller.observe(9.0, 64)
    assert controller.coef == pytest.approx(0.15 * (1 + 0.2 * 64 / 10_000))
    controller = KLController(KLConfig(adaptive=True, coef=0.15))
    controller.observe(5.4, 64)
    assert controller.coef == pytest.approx(0.15 * (1 - 0.1 * 64 / 10_000))
    again = KLController(KLConfig(adaptive=True, coef=0.15))
    again.load_state(controller.state())
    assert again.coef == controller.coef


def test_a_fixed_coefficient_follows_the_configuration_not_the_checkpoint() -> None:
    controller = KLController(KLConfig(coef=0.05))
    controller.observe(100.0, 64)
    assert controller.coef == 0.05
    controller.load_state({"coef": 0.4})
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("where", "in_reward", "in_loss"), [("reward", 0.05, 0), ("loss", 0, 0.05), ("off", 0, 0)]
)
def test_the_kl_enters_in_one_place_only(where: str, in_reward: float, in_loss: float) -> None:
    config = KLConfig.model_validate({"where": where, "estimator": "k2"})
    controller = KLController(config)
    assert (controller.in_reward, controller.in_loss) == (in_reward, in_loss)


def test_adaptive_controller_names_a_kl_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="KL of a batch is nan"):
        KLController(KLConfig(adaptive=True)).observe(float("nan"), 4)


CONFIG = PPOConfig(
    clip=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    entropy_coef=0.01,
    importance_cap=2.0,
    kl=KLConfig(where="loss", estimator="k2", coef=0.1),
)


def full_loss(theta: Tensor, old: Tensor, reference: Tensor, engine: Tensor, adv: Tensor) -> Tensor:
    """The policy's whole loss of one token per row of logits ``theta [N, V]``, token 0 chosen."""
    everything = torch.log_softmax(theta, -1)
    entropy = -(everything.exp() * everything).sum(-1)
    return policy_terms(
        everything[:, 0],
        entropy,
        old_logprobs=old,
        reference_logprobs=reference,
        engine_logprobs=engine,
        advantages=adv,
        kl_coef=0.1,
        config=CONFIG,
    ).loss


def loop_loss(theta: np.ndarray, old: float, reference: float, engine: float, adv: float) -> float:
    """The same from the formulas, one token, in plain Python."""
    top = max(theta)
    log_z = top + math.log(sum(math.exp(x - top) for x in theta))
    logps = [x - log_z for x in theta]
    ratio = math.exp(logps[0] - old)
    loss = max(-adv * ratio, -adv * min(max(ratio, 0.8), 1.3))
    if adv < 0:
        loss = min(loss, -adv * 3.0)
    loss *= min(math.exp(old - engine), 2.0)
    entropy = -sum(math.exp(x) * x for x in logps)
    return loss - 0.01 * entropy + 0.1 * 0.5 * (logps[0] - reference) ** 2


finite = st.floats(-3, 3, width=32)
tokens = st.lists(st.tuples(finite, finite, finite, finite, finite, finite), min_size=1, max_size=6)


@given(tokens)
@settings(max_examples=150, deadline=None)
def test_the_whole_policy_loss_equals_a_loop(rows: list[tuple[float, ...]]) -> None:
    theta = torch.tensor([row[:3] for row in rows], dtype=torch.float64)
    others = [torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (3, 4, 5)]
    old, reference, adv = others[0] - 2, others[1] - 2, others[2]
    engine = old + 0.3
    got = full_loss(theta, old, reference, engine, adv)
    want = [
        loop_loss(
            theta[i].tolist(), float(old[i]), float(reference[i]), float(engine[i]), float(adv[i])
        )
        for i in range(len(rows))
    ]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_whole_loss_equals_numerical_differentiation() -> None:
    torch.manual_seed(3)
    theta = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.log_softmax(theta.detach(), -1)[:, 0]
    old, reference = chosen + 0.4 * torch.randn(12), chosen + 0.4 * torch.randn(12)
    fixed = (old.double(), reference.double(), old.double() + 0.1, torch.randn(12).double())
    assert torch.autograd.gradcheck(lambda t: full_loss(t, *fixed), (theta,))
    values = torch.randn(12, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(12, dtype=torch.float64)
    before = torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, before, returns, 0.2)[0], (values,))


def test_without_a_change_of_the_policy_ratio_is_one_and_nothing_is_clipped() -> None:
    logprobs = -torch.rand(9)
    terms = policy_terms(
        logprobs,
        None,
        old_logprobs=logprobs,
        reference_logprobs=logprobs,
        engine_logprobs=logprobs,
        advantages=torch.randn(9),
        kl_coef=0.0,
        config=PPOConfig(),
    )
    assert torch.equal(terms.ratio, torch.ones(9))
    assert torch.equal(terms.approx_kl, torch.zeros(9))
    assert not terms.clipped.any()


def test_aggregations_by_hand() -> None:
    """Losses 4 and 1, 2, 3: the mean over tokens is 10 / 4, over responses (4 + 2) / 2."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    losses = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    lengths = np.array([1, 3], np.int32)
    for aggregation, expected in (("token_mean", 2.5), ("sequence_mean", 3.0)):
        weighted = (losses * token_weights(mask, aggregation)).sum()
        assert float(weighted) / loss_divisor(lengths, aggregation) == pytest.approx(expected)
