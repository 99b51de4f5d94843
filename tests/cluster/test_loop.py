"""Rounds: what each of them is configured to do, resuming, and the page of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import RunConfig, override_config
from cluster.loop import round_config, run_loop, start_config
from cluster.pipeline import configured_stages
from cluster.presets import quickstart_config
from reward_service.comparison import Annotator, Candidate, Comparison, Pair
from reward_service.feedback.store import FeedbackStore


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return quickstart_config(run_dir=tmp_path / "loop")


def test_a_round_begins_where_the_one_before_ended(config: RunConfig) -> None:
    loop = config.run_dir
    start = start_config(config)
    assert start is not None
    assert configured_stages(start) == ["pretrain", "sft", "report"]
    first, third = round_config(config, 1), round_config(config, 3)
    assert configured_stages(first) == ["collect", "reward", "ppo", "evaluate", "report"]
    assert first.policy_model == loop / "start" / "sft"
    assert first.collect is not None
    assert first.collect.opponents == {}
    assert first.collect.least_sure_of == ()
    assert (first.policy_names, third.policy_names) == (
        ("policy-1", "policy-2"), ("policy-3", "policy-4")
    ), "a round's policies are neither SFT nor the only PPO"  # fmt: skip
    assert third.run_dir == loop / "round-03"
    assert third.policy_model == loop / "round-02" / "ppo" / "final"
    assert third.collect is not None
    assert third.collect.opponents == {
        "policy-2": str(loop / "round-01" / "ppo" / "final"),
        "policy-1": str(loop / "start" / "sft"),
    }
    assert third.collect.least_sure_of == (str(loop / "round-02" / "reward_model"),)
    assert {first.collect.store, third.collect.store} == {str(loop / "feedback.sqlite")}
    assert third.data == config.data, "the same held-out prompts in every round"
    plain = override_config(config, ["loop.active=false", "loop.earlier_policies=1"], "test")
    third = round_config(plain, 3)
    assert third.collect is not None
    assert third.collect.least_sure_of == ()
    assert list(third.collect.opponents) == ["policy-2"]


def test_an_existing_model_needs_no_start(tmp_path: Path, config: RunConfig) -> None:
    own = config.model_copy(update={"pretrain": None, "sft": None, "model": "some/model"})
    assert start_config(own) is None
    assert round_config(own, 1).policy_model == Path("some/model")


class Stop(Exception):
    pass


def test_rounds_go_on_where_they_stopped(config: RunConfig) -> None:
    ran: list[tuple[str, bool]] = []

    def run_one(current: RunConfig, resume: bool) -> None:
        ran.append((current.run_dir.name, resume))
        current.run_dir.mkdir(parents=True, exist_ok=True)
        stages = {s: {"seconds": 1.0} for s in configured_stages(current)}
        if ran[-1] == ("round-02", False):
            stages.pop("ppo")
        (current.run_dir / "stages.json").write_text(json.dumps(stages))
        if "ppo" not in stages and current.ppo is not None:
            raise Stop
        if current.collect is not None:
            _judge(current, len(ran))

    with pytest.raises(Stop):
        run_loop(config, rounds=3, resume=False, say=lambda _: None, run_one=run_one)
    assert [name for name, _ in ran] == ["start", "round-01", "round-02"]
    with pytest.raises(FileExistsError, match="already holds rounds"):
        run_loop(config, rounds=3, resume=False, say=lambda _: None, run_one=run_one)
    path = run_loop(config, rounds=3, resume=True, say=lambda _: None, run_one=run_one)
    assert ran[3:] == [("round-02", True), ("round-03", True)]
    page = path.read_text(encoding="utf-8")
    assert 'href="round-03/report.html"' in page or "round by round" in page
    assert "policy-3" in page
    found = json.loads((config.run_dir / "loop.json").read_text())
    assert [r["done"] for r in found["rounds"]] == [True, True, True]
    assert {s["model"] for s in found["strengths"]} == {"policy-2", "policy-3", "opponent"}
    run_loop(config, rounds=3, resume=True, say=lambda _: None, run_one=run_one)
    assert len(ran) == 5, "nothing is left to do"


def _judge(current: RunConfig, number: int) -> None:
    assert current.collect is not None
    assert current.collect.store is not None
    name = f"policy-{current.collect.round}"
    if name == "policy-1":
        return
    pair = Pair(
        item_id=f"i{number}", prompt_id=f"p{number}", prompt="?",
        a=Candidate(text="x", model=name), b=Candidate(text="y", model="opponent"),
    )  # fmt: skip
    judge = Annotator(annotator_id="judge-1", kind="simulated")
    with FeedbackStore(current.collect.store) as store:
        store.add_comparisons([Comparison(pair=pair, annotator=judge, choice="a")])


def test_a_loop_needs_the_sections_of_a_round(config: RunConfig) -> None:
    lacking = config.model_copy(update={"ppo": None, "collect": None})
    with pytest.raises(ValueError, match="sections collect, ppo"):
        run_loop(lacking, rounds=1, resume=False, say=print)
