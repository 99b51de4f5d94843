"""What our PPO sends to a reward server of another system, and what it takes for an answer.

Pure: a format turns items into a JSON body, and a JSON answer into the score of each item or the
reason why it has none. Texts are the rendered prompt followed by the response, as the policy's own
template wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_service.config import WireFormat
from reward_service.score import ScoreItem

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpokenFormat:
    """One format that we speak as a client.

    Attributes:
        path: Appended to the URL of the server's root; empty where the URL is the endpoint.
        write: (items, model or None) to a body.
        read: An answer and the number of items to the value of each; raises LookupError,
            TypeError or ValueError when it cannot be told which value is whose.
        most_items: Items that one request can carry, or ``None``.
    """

    path: str
    write: Callable[[Sequence[ScoreItem], str | None], Body]
    read: Callable[[Any, int], list[Value]]
    most_items: int | None = None


Value = float | str
"""The score of one item, or why it has none."""


def value_of(number: Any) -> Value:
    """A finite number as a score; anything else as the reason why it is none."""
    if number is None:
        return "the answer has no score for it"
    if isinstance(number, bool) or not isinstance(number, int | float):
        return f"its score is a {type(number).__name__}"
    try:
        score = float(number)
    except OverflowError:  # an integer of hundreds of digits
        return "its score is beyond all floating-point numbers"
    return score if math.isfinite(score) else f"its score is {score}"


def values_of(numbers: Any, count: int) -> list[Value]:
    """``count`` values in order. Raises ValueError when they are not as many as the items."""
    if not isinstance(numbers, list) or len(numbers) != count:
        raise ValueError(
            f"{len(numbers) if isinstance(numbers, list) else 'no list of'} scores for "
            f"{count} items"
        )
    return [value_of(number) for number in numbers]


def _read_row(row: Any, read: Callable[[Any], Any]) -> Value:
    try:
        return value_of(read(row))
    except (LookupError, TypeError) as error:
        return f"its part of the answer is malformed ({type(error).__name__}: {error})"


def _text(item: ScoreItem) -> str:
    if item.ids is not None or (item.messages and not item.prompt):
        raise ValueError("this wire format carries texts only: render the dialogue first")
    return item.prompt + item.response


def write_openrlhf(items: Sequence[ScoreItem], model: str | None) -> Body:
    body: Body = {
        "query": [_text(item) for item in items],
        "prompts": [item.prompt for item in items],
        "labels": [None] * len(items),
    }
    return body if model is None else body | {"model": model}


def read_openrlhf(answer: Any, count: int) -> list[Value]:
    # Servers of one request answer with numbers alone, newer ones also with scores and logs.
    rewards = answer["rewards"]
    return values_of([rewards] if not isinstance(rewards, list) else rewards, count)


def write_slime(items: Sequence[ScoreItem], model: str | None) -> Body:  # noqa: ARG001
    (item,) = items
    _text(item)
    return {"prompt": item.prompt, "response": item.response, "label": None}


def read_slime(answer: Any, count: int) -> list[Value]:
    return values_of([answer], count)


def write_vllm(items: Sequence[ScoreItem], model: str | None) -> Body:
    body: Body = {"input": [_text(item) for item in items], "use_activation": False}
    return body if model is None else body | {"model": model}


def read_vllm(answer: Any, count: int) -> list[Value]:
    return _by_index(answer["data"], count, lambda row: row["probs"][-1])


def write_vllm_score(items: Sequence[ScoreItem], model: str | None) -> Body:
    for item in items:
        _text(item)
    body: Body = {
        "queries": [item.prompt for item in items],
        "documents": [item.response for item in items],
        "use_activation": False,
    }
    return body if model is None else body | {"model": model}


def read_vllm_score(answer: Any, count: int) -> list[Value]:
    return _by_index(answer["data"], count, lambda row: row["score"])


def write_sglang(items: Sequence[ScoreItem], model: str | None) -> Body:
    body: Body = {"text": [_text(item) for item in items]}
    return body if model is None else body | {"model": model}


def read_sglang(answer: Any, count: int) -> list[Value]:
    rows = [answer] if isinstance(answer, dict) else answer
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"{len(rows) if isinstance(rows, list) else 'no'} rows for {count} items")
    return [_read_row(row, lambda row: row["embedding"][-1]) for row in rows]


def _by_index(rows: Any, count: int, read: Callable[[Any], Any]) -> list[Value]:
    """Values of rows that say which item they belong to; an item without a row has none."""
    found: dict[int, Any] = {}
    for row in rows:
        index = row["index"]
        if type(index) is not int or not 0 <= index < count or index in found:
            raise ValueError(f"a row of the answer has index {index!r}, of {count} items")
        found[index] = row
    if not found:
        raise ValueError(f"no rows for {count} items")
    return [_read_row(found[i], read) if i in found else value_of(None) for i in range(count)]


SPOKEN: Mapping[WireFormat, SpokenFormat] = {
    "openrlhf": SpokenFormat(path="", write=write_openrlhf, read=read_openrlhf),
    "slime": SpokenFormat(path="", write=write_slime, read=read_slime, most_items=1),
    "vllm": SpokenFormat(path="/classify", write=write_vllm, read=read_vllm),
    "vllm_score": SpokenFormat(path="/score", write=write_vllm_score, read=read_vllm_score),
    "sglang": SpokenFormat(path="/classify", write=write_sglang, read=read_sglang),
}
