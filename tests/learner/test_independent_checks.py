"""The mathematics against an independent float64 implementation, and gradients against numbers.

``test_advantages.py`` and ``test_losses.py`` hold the values worked out by hand, GAE and the
policy's whole loss; here is what they leave: every formula over random masked inputs, the metrics
of a batch, and the gradient of the whole loss with respect to the weights of a model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from learner.advantages import explained_variance, masked_mean, masked_var, whiten
from learner.batch import take_rows
from learner.config import KLConfig, OptimizerConfig, PPOConfig
from learner.kl import KLController, kl_estimate
from learner.losses import importance_weights, policy_loss, policy_terms, value_loss
from learner.models import token_logprobs
from tests.learner import float64_formulas as plain
from tests.learner.plain_ppo import PlainModels, response_views
from tests.learner.ppo_samples import in_process, random_batch

number = st.floats(-4, 4, width=32)
column = st.lists(st.tuples(number, number, number, number), min_size=1, max_size=8)


@st.composite
def masked_arrays(draw: st.DrawFn, count: int) -> tuple[list[np.ndarray], list[int]]:
    """Arrays ``[B, R]`` of responses of unequal lengths, with room to the right of the longest."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shape = (len(lengths), max(lengths) + draw(st.integers(0, 2)))
    array = npst.arrays(np.float64, shape, elements=st.floats(-5, 5, width=32))
    return [draw(array) for _ in range(count)], lengths


def dirty(array: np.ndarray, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The array with NaN at masked positions, and the mask."""
    mask = np.arange(array.shape[1]) < np.array(lengths)[:, None]
    return torch.tensor(np.where(mask, array, np.nan)), torch.tensor(mask)


@given(masked_arrays(1), st.booleans())
@settings(max_examples=150, deadline=None)
def test_mean_variance_and_whitening(
    data: tuple[list[np.ndarray], list[int]], shift_mean: bool
) -> None:
    (values,), lengths = data
    rows = plain.rows_of(values, lengths)
    given_values, mask = dirty(values, lengths)
    assert float(masked_mean(given_values, mask)) == pytest.approx(
        plain.mean(plain.flat(rows)), abs=1e-12
    )
    assert float(masked_var(given_values, mask)) == pytest.approx(
        plain.variance(plain.flat(rows)), abs=1e-11
    )
    white = whiten(given_values, mask, shift_mean=shift_mean).numpy()
    want = plain.flat(plain.whitened(rows, shift_mean=shift_mean))
    got = plain.flat(plain.rows_of(white, lengths))
    np.testing.assert_allclose(got, want, atol=1e-8)
    assert not white[~mask.numpy()].any()


@given(masked_arrays(2))
@settings(max_examples=150, deadline=None)
def test_explained_variance(data: tuple[list[np.ndarray], list[int]]) -> None:
    (values, returns), lengths = data
    given_values, mask = dirty(values, lengths)
    given_returns, _ = dirty(returns, lengths)
    got = float(explained_variance(given_values, given_returns, mask))
    return_rows = plain.rows_of(returns, lengths)
    spread = np.ptp(plain.flat(return_rows))
    if spread == 0:
        assert got == 0.0
    elif spread > 1e-6:
        want = plain.explained_variance(plain.rows_of(values, lengths), return_rows)
        assert got == pytest.approx(want, rel=1e-8, abs=1e-8)


def test_returns_that_are_equal_but_for_rounding_explain_nothing() -> None:
    """The quotient of two roundings could be any number, -1e14 as well."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    returns = torch.tensor([[0.1, 0.1 + 1e-8, 0.1], [0.1, 0.1 - 1e-8, 0.1]])
    assert returns.unique().numel() > 1
    values = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.1, 0.2]])
    assert float(explained_variance(values, returns, mask)) == 0.0


@given(st.lists(st.floats(-19, 19, width=32), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_kl_estimators(differences: list[float]) -> None:
    d = torch.tensor(differences, dtype=torch.float64)
    for estimator in ("k1", "k2", "k3"):
        want = [plain.kl(x, estimator) for x in differences]
        np.testing.assert_allclose(kl_estimate(d, estimator), want, rtol=1e-9, atol=1e-9)
    straight = [plain.kl(x, "k3") for x in differences]
    np.testing.assert_allclose(kl_estimate(d, "k3_st_k2"), straight, rtol=1e-9, atol=1e-9)


@given(
    column,
    st.floats(0.05, 0.5),
    st.floats(0.05, 0.9),
    st.one_of(st.none(), st.floats(1.1, 5.0)),
    st.floats(0.5, 3.0),
)
@settings(max_examples=200, deadline=None)
def test_surrogate_value_loss_and_importance_weights(
    rows: list[tuple[float, ...]], low: float, high: float, dual: float | None, cap: float
) -> None:
    a, b, c, d = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    loss, ratio, _ = policy_loss(a, b, low, high, dual)
    want = [
        plain.clipped_surrogate(float(x), float(y), low, high, dual)
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(loss, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ratio, np.exp(a.numpy()), rtol=1e-12)
    error, _ = value_loss(a, b, c, low)
    want = [
        plain.clipped_value_loss(float(x), float(y), float(z), low)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_allclose(error, want, rtol=1e-10, atol=1e-10)
    weights = importance_weights(c, d, cap)
    np.testing.assert_allclose(weights, np.minimum(np.exp(c.numpy() - d.numpy()), cap), rtol=1e-12)


@given(
    st.lists(st.tuples(st.floats(-5, 60), st.integers(1, 512)), max_size=20),
    st.floats(0.5, 20),
    st.integers(100, 20_000),
    st.floats(0.001, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_the_adaptive_controller(
    observed: list[tuple[float, int]], target: float, horizon: int, coef: float
) -> None:
    controller = KLController(
        KLConfig(adaptive=True, coef=coef, target=target, horizon=max(horizon, 512))
    )
    for kl, episodes in observed:
        controller.observe(kl, episodes)
    want = plain.controlled(coef, observed, target, max(horizon, 512))
    assert controller.coef == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_metrics_of_a_batch(seed: int, tiny_llama: Path, tiny_llama_untied: Path) -> None:
    """From float64 forward passes over whole padded rows, with sums over lists."""
    batch = random_batch(6, seed=seed)
    still = OptimizerConfig(learning_rate=0.0)
    config = PPOConfig(epochs=1, minibatches=2, policy=still, critic=still, lam=0.9, gamma=0.97)
    got = in_process(config, tiny_llama, reference_dir=tiny_llama_untied, temperature=0.8).update(
        batch
    )
    models = PlainModels(tiny_llama, tiny_llama_untied, shared_trunk=False)
    with torch.no_grad():
        views = [response_views(models, batch, row, 0.8) for row in range(6)]
    lengths = batch.response_lengths.tolist()
    logprobs = [view["logprobs"].tolist() for view in views]
    difference = [(view["logprobs"] - view["reference"]).tolist() for view in views]
    engine = plain.rows_of(batch.engine_logprobs.astype(np.float64), lengths)
    deltas = [a - b for a, b in zip(plain.flat(logprobs), plain.flat(engine), strict=True)]
    scores = batch.scores.astype(np.float64).tolist()
    sequence_kl = [sum(row) for row in difference]
    want = {
        "score": plain.mean(scores),
        "score_std": plain.variance(scores) ** 0.5,
        "kl_sequence": plain.mean(sequence_kl),
        "kl_token": plain.mean(plain.flat(difference)),
        "reward_shaped": plain.mean(
            [s - 0.05 * k for s, k in zip(scores, sequence_kl, strict=True)]
        ),
        "entropy": plain.mean([x for view in views for x in view["entropy"].tolist()]),
        "value": 0.0,
        "explained_variance": 0.0,  # of a critic that says 0 everywhere
        "engine_delta_mean": plain.mean([abs(x) for x in deltas]),
        "engine_delta_max": max(abs(x) for x in deltas),
        "effective_sample_size": plain.effective_share(deltas),
        "eos_rate": sum(batch.stopped.tolist()) / 6,
        "response_length": sum(lengths) / 6,
        "tokens": sum(lengths),
        "ratio_mean": 1.0,
        "approx_kl": 0.0,
    }
    for name, value in want.items():
        assert got[f"ppo/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert abs(want["kl_sequence"]) > 0.1


FULL = PPOConfig(
    clip=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    entropy_coef=0.05,
    importance_cap=2.0,
    kl=KLConfig(where="loss", estimator="k2", coef=0.1),
)


def rms_norm(module: LlamaRMSNorm, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt((x**2).mean(-1, keepdim=True) + module.variance_epsilon)


def test_the_gradient_through_a_model_equals_central_differences(tiny_llama: Path) -> None:
    """Policy, value, KL and entropy together, for a random direction of every weight tensor.

    In float64 with a step of 1e-6 the difference quotient has about nine correct digits.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    for module in model.modules():  # Hugging Face's own computes in float32
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(rms_norm, module)
    head = nn.Linear(64, 1).double()
    batch = random_batch(3, seed=8, longest=9)
    cut = take_rows(np.arange(3), batch.input_ids, batch.prompt_lengths, batch.response_lengths, 9)
    inputs = {name: torch.from_numpy(getattr(cut, name)) for name in cut.__slots__}
    with torch.no_grad():
        start = token_logprobs(model, inputs, temperature=0.7)[0]
    noise = torch.randn(4, len(start), dtype=torch.float64)
    old, reference = start + 0.3 * noise[0], start + 0.3 * noise[1]
    advantages, returns = noise[2], noise[3]

    def loss() -> Tensor:
        logprobs, entropy, hidden = token_logprobs(model, inputs, 0.7, with_entropy=True)
        terms = policy_terms(
            logprobs,
            entropy,
            old_logprobs=old,
            reference_logprobs=reference,
            engine_logprobs=old + 0.1,
            advantages=advantages,
            kl_coef=0.1,
            config=FULL,
        )
        error, _ = value_loss(head(hidden)[:, 0], returns + 0.1, returns, 0.2)
        return (terms.loss + 0.1 * error).mean()

    parameters = [*model.named_parameters(), *head.named_parameters()]
    gradients = torch.autograd.grad(loss(), [p for _, p in parameters])
    step = 1e-6
    for (name, parameter), gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                slopes.append(float(loss()))
                parameter.sub_(direction, alpha=sign * step)
        quotient = (slopes[0] - slopes[1]) / (2 * step)
        want = float((gradient * direction).sum())
        assert quotient == pytest.approx(want, rel=1e-5, abs=1e-8), name
    assert all(float(g.abs().max()) > 1e-6 for g in gradients)
