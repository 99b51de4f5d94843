"""Which reward model the critic starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.ppo_stage import critic_start
from reward_service.config import RewardConfig, RewardTerm
from tests.reward_service.conftest import write_reward_model


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, two reward models that read as it does, and some that do not."""
    place = tmp_path_factory.mktemp("critic")
    write_reward_model(tiny_llama, place / "a", seed=1, gain=1.0, bias=0.0)
    for name in ("b", "policy", "short", "classifier", "stranger"):
        shutil.copytree(place / "a", place / name)
    change(place / "short" / "config.json", max_position_embeddings=128)
    change(place / "classifier" / "reward_head.json", activation="sigmoid")
    change(place / "stranger" / "reward_head.json", fingerprint="of another tokenizer")
    return place


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def start(place: Path, *terms: RewardTerm, run: str = "run") -> Path | None:
    config = RunConfig(
        run_dir=place / run, model=str(place / "policy"), reward=RewardConfig(terms=terms)
    )
    return critic_start(config)


def ensemble(place: Path, *names: str, **options: Any) -> RewardTerm:
    return RewardTerm(name="both", models=tuple(str(place / name) for name in names), **options)


def test_of_an_ensemble_the_first_member_that_fits(place: Path) -> None:
    assert start(place, ensemble(place, "a", "b")) == place / "a"
    assert start(place, ensemble(place, "stranger", "short", "b")) == place / "b"
    assert start(place, ensemble(place, "stranger", "classifier")) is None


def test_the_model_of_this_run_comes_first_however_it_is_written(place: Path) -> None:
    run = place / "own"
    shutil.copytree(place / "b", run / "reward_model")
    indirect = str(place / "a" / ".." / "own" / "reward_model")
    term = RewardTerm(name="both", models=(str(place / "a"), indirect))
    assert start(place, term, run="own") == (run / "reward_model").resolve()


def test_a_penalty_or_a_function_is_no_start(place: Path) -> None:
    function = RewardTerm(name="words", function="reward_service.examples:new_words")
    assert start(place, function) is None
    assert start(place, function, ensemble(place, "a", "b", weight=-1.0)) is None
    assert start(place, function, RewardTerm(name="rm", model=str(place / "b"))) == place / "b"
