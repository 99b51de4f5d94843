"""The training loop: batches, schedule, accumulation, resume, and the losses worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learner.config import OptimizerConfig, SupervisedConfig
from learner.supervised import Interrupted, OtherDataError, learning_rate, train
from learner.supervised_losses import bradley_terry, nll, rating_error
from learner.token_batches import cut_by_budget, pad_right, plan_steps
from learner.training_state import STATE_FILE, saved_step

# --- losses ------------------------------------------------------------------------------------


def test_nll_is_the_sum_of_minus_log_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    # 1/2, and 3 / (3 + 1)
    expected = -math.log(1 / 2) - math.log(3 / 4)
    assert nll(logits, torch.tensor([1, 0])).item() == pytest.approx(expected)


def test_nll_takes_its_softmax_in_float32() -> None:
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    loss = nll(logits, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)


def test_bradley_terry_by_hand() -> None:
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0])
    won, lost = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    preference = torch.tensor([1.0, 0.0, 0.5])
    expected = won + lost + 0.5 * won + 0.5 * lost
    assert bradley_terry(a, b, preference).item() == pytest.approx(expected, rel=1e-6)
    weighted = bradley_terry(a, b, preference, weight=torch.tensor([2.0, 0.0, 0.0]))
    assert weighted.item() == pytest.approx(2 * won, rel=1e-6)


def test_a_margin_asks_for_a_lead() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    loss = bradley_terry(a, b, torch.tensor([1.0, 0.0]), margin=torch.tensor([1.0, 1.0]))
    # A lead of exactly the margin is a coin toss, whichever side it is on.
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_a_tie_pulls_rewards_together() -> None:
    a = torch.tensor([1.5], requires_grad=True)
    b = torch.tensor([0.5], requires_grad=True)
    bradley_terry(a, b, torch.tensor([0.5])).backward()
    assert a.grad is not None
    assert b.grad is not None
    # d/dx of softplus-type loss: sigmoid(1) - 1/2
    assert a.grad.item() == pytest.approx(1 / (1 + math.exp(-1)) - 0.5, rel=1e-5)
    assert b.grad.item() == pytest.approx(-a.grad.item(), rel=1e-5)


def test_bradley_terry_stays_finite_far_out() -> None:
    loss = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(2e4)


def test_rating_error_by_hand() -> None:
    loss = rating_error(
        torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), weight=torch.tensor([1.0, 3.0])
    )
    assert loss.item() == pytest.approx(0.5 * 1 + 3 * 0.5 * 4)


# --- schedule and batches ----------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_share=0.2, schedule="linear")
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))])
    cosine = OptimizerConfig(learning_rate=2.0, schedule="cosine")
    assert [learning_rate(cosine, s, 4) for s in (0, 2)] == pytest.approx([2.0, 1.0])
    constant = OptimizerConfig(learning_rate=2.0, schedule="constant")
    assert learning_rate(constant, 99, 100) == 2.0


def test_cut_by_budget_counts_padded_tokens() -> None:
    lengths, rows = np.array([2, 3, 3, 9, 1]), np.array([1, 1, 1, 1, 1])
    cut = cut_by_budget(np.arange(5), lengths, rows, 9)
    # 3 rows x 3 tokens fill the budget; 9 tokens take a batch; the last begins a new one.
    assert [batch.tolist() for batch in cut] == [[0, 1, 2], [3], [4]]
    pairs = cut_by_budget(np.arange(5), lengths, rows * 2, 9)
    assert [batch.tolist() for batch in pairs] == [[0], [1], [2], [3], [4]]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    tokens=st.integers(20, 400),
    seed=st.integers(0, 5),
)
def test_a_pass_holds_every_item_once(lengths: list[int], tokens: int, seed: int) -> None:
    sizes, rows = np.array(lengths), np.ones(len(lengths), np.int64)
    steps = plan_steps(sizes, rows, tokens, 2.0, seed)
    assert sorted(np.concatenate(steps).tolist()) == sorted([*range(len(lengths))] * 2)
    for step in steps:
        assert len(step) == 1 or sizes[step].max() * len(step) <= tokens
    again = plan_steps(sizes, rows, tokens, 2.0, seed)
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))


def test_half_a_pass_is_half_of_it() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 4000)
    rows = np.ones_like(lengths)
    half = np.concatenate(plan_steps(lengths, rows, 512, 0.5, 0))
    assert len(set(half.tolist())) == len(half)
    assert len(half) == pytest.approx(2000, rel=0.1)
    # Sorting by length leaves little padding.
    steps = plan_steps(lengths, rows, 512, 1.0, 0)
    padded = sum(int(lengths[s].max()) * len(s) for s in steps)
    assert padded < 1.06 * lengths.sum()


def test_pad_right() -> None:
    ids = pad_right([np.array([5, 6], np.int32), np.array([7], np.int32)], torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [7, 0]]


# --- the loop ----------------------------------------------------------------------------------


class Regression:
    """Least squares on fixed points: an objective small enough to follow."""

    def __init__(self, n: int = 64, seed: int = 0, fail_on: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.x = torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32))
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
        self.lengths = rng.integers(1, 9, n)
        self.rows = np.ones(n, np.int64)
        self.fail_on = fail_on
        self.device: torch.device | None = None

    def weight(self, items: np.ndarray) -> float:
        return float(len(items))

    def loss(self, model: Any, items: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        parameter = next(model.parameters())
        error = model(self.x[items].to(parameter.device))[:, 0] - self.y[items].to(parameter.device)
        total = error.square().sum()
        if self.fail_on is not None and self.fail_on in items:
            total = total * float("nan")
        return total, {"absolute": float(error.detach().abs().sum())}


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def fit(
    directory: Path, model: nn.Module | None = None, objective: Any = None, **options: Any
) -> tuple[nn.Module, Any]:
    settings = {"tokens_per_step": 64, "tokens_per_micro_batch": 64, "epochs": 10, "threads": 1}
    config = SupervisedConfig(
        **(settings | options.pop("config", {})), optimizer=OptimizerConfig(learning_rate=0.05)
    )
    model = model or linear()
    options.setdefault("identity", "x")
    result = train(
        model, objective or Regression(), config, output_dir=directory, seed=0, **options
    )
    return model, result


def test_training_finds_the_solution_and_reports_it(tmp_path: Path) -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    model, result = fit(
        tmp_path,
        held_out=Regression(seed=1),
        on_step=lambda *call: seen.append(call),
        config={"epochs": 40},
    )
    assert model.weight[0].tolist() == pytest.approx([1.0, -2.0, 0.5], abs=0.1)
    steps, total, _ = seen[-1]
    assert steps == total == result.steps == len(seen)
    assert result.kept_step == result.steps
    assert result.tokens == 40 * Regression().lengths.sum()
    assert result.held_out["loss"] < 0.05
    assert seen[-1][2]["held_out_loss"] == result.held_out["loss"]
    assert sum("held_out_loss" in metrics for _, _, metrics in seen) == 4
    assert all(m["gradient_norm"] >= 0 and m["absolute"] >= 0 for _, _, m in seen)


def test_micro_batches_do_not_change_the_step(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "a")
    cut, _ = fit(tmp_path / "b", config={"tokens_per_micro_batch": 9})
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    held_out = Regression(seed=1)
    expected, result = fit(tmp_path / "whole", held_out=held_out, keep_best=True)
    steps: list[int] = []

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        steps.append(step)

    model = None
    for stop_at in (7, 23):
        with pytest.raises(Interrupted, match=f"step {stop_at} of {result.steps}"):
            fit(tmp_path / "parts", held_out=held_out, keep_best=True, resume=True,
                on_step=on_step, should_stop=lambda at=stop_at: steps[-1] >= at)  # fmt: skip
        assert saved_step(tmp_path / "parts") == stop_at
    model, resumed = fit(
        tmp_path / "parts", held_out=held_out, keep_best=True, resume=True, on_step=on_step
    )
    assert steps == [*range(1, result.steps + 1)]
    for a, b in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.held_out == result.held_out
    assert resumed.train_loss == result.train_loss


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tmp_path, should_stop=lambda: True)
    with pytest.raises(OtherDataError, match="with other data: resume"):
        fit(tmp_path, resume=True, identity="y")
    with pytest.raises(ValueError, match="other data, seed or settings"):
        fit(tmp_path, resume=True, identity="y", config={"epochs": 11})
    whole = (tmp_path / STATE_FILE).read_bytes()
    for position in range(0, len(whole), 37):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (tmp_path / STATE_FILE).write_bytes(flipped)
        with pytest.raises(ValueError, match="cannot be read"):
            fit(tmp_path, resume=True)
    for torn in (b"torn", whole[:-1]):
        (tmp_path / STATE_FILE).write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read"):
            fit(tmp_path, resume=True)
        with pytest.raises(ValueError, match="cannot be read"):
            saved_step(tmp_path)


def test_no_state_file_means_no_step_to_resume(tmp_path: Path) -> None:
    assert saved_step(tmp_path) is None


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    model = linear()
    with pytest.raises(RuntimeError, match=r"diverged in step \d+ of .*lower optimizer.learning"):
        fit(tmp_path, model=model, objective=Regression(fail_on=3))
    assert torch.isfinite(model.weight).all()


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """The held-out answer is what the model starts with, so training only makes it worse."""
    model = linear()
    held_out = Regression(seed=1)
    with torch.no_grad():
        held_out.y = model(held_out.x)[:, 0]
    seen: list[float] = []
    trained, result = fit(
        tmp_path,
        model=model,
        held_out=held_out,
        keep_best=True,
        on_step=lambda s, t, m: seen.append(m["held_out_loss"]) if "held_out_loss" in m else None,
    )
    assert result.kept_step == round(result.steps / 4)
    assert result.held_out["loss"] == min(seen) == seen[0]
    with torch.no_grad():
        loss, _ = held_out.loss(trained, np.arange(64))
    assert loss.item() / 64 == pytest.approx(seen[0])


def test_the_thread_count_is_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    counts: list[int] = []
    fit(tmp_path, config={"threads": before + 1},
        on_step=lambda *_: counts.append(torch.get_num_threads()))  # fmt: skip
    assert set(counts) == {before + 1}
    assert torch.get_num_threads() == before


def test_slow_bfloat16_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("learner.supervised._fast_bf16", lambda device: False)
    fit(tmp_path, config={"bf16": True, "epochs": 1})
    assert "no bfloat16 instructions" in caplog.text
