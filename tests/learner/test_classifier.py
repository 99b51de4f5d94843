"""The classifier: its figures by hand, and that it learns what its labels say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from actors.config import DataConfig
from cluster.data import load_labels
from learner.classifier import (
    LabelLoss,
    choose_threshold,
    held_out_figures,
    roc_auc,
    train_classifier,
)
from learner.config import OptimizerConfig, RewardModelConfig
from reward_service.comparison import LabelledText
from reward_service.model import RewardModel
from reward_service.score import ScoreItem

CONFIG = RewardModelConfig(
    epochs=6,
    tokens_per_step=400,
    choosing_share=0.25,
    evaluations=3,
    threads=1,
    optimizer=OptimizerConfig(learning_rate=3e-3),
)


def test_the_threshold_is_the_best_line_between_two_texts() -> None:
    probabilities = np.array([0.9, 0.2, 0.7, 0.4, 0.6])
    flagged = np.array([True, False, True, True, False])
    # ranked: 0.9+ 0.7+ 0.6- 0.4+ 0.2-; F1 after 4: 2 * 3 / (4 + 3) = 6/7, the best
    threshold, f1 = choose_threshold(probabilities, flagged)
    assert threshold == pytest.approx(0.3)
    assert f1 == pytest.approx(6 / 7)
    # no line can be drawn inside a tie
    threshold, f1 = choose_threshold(np.array([0.5, 0.5, 0.1]), np.array([True, False, False]))
    assert (threshold, f1) == (pytest.approx(0.3), pytest.approx(2 / 3))


def test_figures_by_hand() -> None:
    probabilities = np.array([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    flagged = np.array([True, False, True, True, False, False])
    figures = held_out_figures(probabilities, flagged, 0.5)
    assert figures["precision"] == pytest.approx(2 / 3)
    assert figures["recall"] == pytest.approx(2 / 3)
    assert figures["f1"] == pytest.approx(2 / 3)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["flagged_share"] == 0.5
    # pairs in order: 0.9 above three, 0.7 above two, 0.3 above two: 7 of 9
    assert figures["roc_auc"] == pytest.approx(7 / 9)
    assert figures["precision_low"] < 2 / 3 < figures["precision_high"]
    nothing = held_out_figures(probabilities, flagged, 1.0)
    assert (nothing["precision"], nothing["recall"], nothing["f1"]) == (None, 0.0, 0.0)
    assert roc_auc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert roc_auc(np.array([1.0]), np.array([True])) is None


def labelled(count: int) -> list[LabelledText]:
    """Texts are flagged when they mention rain."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        words = [rng.choice(["storm", "market", "bank", "river", "mayor"]) for _ in range(6)]
        flagged = rng.random() < 0.4
        if flagged:
            words[rng.randrange(6)] = "rain"
        made.append(LabelledText(text_id=f"t{number}", text=" ".join(words), flagged=flagged))
    return made


def test_it_learns_and_scores_as_a_reward_model_does(tiny_llama: Path, tmp_path: Path) -> None:
    texts = labelled(240)
    report = train_classifier(CONFIG, texts, tiny_llama, tmp_path / "out", seed=0)
    assert report.roc_auc is not None
    assert report.roc_auc > 0.9
    assert report.train_texts + report.validation_texts + report.held_out_texts == 240
    assert report.f1 > 0.8
    model = RewardModel.load(tmp_path / "out")
    rain, dry = model.score(
        [ScoreItem(response="storm rain bank river"), ScoreItem(response="storm mayor bank river")]
    ).scores
    assert rain is not None
    assert dry is not None
    assert 0 < dry < report.threshold <= rain < 1
    head = json.loads((tmp_path / "out" / "reward_head.json").read_text())
    assert head["info"]["threshold"] == report.threshold


def test_the_loss_is_the_cross_entropy(tiny_llama: Path) -> None:
    from learner import hf_directory

    tokenizer = hf_directory.load_tokenizer(tiny_llama)
    model = hf_directory.load_scalar_model(tiny_llama, tokenizer)
    objective = LabelLoss([np.array([5, 6, 2], np.int32)] * 3, [True, False, True])
    loss, sums = objective.loss(model, np.arange(3))
    # a new head is zero: every text has probability one half
    assert float(loss.detach()) == pytest.approx(3 * np.log(2))
    assert sums == {"accuracy": 1.0}


def test_too_few_or_all_alike_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    alike = [LabelledText(text_id=str(n), text="storm", flagged=False) for n in range(40)]
    for texts in (labelled(6), alike):
        with pytest.raises(ValueError, match="too few"):
            train_classifier(CONFIG, texts, tiny_llama, tmp_path, seed=0)
    config = CONFIG.model_copy(update={"choosing_share": 0.0})
    with pytest.raises(ValueError, match="choosing_share above 0"):
        train_classifier(config, labelled(40), tiny_llama, tmp_path, seed=0)


def test_labels_are_read_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [
        {"id": "a", "text": "rain", "flagged": True},
        {"prompt": "storm?", "response": "no", "flagged": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_labels(str(path), DataConfig()) == [
        LabelledText(text_id="a", text="rain", flagged=True),
        LabelledText(text_id="labels:2", text="no", flagged=False, prompt="storm?"),
    ]
    for bad, says in (
        ({"text": "x"}, "labels.jsonl:1: field 'flagged' is missing"),
        ({"text": "x", "flagged": "yes"}, "must be true or false, got 'yes'"),
        ({"flagged": True}, "a labelled row has a text"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=says):
            load_labels(str(path), DataConfig())
