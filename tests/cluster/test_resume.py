"""What is said when a run is resumed with other settings, packages or models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import Checkpoint, package_versions
from cluster.config import RunConfig, override_config
from cluster.resume import as_json, check_inputs, differences, input_digests


def configured(**ppo: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "runs/x",
            "model": "some/model",
            "ppo": ppo,
            "reward": {"terms": [{"name": "a", "weight": 1.0, "function": "m:f"}]},
        }
    )


def checkpoint(config: RunConfig, **state: Any) -> Checkpoint:
    return Checkpoint(
        path=Path("runs/x/ppo/checkpoints/step_000010"),
        step=10,
        state=state,
        config=as_json(config),
        versions=package_versions(),
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1", "change the result have changed: seed 0 -> 1"),
        ("ppo.clip=0.3", "change the result have changed: ppo.clip 0.2 -> 0.3"),
        ("ppo.policy.learning_rate=0.1", "ppo.policy.learning_rate 0.0003 -> 0.1"),
        ("reward={terms: [{name: a, weight: 2, function: 'm:f'}]}", "reward.terms.0.weight 1.0 ->"),
        ("rollout.engine.max_model_len=64", "rollout.engine.max_model_len None -> 64"),
        ("learners.num_learners=2", "how numbers are rounded: learners.num_learners 1 -> 2"),
        ("learners.num_gpus_per_learner=1", "learners.num_gpus_per_learner 0.0 -> 1.0"),
        ("reward.service.num_gpus_per_replica=1", "how numbers are rounded: reward.service.num_gp"),
        ("rollout.num_actors=2", "how numbers are rounded: rollout.num_actors 1 -> 2"),
        ("ppo.steps=99", "decay towards another last step: ppo.steps 50 -> 99"),
    ],
)
def test_a_setting_that_matters_is_said_with_both_values(override: str, says: str) -> None:
    config = configured()
    (found,) = differences(checkpoint(config), override_config(config, [override], "test"))
    assert says in found


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "ppo.checkpoint_every=1",
        "ppo.keep_best=null",
        "reward.service.port=1234",
        "reward.retry.pause_s=9",
        "evaluate.prompts=3",
        "rollout.sample_timeout_s=1",
        "sft={}",
    ],
)
def test_a_setting_that_does_not_matter_is_not_mentioned(override: str) -> None:
    config = configured()
    assert differences(checkpoint(config), override_config(config, [override], "test")) == []


def test_more_steps_change_nothing_where_learning_rates_are_constant() -> None:
    constant = {"schedule": "constant"}
    config = configured(policy=constant, critic=constant)
    assert differences(checkpoint(config), override_config(config, ["ppo.steps=99"], "t")) == []
    ahead = configured(policy=constant, critic=constant, max_staleness=1)  # at step 10 of 50
    assert differences(checkpoint(ahead), override_config(ahead, ["ppo.steps=99"], "t")) == []
    assert differences(checkpoint(ahead), override_config(ahead, ["ppo.steps=20"], "t")) == []
    ended = configured(policy=constant, critic=constant, max_staleness=1, steps=10)
    (found,) = differences(checkpoint(ended), override_config(ended, ["ppo.steps=99"], "t"))
    assert found == "nothing was generated ahead of what was the last step: ppo.steps 10 -> 99"


def test_other_packages_are_said() -> None:
    config = configured()
    old = checkpoint(config)
    old.versions["torch"] = "1.0"
    (found,) = differences(old, config)
    assert "packages that may round otherwise: torch 1.0 -> " in found


def test_a_model_that_was_replaced_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = override_config(configured(), [f"model={tiny_llama}"], "test")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    digests = input_digests(config, {"a": tmp_path})
    old = checkpoint(config, inputs=digests)
    check_inputs(old, input_digests(config, {"a": tmp_path}))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="the reward model 'a' of this run have other weights"):
        check_inputs(old, input_digests(config, {"a": tmp_path}))
