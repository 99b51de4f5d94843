"""Edge cases through the real engine, the scoring and the PPO learner, and back into the engine.

The policies are made by hand: their logits are the same in every state, so what they write, and
with which probability, is known. The reward model has another tokenizer than the policy.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from actors.config import DataConfig, EngineConfig, RolloutConfig, SamplingConfig
from actors.datasets import RawPrompt
from actors.fingerprint import template_fingerprint
from actors.prompts import tokenize_prompts
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.step import Sample, probe_sequences, sample_row
from learner.batch import build_batch
from learner.config import OptimizerConfig, PPOConfig
from reward_service.encoding import RewardHead, Truncation
from reward_service.model import RewardModel
from reward_service.rewards import FunctionReward, ModelReward, Reward, WeightedSum
from reward_service.score import ModelScores, Score, ScoreItem
from reward_service.scoring import score_stream
from tests.actors.test_prompts import TEMPLATE, make_tokenizer
from tests.learner.ppo_samples import in_process, weights
from tests.reward_service.test_model import direct_scores

EOS, SECOND_EOS = 2, 1
CONTEXT = 256
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, betas=(0.9, 0.999), schedule="constant")
PPO = PPOConfig(epochs=1, minibatches=2, policy=OPTIMIZER, critic=OPTIMIZER)
REWARD_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def policy(tiny_llama_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy whose generation configuration names two ids that end a response."""
    path = tmp_path_factory.mktemp("edges") / "policy"
    shutil.copytree(tiny_llama_untied, path)
    config = json.loads((path / "generation_config.json").read_text())
    config["eos_token_id"] = [EOS, SECOND_EOS]
    (path / "generation_config.json").write_text(json.dumps(config))
    return path


def puppet(policy: Path, path: Path, logits: Mapping[int, float]) -> Path:
    """The policy with weights that give these logits in every state, and 0 for all other ids.

    Every token's embedding is the first unit vector and no layer adds to it. RMSNorm scales it to
    8, the root of the width 64, and the head multiplies by an eighth of the logit.
    """
    shutil.copytree(policy, path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1.0
        for token, logit in logits.items():
            model.lm_head.weight[token, 0] = logit / 8
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pool(ray_session: None, policy: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(engine=EngineConfig(max_num_seqs=32, kv_cache_gib=0.1))
    with RolloutPool(policy, config, name="edges") as started:
        yield started


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over bytes: 259 ids, where the policy has 512."""
    path = tmp_path_factory.mktemp("bytes_reward")
    make_tokenizer(template=REWARD_TEMPLATE).save_pretrained(path)
    torch.manual_seed(3)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
            pad_token_id=258,
            num_labels=1,
            initializer_range=0.3,
        )
    ).save_pretrained(path)
    fingerprint = template_fingerprint(AutoTokenizer.from_pretrained(path))
    RewardHead(gain=1.5, bias=0.25, fingerprint=fingerprint).save(path)
    return path


class Recorder:
    """The reward model, and everything that reached it."""

    def __init__(self, path: Path) -> None:
        self.model = RewardModel.load(path)
        self.items: list[ScoreItem] = []

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        self.items += items
        return self.model.score(items, truncation)


@pytest.fixture
def recorder(reward_dir: Path) -> Recorder:
    return Recorder(reward_dir)


@pytest.fixture
def tokenizer(policy: Path):
    return AutoTokenizer.from_pretrained(policy)


@dataclass(frozen=True)
class Round:
    """Once round the loop: what was sampled, scored and set aside, and what was learned."""

    samples: list[Trajectory]
    scores: dict[str, Score]
    failures: list[SampleFailure]
    metrics: dict[str, float]
    stopped: list[bool]

    @property
    def texts(self) -> set[str]:
        return {sample.response_text for sample in self.samples}


def go_round(
    pool: RolloutPool,
    model: Path,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    samples_per_prompt: int = 4,
) -> Round:
    """Generate, score, learn, and give the engine the new weights, proved by its probe."""
    pool.load_checkpoint(model, version=pool.version + 1)
    sampling = SamplingConfig(max_new_tokens=6, samples_per_prompt=samples_per_prompt)
    answers = pool.generate(prompts, sampling, run_seed=0, round_index=0)
    results = list(score_stream(reward, answers))
    failures = [r for r in results if isinstance(r, SampleFailure)]
    scored = [r for r in results if not isinstance(r, SampleFailure)]
    scored.sort(key=lambda pair: pair[0].sample_id)
    assert len(results) == len(prompts) * samples_per_prompt
    batch = build_batch([t for t, _ in scored], [s for _, s in scored], PPO)
    learners = in_process(PPO, model)
    metrics = learners.update(batch)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["ppo/engine_delta_max"] < 1e-4
    samples = [Sample(trajectory=t, score=s, measured={}) for t, s in scored]
    (confirmed,) = pool.load(learners.export_weights(pool.version + 1, probe_sequences(samples)))
    assert confirmed.probe_max_error < 1e-3
    for sample in samples:  # as the run directory would have it
        row = json.dumps(sample_row(sample), ensure_ascii=False).encode()
        assert json.loads(row)["response"] == sample.trajectory.response_text
    return Round(
        samples=[t for t, _ in scored],
        scores={s.sample_id: s for _, s in scored},
        failures=failures,
        metrics=metrics,
        stopped=batch.stopped.tolist(),
    )


def plain_prompts(tokenizer, texts: Sequence[str], **config: object) -> list[Prompt]:
    raw = [RawPrompt(prompt_id=f"p{i}", text=text) for i, text in enumerate(texts)]
    return tokenize_prompts(raw, tokenizer, DataConfig(**config))


TEXTS = ["storm in Riverton", "rain"]


# --- how a response ends -----------------------------------------------------------------------


def test_an_empty_response_is_one_trained_token_and_an_empty_text(
    pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer, tmp_path: Path
) -> None:
    model = puppet(policy, tmp_path / "silent", {EOS: 30.0})
    done = go_round(pool, model, plain_prompts(tokenizer, TEXTS), ModelReward(recorder))
    assert [t.response_ids.tolist() for t in done.samples] == [[EOS]] * 8
    assert done.texts == {""}
    assert done.stopped == [True] * 8
    assert {item.response for item in recorder.items} == {""}
    assert done.metrics["ppo/response_length"] == done.metrics["ppo/eos_rate"] == 1.0
    assert done.metrics["ppo/tokens"] == 8
    # The reward model has read the prompt and EOS, and one prompt's samples score alike.
    assert len({score.value for score in done.scores.values()}) == 2


def test_a_response_without_eos_is_cut_and_gets_none(
    pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer, tmp_path: Path
) -> None:
    model = puppet(policy, tmp_path / "endless", {EOS: -30.0, SECOND_EOS: -30.0})
    done = go_round(pool, model, plain_prompts(tokenizer, TEXTS), ModelReward(recorder))
    assert all(len(t.response_ids) == 6 and t.finish_reason == "length" for t in done.samples)
    assert not any({EOS, SECOND_EOS} & set(t.response_ids.tolist()) for t in done.samples)
    assert done.metrics["ppo/eos_rate"] == 0.0
    for sample in done.samples:  # 510 ids that are equally likely
        np.testing.assert_allclose(sample.response_logprobs, -math.log(510), atol=1e-3)


def test_each_of_several_eos_ids_ends_a_response_and_is_trained(
    pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer, tmp_path: Path
) -> None:
    """Two ids with probability 255 / (255 + 255 + 510) = 1/4 each."""
    level = math.log(255)
    model = puppet(policy, tmp_path / "two", {EOS: level, SECOND_EOS: level})
    prompts = plain_prompts(tokenizer, TEXTS)
    done = go_round(pool, model, prompts, ModelReward(recorder), samples_per_prompt=16)
    ended = [t for t in done.samples if t.finish_reason == "stop"]
    assert {int(t.response_ids[-1]) for t in ended} == {EOS, SECOND_EOS}
    assert {len(t.response_ids) for t in ended} >= {1, 2, 3}
    for sample in ended:
        assert not {EOS, SECOND_EOS} & set(sample.response_ids[:-1].tolist())
        assert sample.response_logprobs[-1] == pytest.approx(math.log(0.25), abs=1e-3)
        assert "</s>" not in sample.response_text
        assert "<s>" not in sample.response_text
    assert done.metrics["ppo/eos_rate"] == len(ended) / 32 > 0.8


# --- what stands in the context -----------------------------------------------------------------


def test_a_prompt_up_to_the_last_place_of_the_context(
    pool: RolloutPool, policy: Path, recorder: Recorder, tmp_path: Path
) -> None:
    """One token fits behind 255; a prompt of 256 is refused before a run's first step."""
    model = puppet(policy, tmp_path / "endless", {EOS: -30.0, SECOND_EOS: -30.0})
    full = Prompt(
        prompt_id="full", token_ids=np.full(CONTEXT - 1, 9, np.int32), text="x" * (CONTEXT - 1)
    )
    done = go_round(pool, model, [full], ModelReward(recorder))
    assert [len(t.response_ids) for t in done.samples] == [1] * 4
    assert not any(done.stopped)
    over = replace(full, prompt_id="over", token_ids=np.full(CONTEXT, 9, np.int32))
    with pytest.raises(ValueError, match="'over' has 256 tokens and leaves no room"):
        pool.check_prompts([full, over])
    alien = replace(full, prompt_id="alien", token_ids=np.array([5, 512], np.int32))
    with pytest.raises(ValueError, match=r"'alien' holds token id 512, outside .* of 512"):
        pool.check_prompts([full, alien])
    pool.check_prompts([full])


@pytest.mark.parametrize("what", ["an id that the tokenizer lacks", "half an emoji"])
def test_ids_that_are_no_text_are_trained_and_scored_all_the_same(
    what: str, pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer, tmp_path: Path
) -> None:
    """Models often have more rows than their tokenizer has tokens, and byte-level tokens need
    not add up to characters."""
    assert len(tokenizer) < 511
    first_byte = tokenizer.convert_tokens_to_ids("ð")  # 0xF0, which begins most emoji
    token, text = (
        (511, "") if what.startswith("an id") else (first_byte, "\N{REPLACEMENT CHARACTER}" * 6)
    )
    model = puppet(policy, tmp_path / "strange", {token: 30.0})
    done = go_round(pool, model, plain_prompts(tokenizer, TEXTS), ModelReward(recorder))
    assert {tuple(t.response_ids.tolist()) for t in done.samples} == {(token,) * 6}
    assert done.texts == {text}
    assert not done.failures


# --- texts ---------------------------------------------------------------------------------------

STRANGE = [
    "临江大楼起火，32家人撤离。",
    "family \N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}, \U0001f1e8\U0001f1ed, \U0001f44d\U0001f3fd",
    "עברית and \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u202eturned round\u202c",
    "e\u0301 is not é; z\u0335\u0321\u031b\u0342a\u0336\u0315l\u0334g\u0337o",
    "\x00 and \x1b[31m and \ufeff and \U0010ffff",
    "  two spaces before, a tab\tand a line\r\nbreak  ",
]


def test_unusual_texts_reach_engine_and_reward_unchanged(
    pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer
) -> None:
    prompts = plain_prompts(tokenizer, STRANGE)
    for prompt, text in zip(prompts, STRANGE, strict=True):
        assert prompt.text == text
        assert tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False) == text
    done = go_round(pool, policy, prompts, ModelReward(recorder), samples_per_prompt=2)
    assert {(i.prompt, i.response) for i in recorder.items} == {
        (STRANGE[int(t.prompt.prompt_id[1:])], t.response_text) for t in done.samples
    }
    assert len(done.scores) == 12
    for sample in done.samples:
        decoded = tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        assert sample.response_text == decoded


def test_a_chat_template_and_plain_text_are_two_prompts(
    pool: RolloutPool, policy: Path, recorder: Recorder, tokenizer
) -> None:
    """The policy's template makes its ids; the reward model renders the same dialogue with its
    own template, and plain text with none."""
    tokenizer.chat_template = TEMPLATE
    (plain,) = plain_prompts(tokenizer, ["storm?"])
    (chat,) = plain_prompts(tokenizer, ["storm?"], chat_template=True)
    chat = replace(chat, prompt_id="chat")
    assert plain.text == "storm?"
    assert chat.text == "<s><user>storm?\n<assistant>"
    done = go_round(pool, policy, [plain, chat], ModelReward(recorder), samples_per_prompt=2)
    rendered = make_tokenizer()
    for sample in done.samples:
        dialogue = f"[user] storm?</s>[assistant] {sample.response_text}</s>"
        text = dialogue if sample.prompt.messages else f"storm?{sample.response_text}</s>"
        (want,) = direct_scores(
            recorder_path(recorder), [rendered(text, add_special_tokens=False)["input_ids"]]
        )
        assert done.scores[sample.sample_id].value == pytest.approx(want, abs=1e-5)
    assert [bool(t.prompt.messages) for t in done.samples] == [True, True, False, False]


def recorder_path(recorder: Recorder) -> Path:
    return Path(recorder.model._network.config._name_or_path)


def test_text_crosses_to_the_reward_model_never_ids(
    reward_dir: Path, recorder: Recorder, tokenizer
) -> None:
    """The same text from other ids scores the same bit for bit; ids beyond the reward model's own
    vocabulary mean nothing to it."""
    whole = [int(i) for i in tokenizer("storm in Riverton")["input_ids"]]
    pieces = [int(i) for c in "storm in Riverton" for i in tokenizer(c)["input_ids"]]
    assert whole != pieces
    assert tokenizer.decode(whole) == tokenizer.decode(pieces) == "storm in Riverton"
    (prompt,) = plain_prompts(tokenizer, ["rain"])
    samples = [
        Trajectory(
            prompt=prompt,
            sample_index=index,
            response_ids=np.array(ids, np.int32),
            response_logprobs=np.zeros(len(ids), np.float32),
            policy_versions=np.zeros(len(ids), np.int32),
            response_text="storm in Riverton",
            finish_reason="length",
            seed=0,
        )
        for index, ids in enumerate([whole, pieces, [511, 510]])
    ]
    scores = ModelReward(recorder).score(samples)
    values = {score.value for score in scores if isinstance(score, Score)}
    assert len(scores) == 3
    assert len(values) == 1
    ids = [*make_tokenizer()("rainstorm in Riverton")["input_ids"], 257]
    assert values.pop() == pytest.approx(direct_scores(reward_dir, [ids])[0], abs=1e-5)


def test_padding_settings_of_a_tokenizer_change_no_score(reward_dir: Path, tmp_path: Path) -> None:
    """Pad equal to EOS, and padding on the left."""
    copy = Path(shutil.copytree(reward_dir, tmp_path / "copy"))
    changed = AutoTokenizer.from_pretrained(copy)
    changed.pad_token, changed.padding_side = changed.eos_token, "left"
    changed.save_pretrained(copy)
    items = [ScoreItem(prompt=text, response=" storm" * n) for n, text in enumerate(STRANGE)]
    assert (
        RewardModel.load(copy).score(items).scores
        == RewardModel.load(reward_dir).score(items).scores
    )
    one, other = (
        RewardModel.load(path, one_by_one=False).score(items).scores for path in (copy, reward_dir)
    )
    assert one == other


# --- a reward that is no number ------------------------------------------------------------------


def test_one_sample_with_nan_from_the_reward_is_set_aside_and_changes_nothing(
    pool: RolloutPool,
    policy: Path,
    recorder: Recorder,
    tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are, bit for bit, those of a step that never had this sample."""
    (tmp_path / "edge_rewards.py").write_text(
        "def picky(*, prompt, meta, **_):\n    return float('nan') if meta.get('bad') else 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = WeightedSum(
        [
            ("model", 1.0, ModelReward(recorder)),
            ("picky", 1.0, FunctionReward("edge_rewards:picky")),
        ]
    )
    good = plain_prompts(tokenizer, ["storm in Riverton", "rain", "the mayor"])
    bad = replace(good[0], prompt_id="bad", meta={"bad": True})
    done = go_round(pool, policy, [*good, bad], reward, samples_per_prompt=1)
    (failure,) = done.failures
    assert (failure.sample_id, failure.stage) == ("bad#0", "scoring")
    assert "term 'picky'" in failure.reason
    assert "NaN or infinity" in failure.reason
    assert done.metrics["ppo/samples"] == 3
    assert set(done.scores) == {"p0#0", "p1#0", "p2#0"}
    without = go_round(pool, policy, good, reward, samples_per_prompt=1)
    results = []
    for number, one in enumerate((done, without)):
        learners = in_process(PPO, policy)
        batch = build_batch(one.samples, [one.scores[t.sample_id] for t in one.samples], PPO)
        learners.update(batch)
        results.append(weights(learners, tmp_path / str(number)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
