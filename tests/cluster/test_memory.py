"""The memory estimate counts parameters exactly, and the doctor says what is wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cluster.config import RunConfig, build_config
from cluster.doctor import examine, print_findings
from cluster.memory import estimate_memory, model_shape
from cluster.presets import quickstart_config


def test_parameters_of_a_real_model(tiny_llama: Path, tiny_llama_untied: Path) -> None:
    from transformers import AutoModelForCausalLM

    for path in (tiny_llama, tiny_llama_untied):
        model = AutoModelForCausalLM.from_pretrained(path)
        config = RunConfig(run_dir=Path("runs/x"), model=str(path))
        assert model_shape(config).parameters == model.num_parameters()


def test_parameters_of_the_published_story_model(shared_data: Path) -> None:
    config = RunConfig(run_dir=Path("runs/x"), model=str(shared_data / "model_stories260k"))
    assert model_shape(config).parameters == 260_032


def test_the_estimate_grows_with_what_is_asked_for() -> None:
    small = quickstart_config(run_dir=Path("runs/q"))
    assert 3.0 < estimate_memory(small).total_gib < 8.0
    values = small.model_dump(mode="json")
    values["rollout"]["num_actors"] = 4
    values["learners"]["num_learners"] = 2
    values["pretrain"]["hidden_size"] = 1024
    large = build_config(values, "test")
    assert estimate_memory(large).parts["engines"] > 3 * estimate_memory(small).parts["engines"]
    assert estimate_memory(large).parts["learners"] > 2 * estimate_memory(small).parts["learners"]


def test_without_a_critic_a_learner_holds_its_four_copies_of_the_weights_less() -> None:
    with_critic = quickstart_config(run_dir=Path("runs/q"))
    values = with_critic.model_dump(mode="json")
    values["ppo"]["advantage"] = "reinforce_plus_plus"
    saved = (
        estimate_memory(with_critic).parts["learners"]
        - estimate_memory(build_config(values, "test")).parts["learners"]
    )
    weights = model_shape(with_critic).parameters * 4 / 2**30
    assert saved == pytest.approx(4 * weights)


def test_a_hub_name_cannot_be_estimated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in owner/model"):
        model_shape(RunConfig(run_dir=tmp_path, model="owner/model"))


def test_the_doctor_sees_too_little_memory_and_a_port_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shape = {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "intermediate_size": 28672, "vocab_size": 128256,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        values = {
            "run_dir": "runs/x", "model": str(model), "ppo": {},
            "reward": {"service": {"port": port}},
        }  # fmt: skip
        findings = {f.what: f for f in examine(build_config(values, "test"))}
    assert findings["this run needs"].verdict == "problem"
    assert findings["port"].verdict == "warning"
    assert str(port) in findings["port"].seen
    assert findings["vLLM import"].verdict == "ok"
    assert not print_findings(list(findings.values()))
    assert "PROBLEM  this run needs" in capsys.readouterr().out
