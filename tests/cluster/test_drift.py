"""The drift gate on real parts, one of them at fault, and the search for the culprit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from click.testing import CliRunner

from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, Trajectory
from cluster import drift_blame
from cluster.cli import main
from cluster.config import RunConfig
from cluster.drift import (
    Check,
    engine_agreement,
    exact_in_the_learner,
    examine_drift,
    gate_config,
    gate_learners,
    measuring,
    same_weights,
    with_other_weights,
)
from cluster.drift_blame import EngineSetup, changes, find_culprit
from cluster.progress import Reporter
from learner.config import DriftConfig, LearnersConfig, PPOConfig
from reward_service.rewards import build_reward

ENGINE = EngineConfig(max_num_seqs=16, kv_cache_gib=0.1)


def configuration(model: Path, run_dir: Path, **ppo: Any) -> RunConfig:
    return RunConfig(
        run_dir=run_dir,
        model=str(model),
        sampling=SamplingConfig(max_new_tokens=12, temperature=0.8),
        rollout=RolloutConfig(engine=ENGINE),
        learners=LearnersConfig(num_learners=0),
        ppo=PPOConfig(epochs=2, **ppo),
    )


def test_the_gate_passes_where_everything_agrees(
    ray_session: None, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(configuration(tiny_llama, tmp_path / "run").model_dump(mode="json")))
    arguments = ["doctor", "--drift", "--config", str(path), "--steps", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    verdict = json.loads(result.stdout.splitlines()[-1])
    assert verdict["passed"]
    assert verdict["steps"] == 2
    assert verdict["blame"] is None
    measured = {check["what"]: check["measured"] for check in verdict["checks"]}
    assert measured["largest |log ratio|, all epochs"] == "0"
    assert measured["KL to the reference"] == "0"
    assert measured["largest |log ratio|, 4 minibatches"].endswith("in the first 0")
    assert 0 < float(measured["engine: mean |Δ log p|"]) < 1e-5
    assert 0 < float(measured["engine: probe after each update"]) < 1e-4
    hashed = next(c for c in verdict["checks"] if c["what"] == "policy weights, hash")
    assert hashed["measured"] == hashed["must_be"]


def keep_old_heads(actor: Any) -> None:
    """Runs in an actor: an update leaves the packed copy of a tied head behind."""
    from actors.weight_transfer import ObjectStoreTransfer

    ObjectStoreTransfer.repack_heads = lambda self: None  # type: ignore[method-assign]


@pytest.fixture
def stale(ray_session: None, tiny_llama: Path, tmp_path: Path) -> Iterator[RolloutPool]:
    config = measuring(configuration(tiny_llama, tmp_path))
    start = with_other_weights(tiny_llama, tmp_path)
    with RolloutPool(start, config.rollout, name="stale") as pool:
        ray.get(pool.handles[0].__ray_call__.remote(keep_old_heads))
        yield pool


def test_weights_that_an_update_leaves_behind_fail_it_and_are_blamed(
    stale: RolloutPool, tiny_llama: Path, tmp_path: Path
) -> None:
    """At learning rate zero old and new weights are alike, unless the engine began with others."""
    config = gate_config(configuration(tiny_llama, tmp_path), None, 1, tmp_path)
    with gate_learners(config) as learners:
        verdict, samples = examine_drift(
            config, stale, build_reward(config.reward, {}), learners, Reporter()
        )
    assert not verdict.passed
    failed = {check.what for check in verdict.checks if not check.passed}
    assert "engine: mean |Δ log p|" in failed
    assert "engine: probe after each update" in failed
    assert "policy weights, hash" not in failed
    assert verdict.blame is not None
    assert verdict.blame.setting.startswith("weight transfer")
    assert verdict.blame.before > 0.01
    assert 0 < verdict.blame.after < 1e-5
    assert len(samples) == 16


SAMPLED = [
    Trajectory(
        prompt=Prompt(prompt_id=f"p{i}", token_ids=np.arange(3 + i, dtype=np.int32), text=""),
        sample_index=0,
        response_ids=np.array([7, 8], np.int32),
        response_logprobs=np.array([-1.0, -2.0], np.float32),
        policy_versions=np.zeros(2, np.int32),
        response_text="",
        finish_reason="length",
        seed=i,
    )
    for i in range(3)
]


class Learner:
    """Finds every sample of ``SAMPLED`` as likely as it says."""

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[Any]:
        assert temperature > 0
        return [np.array([-9.0] * (len(s) - 3) + [-1.0, -2.0], np.float32) for s in sequences]


def off_by(error: float) -> list[Trajectory]:
    return [replace(t, response_logprobs=t.response_logprobs + np.float32(error)) for t in SAMPLED]


BAD_ARGUMENTS: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",
    "generation_config": "auto",
    "enable_chunked_prefill": True,
}
WORST = EngineSetup(
    config=ENGINE.model_copy(update={"dtype": "bfloat16", "enforce_eager": False}),
    temperature=0.7,
    arguments=BAD_ARGUMENTS,
)
CULPRITS: dict[str, Callable[[EngineSetup], bool]] = {
    "rollout.engine.dtype bfloat16": lambda s: s.config.dtype != "float32",
    "vLLM's logprobs_mode raw_logprobs": lambda s: s.argument("logprobs_mode") == "raw_logprobs",
    "vLLM's generation_config auto": lambda s: s.argument("generation_config") == "auto",
    "vLLM's enable_chunked_prefill": lambda s: bool(s.argument("enable_chunked_prefill")),
    "vLLM's enable_prefix_caching": lambda s: bool(s.argument("enable_prefix_caching", True)),
    "rollout.engine.max_num_seqs 16": lambda s: s.config.max_num_seqs > 1,
    "rollout.engine.enforce_eager false": lambda s: not s.config.enforce_eager,
    "sampling.temperature 0.7": lambda s: s.temperature != 1.0,
    "": lambda _: True,
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_the_one_setting_that_makes_them_disagree_is_named(
    culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        drift_blame,
        "sample_again",
        lambda _, setup, __: off_by(0.02 if CULPRITS[culprit](setup) else 1e-6),
    )
    blame = find_culprit(
        configuration(tmp_path, tmp_path),
        off_by(0.02),
        Learner(),  # type: ignore[arg-type]
        lambda _: None,
        measured=0.02,
        setup=WORST,
    )
    assert blame.setting == culprit
    assert blame.tried["without weight transfer (actors/weight_transfer.py)"] == pytest.approx(0.02)
    if culprit:
        assert blame.after == pytest.approx(1e-6, rel=0.2)
        assert f"To blame: {culprit}." in str(blame)
    else:
        assert len(blame.tried) == 9
        assert "No single setting is to blame" in str(blame)


def test_the_learners_precision_is_tried_first(tmp_path: Path) -> None:
    config = configuration(tmp_path, tmp_path, bf16=True)
    blame = find_culprit(
        config,
        off_by(0.01),
        Learner(),  # type: ignore[arg-type]
        lambda _: None,
        measured=0.4,
    )
    assert (blame.setting, blame.before) == ("ppo.bf16", 0.4)
    assert blame.after == pytest.approx(0.01, rel=1e-4)


def test_what_is_as_it_should_be_is_not_tried() -> None:
    settings = [name for name, _, _ in changes(EngineSetup(config=ENGINE, temperature=1.0))]
    assert settings == ["vLLM's enable_prefix_caching", "rollout.engine.max_num_seqs 16"]
    for _, _, changed in changes(WORST):
        assert changed != WORST


STEP = {
    "ppo/log_ratio_max": 0.0,
    "ppo/approx_kl": 0.0,
    "ppo/clip_fraction": 0.0,
    "ppo/kl_sequence": 0.0,
    "ppo/kl_token": 0.0,
    "ppo/engine_delta_mean": 1e-6,
    "ppo/engine_delta_max": 1e-5,
    "ppo/effective_sample_size": 1.0,
    "ppo/engine_correlation": 1.0,
}


@pytest.mark.parametrize(
    ("metric", "value", "what"),
    [
        ("ppo/log_ratio_max", 1e-9, "largest |log ratio|, all epochs"),
        ("ppo/approx_kl", -1e-12, "approximate KL of the update"),
        ("ppo/kl_token", 1e-12, "KL to the reference"),
        ("ppo/engine_delta_mean", 2e-4, "engine: mean |Δ log p|"),
        ("ppo/engine_correlation", 0.99, "engine: correlation of log-probabilities"),
    ],
)
def test_one_bad_step_among_good_ones_fails_its_check(metric: str, value: float, what: str) -> None:
    steps = [STEP, STEP | {metric: value}, STEP]
    checks: list[Check] = [*exact_in_the_learner(steps), *engine_agreement(steps, DriftConfig())]
    assert [check.what for check in checks if not check.passed] == [what]


def test_one_changed_bit_of_the_policy_is_named(tiny_llama: Path) -> None:
    from actors.weights import read_checkpoint

    before = read_checkpoint(tiny_llama, version=0)
    name = "model.norm.weight"
    info = replace(before.manifest[name], checksum=before.manifest[name].checksum ^ 1)
    after = replace(before, manifest={**before.manifest, name: info})
    assert same_weights(before, before).passed
    changed = same_weights(before, after)
    assert not changed.passed
    assert "1 of 20 tensors, first 'model.norm.weight'" in changed.measured


def test_the_gate_needs_a_model() -> None:
    result = CliRunner().invoke(main, ["doctor", "--drift"])
    assert result.exit_code == 1
    assert "give --model DIR, or --config FILE" in result.output
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 2
