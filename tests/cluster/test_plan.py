"""``rlhf plan``: what fits, what is suggested, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.config import RunConfig, build_config, override_config
from cluster.cost_model import Layout, write_calibration
from cluster.memory import kv_cache_gib, model_shape, process_memory
from cluster.plan import ClusterShape, make_plan
from cluster.plan_text import describe
from cluster.presets import quickstart_config
from tests.cluster.test_cost_model import TRUTH

SEVEN_BILLION = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def large(tmp_path: Path) -> RunConfig:
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_BILLION))
    return build_config(
        {
            "run_dir": "runs/x", "model": str(tmp_path), "data": {"max_prompt_tokens": 512},
            "sampling": {"max_new_tokens": 512, "samples_per_prompt": 4},
            "rollout": {"engine": {"dtype": "bfloat16", "max_num_seqs": 256}},
            "ppo": {"prompts_per_step": 128, "tokens_per_micro_batch": 4096},
        },
        "test",
    )  # fmt: skip


def test_memory_of_a_process_by_hand(tmp_path: Path) -> None:
    config = large(tmp_path)
    shape = model_shape(config)
    assert shape.parameters == pytest.approx(8.03e9, rel=0.001)  # Llama 3 8B
    # 256 sequences x 1024 tokens x keys and values x 32 layers x 8 heads of 128 x 2 bytes.
    assert kv_cache_gib(config, shape) == pytest.approx(256 * 1024 * 2 * 32 * 1024 * 2 / 2**30)
    on_host = {one.kind: one for one in process_memory(config, shape)}
    assert on_host["learners"].device_gib == 0
    weights = shape.parameters * 4 / 2**30
    assert on_host["learners"].host_gib > 9 * weights


def test_a_large_model_with_a_critic_does_not_fit_one_accelerator(tmp_path: Path) -> None:
    cluster = ClusterShape(nodes=2, gpus_per_node=8, memory_gib=1000, gpu_memory_gib=80)
    plan = make_plan(large(tmp_path), cluster, TRUTH)
    assert plan.suggested is None
    assert not plan.configured.fits
    text = describe(plan)
    assert "DOES NOT FIT" in text
    assert "nothing fits into 90% of 80 GiB" in text
    roomy = ClusterShape(nodes=2, gpus_per_node=8, memory_gib=1000, gpu_memory_gib=400)
    suggested = make_plan(large(tmp_path), roomy, TRUTH).suggested
    assert suggested is not None
    assert suggested.seconds is not None
    assert suggested.engines + suggested.learners in (16, 32)


def test_memory_decides_whether_processes_may_share_a_device() -> None:
    config = quickstart_config(run_dir=Path("runs/x"))
    each = {one.kind: one.host_gib for one in process_memory(config, model_shape(config))}
    both = each["engines"] + each["learners"]
    others = sum(
        one.count * one.host_gib
        for one in process_memory(config, model_shape(config))
        if one.kind in ("Ray and driver", "reward service")
    )
    small = ClusterShape(nodes=4, memory_gib=(max(both - 0.2, 0) + others) / 0.9)
    ways = {
        (p.how, p.engines, p.learners): p.fits for p in make_plan(config, small, None).placements
    }
    assert ways == {
        ("together", 4, 4): False, ("apart", 3, 1): True, ("apart", 2, 2): True,
    }  # fmt: skip
    enough = ClusterShape(nodes=4, memory_gib=(both + others + 0.1) / 0.9)
    plan = make_plan(config, enough, TRUTH)
    assert all(one.fits for one in plan.placements)
    assert plan.suggested == min(plan.placements, key=lambda one: one.seconds or 0)


def test_more_machines_make_a_step_shorter_and_a_slow_network_longer() -> None:
    config = quickstart_config(run_dir=Path("runs/x"))

    def seconds(nodes: int, gbit: float) -> float:
        cluster = ClusterShape(nodes=nodes, memory_gib=64, network_gbit=gbit)
        suggested = make_plan(config, cluster, TRUTH).suggested
        assert suggested is not None
        assert suggested.seconds is not None
        return suggested.seconds

    assert seconds(4, 100) < seconds(1, 100)
    assert seconds(4, 0.1) > seconds(4, 100)


def test_generation_beside_learning_hides_the_shorter_of_the_two() -> None:
    config = quickstart_config(run_dir=Path("runs/x"))
    cluster = ClusterShape(nodes=4, memory_gib=64)
    ahead = override_config(config, ["ppo.max_staleness=1"], "test")
    plans = [make_plan(c, cluster, TRUTH) for c in (config, ahead)]
    before, after = ({(p.how, p.engines): p.seconds for p in plan.placements} for plan in plans)
    assert after["together", 4] == before["together", 4]
    for engines, learners in ((3, 1), (2, 2)):
        phases = TRUTH.predict(
            plans[0].step,
            Layout(
                engines=engines,
                learners=learners,
                network_bytes_per_s=cluster.network_bytes_per_s,
            ),
        )
        generate = phases.seconds("generate")
        learn = phases.seconds("learn") + phases.seconds("optimize")
        assert before["apart", engines] == pytest.approx(phases.total)
        assert after["apart", engines] == pytest.approx(phases.total - min(generate, learn))


def test_means_beyond_the_limits_are_refused() -> None:
    config = quickstart_config(run_dir=Path("runs/x"))
    cluster = ClusterShape(memory_gib=16)
    with pytest.raises(ValueError, match=r"beyond sampling\.max_new_tokens 96"):
        make_plan(config, cluster, None, response_tokens=97)
    with pytest.raises(ValueError, match=r"beyond data\.max_prompt_tokens 96"):
        make_plan(config, cluster, None, prompt_tokens=200)


def test_the_command_plans_with_and_without_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(main, ["plan", "pretrain.hidden_size=512", "--nodes", "2"])
    assert result.exit_code == 0, result.output
    assert "layers of 512" in result.output
    assert "no seconds: measure this machine's constants" in result.output
    path = tmp_path / "constants.json"
    write_calibration(path, TRUTH, [])
    result = CliRunner().invoke(main, ["plan", "--calibration", str(path), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    phases = values["prediction"]["phases"]
    assert values["seconds"] == pytest.approx(sum(sum(terms.values()) for terms in phases.values()))
    assert values["suggested"]["fits"]
    result = CliRunner().invoke(main, ["plan", "--calibration", str(tmp_path / "none.json")])
    assert result.exit_code == 1
    assert "rlhf bench plan" in result.output
