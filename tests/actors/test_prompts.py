"""Prompts to token ids, the resumable stream, and the tokenizer's fingerprint."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import DataConfig
from actors.datasets import RawPrompt
from actors.fingerprint import template_fingerprint
from actors.prompts import PromptStream, render_prompt, tokenize_prompts
from actors.trajectory import Message, Prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(*, adds: str = "", template: str | None = None) -> Any:
    """A byte-level tokenizer of 256 bytes, ``<s>`` = 256, ``</s>`` = 257, ``<pad>`` = 258.

    ``adds`` names the special tokens that it adds by itself, "<s>" or "<s> </s>".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    vocab |= {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        before, _, after = f"{adds} ".partition(" ")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def ids_of(tokenizer: Any, text: str, **config: Any) -> list[int]:
    (prompt,) = tokenize_prompts(
        [RawPrompt(prompt_id="x", text=text)], tokenizer, DataConfig(**config)
    )
    assert prompt.token_ids.dtype == np.int32
    return prompt.token_ids.tolist()


# --- token ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adds", "text", "expected"),
    [
        ("", "ab", "ab"),
        ("<s>", "ab", "<s>ab"),
        ("<s> </s>", "ab", "<s>ab"),  # a trailing EOS would end the text before it began
        ("<s>", "<s>ab", "<s>ab"),  # the text spelt BOS out: not doubled
        ("<s>", "", "<s>"),  # generation from nothing
        ("<s> </s>", "", "<s>"),
        ("<s>", "a<s>b", "<s>a<s>b"),
    ],
)
def test_special_tokens_of_a_plain_prompt(adds: str, text: str, expected: str) -> None:
    tokenizer = make_tokenizer(adds=adds)
    assert ids_of(tokenizer, text) == make_tokenizer()(expected)["input_ids"]


def test_text_and_meta_are_kept() -> None:
    raw = RawPrompt(prompt_id="x", text="Storm\n", meta={"place": "Dover"})
    (prompt,) = tokenize_prompts([raw], make_tokenizer(adds="<s>"), DataConfig())
    assert (prompt.prompt_id, prompt.text, prompt.meta) == ("x", "Storm\n", {"place": "Dover"})
    assert prompt.messages == ()


@pytest.mark.parametrize("adds", ["", "<s>", "<s> </s>"])
def test_a_dialogue_gets_bos_once_and_from_its_template(adds: str) -> None:
    tokenizer = make_tokenizer(adds=adds, template=TEMPLATE)
    messages = (Message(role="system", content="S"), Message(role="user", content="U"))
    raw = RawPrompt(prompt_id="x", messages=messages)
    assert render_prompt(raw, tokenizer) == "<s><system>S\n<user>U\n<assistant>"
    (prompt,) = tokenize_prompts([raw], tokenizer, DataConfig())
    plain = make_tokenizer()("<s><system>S\n<user>U\n<assistant>")["input_ids"]
    assert prompt.token_ids.tolist() == plain
    assert prompt.token_ids.tolist().count(256) == 1
    assert prompt.text == "<s><system>S\n<user>U\n<assistant>"
    assert prompt.messages == messages


def test_a_text_prompt_becomes_a_users_turn() -> None:
    tokenizer = make_tokenizer(adds="<s>", template=TEMPLATE)
    raw = RawPrompt(prompt_id="x", text="U")
    assert render_prompt(raw, tokenizer) == "U"
    (prompt,) = tokenize_prompts([raw], tokenizer, DataConfig(chat_template=True))
    assert prompt.text == "<s><user>U\n<assistant>"
    assert prompt.messages == ({"role": "user", "content": "U"},)


def test_dialogues_that_cannot_be_rendered_are_refused() -> None:
    raw = RawPrompt(prompt_id="d7", messages=(Message(role="tool", content="T"),))
    with pytest.raises(ValueError, match=r"'d7' is a dialogue but the tokenizer has no chat templ"):
        tokenize_prompts([raw], make_tokenizer(), DataConfig())
    with pytest.raises(ValueError, match=r"'d7': the chat template refuses .*no tools here"):
        tokenize_prompts([raw], make_tokenizer(template=TEMPLATE), DataConfig())


# --- prompts that are too long -----------------------------------------------------------------

LONG = [
    RawPrompt(prompt_id="short", text="abc"),
    RawPrompt(prompt_id="long", text="abcdefgh"),
]


def test_an_overlong_prompt_is_an_error_by_default() -> None:
    with pytest.raises(ValueError, match=r"'long' has 9 tokens, data\.max_prompt_tokens is 5: "):
        tokenize_prompts(LONG, make_tokenizer(adds="<s>"), DataConfig(max_prompt_tokens=5))
    fits = DataConfig(max_prompt_tokens=9)
    assert len(tokenize_prompts(LONG, make_tokenizer(adds="<s>"), fits)) == 2


def test_overlong_prompts_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(max_prompt_tokens=5, overlong_prompts="skip")
    with caplog.at_level(logging.WARNING):
        prompts = tokenize_prompts(LONG, make_tokenizer(adds="<s>"), config)
    assert [p.prompt_id for p in prompts] == ["short"]
    assert "1 of 2 prompts have more than 5 tokens: skipped" in caplog.text
    none_fits = DataConfig(max_prompt_tokens=2, overlong_prompts="skip")
    with pytest.raises(ValueError, match="no prompt is left of 2: 2 have more than"):
        tokenize_prompts(LONG, make_tokenizer(adds="<s>"), none_fits)


@pytest.mark.parametrize(("adds", "kept"), [("<s>", "efgh"), ("", "defgh")])
def test_overlong_prompts_can_be_cut_at_the_left(
    adds: str, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(max_prompt_tokens=5, overlong_prompts="truncate_left")
    with caplog.at_level(logging.WARNING):
        short, long = tokenize_prompts(LONG, make_tokenizer(adds=adds), config)
    assert short.text == "abc"
    assert long.text == kept
    assert long.token_ids.tolist() == make_tokenizer()(adds + kept)["input_ids"]
    assert "1 of 2 prompts have more than 5 tokens: cut at the left" in caplog.text


def test_ids_are_unique_and_a_prompt_has_tokens() -> None:
    with pytest.raises(ValueError, match="'short' occurs twice"):
        tokenize_prompts([LONG[0], LONG[0]], make_tokenizer(), DataConfig())
    with pytest.raises(ValueError, match="prompt 'e' has no tokens"):
        tokenize_prompts([RawPrompt(prompt_id="e", text="")], make_tokenizer(), DataConfig())
    with pytest.raises(ValueError, match="no prompt is left of 0"):
        tokenize_prompts([], make_tokenizer(), DataConfig())


def test_real_dialogues_through_a_template(shared_data: Path) -> None:
    from actors.datasets import load_prompts

    source = str(shared_data / "pref_hh_harmless" / "train.jsonl.gz")
    raw = load_prompts(source, DataConfig(limit=50))
    config = DataConfig(max_prompt_tokens=200, overlong_prompts="truncate_left")
    tokenizer = make_tokenizer(adds="<s>", template=TEMPLATE)
    for prompt in tokenize_prompts(raw, tokenizer, config):
        assert len(prompt.token_ids) <= 200
        assert prompt.token_ids[0] == 256
        assert prompt.text.endswith("\n<assistant>")


# --- the stream --------------------------------------------------------------------------------


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=str(i), token_ids=np.array([i + 1], np.int32), text="")
        for i in range(count)
    ]


def ids_of_batch(stream: PromptStream, step: int) -> list[str]:
    return [prompt.prompt_id for prompt in stream.batch(step)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_prompt_once_per_epoch_and_never_twice_in_a_batch(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    per_step = data.draw(st.integers(1, count))
    stream = PromptStream(make_prompts(count), per_step, data.draw(st.integers(0, 5)))
    flat: list[str] = []
    for step in range(5 * count // per_step + 2):
        batch = ids_of_batch(stream, step)
        assert len(set(batch)) == len(batch) == per_step
        flat += batch
    for start in range(0, len(flat) - count + 1, count):
        assert len(set(flat[start : start + count])) == count


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 30),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=8),
)
def test_a_batch_depends_on_its_step_alone(
    count: int, share: float, seed: int, steps: list[int]
) -> None:
    """Asked in any order, by a stream that has seen others or none: resuming is free."""
    per_step = max(1, int(share * count))
    prompts = make_prompts(count)
    used = PromptStream(prompts, per_step, seed)
    for step in steps:
        assert ids_of_batch(used, step) == ids_of_batch(PromptStream(prompts, per_step, seed), step)


def test_replacements_are_a_sequence_of_the_step_and_leave_the_batches_alone() -> None:
    """In pieces or at once, by a fresh stream or a used one: every other prompt, once."""
    prompts = make_prompts(20)
    used = PromptStream(prompts, 6, seed=3)
    batches = [ids_of_batch(used, step) for step in range(9)]
    for step in (7, 2):
        whole = [p.prompt_id for p in PromptStream(prompts, 6, seed=3).replacements(step, 0, 99)]
        assert sorted(whole + batches[step]) == sorted(p.prompt_id for p in prompts)
        parts = [used.replacements(step, start, count) for start, count in ((0, 5), (5, 2), (7, 9))]
        assert [p.prompt_id for part in parts for p in part] == whole
        assert used.replacements(step, 14, 3) == []
    assert [ids_of_batch(used, step) for step in range(9)] == batches
    orders = {tuple(p.prompt_id for p in used.replacements(s, 0, 9)) for s in range(9)}
    assert len(orders) == 9


def test_epochs_are_shuffled_differently_and_by_the_seed() -> None:
    prompts = make_prompts(50)
    stream = PromptStream(prompts, 50, seed=0)
    orders = [tuple(ids_of_batch(stream, step)) for step in range(3)]
    assert len(set(orders)) == 3
    assert orders[0] != tuple(str(i) for i in range(50))
    assert tuple(ids_of_batch(PromptStream(prompts, 50, seed=1), 0)) != orders[0]


def test_order_of_a_small_stream_is_the_same_on_every_machine() -> None:
    stream = PromptStream(make_prompts(5), 2, seed=0)
    assert [ids_of_batch(stream, step) for step in range(5)] == [
        ["4", "2"],
        ["1", "3"],
        ["0", "3"],
        ["4", "1"],
        ["0", "2"],
    ]


def test_the_shuffle_is_fair() -> None:
    """Amending an epoch's head must not favour any prompt: each is first about equally often."""
    firsts: Counter[str] = Counter()
    for seed in range(900):
        firsts[ids_of_batch(PromptStream(make_prompts(3), 2, seed), 3)[0]] += 1
    assert sum(firsts.values()) == 900
    assert all(240 < count < 360 for count in firsts.values())


@pytest.mark.parametrize(("count", "per_step"), [(3, 4), (3, 0), (0, 1)])
def test_impossible_batches_are_refused(count: int, per_step: int) -> None:
    with pytest.raises(ValueError, match=f"prompts_per_step is {per_step} but there are {count}"):
        PromptStream(make_prompts(count), per_step, 0)
    with pytest.raises(ValueError, match="steps count from 0"):
        PromptStream(make_prompts(3), 1, 0).batch(-1)


# --- fingerprint -------------------------------------------------------------------------------


def test_the_fingerprint_survives_saving_and_use(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(adds="<s>", template=TEMPLATE)
    first = template_fingerprint(tokenizer)
    assert len(first) == 64
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.pad_token = tokenizer.eos_token
    assert template_fingerprint(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    assert template_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == first


def test_the_fingerprint_sees_what_changes_ids() -> None:
    variants = [
        make_tokenizer(),
        make_tokenizer(adds="<s>"),
        make_tokenizer(adds="<s> </s>"),
        make_tokenizer(template=TEMPLATE),
        make_tokenizer(template=TEMPLATE + " "),
        make_tokenizer(),
        make_tokenizer(),
    ]
    variants[-1].eos_token = "<pad>"
    variants[-2].add_tokens(["storm"])
    assert len({template_fingerprint(tokenizer) for tokenizer in variants}) == len(variants)


def test_fingerprint_of_a_real_tokenizer(shared_data: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    paths = [shared_data / "model_stories260k", tiny_llama]
    prints = [template_fingerprint(AutoTokenizer.from_pretrained(path)) for path in paths]
    assert prints[0] != prints[1]
