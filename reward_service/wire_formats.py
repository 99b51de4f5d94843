"""What other systems' reward clients send and expect, as pure translations to and from ours.

    OpenRLHF         POST /get_reward     --remote_rm_url
    slime            POST /remote_rm      --rm-url
    verl with vLLM   POST /classify       as vLLM answers
    verl with SGLang POST /v1/embeddings  as SGLang answers
    SGLang's own     POST /classify       {"text": ...}
    vLLM             POST /score

``SERVED`` are the formats that our server speaks; ``reward_service.wire_clients`` has those that
our own PPO speaks to other servers. None of these formats can say that one item of several could
not be scored, so a request with such an item is refused as a whole, with the reason; and none
can choose a truncation, so the oldest tokens are dropped unless the URL says
``?truncation=error``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from actors.trajectory import Message
from reward_service.http_bodies import MessageIn, TokenId
from reward_service.score import ItemIds, ModelScores, ScoreItem


@dataclass(frozen=True, kw_only=True, slots=True)
class WireRequest:
    """A request of any format.

    Attributes:
        model: What the client calls the model, often a path of its own machine.
        single: It sent one text where it may send a list, which some formats answer otherwise.
        sigmoid: It expects probabilities, not raw scores.
    """

    items: tuple[ScoreItem, ...]
    model: str | None = None
    single: bool = False
    sigmoid: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFormat:
    """One format at one path; several may share a path if their bodies tell them apart.

    ``write`` gets the request, an answer without errors, and the time in seconds since 1970.
    """

    name: str
    path: str
    body: type[BaseModel]
    read: Callable[[Any], WireRequest]
    write: Callable[[WireRequest, ModelScores, int], Any]


class _Foreign(BaseModel):
    """Keys that we do not know are other versions' options: they are passed over."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


Texts: TypeAlias = str | list[str]


def _texts(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _scores(answer: ModelScores) -> list[float]:
    scores = [s for s in answer.scores if s is not None]
    assert len(scores) == len(answer.scores), "an answer with errors is not translated"
    return scores


# OpenRLHF: openrlhf/utils/remote_rm_utils.py


class OpenRLHFRequest(_Foreign):
    query: Texts = Field(description="prompt and response as one text")
    prompts: Texts | None = None
    labels: Any = None


def read_openrlhf(body: OpenRLHFRequest) -> WireRequest:
    return WireRequest(items=tuple(ScoreItem(response=text) for text in _texts(body.query)))


def write_openrlhf(_: WireRequest, answer: ModelScores, __: int) -> dict[str, Any]:
    scores = _scores(answer)
    return {"rewards": scores, "scores": scores, "extra_logs": {}}


# slime: slime/rollout/rm_hub/__init__.py


class SlimeRequest(_Foreign):
    prompt: str | list[MessageIn]
    response: str
    label: Any = None


def read_slime(body: SlimeRequest) -> WireRequest:
    if isinstance(body.prompt, str):
        return WireRequest(items=(ScoreItem(prompt=body.prompt, response=body.response),))
    return WireRequest(items=(ScoreItem(messages=_turns(body.prompt), response=body.response),))


def write_slime(_: WireRequest, answer: ModelScores, __: int) -> float:
    return _scores(answer)[0]


# vLLM: vllm/entrypoints/pooling/classify/protocol.py; verl reads data[-1].probs[-1]


class VLLMClassifyRequest(_Foreign):
    input: Texts | list[TokenId] | list[list[TokenId]]
    model: str | None = None
    use_activation: bool | None = Field(None, description="null is true: a probability")


class VLLMClassifyChatRequest(_Foreign):
    messages: list[MessageIn] = Field(min_length=1)
    model: str | None = None
    use_activation: bool | None = None


def read_vllm_classify(body: VLLMClassifyRequest) -> WireRequest:
    return WireRequest(
        items=_input_items(body.input), model=body.model, sigmoid=body.use_activation is not False
    )


def read_vllm_classify_chat(body: VLLMClassifyChatRequest) -> WireRequest:
    *before, last = body.messages
    if last.role != "assistant" or not before:
        raise ValueError("the last of several messages must be the assistant's: it is scored")
    return WireRequest(
        items=(ScoreItem(messages=_turns(before), response=last.content),),
        model=body.model,
        sigmoid=body.use_activation is not False,
    )


def write_vllm_classify(request: WireRequest, answer: ModelScores, now: int) -> dict[str, Any]:
    data = [
        {"index": i, "label": "LABEL_0", "probs": [score], "num_classes": 1}
        for i, score in enumerate(_activated(request, answer))
    ]
    return _vllm_list("classify", answer, now, data)


# vLLM: vllm/entrypoints/pooling/scoring/protocol.py


class VLLMScoreRequest(_Foreign):
    queries: Texts
    documents: Texts
    model: str | None = None
    use_activation: bool | None = None


class VLLMScoreTextRequest(_Foreign):
    text_1: Texts
    text_2: Texts
    model: str | None = None
    use_activation: bool | None = None


def read_vllm_score(body: VLLMScoreRequest) -> WireRequest:
    return _pairs(body.queries, body.documents, body.model, body.use_activation)


def read_vllm_score_text(body: VLLMScoreTextRequest) -> WireRequest:
    return _pairs(body.text_1, body.text_2, body.model, body.use_activation)


def write_vllm_score(request: WireRequest, answer: ModelScores, now: int) -> dict[str, Any]:
    data = [
        {"index": i, "object": "score", "score": score}
        for i, score in enumerate(_activated(request, answer))
    ]
    return _vllm_list("score", answer, now, data)


# SGLang: /classify of its native interface, and its OpenAI embeddings, which verl reads


class SGLangClassifyRequest(_Foreign):
    text: Texts
    model: str | None = None


class EmbeddingsRequest(_Foreign):
    input: Texts | list[TokenId] | list[list[TokenId]]
    model: str | None = None


def read_sglang_classify(body: SGLangClassifyRequest) -> WireRequest:
    return WireRequest(
        items=tuple(ScoreItem(response=text) for text in _texts(body.text)),
        model=body.model,
        single=isinstance(body.text, str),
    )


def write_sglang_classify(
    request: WireRequest, answer: ModelScores, _: int
) -> dict[str, Any] | list[dict[str, Any]]:
    rows = [
        {"embedding": [score], "meta_info": {"prompt_tokens": tokens}}
        for score, tokens in zip(_scores(answer), answer.tokens, strict=True)
    ]
    return rows[0] if request.single else rows


def read_embeddings(body: EmbeddingsRequest) -> WireRequest:
    return WireRequest(items=_input_items(body.input), model=body.model)


def write_embeddings(_: WireRequest, answer: ModelScores, __: int) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": i, "embedding": [score]}
        for i, score in enumerate(_scores(answer))
    ]
    return {"object": "list", "model": answer.model, "data": data, "usage": _usage(answer)}


def _turns(messages: Sequence[MessageIn]) -> tuple[Message, ...]:
    return tuple(Message(role=m.role, content=m.content) for m in messages)


def _input_items(given: Any) -> tuple[ScoreItem, ...]:
    if isinstance(given, str):
        return (ScoreItem(response=given),)
    if given and isinstance(given[0], int):
        given = [given]
    return tuple(
        ScoreItem(response=one)
        if isinstance(one, str)
        else ScoreItem(ids=ItemIds(response=tuple(one)))
        for one in given
    )


def _pairs(
    first: Texts, second: Texts, model: str | None, use_activation: bool | None
) -> WireRequest:
    queries, documents = _texts(first), _texts(second)
    if len(queries) == 1:
        queries = queries * len(documents)
    if len(queries) != len(documents):
        raise ValueError(
            f"{len(queries)} queries and {len(documents)} documents: send one query, or as many "
            "as documents"
        )
    return WireRequest(
        items=tuple(
            ScoreItem(prompt=q, response=d) for q, d in zip(queries, documents, strict=True)
        ),
        model=model,
        sigmoid=use_activation is not False,
    )


def _activated(request: WireRequest, answer: ModelScores) -> list[float]:
    """Scores as probabilities, or as the logits of them, whichever was asked for."""
    if request.sigmoid == answer.probability:
        return _scores(answer)
    return [_sigmoid(s) if request.sigmoid else _logit(s) for s in _scores(answer)]


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def _logit(p: float) -> float:
    """Its inverse; finite where the probability was rounded to 0 or 1."""
    p = min(max(p, 1e-300), 1.0 - 2.0**-53)
    return math.log(p) - math.log1p(-p)


def _vllm_list(kind: str, answer: ModelScores, now: int, data: list[Any]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{answer.version}",
        "object": "list",
        "created": now,
        "model": answer.model,
        "data": data,
        "usage": _usage(answer),
    }


def _usage(answer: ModelScores) -> dict[str, Any]:
    tokens = sum(answer.tokens)
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def _served(path: str, name: str, body: Any, read: Any, write: Any) -> ServedFormat:
    return ServedFormat(name=name, path=path, body=body, read=read, write=write)


SERVED = (
    _served("/get_reward", "openrlhf", OpenRLHFRequest, read_openrlhf, write_openrlhf),
    _served("/remote_rm", "slime", SlimeRequest, read_slime, write_slime),
    _served("/classify", "vllm", VLLMClassifyRequest, read_vllm_classify, write_vllm_classify),
    _served(
        "/classify",
        "vllm_chat",
        VLLMClassifyChatRequest,
        read_vllm_classify_chat,
        write_vllm_classify,
    ),
    _served(
        "/classify", "sglang", SGLangClassifyRequest, read_sglang_classify, write_sglang_classify
    ),
    _served("/score", "vllm_score", VLLMScoreRequest, read_vllm_score, write_vllm_score),
    _served(
        "/score", "vllm_score_text", VLLMScoreTextRequest, read_vllm_score_text, write_vllm_score
    ),
    _served("/v1/embeddings", "embeddings", EmbeddingsRequest, read_embeddings, write_embeddings),
)
