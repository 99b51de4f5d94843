"""What a reward model sees of a prompt and a response."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.fingerprint import template_fingerprint
from actors.trajectory import Message
from reward_service.encoding import RewardHead, encode, encode_text

TURNS = (Message(role="user", content="storm?"),)


@pytest.fixture
def tokenizer(reward_dir: Path):
    return AutoTokenizer.from_pretrained(reward_dir)


def test_plain_text_ends_in_exactly_one_eos(tokenizer) -> None:
    ids = encode(tokenizer, "storm in", (), " Riverton")
    assert ids == [*tokenizer("storm in Riverton")["input_ids"], tokenizer.eos_token_id]
    assert encode(tokenizer, "storm in", (), " Riverton</s>") == ids
    assert encode(tokenizer, "", (), "") == [tokenizer.eos_token_id]


def test_a_dialogue_goes_through_the_template(tokenizer) -> None:
    ids = encode(tokenizer, "ignored", TURNS, "rain")
    text = "<s>user\nstorm?</s>\n<s>assistant\nrain</s>"
    # the template's line break after the last turn is dropped: the score is read at EOS
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id


def test_a_dialogue_that_a_client_rendered_is_the_same(tokenizer) -> None:
    rendered = "<s>user\nstorm?</s>\n<s>assistant\nrain</s>\n"
    assert encode(tokenizer, "", (), rendered) == encode(tokenizer, "", TURNS, "rain")


def test_where_the_response_begins(tokenizer) -> None:
    plain = encode_text(tokenizer, "storm in", (), " Riverton")
    assert tokenizer.decode(plain.ids[plain.response_start :]) == " Riverton</s>"
    dialogue = encode_text(tokenizer, "", TURNS, "rain")
    assert tokenizer.decode(dialogue.ids[dialogue.response_start :]) == "rain</s>"
    cut = encode_text(tokenizer, "storm in", (), " Riverton", max_tokens=3, truncation="left")
    assert cut.response_start == max(0, plain.response_start - (len(plain) - 3))
    assert (
        encode_text(tokenizer, "storm", (), "").response_start
        == len(encode_text(tokenizer, "storm", (), "")) - 1
    )


def test_a_dialogue_needs_a_template_that_takes_it(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ValueError, match="refuses the dialogue: only one turn"):
        encode(tokenizer, "", TURNS, "rain")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode(tokenizer, "", TURNS, "rain")


def test_too_long_is_an_error_unless_cut_on_the_left(tokenizer) -> None:
    ids = encode(tokenizer, "storm rain river mayor", (), " bank")
    with pytest.raises(ValueError, match=f"have {len(ids)} tokens.*context is 5"):
        encode(tokenizer, "storm rain river mayor", (), " bank", max_tokens=5)
    cut = encode(tokenizer, "storm rain river mayor", (), " bank", max_tokens=5, truncation="left")
    assert cut == ids[-5:]
    dialogue = encode(tokenizer, "", TURNS, "rain")
    cut = encode(tokenizer, "", TURNS, "rain", max_tokens=4, truncation="left")
    assert cut == [tokenizer.bos_token_id, *dialogue[-3:]]


def test_a_tokenizer_without_eos_is_refused(tokenizer) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        encode(tokenizer, "a", (), "b")


def test_the_fingerprint_survives_saving_and_sees_every_change(tokenizer, tmp_path: Path) -> None:
    fingerprint = template_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert template_fingerprint(again) == fingerprint
    again("padded", padding="max_length", max_length=20, truncation=True)
    assert template_fingerprint(again) == fingerprint
    again.chat_template += " "
    assert template_fingerprint(again) != fingerprint
    tokenizer.add_tokens(["<new>"])
    assert template_fingerprint(tokenizer) != fingerprint


def test_a_damaged_head_names_file_and_field(tmp_path: Path) -> None:
    head = RewardHead(gain=2.0, bias=-1.0, fingerprint="f", info={"accuracy": 0.7})
    head.save(tmp_path)
    assert RewardHead.load(tmp_path) == head
    (tmp_path / "reward_head.json").write_text('{"gain": "much", "bias": 0, "fingerprint": "f"}')
    with pytest.raises(ValueError, match=r"reward_head.json: gain: Input should be a valid number"):
        RewardHead.load(tmp_path)
