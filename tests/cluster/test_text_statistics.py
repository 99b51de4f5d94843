"""Diversity measures against numbers worked out by hand and a plain restatement of BLEU."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text_statistics import distinct_n, ngrams, repetition, self_bleu, words


def test_words_of_english_and_chinese() -> None:
    assert words("The Mayor's plan: 12, half-built!") == (
        "the", "mayor's", "plan", ":", "12", ",", "half", "-", "built", "!",
    )  # fmt: skip
    assert words("市长says桥梁2座。") == ("市", "长", "says", "桥", "梁", "2", "座", "。")
    assert words(" \n ") == ()


def test_distinct_n_by_hand() -> None:
    texts = ["a b a b", "a b c"]
    # unigrams: a b a b a b c -> 3 of 7; bigrams: ab ba ab | ab bc -> 3 of 5; trigrams: aba bab abc
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5)
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(["a", ""], 2) == 0.0


def test_repetition_by_hand() -> None:
    # 4-grams of "a b c d a b c d": abcd bcda cdab dabc abcd -> 4 different of 5
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c d e") == 0.0
    assert repetition("a b") == 0.0


def test_self_bleu_by_hand() -> None:
    # Each way: precisions 3/4, 2/3, 1/2 and, without a match, 0.1/1; equal lengths.
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(0.025**0.25)
    # The long text: 4/5 3/4 2/3 1/2, no penalty. The short one: all 1, penalty e^(1 - 5/4).
    assert self_bleu(["a b c d e", "a b c d"]) == pytest.approx((0.2**0.25 + math.exp(-0.25)) / 2)
    # Counts are clipped to the most that one reference has: "a a a" may match one a of "a b c".
    # p1 = 1/3, p2 = 0.1/2, p3 = 0.1/1, p4 = 0.1/1 (no 4-gram: the denominator is 1) both ways.
    assert self_bleu(["a a a", "a b c"]) == pytest.approx((1 / 3 * 0.05 * 0.1 * 0.1) ** 0.25)


def test_self_bleu_at_the_ends() -> None:
    assert self_bleu(["the same old text again"] * 4) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0
    assert self_bleu(["", ""]) == 0.0
    assert self_bleu(["alone"]) is None
    assert self_bleu([]) is None


def test_self_bleu_thins_a_large_set_repeatably() -> None:
    texts = [f"w{i % 7} w{i % 5} w{i % 3} w{i % 2} end" for i in range(60)]
    thinned = self_bleu(texts, max_texts=20, seed=3)
    assert thinned == self_bleu(texts, max_texts=20, seed=3)
    assert thinned != self_bleu(texts, max_texts=20, seed=4)


def plain_bleu(hypothesis: tuple[str, ...], references: list[tuple[str, ...]]) -> float:
    """BLEU-4 as Papineni et al. and Chen & Cherry's smoothing 1 put it, without any shortcut."""
    log_precision = 0.0
    for n in range(1, 5):
        counts = Counter(ngrams(hypothesis, n))
        matches = sum(
            min(count, max(ngrams(r, n).count(gram) for r in references))
            for gram, count in counts.items()
        )
        if n == 1 and matches == 0:
            return 0.0
        log_precision += 0.25 * math.log((matches or 0.1) / max(1, sum(counts.values())))
    nearest = min((len(r) for r in references), key=lambda r: (abs(r - len(hypothesis)), r))
    penalty = min(0.0, 1 - nearest / len(hypothesis))
    return math.exp(penalty + log_precision)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abcd ", max_size=16).map(lambda s: " ".join(s)), min_size=2, max_size=7))
def test_self_bleu_equals_the_plain_definition(texts: list[str]) -> None:
    corpus = [words(text) for text in texts]
    plain = [
        plain_bleu(text, [other for j, other in enumerate(corpus) if j != i])
        for i, text in enumerate(corpus)
    ]
    assert self_bleu(texts) == pytest.approx(sum(plain) / len(plain))
