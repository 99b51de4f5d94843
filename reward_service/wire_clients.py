"""What our PPO sends to a reward server of another system, and what it takes for an answer.

Pure: a format turns items into a JSON body and a JSON answer into scores. Texts are the rendered
prompt followed by the response, as the policy's own template wrote it.
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
        read: An answer and the number of items to scores; raises LookupError, TypeError or
            ValueError for what is no answer.
        most_items: Items that one request can carry, or ``None``.
    """

    path: str
    write: Callable[[Sequence[ScoreItem], str | None], Body]
    read: Callable[[Any, int], list[float]]
    most_items: int | None = None


def scores_of(numbers: Any, count: int) -> list[float]:
    """``count`` finite numbers. Raises ValueError or TypeError for anything else."""
    if not isinstance(numbers, list) or len(numbers) != count:
        raise ValueError(
            f"{len(numbers) if isinstance(numbers, list) else 'no list of'} scores for "
            f"{count} items"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"a score is a {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"a score is {number}")
    return [float(number) for number in numbers]


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


def read_openrlhf(answer: Any, count: int) -> list[float]:
    # Servers of one request answer with numbers alone, newer ones also with scores and logs.
    rewards = answer["rewards"]
    return scores_of([rewards] if not isinstance(rewards, list) else rewards, count)


def write_slime(items: Sequence[ScoreItem], model: str | None) -> Body:  # noqa: ARG001
    (item,) = items
    _text(item)
    return {"prompt": item.prompt, "response": item.response, "label": None}


def read_slime(answer: Any, count: int) -> list[float]:
    return scores_of([answer], count)


def write_vllm(items: Sequence[ScoreItem], model: str | None) -> Body:
    body: Body = {"input": [_text(item) for item in items], "use_activation": False}
    return body if model is None else body | {"model": model}


def read_vllm(answer: Any, count: int) -> list[float]:
    return scores_of([row["probs"][-1] for row in _in_order(answer["data"])], count)


def write_vllm_score(items: Sequence[ScoreItem], model: str | None) -> Body:
    for item in items:
        _text(item)
    body: Body = {
        "queries": [item.prompt for item in items],
        "documents": [item.response for item in items],
        "use_activation": False,
    }
    return body if model is None else body | {"model": model}


def read_vllm_score(answer: Any, count: int) -> list[float]:
    return scores_of([row["score"] for row in _in_order(answer["data"])], count)


def write_sglang(items: Sequence[ScoreItem], model: str | None) -> Body:
    body: Body = {"text": [_text(item) for item in items]}
    return body if model is None else body | {"model": model}


def read_sglang(answer: Any, count: int) -> list[float]:
    rows = [answer] if isinstance(answer, dict) else answer
    return scores_of([row["embedding"][-1] for row in rows], count)


def _in_order(rows: Any) -> list[Any]:
    ordered = sorted(rows, key=lambda row: int(row["index"]))
    if [row["index"] for row in ordered] != list(range(len(ordered))):
        raise ValueError("the indices of the answer are not 0, 1, 2, ...")
    return ordered


SPOKEN: Mapping[WireFormat, SpokenFormat] = {
    "openrlhf": SpokenFormat(path="", write=write_openrlhf, read=read_openrlhf),
    "slime": SpokenFormat(path="", write=write_slime, read=read_slime, most_items=1),
    "vllm": SpokenFormat(path="/classify", write=write_vllm, read=read_vllm),
    "vllm_score": SpokenFormat(path="/score", write=write_vllm_score, read=read_vllm_score),
    "sglang": SpokenFormat(path="/classify", write=write_sglang, read=read_sglang),
}
