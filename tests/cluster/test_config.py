"""A bad configuration fails before anything starts, names the value and says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cluster.config import build_config, load_config, override_config, write_config
from cluster.presets import quickstart_config
from learner.config import AdvantageEstimator

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ADVANTAGE_EXAMPLES = re.findall(
    r"```yaml\n(.*?)```", (ROOT / "docs" / "advantages.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pppo": {}}, "pppo: unknown key; did you mean 'ppo'?"),
        ({"ppo": {"step": 3}}, "ppo.step: unknown key; did you mean 'ppo.steps'?"),
        ({"rollout": {"engine": {"zzz": 1}}}, "rollout.engine.zzz: unknown key; known keys: dtype"),
        ({"reward": {"terms": [{"name": "a"}]}}, "needs exactly one of model, models, url"),
        ({"ppo": {"steps": 0}}, r"ppo.steps: must be at least 1, not 0"),
        ({"ppo": {}, "sampling": {"temperature": 0}}, "temperature is 0"),
        ({"ppo": {"prompts_per_step": 2, "minibatches": 4}}, "a step has only 2 samples"),
        ({"ppo": {"kl": {"where": "loss"}}}, "biased gradient"),
        ({"pretrain": {}, "model": "x"}, "both model and pretrain"),
        ({"pretrain": {"context": 64}}, "more than pretrain.context 64"),
        ({"pretrain": {"hidden_size": 100, "heads": 3}}, "must divide by heads 3"),
        ({"data": {"newswire": {}, "prompts": "x.jsonl"}}, "leave data.prompts"),
        ({"ppo": {"advantage": "rloo"}}, "samples_per_prompt is 1: set it to 2 or more"),
        (
            {"ppo": {"length_penalty": {"max_tokens": 80, "cache_tokens": 9}}},
            "max_tokens is 80, but no response is longer than sampling.max_new_tokens 64",
        ),
    ],
)
def test_what_is_wrong_is_said(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config({"run_dir": "runs/x", **values}, source="file.yaml")


def test_all_problems_at_once() -> None:
    with pytest.raises(ValueError) as error:
        build_config({"ppo": {"steps": 0}, "seeed": 1}, source="f.yaml")
    text = str(error.value)
    assert "run_dir" in text
    assert "ppo.steps" in text
    assert "'seed'" in text


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: runs/x\nppo: {steps: 3}\n")
    config = load_config(file, ["ppo.steps=7", "ppo.kl.coef=0.1", "rollout.num_actors=2"])
    assert config.ppo is not None
    assert (config.ppo.steps, config.ppo.kl.coef, config.rollout.num_actors) == (7, 0.1, 2)
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert override_config(config, ["seed=5"], "test").seed == 5


@pytest.mark.parametrize("override", ["ppo.steps", "=3", "run_dir.x=1", "seed=[1"])
def test_a_malformed_override(tmp_path: Path, override: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: runs/x\n")
    with pytest.raises(ValueError, match="override"):
        load_config(file, [override])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file at .*configs/"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="mapping"):
        load_config(tmp_path / "b.yaml")


def test_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: runs/x\ndata: {prompts: $MY_DATA/p.jsonl}\n")
    monkeypatch.setenv("MY_DATA", "/data")
    assert load_config(file).data.prompts == "/data/p.jsonl"
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(ValueError, match="MY_DATA"):
        load_config(file)


def test_the_quickstart_preset_is_valid_in_both_languages() -> None:
    for language in ("en", "zh"):
        config = quickstart_config(run_dir=Path("runs/q"), language=language, seed=1)
        assert config.policy_model == Path("runs/q/sft")
        assert config.policy_names == ("sft", "ppo")
        assert config.reward_terms[0].model == "runs/q/reward_model"


@pytest.mark.parametrize("text", ADVANTAGE_EXAMPLES, ids=range(len(ADVANTAGE_EXAMPLES)))
def test_the_examples_of_the_page_about_advantages_are_valid(text: str) -> None:
    config = build_config({"run_dir": "runs/x", **yaml.safe_load(text)}, source="advantages.md")
    assert config.ppo is not None
    restored = build_config(config.model_dump(mode="json"), source="a resumed run")
    assert restored == config


def test_the_page_about_advantages_has_an_example_of_each_estimator() -> None:
    examples = [yaml.safe_load(text)["ppo"] for text in ADVANTAGE_EXAMPLES]
    assert {ppo.get("advantage") for ppo in examples} >= set(get_args(AdvantageEstimator))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_example_configuration_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_DATA", "data")
    config = load_config(path)
    assert config.run_dir.parent.name == "runs"
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)
