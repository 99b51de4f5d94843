"""Supervised fine-tuning: which tokens are trained, and that they are what a rollout sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config import DataConfig
from actors.datasets import RawPrompt
from actors.prompts import tokenize_prompts
from actors.trajectory import Demonstration, Message
from learner.config import OptimizerConfig, SFTConfig
from learner.sft import Example, ResponseLoss, encode_demonstration, train_sft
from learner.stage import REPORT_FILE
from learner.supervised import Interrupted
from learner.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TURNS_END_WITH_EOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CORPUS = ["storm hits Riverton", "the mayor of Riverton speaks", "rain stops, river falls"] * 20


def demonstrations(count: int = 200) -> list[Demonstration]:
    """The response repeats the prompt's last word, three times."""
    words = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor"]
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        a, b = (words[k] for k in rng.integers(8, size=2))
        made.append(
            Demonstration(example_id=str(i), prompt=f"{i}: {a} {b}", response=f" {b} {b} {b}")
        )
    return made


def config(**values: Any) -> SFTConfig:
    loop = {"tokens_per_step": 512, "tokens_per_micro_batch": 512, "threads": 1, "epochs": 8}
    optimizer = OptimizerConfig(learning_rate=5e-3)
    return SFTConfig.model_validate({**loop, "optimizer": optimizer, **values})


def ids_of(example: Example) -> tuple[list[int], list[int]]:
    ids = example.ids.tolist()
    return ids[: example.prompt_length], ids[example.prompt_length :]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, 320, context=64)


@pytest.fixture(scope="module")
def stories_tokenizer(shared_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared_data / "model_stories260k")


# --- ids ---------------------------------------------------------------------------------------


def rollout_prompt_ids(tokenizer: Any, prompt: RawPrompt) -> list[int]:
    [made] = tokenize_prompts([prompt], tokenizer, DataConfig())
    return made.token_ids.tolist()


@pytest.mark.parametrize("prompt", ["storm hits\n", "storm", "</s>", "<s>storm", "the mayor "])
def test_prompt_ids_are_those_of_a_rollout(tokenizer: Any, prompt: str) -> None:
    example = encode_demonstration(tokenizer, prompt, (), "rain", frozenset({2}))
    raw = RawPrompt(prompt_id="x", text=prompt, messages=(), meta={})
    assert ids_of(example)[0] == rollout_prompt_ids(tokenizer, raw)


def test_the_response_decodes_to_itself_and_ends_once(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    for prompt, response in [("storm\n", "rain stops"), ("a", " b"), ("Ri", "verton"), ("x", "")]:
        example = encode_demonstration(tokenizer, prompt, (), response, frozenset({eos}))
        assert example.ids.tolist().count(eos) == 1
        assert example.ids[-1] == eos
        assert tokenizer.decode(ids_of(example)[1][:-1]) == response


def test_an_eos_that_the_text_spells_out_is_not_doubled(tokenizer: Any) -> None:
    example = encode_demonstration(tokenizer, "storm", (), " rain</s>", frozenset({2}))
    assert example.ids.tolist().count(2) == 1


def test_a_token_across_the_border_is_not_trained(tokenizer: Any) -> None:
    """ "Riverton" is one token, but a rollout that continues "River" can only write "ton"."""
    whole = tokenizer(" Riverton", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1
    example = encode_demonstration(tokenizer, "hits River", (), "ton", frozenset({2}))
    raw = RawPrompt(prompt_id="x", text="hits River", messages=(), meta={})
    assert ids_of(example)[0] == rollout_prompt_ids(tokenizer, raw)
    assert whole[0] not in example.ids
    assert tokenizer.decode(ids_of(example)[1][:-1]) == "ton"


def test_a_tokenizer_that_prepends_spaces_adds_none_to_the_response(stories_tokenizer: Any) -> None:
    example = encode_demonstration(
        stories_tokenizer, "Once upon a ti", (), "me there was", frozenset({1, 2})
    )
    prompt, response = ids_of(example)
    assert prompt[0] == stories_tokenizer.bos_token_id
    assert response[-1] == 2
    assert stories_tokenizer.decode([*prompt[1:], *response[:-1]]) == "Once upon a time there was"


@pytest.mark.parametrize("template", [CHATML, TURNS_END_WITH_EOS])
def test_a_dialogue_is_the_template_up_to_the_end_of_the_turn(template: str) -> None:
    tokenizer = train_tokenizer(CORPUS, 330, context=64, chat_template=template)
    messages = (Message(role="user", content="storm?"),)
    example = encode_demonstration(tokenizer, "", messages, "rain", frozenset({2}))
    raw = RawPrompt(prompt_id="x", text="", messages=messages, meta={})
    prompt, response = ids_of(example)
    assert prompt == rollout_prompt_ids(tokenizer, raw)
    assert response.count(2) == 1
    assert response[-1] == 2
    text = tokenizer.decode(response[:-1])
    assert text == ("rain<|end|>\n" if template is CHATML else " rain")


def test_another_eos_at_the_end_of_a_turn_is_the_one_trained() -> None:
    """Chat models often end turns with a second EOS that only generation_config knows."""
    tokenizer = train_tokenizer(CORPUS, 330, context=64, chat_template=CHATML)
    turn_end = tokenizer.convert_tokens_to_ids("<|end|>")
    messages = (Message(role="user", content="storm?"),)
    example = encode_demonstration(tokenizer, "", messages, "rain", frozenset({2, turn_end}))
    _, response = ids_of(example)
    assert response[-1] == turn_end
    assert 2 not in response


def test_a_dialogue_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_demonstration(
            tokenizer, "", (Message(role="user", content="x"),), "y", frozenset({2})
        )


# --- loss --------------------------------------------------------------------------------------


def test_only_responses_and_eos_are_trained(tiny_llama: Path) -> None:
    """Against transformers' loss on full logits with -100 on prompts and pads."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rng = np.random.default_rng(0)
    examples = [
        Example(ids=rng.integers(3, 500, n).astype(np.int32), prompt_length=p)
        for n, p in [(9, 4), (5, 1), (12, 11)]
    ]
    objective = ResponseLoss(examples)
    loss, _ = objective.loss(model, np.arange(3))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ids, labels = torch.zeros(3, 12, dtype=torch.long), torch.full((3, 12), -100)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.from_numpy(e.ids.astype(np.int64))
        labels[row, e.prompt_length : len(e.ids)] = ids[row, e.prompt_length : len(e.ids)]
    trained = (9 - 4) + (5 - 1) + (12 - 11)
    mask = (torch.arange(12)[None] < torch.tensor([[9], [5], [12]])).long()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss * trained
    expected.backward()
    assert objective.weight(np.arange(3)) == trained
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


# --- the stage ---------------------------------------------------------------------------------


def test_it_learns_the_responses(tiny_llama: Path, tmp_path: Path) -> None:
    report = train_sft(config(epochs=30), demonstrations(), tiny_llama, tmp_path, seed=0)
    assert report.demonstrations == 190
    assert report.held_out_demonstrations == 10
    # Random guessing costs ln 512 = 6.2; the last two words and EOS are certain, the first is not.
    assert report.held_out_nll < 1.5
    assert json.loads((tmp_path / REPORT_FILE).read_text())["training"]["steps"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("7: storm rain", return_tensors="pt")["input_ids"]
    out = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    assert out[-1] == tokenizer.eos_token_id
    first, second, third = tokenizer.decode(out[:-1]).split()
    assert first == second == third


def test_interrupted_fine_tuning_ends_with_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    train_sft(config(epochs=2), demonstrations(), tiny_llama, tmp_path / "whole", seed=0)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        train_sft(config(epochs=2), demonstrations(), tiny_llama, tmp_path / "parts", seed=0,
                  should_stop=lambda: next(asked))  # fmt: skip
    train_sft(
        config(epochs=2), demonstrations(), tiny_llama, tmp_path / "parts", seed=0, resume=True
    )
    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_held_out_prompts_are_not_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    """Four responses to each of two prompts: one prompt with all of its responses is held out."""
    made = [
        Demonstration(example_id=str(i), prompt=f"prompt {i % 2}", response=f" {i}")
        for i in range(8)
    ]
    report = train_sft(config(epochs=1), made, tiny_llama, tmp_path, seed=0)
    assert (report.demonstrations, report.held_out_demonstrations) == (4, 4)


def test_overlong_demonstrations(tiny_llama: Path, tmp_path: Path,
                                 caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    long = Demonstration(example_id="long one", prompt="a", response="storm 12 " * 200)
    made = [*demonstrations(20), long]
    report = train_sft(config(epochs=1), made, tiny_llama, tmp_path, seed=0)
    assert report.skipped == 1
    assert "1 of 21 demonstrations are longer than the context of 256 tokens" in caplog.text
    with pytest.raises(ValueError, match="the first is 'long one' with"):
        train_sft(config(overlong="error"), made, tiny_llama, tmp_path, seed=0)
    with pytest.raises(ValueError, match="2 of 2 demonstrations are longer"):
        train_sft(config(), [long, long], tiny_llama, tmp_path, seed=0)


def test_no_demonstrations(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 0 demonstrations"):
        train_sft(config(), [], tiny_llama, tmp_path, seed=0)


def test_a_model_of_another_kind_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForMaskedLM(BertConfig(vocab_size=512, intermediate_size=16, **shape))
    for name, model in (("LlamaForSequenceClassification", classifier), ("BertForMaskedLM", bert)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"holds {name}, but a causal language model"):
            train_sft(config(), demonstrations(4), tmp_path / name, tmp_path / "out", seed=0)


def test_broken_directories_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_llama, tmp_path / name))

    def message(directory: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            train_sft(config(), demonstrations(4), directory, tmp_path / "out", seed=0)
        assert str(directory) in str(caught.value)
        return str(caught.value)

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "no .safetensors weights" in message(pickled)
    unclear = copy("unclear")
    (unclear / "config.json").write_text('{"model_type": "nonsense"}')
    assert "configuration cannot be read" in message(unclear)
    mute = copy("mute")
    (mute / "tokenizer.json").unlink()
    assert "no tokenizer could be loaded" in message(mute)
    other = copy("other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    assert "weights of LlamaForCausalLM are missing" in message(other)
    small = copy("small")
    train_tokenizer([f"{a}{b}{c} w{a}{b}" for a in "abcdefgh" for b in "xyzuvw" for c in "klmn"],
                    600, context=64).save_pretrained(small)  # fmt: skip
    assert "tokens but the model has only 512 embeddings" in message(small)


def test_real_model(shared_data: Path, tmp_path: Path) -> None:
    base = shared_data / "model_stories260k"
    made = [
        Demonstration(example_id=str(i), prompt=f"Once there was a cat number {i}.",
                      response=" The cat was happy.")
        for i in range(60)
    ]  # fmt: skip
    report = train_sft(
        config(epochs=15, optimizer=OptimizerConfig(learning_rate=1e-3)), made, base, tmp_path,
        seed=0,
    )  # fmt: skip
    assert report.held_out_nll < 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [2, 1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("Once there was a cat number 99.", return_tensors="pt")["input_ids"]
    out = model.generate(prompt, do_sample=False, max_new_tokens=30)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text == "Once there was a cat number 99. The cat was happy."
