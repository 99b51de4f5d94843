"""The reward model: agreement figures by hand, and a scorer that learns what judges say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.fingerprint import template_fingerprint
from actors.trajectory import Message
from learner import hf_directory
from learner.config import OptimizerConfig, RewardModelConfig
from learner.judgement_loss import JudgedItem, JudgementLoss, RatingScale, score_sequences
from learner.judgements import (
    JudgedPair,
    Judgement,
    Teaching,
    accuracy_beside_judges,
    disagreements,
    judge_agreement,
    judged_pairs,
    judgement_accuracy,
    majority,
    majority_accuracy,
    rated_responses,
    share_of,
    share_over_groups,
)
from learner.reward_model import RewardModelReport, normalisation, train_reward_model
from learner.stage import REPORT_FILE
from learner.supervised import Interrupted
from reward_service.comparison import Annotator, Candidate, Choice, Comparison, Pair, Rating
from reward_service.encoding import RewardHead
from reward_service.model import RewardModel
from reward_service.score import ScoreItem

# --- agreement ---------------------------------------------------------------------------------


def judged(item: str, votes: str, prompt: str = "") -> JudgedPair:
    """``votes`` is one letter a judge: a, b or t for a tie."""
    value = {"a": 1.0, "b": 0.0, "t": 0.5}
    return JudgedPair(
        item_id=item,
        prompt_id=prompt or item,
        prompt="p",
        messages=(),
        a="x",
        b="y",
        judgements=tuple(
            Judgement(annotator_id=f"j{k}", preference=value[v], strength=1)
            for k, v in enumerate(votes)
        ),
    )


@pytest.mark.parametrize(
    ("votes", "expected"),
    [("aab", 1.0), ("abb", 0.0), ("ab", None), ("tta", 1.0), ("tt", None), ("", None)],
)
def test_majority(votes: str, expected: float | None) -> None:
    assert majority(judged("1", votes).judgements) == expected


def test_accuracies_by_hand() -> None:
    pairs = [judged("1", "aab"), judged("2", "bbt"), judged("3", "ab"), judged("4", "aaa")]
    differences = np.array([1.0, 2.0, -1.0, 0.0])
    found = majority_accuracy(pairs, differences)
    # right, wrong, no majority, undecided
    assert (found.value, found.n) == ((1 + 0 + 0.5) / 3, 3)
    single = judgement_accuracy(pairs, differences, seed=0)
    # 2 of 3, 0 of 2 (a tie is left out), 1 of 2, 1.5 of 3
    assert (single.value, single.n) == ((2 + 0 + 1 + 1.5) / 10, 10)


def test_leave_one_out_by_hand() -> None:
    pairs = [judged("1", "aab"), judged("2", "bbb"), judged("3", "ab"), judged("4", "ta")]
    found = judge_agreement(pairs, seed=0)
    # 1: without an a the others are split, without b they say a. 2: three agreements. 3: each
    # against the other. 4: without the tie a; without a the other is a tie; the tie is no vote.
    assert (found.value, found.n) == ((0 + 3 + 0) / (1 + 3 + 2), 6)
    model = accuracy_beside_judges(pairs, np.array([1.0, -1.0, 1.0, 1.0]), seed=0)
    # 1: a is right. 2: thrice right. 3: right once of two.
    assert (model.value, model.n) == ((1 + 3 + 1) / 6, 6)


def test_wilson_interval() -> None:
    """8 of 10: the textbook values."""
    found = share_of(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share_of(10, 10).high == pytest.approx(1.0)
    assert share_of(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert share_of(0, 0).value is None


def test_the_bootstrap_resamples_whole_groups() -> None:
    """Copies of a judgement within a group make the interval no narrower."""
    rng = np.random.default_rng(0)
    once = [[float(v)] for v in rng.random(100) < 0.7]
    many = [group * 5 for group in once]
    a, b = (share_over_groups(groups, seed=1) for groups in (once, many))
    assert (a.low, a.high, a.value) == (b.low, b.high, b.value)
    assert b.n == 500
    share, spread = a.value, 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert share is not None
    assert a.low == pytest.approx(share - spread, abs=0.03)
    assert share_over_groups([], seed=0).value is None


# --- records -----------------------------------------------------------------------------------

WORDS = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor"]


def comparison(item: int, choice: Choice, judge: str = "j0", **values: Any) -> Comparison:
    pair = Pair(
        item_id=f"i{item}",
        prompt_id=f"p{item}",
        prompt=f"{item}: storm",
        a=Candidate(text=values.pop("a", " rain")),
        b=Candidate(text=values.pop("b", " bank")),
    )
    annotator = Annotator(annotator_id=judge, kind="human")
    return Comparison(pair=pair, annotator=annotator, choice=choice, **values)


def rating(item: int, text: str, value: int, judge: str = "j0") -> Rating:
    return Rating(
        item_id=f"r{item}",
        prompt_id=f"p{item}",
        prompt=f"{item}: storm",
        response=Candidate(text=text),
        annotator=Annotator(annotator_id=judge, kind="human"),
        criterion="overall",
        value=value,
    )


def test_comparisons_become_pairs() -> None:
    first = comparison(1, "a", "x")
    changed = comparison(1, "both_bad", "x")
    [pair, other] = judged_pairs([first, comparison(2, "b"), comparison(1, "b", "y"), changed])
    assert (pair.item_id, other.item_id) == ("i1", "i2")
    # The last word of a judge counts; both_bad says that neither is better.
    assert {j.annotator_id: j.preference for j in pair.judgements} == {"x": 0.5, "y": 0.0}
    with pytest.raises(ValueError, match="item 'i1' stands for two different pairs"):
        judged_pairs([first, comparison(1, "a", "z", a=" other")])


def test_ratings_become_means() -> None:
    [one, two] = rated_responses([rating(1, " a", 2), rating(1, " a", 5, "y"), rating(1, " b", 1)])
    assert (one.mean, one.count, two.mean) == (3.5, 2, 1.0)


# --- objective ---------------------------------------------------------------------------------


def test_each_judgement_counts_once(tiny_llama: Path) -> None:
    """Three judgements, one tie, strengths, a margin: against the formula written out."""
    tokenizer = hf_directory.load_tokenizer(tiny_llama)
    model = hf_directory.load_scalar_model(tiny_llama, tokenizer)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(3, 500, n).astype(np.int32) for n in (7, 12, 5))
    pair = judged("1", "atb")
    strong = Judgement(annotator_id="s", preference=1.0, strength=3)
    pair = JudgedPair(**{
        **{f: getattr(pair, f) for f in pair.__slots__}, "judgements": (*pair.judgements, strong)
    })  # fmt: skip
    [rated] = rated_responses([rating(1, " c", 5), rating(1, " c", 4, "y")])
    items = [
        JudgedItem(sequences=(a, b), prompt_id="1", pair=pair),
        JudgedItem(sequences=(c,), prompt_id="1", rated=rated),
    ]
    config = RewardModelConfig(strength_margin=0.25, rating_weight=0.5)
    objective = JudgementLoss(items, config, RatingScale(mean=3.0, std=2.0))
    assert objective.lengths.tolist() == [12, 5]
    assert objective.rows.tolist() == [2, 1]
    assert objective.weight(np.array([0, 1])) == 4 + 2
    loss, sums = objective.loss(model, np.array([0, 1]))
    ra, rb, rc = score_sequences(model, [a, b, c], 1000)
    d = ra - rb

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = (
        softplus(-d) + 0.5 * (softplus(-d) + softplus(d)) + softplus(d) + softplus(0.5 - d)
        + 0.5 * 2 * 0.5 * (rc - 0.75) ** 2
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums["agreement"] == (2 if d > 0 else 1)


def test_labels_and_weights_teach_and_votes_measure(tiny_llama: Path) -> None:
    tokenizer = hf_directory.load_tokenizer(tiny_llama)
    model = hf_directory.load_scalar_model(tiny_llama, tokenizer)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(3, 500, n).astype(np.int32) for n in (9, 12))
    said = [comparison(1, "a", "j0"), comparison(1, "b", "j1")]
    ra, rb = score_sequences(model, [a, b], 1000)
    d = ra - rb

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    for teaching, expected in (
        (Teaching(), softplus(-d) + softplus(d)),
        (Teaching(weights={"j0": 1.5, "j1": 0.25}), 1.5 * softplus(-d) + 0.25 * softplus(d)),
        # both judgements say what the judges together mean
        (Teaching(labels={"i1": 0.9}), 2 * (0.9 * softplus(-d) + 0.1 * softplus(d))),
    ):
        (pair,) = judged_pairs(said, teaching)
        item = JudgedItem(sequences=(a, b), prompt_id="1", pair=pair)
        config = RewardModelConfig(strength_margin=0.0)
        loss, _ = JudgementLoss([item], config, RatingScale()).loss(model, np.array([0]))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert majority_accuracy([pair], np.array([1.0])).n == 0, "measured on the votes: split"


def test_disagreements_are_the_surest_mistakes() -> None:
    pairs = [judged("1", "aab"), judged("2", "bbt"), judged("3", "ab"), judged("4", "b")]
    found = disagreements(pairs, np.array([-1.0, 0.5, 9.0, 3.0]), most=2)
    assert [(f["item_id"], f["margin"], f["preferred"]) for f in found] == [
        ("4", 3.0, "y"), ("1", 1.0, "x"),
    ]  # fmt: skip
    assert found[1]["share"] == pytest.approx(2 / 3)
    assert len(disagreements(pairs, np.array([-1.0, 0.5, 9.0, 3.0]), most=9)) == 3


def test_scores_are_read_at_the_last_token(tiny_llama: Path) -> None:
    """Against transformers' own classifier, a sequence at a time."""
    tokenizer = hf_directory.load_tokenizer(tiny_llama)
    model = hf_directory.load_scalar_model(tiny_llama, tokenizer)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 500, n).astype(np.int32) for n in (7, 12, 5, 30)]
    with torch.no_grad():
        alone = [
            float(model(input_ids=torch.from_numpy(s.astype(np.int64))[None]).logits)
            for s in sequences
        ]
    np.testing.assert_allclose(score_sequences(model, sequences, 40), alone, atol=1e-5)


def test_normalisation_by_hand() -> None:
    gain, bias = normalisation(np.array([1.0, 3.0, 5.0, 7.0]))
    assert gain == pytest.approx(1 / math.sqrt(5))
    assert bias == pytest.approx(-4 / math.sqrt(5))
    assert normalisation(np.array([2.0, 2.0])) == (1.0, -2.0)
    assert normalisation(np.array([])) == (1.0, 0.0)


# --- the stage ---------------------------------------------------------------------------------


def response(rng: np.random.Generator) -> str:
    return "".join(f" {WORDS[k]}" for k in rng.integers(8, size=rng.integers(3, 7)))


def noisy_judgements(pairs: int = 240, judges: int = 3, flip: float = 0.1) -> list[Comparison]:
    """Judges prefer the response with more rain, and err now and then."""
    rng = np.random.default_rng(0)
    made = []
    for item in range(pairs):
        a, b = response(rng), response(rng)
        lead = a.count("rain") - b.count("rain")
        for k in range(judges):
            choice: Choice = "tie" if lead == 0 else "a" if lead > 0 else "b"
            if rng.random() < flip:
                choice = "a" if rng.random() < 0.5 else "b"
            made.append(comparison(item, choice, f"j{k}", a=a, b=b))
    return made


def references(count: int = 100) -> list[tuple[str, tuple[()], str]]:
    rng = np.random.default_rng(1)
    return [(f"{i}: storm", (), response(rng)) for i in range(count)]


def config(**values: Any) -> RewardModelConfig:
    loop = {"tokens_per_step": 1024, "tokens_per_micro_batch": 1024, "threads": 1, "epochs": 8}
    optimizer = OptimizerConfig(learning_rate=3e-3)
    return RewardModelConfig.model_validate({**loop, "optimizer": optimizer, **values})


@pytest.fixture(scope="module")
def trained(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RewardModelReport]:
    directory = tmp_path_factory.mktemp("reward")
    report = train_reward_model(
        config(), noisy_judgements(), [], tiny_llama, directory,
        reference_samples=references(), seed=0,
    )  # fmt: skip
    return directory, report


def test_it_learns_what_judges_prefer(trained: tuple[Path, RewardModelReport]) -> None:
    _, report = trained
    assert report.held_out_pairs == 48
    assert report.train_pairs == 240 - 48 - 19
    assert report.held_out_accuracy is not None
    assert report.ci_low is not None
    assert report.judge_agreement is not None
    assert report.length_baseline is not None
    assert report.held_out_accuracy > 0.8
    assert report.ci_low < report.held_out_accuracy < report.ci_high
    # It knows nothing but length: hardly better than a coin.
    assert report.held_out_accuracy > report.length_baseline + 0.15
    assert 0.8 < report.judge_agreement < 1.0
    assert report.accuracy_beside_judges == pytest.approx(report.judge_agreement, abs=0.15)
    assert report.ties > 0


def test_scores_are_normalised_on_the_references(trained: tuple[Path, RewardModelReport]) -> None:
    directory, report = trained
    model = RewardModel.load(directory)
    scores = model.score(
        [ScoreItem(prompt=prompt, response=text) for prompt, _, text in references()]
    ).scores
    assert report.reference_samples == 100
    assert np.mean(scores) == pytest.approx(0.0, abs=1e-3)
    assert np.std(scores) == pytest.approx(1.0, abs=1e-3)
    [good, bad] = model.score([
        ScoreItem(prompt="9: storm", response=" rain rain market"),
        ScoreItem(prompt="9: storm", response=" bank mayor market"),
    ]).scores  # fmt: skip
    assert good is not None
    assert bad is not None
    assert good > bad + 1


def test_the_checkpoint_says_what_it_is(
    trained: tuple[Path, RewardModelReport], tiny_llama: Path
) -> None:
    directory, report = trained
    head = RewardHead.load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert head.fingerprint == template_fingerprint(tokenizer)
    assert (head.gain, head.bias, head.base) == (report.gain, report.bias, str(tiny_llama))
    assert head.info["held_out_accuracy"] == report.held_out_accuracy
    saved = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    assert saved["held_out_accuracy"] == report.held_out_accuracy
    network = AutoModelForSequenceClassification.from_pretrained(directory)
    assert network.score.out_features == 1
    assert network.config.pad_token_id == tokenizer.pad_token_id


def test_interrupted_training_ends_with_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> RewardModelReport:
        return train_reward_model(
            config(epochs=2, tokens_per_step=256), noisy_judgements(60), [], tiny_llama,
            tmp_path / name,
            reference_samples=references(20), seed=0, **options,
        )  # fmt: skip

    whole = run("whole")
    asked = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run("parts", should_stop=lambda: next(asked))
    parts = run("parts", resume=True)
    assert (parts.gain, parts.bias) == (whole.gain, whole.bias)
    assert parts.held_out_accuracy == whole.held_out_accuracy
    with pytest.raises(Interrupted):
        run("other", should_stop=lambda: True)
    with pytest.raises(ValueError, match="with other data"):
        train_reward_model(
            config(epochs=2, tokens_per_step=256), noisy_judgements(60, flip=0.5), [], tiny_llama,
            tmp_path / "other",
            reference_samples=[], seed=0, resume=True,
        )  # fmt: skip


def test_ratings_alone_train_a_reward_model(tiny_llama: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ratings = []
    for item in range(200):
        text = response(rng)
        value = 1 + min(4, 2 * text.count("rain"))
        ratings += [rating(item, text, value, judge) for judge in ("x", "y")]
    report = train_reward_model(
        config(epochs=12), [], ratings, tiny_llama, tmp_path, reference_samples=[], seed=0
    )
    assert report.rating_correlation is not None
    assert report.rating_correlation > 0.7
    assert (report.held_out_accuracy, report.judge_agreement, report.n) == (None, None, 0)
    assert (report.train_pairs, report.held_out_ratings) == (0, 80)
    # Normalised on the judged responses themselves.
    assert report.reference_samples == 200


def test_what_is_too_long(tiny_llama: Path, tmp_path: Path) -> None:
    made = [*noisy_judgements(12), comparison(99, "a", a=" storm 12" * 200)]
    report = train_reward_model(
        config(epochs=1), made, [], tiny_llama, tmp_path, reference_samples=[], seed=0
    )
    assert report.skipped == 1
    with pytest.raises(ValueError, match="1 of 13 judged items are longer than the context of 256"):
        train_reward_model(
            config(overlong="error"), made, [], tiny_llama, tmp_path, reference_samples=[], seed=0
        )


def test_too_little_to_learn_from(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no judgements"):
        train_reward_model(config(), [], [], tiny_llama, tmp_path, reference_samples=[], seed=0)
    with pytest.raises(ValueError, match="judgements are on 2 prompts: at least 3"):
        train_reward_model(
            config(), noisy_judgements(2), [], tiny_llama, tmp_path, reference_samples=[], seed=0
        )
    report = train_reward_model(
        config(epochs=1), noisy_judgements(3), [], tiny_llama, tmp_path, reference_samples=[],
        seed=0,
    )  # fmt: skip
    assert report.train_pairs == report.held_out_pairs == 1


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        train_reward_model(
            config(), noisy_judgements(5), [], tmp_path / "none", tmp_path, reference_samples=[],
            seed=0,
        )  # fmt: skip


def test_real_model(shared_data: Path, tmp_path: Path) -> None:
    base = shared_data / "model_stories260k"
    report = train_reward_model(
        config(epochs=6, optimizer=OptimizerConfig(learning_rate=2e-3)),
        noisy_judgements(), [], base, tmp_path, reference_samples=references(), seed=0,
    )  # fmt: skip
    assert report.held_out_accuracy is not None
    assert report.held_out_accuracy > 0.8
    assert np.isfinite(RewardModel.load(tmp_path).score([ScoreItem(response="The cat.")]).scores[0])


def test_pairs_that_show_the_same_prompt_are_of_one_prompt_whatever_their_ids() -> None:
    """Or a response would be trained on and held out at once."""

    def judged(item_id: str, prompt_id: str, prompt: str, messages: Any = ()) -> Comparison:
        pair = Pair(item_id=item_id, prompt_id=prompt_id, prompt=prompt, messages=messages,
                    a=Candidate(text="x"), b=Candidate(text=item_id))  # fmt: skip
        return Comparison(
            pair=pair, annotator=Annotator(annotator_id="u", kind="human"), choice="a"
        )

    brief = (Message(role="system", content="Be brief."), Message(role="user", content="Storm?"))
    pairs = judged_pairs(
        [
            judged("1", "1", "Storm?"),
            judged("2", "2", "Storm?"),
            judged("3", "p", "Rain?"),
            judged("4", "p", "Rain!"),
            judged("5", "5", "Storm?", brief),
            judged("6", "6", "Storm?", brief),
            judged("7", "2", "Wind?"),  # the id of one that shows what the first does
        ]
    )
    assert [pair.prompt_id for pair in pairs] == ["1", "1", "p", "p", "5", "5", "1"]
    alike = judged_pairs([judged(str(n), str(n), "Write a poem.") for n in range(9)])
    assert len({pair.prompt_id for pair in alike}) == 9, "one instruction for all is no prompt"
