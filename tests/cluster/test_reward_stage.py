"""The reward stage beside a store to which people go on adding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.config import RunConfig
from cluster.data import RunData
from cluster.progress import Reporter
from cluster.stages import Workplace, reward
from cluster.stop import Stopped
from reward_service.comparison import Annotator, Candidate, Comparison, Pair
from reward_service.feedback.store import FeedbackStore

WORDS = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor"]


def judgement(number: int) -> Comparison:
    pair = Pair(
        item_id=f"i{number}",
        prompt_id=f"p{number}",
        prompt=WORDS[number % 8],
        a=Candidate(text=f" {WORDS[(number + 1) % 8]} rain"),
        b=Candidate(text=f" {WORDS[(number + 3) % 8]} bank 12"),
    )
    return Comparison(pair=pair, annotator=Annotator(annotator_id="anna", kind="human"),
                      choice="a", strength=1, shown_first="a")  # fmt: skip


def workplace(config: RunConfig, *, resume: bool, stops_after: int | None = None) -> Workplace:
    calls = itertools.count(1)
    stop: Any = lambda: stops_after is not None and next(calls) >= stops_after  # noqa: E731
    return Workplace(
        config=config, data=RunData(config), session=cast("Any", None), reporter=Reporter(),
        stop=stop, resume=resume, mirror=None,
    )  # fmt: skip


def test_a_training_whose_judgements_have_changed_begins_again(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "model": str(tiny_llama),
            "collect": {},
            "reward_model": {"epochs": 2, "tokens_per_step": 40},
        }
    )
    config.run_dir.mkdir()
    with FeedbackStore(config.run_dir / "feedback.sqlite") as store:
        store.add_comparisons([judgement(n) for n in range(16)])
        with pytest.raises(Stopped):
            reward(workplace(config, resume=False, stops_after=2))
        store.add_comparisons([judgement(16)])
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="a training with other data, seed or settings"):
        reward(workplace(other, resume=True))
    reward(workplace(config, resume=True))
    assert "it begins again, with what there is now" in " ".join(capsys.readouterr().err.split())
    report = json.loads((config.run_dir / "reward_model" / "report.json").read_text())
    assert report["train_judgements"] + report["held_out_pairs"] <= 17
    lines = (config.run_dir / "reward_model" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)), "no step is told twice"
