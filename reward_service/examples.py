"""Reward functions to start from, usable as they are: ``reward_service.examples:<name>``."""

from __future__ import annotations

import itertools
import statistics
from typing import Any


def length_and_diversity(*, response: str, response_ids: list[int], **_: Any) -> float:
    """0.1 x characters of the text + 0.1 x (population) standard deviation of its token ids.

    The reward of the article that this project began with. It is easily hacked: any long text
    does well, and the spread of token *ids* says nothing about the diversity of words.
    """
    return 0.1 * len(response) + 0.1 * statistics.pstdev(response_ids)


def new_words(*, response_ids: list[int], **_: Any) -> list[float]:
    """Per-token: 1 / R for a token that has not occurred before in the response, else 0.

    Their sum is the share of distinct tokens, and each token is paid where it is earned.
    """
    seen: set[int] = set()
    rewards = []
    for token in response_ids:
        rewards.append(0.0 if token in seen else 1.0 / len(response_ids))
        seen.add(token)
    return rewards


def story_quality(*, response: str, **_: Any) -> float:
    """How well a short story is told, 0 to 1: direct speech, variety, and a proper end.

    One third each for: at least one closed pair of quotation marks; the share of distinct word
    pairs among all; ending with a full stop, question or exclamation mark or a closing quote.
    """
    words = response.lower().split()
    pairs = list(itertools.pairwise(words))
    speech = min(1.0, response.count('"') // 2)
    variety = len(set(pairs)) / len(pairs) if pairs else 0.0
    ends = 1.0 if response.rstrip().endswith((".", "!", "?", '"')) else 0.0
    return (speech + variety + ends) / 3
