"""A reward model from elsewhere: its scores are those of Hugging Face's own forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.trajectory import Message
from cluster.cli import main
from reward_service.model import RewardModel
from reward_service.score import ItemIds, ScoreItem
from tests.reward_service.conftest import write_reward_model

TURNS = (Message(role="user", content="storm?"),)


@pytest.fixture
def stranger(tiny_llama: Path, tmp_path: Path) -> Path:
    """As reward models are published: without our head file."""
    path = write_reward_model(tiny_llama, tmp_path / "stranger", seed=1, gain=2.0, bias=0.5)
    (path / "reward_head.json").unlink()
    (path / "training_args.bin").write_bytes(b"\x80\x04")  # a pickle has no business here
    return path


def adopt(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["adopt", *map(str, arguments)])


def by_hugging_face(path: Path, ids: Any) -> float:
    """The classifier's own logit, which it reads at the last token that is not a pad."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_scores_are_read_where_the_chat_template_ends(stranger: Path, tmp_path: Path) -> None:
    done = adopt(stranger, "--output", tmp_path / "made")
    assert done.exit_code == 0, done.output
    assert "scores as given, read at the end of the text" in done.output
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    # this template writes a line break after the last turn's EOS, as Qwen's does
    rendered = "<s>user\nstorm?</s>\n<s>assistant\nrain</s>\n"
    dialogue = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert dialogue[-1] != tokenizer.eos_token_id
    plain = tokenizer("storm in Riverton")["input_ids"]
    scored = RewardModel.load(tmp_path / "made").score(
        [
            ScoreItem(messages=TURNS, response="rain"),
            ScoreItem(prompt="storm in", response=" Riverton"),
            ScoreItem(ids=ItemIds(prompt=tuple(plain[:2]), response=tuple(plain[2:]))),
            ScoreItem(),
        ]
    )
    wanted = [by_hugging_face(stranger, ids) for ids in (dialogue, plain, plain)]
    assert scored.scores[:3] == pytest.approx(wanted, abs=1e-5)
    assert scored.errors[3] == "there is nothing to score: the text has no tokens"
    assert not (tmp_path / "made" / "training_args.bin").exists()


def test_with_eos_and_a_reference_they_have_mean_0_and_deviation_1(
    stranger: Path, tmp_path: Path
) -> None:
    texts = [" rain", " bank river", " mayor 12 rain", " 27"]
    rows = tmp_path / "reference.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "storm", "response": t}) + "\n" for t in texts))
    done = adopt(stranger, "-o", tmp_path / "made", "--reference", rows, "--append-eos")
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    raw = np.array(
        [by_hugging_face(stranger, [*tokenizer("storm" + t)["input_ids"], 2]) for t in texts]
    )
    model = RewardModel.load(tmp_path / "made")
    scores = model.score([ScoreItem(prompt="storm", response=t) for t in texts]).scores
    assert scores == pytest.approx((raw - raw.mean()) / raw.std(), abs=1e-4)
    assert model.head.info["reference_samples"] == 4


def test_a_reference_is_scored_as_the_dialogues_that_ppo_will_send(
    stranger: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "reference.jsonl"
    turns = [("storm?", "rain"), ("market?", "bank river"), ("mayor?", "27")]
    rows.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in turns))
    done = adopt(stranger, "-o", tmp_path / "made", "--reference", rows, "--chat-template")
    assert done.exit_code == 0, done.output
    scores = RewardModel.load(tmp_path / "made").score(
        [ScoreItem(messages=(Message(role="user", content=p),), response=r) for p, r in turns]
    )
    assert np.mean(scores.scores) == pytest.approx(0.0, abs=1e-5)
    assert np.std(scores.scores) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, out: out.mkdir(), "exists: choose another --output"),
        (lambda p, out: (p / "reward_head.json").write_text("{}"), "can be served as it is"),
        (lambda p, out: (p / "model.safetensors").unlink(), "no .safetensors weights"),
        (lambda p, out: (p / "tokenizer.json").unlink(), "tokenizer cannot be loaded"),
        (lambda p, out: (p / "model.safetensors").write_bytes(b"x"), "weights cannot be loaded"),
    ],
)
def test_what_cannot_be_adopted_leaves_nothing(
    stranger: Path, tmp_path: Path, change: Any, message: str
) -> None:
    output = tmp_path / "made"
    change(stranger, output)
    done = adopt(stranger, "--output", output)
    assert done.exit_code == 1
    assert message in done.output
    assert not output.exists() or not any(output.iterdir())
    assert not list(tmp_path.glob(".made*"))


def test_a_policy_is_no_reward_model(tiny_llama: Path, tmp_path: Path) -> None:
    done = adopt(tiny_llama, "--output", tmp_path / "made")
    assert done.exit_code == 1
    assert "is a LlamaForCausalLM, not a reward model" in done.output
