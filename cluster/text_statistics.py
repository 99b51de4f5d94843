"""How varied a set of texts is: distinct-n, self-BLEU, repetition. Pure functions of strings.

All of them count *words* as ``words`` splits them, never a model's tokens, so that checkpoints
with different tokenizers compare. They still depend on how long and how many the texts are:
compare them between checkpoints on the same prompts, and read the length beside them.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

Words = tuple[str, ...]

# CJK ideographs and kana are written without spaces: each counts as a word of its own.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['’][^\W{_CJK}]+)*|[^\w\s]")

EPSILON = 0.1
"""Numerator of an n-gram precision without a match: smoothing method 1 of Chen & Cherry 2014."""


def words(text: str) -> Words:
    """Lower-cased words; a CJK character and a punctuation mark are each a word.

    >>> words("The Mayor's plan: 12 桥梁")
    ('the', "mayor's", 'plan', ':', '12', '桥', '梁')
    """
    return tuple(_WORD.findall(text.lower()))


def ngrams(sequence: Words, n: int) -> list[Words]:
    """All runs of ``n`` words, in order; none when there are fewer words."""
    return [sequence[i : i + n] for i in range(len(sequence) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts (Li et al. 2016), 0 when there are none."""
    seen: Counter[Words] = Counter()
    for text in texts:
        seen.update(ngrams(words(text), n))
    total = seen.total()
    return len(seen) / total if total else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that have stood in it before (seq-rep-n, Welleck et al. 2020).

    0 for a text without repeats or with fewer than ``n`` words.
    """
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(
    texts: Sequence[str], *, max_n: int = 4, max_texts: int = 500, seed: int = 0
) -> float | None:
    """Mean BLEU of each text against all the others (Zhu et al. 2018, Texygen): 1 says that all
    texts are the same, lower says more variety.

    BLEU is sentence-level BLEU-``max_n`` with uniform weights, clipped counts over the
    references, the brevity penalty of the reference nearest in length (the shorter on a tie) and
    Chen & Cherry's smoothing 1 (a precision without a match counts ``EPSILON`` matches; without
    a single common word BLEU is 0), as Texygen takes it from NLTK.

    Args:
        max_texts: A larger set is thinned to this many at random, as Texygen does.
        seed: Of that thinning.

    Returns:
        ``None`` with fewer than two texts.
    """
    corpus = [words(text) for text in texts]
    if len(corpus) > max_texts:
        corpus = random.Random(seed).sample(corpus, max_texts)
    if len(corpus) < 2:
        return None
    tables = [_TopCounts.of(corpus, n) for n in range(1, max_n + 1)]
    lengths = sorted(len(sequence) for sequence in corpus)
    scores = [_bleu(i, sequence, tables, lengths) for i, sequence in enumerate(corpus)]
    return sum(scores) / len(scores)


@dataclass
class _TopCounts:
    """For each n-gram the text that holds it most often and the two highest counts. With these
    the largest count among *the other* texts is known at once for every text, which makes
    self-BLEU linear in the number of texts instead of quadratic."""

    n: int
    best: dict[Words, tuple[int, int]] = field(default_factory=dict)  # n-gram -> text, its count
    second: dict[Words, int] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Sequence[Words], n: int) -> _TopCounts:
        table = cls(n)
        for index, sequence in enumerate(corpus):
            for gram, count in Counter(ngrams(sequence, n)).items():
                owner, most = table.best.get(gram, (-1, 0))
                if count > most:
                    table.best[gram] = (index, count)
                    if owner >= 0:
                        table.second[gram] = most
                elif count > table.second.get(gram, 0):
                    table.second[gram] = count
        return table

    def among_others(self, gram: Words, index: int) -> int:
        """Highest count of ``gram`` in any text but text ``index``."""
        owner, most = self.best[gram]
        return self.second.get(gram, 0) if owner == index else most


def _bleu(
    index: int, sequence: Words, tables: Sequence[_TopCounts], lengths: Sequence[int]
) -> float:
    """BLEU of text ``index`` against all the others. ``lengths`` is sorted and has its own."""
    log_precision = 0.0
    for table in tables:
        counts = Counter(ngrams(sequence, table.n))
        matches = sum(min(c, table.among_others(gram, index)) for gram, c in counts.items())
        if table.n == 1 and matches == 0:
            return 0.0
        total = max(1, counts.total())
        log_precision += math.log((matches or EPSILON) / total) / len(tables)
    nearest = _nearest_other(len(sequence), lengths)
    brevity = 1.0 if len(sequence) > nearest else math.exp(1 - nearest / len(sequence))
    return brevity * math.exp(log_precision)


def _nearest_other(length: int, lengths: Sequence[int]) -> int:
    """Length nearest to ``length`` when one occurrence of it is taken out of ``lengths``."""
    own = bisect_left(lengths, length)
    others = [lengths[i] for i in (own - 1, own + 1) if 0 <= i < len(lengths)]
    return min(others, key=lambda other: (abs(other - length), other))
