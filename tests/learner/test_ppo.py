"""The PPO learner in this process, against a plain float64 implementation and at its edges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.batch import PPOBatch
from learner.config import KLConfig, OptimizerConfig, PPOConfig
from learner.learner_state import CRITIC_FILE, OPTIMIZER_FILE
from learner.schedule import learning_rate
from tests.learner.plain_ppo import PlainModels, plain_iteration
from tests.learner.ppo_samples import in_process, random_batch, weights

# eps far above the gradients' rounding, so that Adam does not turn rounding into full steps.
STEADY = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-2, schedule="constant", max_grad_norm=0.5
)


def ppo(**changes: Any) -> PPOConfig:
    fixed: dict[str, Any] = {"policy": STEADY, "critic": STEADY, "minibatches": 3, "epochs": 2}
    return PPOConfig.model_validate(fixed | changes)


VARIANTS = {
    "defaults": {},
    "shared trunk": {"shared_trunk": True},
    "everything else": {
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "entropy_coef": 0.01,
        "importance_cap": 2.0,
        "gamma": 0.99,
        "whiten_rewards": True,
        "kl": KLConfig(where="loss", estimator="k2", coef=0.1),
    },
    "k3 in the reward": {"kl": KLConfig(estimator="k3", coef=0.2), "whiten_advantages": False},
    "means of sequences": {"loss_aggregation": "sequence_mean"},
    "grpo": {
        "advantage": "grpo",
        "loss_aggregation": "sequence_mean",
        "kl": KLConfig(where="loss", estimator="k2", coef=0.1),
    },
    "dr grpo": {"advantage": "grpo", "group_std": False, "clip_high": 0.28},
    "rloo": {"advantage": "rloo", "dual_clip": 3.0},
    "reinforce++": {"advantage": "reinforce_plus_plus", "gamma": 0.95},
    "reinforce++ baseline": {"advantage": "reinforce_plus_plus_baseline"},
}
WITHOUT_CRITIC = {"advantage": "rloo", "loss_aggregation": "sequence_mean"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_an_iteration_equals_a_plain_float64_implementation(
    variant: str, tiny_llama: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    config = ppo(**VARIANTS[variant], tokens_per_micro_batch=60)
    batch = random_batch(7, seed=1)
    plain = PlainModels(tiny_llama, tiny_llama_untied, config.shared_trunk)
    start = {name: t.detach().clone() for name, t in plain.policy.state_dict().items()}
    want = plain_iteration(plain, batch, config, temperature=0.7, seed=5)
    learners = in_process(
        config, tiny_llama, reference_dir=tiny_llama_untied, temperature=0.7, seed=5
    )
    metrics = learners.update(batch)
    got = weights(learners, tmp_path)
    for name, expected in plain.policy.state_dict().items():
        moved = (expected - start[name]).abs().max()
        error = (got[f"policy/model.{name}"] - expected).abs().max()
        assert moved > 1e-4
        assert error < 1e-3 * moved, (name, float(error), float(moved))
    if config.has_values:
        head = got[f"{'policy' if config.shared_trunk else 'critic'}/value_head.weight"]
        torch.testing.assert_close(head.double(), plain.head.weight.detach(), atol=1e-6, rtol=1e-3)
    assert metrics["ppo/kl_sequence"] == pytest.approx(want["kl_sequence"], rel=1e-4)
    assert metrics["ppo/entropy"] == pytest.approx(want["entropy"], rel=1e-4)


@pytest.mark.parametrize("variant", [{}, WITHOUT_CRITIC], ids=["ppo", "without-critic"])
def test_micro_batches_change_nothing_but_rounding(
    variant: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    batch = random_batch(9, seed=2)
    results = []
    for budget in (1, 50, 200, 8192):
        learners = in_process(ppo(tokens_per_micro_batch=budget, **variant), tiny_llama)
        learners.update(batch)
        results.append(weights(learners, tmp_path / str(budget)))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=2e-6)


def test_policy_and_critic_side_by_side_give_the_same_bits(
    tiny_llama: Path, tmp_path: Path
) -> None:
    results = []
    for threads in (1, 2):
        learners = in_process(ppo(), tiny_llama, threads=threads)
        learners.update(random_batch(9, seed=2))
        results.append(weights(learners, tmp_path / str(threads)))
        learners.shutdown()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.filterwarnings("ignore:ppo.bf16 is on")
@pytest.mark.parametrize("bf16", [False, True])
def test_at_learning_rate_zero_the_policy_stays_and_the_ratio_is_exactly_one(
    bf16: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    still = OptimizerConfig(learning_rate=0.0)
    config = ppo(policy=still, critic=still, epochs=1, bf16=bf16, tokens_per_micro_batch=64)
    learners = in_process(config, tiny_llama, temperature=0.9)
    before = weights(learners, tmp_path / "before")
    metrics = learners.update(random_batch(9, seed=3))
    after = weights(learners, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["ppo/ratio_mean"] == 1.0
    assert metrics["ppo/ratio_max"] == 1.0
    assert metrics["ppo/approx_kl"] == 0.0
    assert metrics["ppo/clip_fraction"] == 0.0
    assert metrics["ppo/kl_sequence"] == 0.0


def test_without_a_critic_there_is_no_value_model_and_no_metric_of_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    learners = in_process(ppo(**WITHOUT_CRITIC), tiny_llama, critic_dir=tmp_path / "not-read")
    metrics = learners.update(random_batch(7, seed=1))
    assert not [name for name in metrics if "critic" in name or "value" in name]
    assert "ppo/explained_variance" not in metrics
    assert metrics["ppo/grad_norm_policy"] > 0
    assert list(learners._group._learner.module.keys()) == ["policy"]
    learners.save(tmp_path)
    assert load_file(tmp_path / CRITIC_FILE) == {}
    assert {name.partition("/")[0] for name in load_file(tmp_path / OPTIMIZER_FILE)} == {"policy"}
    with pytest.raises(ValueError, match=r"it holds \['policy'\], this run trains \['critic'"):
        in_process(ppo(), tiny_llama).restore(tmp_path)


def test_groups_whose_rewards_are_all_equal_leave_the_policy_as_it_is(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """And a group of one: of 5 samples the last has no other to be compared with."""
    columns = dict(random_batch(5, seed=1).columns)
    columns["rewards"] = np.where(columns["rewards"] != 0, np.float32(0.1), np.float32(0))
    still = ppo(advantage="grpo", kl={"where": "off"})
    learners = in_process(still, tiny_llama)
    before = weights(learners, tmp_path / "before")
    metrics = learners.update(PPOBatch(**columns))
    after = weights(learners, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["ppo/groups_without_spread"] == 1.0
    assert metrics["ppo/grad_norm_policy"] == 0.0


def test_metrics_of_the_batch_by_hand(tiny_llama: Path) -> None:
    batch = random_batch(8, seed=4)
    learners = in_process(ppo(kl={"adaptive": True, "coef": 0.15}), tiny_llama)
    metrics = learners.update(batch)
    assert metrics["ppo/score"] == pytest.approx(float(batch.scores.mean()), rel=1e-5)
    assert metrics["ppo/eos_rate"] == float(batch.stopped.mean())
    assert metrics["ppo/tokens"] == batch.response_lengths.sum()
    assert metrics["ppo/reward_shaped"] == pytest.approx(metrics["ppo/score"], abs=1e-4)
    assert metrics["ppo/optimizer_steps"] == 6
    assert metrics["ppo/kl_coef"] == 0.15
    # The KL to itself is 0, so the controller goes down by its largest step: -0.2 * 8 / 10,000.
    second = learners.update(batch)
    assert second["ppo/kl_coef"] == pytest.approx(0.15 * (1 - 0.2 * 8 / 10_000))
    assert all(np.isfinite(value) for value in second.values())


def test_engine_differences_are_measured(tiny_llama: Path) -> None:
    learners = in_process(ppo(epochs=1, minibatches=1), tiny_llama)
    batch = random_batch(4, seed=5)
    columns = dict(batch.columns)
    engine = np.zeros_like(batch.engine_logprobs)
    for row in range(4):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        ids = batch.input_ids[row, : prompt + length].tolist()
        engine[row, :length] = learners.logprobs([ids])[0][prompt - 1 :]
    agreed = learners.update(PPOBatch(**(columns | {"engine_logprobs": engine})))
    assert agreed["ppo/engine_delta_max"] < 1e-4
    assert agreed["ppo/effective_sample_size"] == pytest.approx(1.0, abs=1e-3)
    assert agreed["ppo/engine_correlation"] == pytest.approx(1.0, abs=1e-6)
    shuffled = learners.update(batch)  # whose engine log-probabilities are drawn at random
    assert abs(shuffled["ppo/engine_correlation"]) < 0.5
    assert shuffled["ppo/engine_delta_mean"] > 0.1


def test_the_critic_starts_from_the_reward_model_with_gain_and_bias(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from actors.fingerprint import template_fingerprint
    from learner.models import load_reward_model
    from reward_service.encoding import RewardHead

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig.from_pretrained(tiny_llama, num_labels=1)
    scorer = LlamaForSequenceClassification(config).eval()
    scorer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fingerprint = template_fingerprint(tokenizer)
    RewardHead(gain=3.0, bias=-0.5, fingerprint=fingerprint).save(tmp_path)
    backbone, head = load_reward_model(tmp_path)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        value = head(backbone(input_ids=ids).last_hidden_state)[0, -1, 0]
        want = 3.0 * scorer(input_ids=ids).logits[0, 0] - 0.5
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    still = OptimizerConfig(learning_rate=0.0)
    learners = in_process(ppo(critic=still), tiny_llama, critic_dir=tmp_path)
    assert learners.update(random_batch(4, seed=1))["ppo/value"] != 0.0

    RewardHead(gain=3.0, bias=-0.5, fingerprint="other").save(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        in_process(ppo(), tiny_llama, critic_dir=tmp_path)
    plain = in_process(ppo(critic_from_reward_model=False), tiny_llama, critic_dir=tmp_path)
    assert plain.update(random_batch(4, seed=1))["ppo/value"] == 0.0


def test_a_gradient_that_is_not_finite_skips_the_step_and_then_is_an_error(
    tiny_llama: Path, tmp_path: Path
) -> None:
    columns = dict(random_batch(6, seed=6).columns)
    rewards = np.where(columns["rewards"] != 0, np.float32(1e30), np.float32(0))
    batch = PPOBatch(**(columns | {"rewards": rewards}))  # its square overflows in the value loss
    patient = in_process(ppo(max_skipped_steps=100), tiny_llama)
    before = weights(patient, tmp_path / "before")
    metrics = patient.update(batch)
    after = weights(patient, tmp_path / "after")
    assert metrics["ppo/skipped_steps_critic"] == 6
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("critic"))
    with pytest.raises(RuntimeError, match=r"gradient of the critic was not finite in 3"):
        in_process(ppo(max_skipped_steps=2), tiny_llama).update(batch)


def test_weights_that_diverged_are_named(tiny_llama: Path) -> None:
    learners = in_process(ppo(), tiny_llama)
    model = learners._group._learner.policy_model
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="old_logprobs are not finite"):
        learners.update(random_batch(4, seed=1))


def test_a_forward_pass_that_does_not_repeat_itself_is_found(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = in_process(ppo(), tiny_llama)
    learner = learners._group._learner
    trainer = learner.trainers["policy"]
    module = trainer._module

    def noisy(inputs: Any) -> Any:
        out = module(inputs)
        return out | {"logprobs": out["logprobs"] + 0.1}

    monkeypatch.setattr(trainer, "_module", noisy)
    with pytest.raises(RuntimeError, match=r"ratio is up to exp\(0.1\), it must be 1"):
        learners.update(random_batch(4, seed=1))


def test_token_ids_beyond_the_vocabulary_are_refused(tiny_llama: Path) -> None:
    columns = dict(random_batch(4, seed=1).columns)
    ids = columns["input_ids"].copy()
    ids[0, 0] = 512
    with pytest.raises(ValueError, match=r"token id 512, the policy's vocabulary ends at 511"):
        in_process(ppo(), tiny_llama).update(PPOBatch(**(columns | {"input_ids": ids})))


def test_bad_directories_and_temperature_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        in_process(ppo(), tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    config = (other / "config.json").read_text().replace("LlamaForCausalLM", "BertModel")
    (other / "config.json").write_text(config)
    with pytest.raises(ValueError, match="holds BertModel, but a causal language model is needed"):
        in_process(ppo(), tiny_llama, reference_dir=other)
    with pytest.raises(ValueError, match="temperature is 0"):
        in_process(ppo(), tiny_llama, temperature=0.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.05, 0.1, 0.075, 0.05, 0.025]),
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1]),
        ("cosine", [0.05, 0.1, 0.0853553, 0.05, 0.0146447]),
    ],
)
def test_learning_rates_by_hand(schedule: str, expected: list[float]) -> None:
    """One step of warm-up of five, then decay over the other four."""
    options = {"learning_rate": 0.1, "schedule": schedule, "warmup_share": 0.2}
    config = OptimizerConfig.model_validate(options)
    rates = [learning_rate(config, done, 5) for done in range(5)]
    assert rates == pytest.approx(expected, rel=1e-5)
