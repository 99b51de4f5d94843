"""Scores of a reward model against a bare forward pass, and the checkpoints that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.trajectory import Message
from reward_service.model import RewardModel
from reward_service.score import ItemIds, ScoreItem

ITEMS = [
    ScoreItem(prompt="storm " * (1 + n % 7), response=" rain and river" * (n % 5))
    for n in range(25)
]


@pytest.fixture(scope="module")
def model(reward_dir: Path) -> RewardModel:
    return RewardModel.load(reward_dir)


def direct_scores(path: Path, sequences: list[list[int]]) -> list[float]:
    """An independent way: Hugging Face's own classification head on one sequence at a time."""
    network = AutoModelForSequenceClassification.from_pretrained(path).eval()
    head = json.loads((path / "reward_head.json").read_text())
    with torch.inference_mode():
        raw = [network(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
    return [head["gain"] * value + head["bias"] for value in raw]


def test_scores_equal_the_classification_head(model: RewardModel, reward_dir: Path) -> None:
    inputs, errors = model.encode_all(ITEMS)
    assert errors == [None] * len(ITEMS)
    encoded = [i.encoded.ids for i in inputs if i is not None]
    expected = direct_scores(reward_dir, encoded)
    answer = model.score(ITEMS)
    np.testing.assert_allclose(answer.scores, expected, rtol=0, atol=2e-6)
    assert np.std(expected) > 0.1
    assert list(answer.tokens) == [len(ids) for ids in encoded]


def test_padded_batches_agree_whatever_the_padding(model: RewardModel, reward_dir: Path) -> None:
    padded = RewardModel.load(reward_dir, one_by_one=False, token_budget=300)
    np.testing.assert_allclose(padded.score(ITEMS).scores, model.score(ITEMS).scores, atol=5e-5)


def test_a_score_is_the_same_bit_for_bit_in_any_company(model: RewardModel) -> None:
    together = model.score(ITEMS).scores
    assert model.score(ITEMS[::-1]).scores == together[::-1]
    assert tuple(model.score([item]).scores[0] for item in ITEMS) == together


def test_values_per_token_are_scores_of_prefixes(model: RewardModel, reward_dir: Path) -> None:
    items = [ITEMS[6], ScoreItem(prompt="storm", response="")]
    answer = model.score(items, per_token=True)
    inputs, _ = model.encode_all(items)
    ids, start = inputs[0].encoded.ids, inputs[0].encoded.response_start
    assert model.tokenizer.decode(ids[start:]) == items[0].response + "</s>"
    prefixes = [ids[: n + 1] for n in range(start, len(ids))]
    np.testing.assert_allclose(answer.per_token[0], direct_scores(reward_dir, prefixes), atol=2e-5)
    assert [values[-1] for values in answer.per_token] == list(answer.scores)
    assert len(answer.per_token[1]) == 1  # of an empty response only EOS is left
    assert model.score(items).per_token == ()
    np.testing.assert_allclose(answer.scores, model.score(items).scores, atol=2e-5)
    padded = RewardModel.load(reward_dir, one_by_one=False).score(items, per_token=True)
    np.testing.assert_allclose(padded.per_token[0], answer.per_token[0], atol=5e-5)


def test_ids_score_as_their_text_does(model: RewardModel) -> None:
    inputs, _ = model.encode_all(ITEMS[6:7])
    ids, start = inputs[0].encoded.ids, inputs[0].encoded.response_start
    given = [
        ScoreItem(ids=ItemIds(prompt=tuple(ids[:start]), response=tuple(ids[start:]))),
        ScoreItem(ids=ItemIds(response=tuple(ids[:-1]))),  # EOS is added
        ScoreItem(ids=ItemIds(response=(5, model.vocabulary))),
        ScoreItem(ids=ItemIds(response=(5,) * 300)),
    ]
    answer = model.score(given, per_token=True)
    text = model.score(ITEMS[6:7], per_token=True)
    assert answer.per_token[0] == text.per_token[0]
    assert answer.scores[1] == text.scores[0]
    assert "token id 512 at position 1 is not in the reward model's vocabulary of 512" in (
        answer.errors[2] or ""
    )
    assert "context is 256" in (answer.errors[3] or "")
    # cut on the left: as many values as tokens of the response are left
    cut = model.score(given[3:], "left", per_token=True)
    assert len(cut.per_token[0]) == cut.tokens[0] == 256
    inputs, errors = model.encode_all(ITEMS[6:7], max_tokens=3)
    assert "context is 3" in (errors[0] or "")


def test_a_bad_item_fails_alone(model: RewardModel) -> None:
    items = [
        ITEMS[0],
        ScoreItem(prompt="x", response="storm " * 400),
        ScoreItem(prompt="x", response="half a pair \ud800"),
        ScoreItem(response="", messages=(Message(role="user", content="storm"),)),
    ]
    answer = model.score(items)
    assert answer.scores[0] == model.score(ITEMS[:1]).scores[0]
    assert "context is 256" in (answer.errors[1] or "")
    assert answer.scores[2] is None
    assert answer.errors[2]
    assert answer.scores[3] is not None
    assert model.score(items[1:2], "left").tokens == (256,)


def test_a_score_that_is_not_finite_is_an_error(reward_dir: Path) -> None:
    broken = RewardModel.load(reward_dir)
    with torch.no_grad():
        broken._network.score.weight.fill_(float("nan"))
    answer = broken.score(ITEMS[:2])
    assert answer.scores == (None, None)
    assert answer.errors == ("the reward model gave nan",) * 2


@pytest.fixture
def copy(reward_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_dir, tmp_path / "copy"))


def test_the_version_is_that_of_the_content(
    model: RewardModel, copy: Path, second_reward_dir: Path
) -> None:
    assert RewardModel.load(copy).version == model.version
    assert RewardModel.load(second_reward_dir).version != model.version
    head = json.loads((copy / "reward_head.json").read_text())
    (copy / "reward_head.json").write_text(json.dumps(head | {"gain": 3.0}))
    assert RewardModel.load(copy).version != model.version


def test_missing_parts_are_named(copy: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
        RewardModel.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="LlamaForCausalLM, not a reward model"):
        RewardModel.load(tiny_llama)
    weights = copy / "model.safetensors"
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights.*can run code"):
        RewardModel.load(copy)
    (copy / "pytorch_model.bin").rename(weights)
    (copy / "reward_head.json").rename(copy / "head.json")
    with pytest.raises(FileNotFoundError, match=r"no reward_head\.json.*rlhf reward"):
        RewardModel.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        RewardModel.load(copy)


def test_another_tokenizer_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="not the one that the reward model was trained with"):
        RewardModel.load(copy)


def test_weights_that_do_not_fit_are_refused(copy: Path, second_reward_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight is missing"):
        RewardModel.load(copy)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        RewardModel.load(copy)


def test_two_outputs_are_refused(copy: Path) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(
        copy, num_labels=2, ignore_mismatched_sizes=True
    )
    network.save_pretrained(copy)
    with pytest.raises(ValueError, match="with 2 outputs"):
        RewardModel.load(copy)
