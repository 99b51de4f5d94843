"""Comparisons made of demonstrations: length must not tell the real response from the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from transformers import AutoTokenizer

from actors.trajectory import Demonstration
from cluster.judgement import responses_within, swapped_responses
from cluster.stages import Workplace


def demonstration(name: str, response: str) -> Demonstration:
    return Demonstration(example_id=name, prompt=f"{name}:", response=response)


def test_responses_of_neighbours_in_length_are_swapped() -> None:
    given = [
        demonstration("long", "x" * 90),
        demonstration("short", "y" * 10),
        demonstration("longer", "z" * 95),
        demonstration("shorter", "w" * 8),
        demonstration("alone", "v" * 500),  # the odd one out has nobody to swap with
    ]
    swapped = {d.example_id: other for d, other in swapped_responses(given)}
    assert swapped == {
        "long": "z" * 95,
        "longer": "x" * 90,
        "short": "w" * 8,
        "shorter": "y" * 10,
    }


def test_two_equal_responses_make_no_comparison() -> None:
    assert list(swapped_responses([demonstration("a", "same"), demonstration("b", "same")])) == []


def test_only_what_the_policy_has_room_to_write_is_compared(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["a", "some words", "a good many words more than that, and then some of them again"]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert lengths == sorted(set(lengths))
    limit = lengths[1] + 1  # room for the second and its end, not for the third
    config = SimpleNamespace(
        policy_model=tiny_llama, sampling=SimpleNamespace(max_new_tokens=limit)
    )
    work = cast(Workplace, SimpleNamespace(config=config))
    kept = responses_within(work, [demonstration(str(i), text) for i, text in enumerate(texts)])
    assert [d.example_id for d in kept] == ["0", "1"]
