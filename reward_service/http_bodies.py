"""Bodies of the native interface as pydantic models; the OpenAPI document is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.trajectory import Message
from reward_service.encoding import Truncation
from reward_service.score import ItemIds, ScoreItem

TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageIn(_Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ItemIn(_Body):
    """One of three forms: ``text``; ``prompt`` (a string or chat messages) with ``response``;
    ``response_ids`` with or without ``prompt_ids``."""

    prompt: str | list[MessageIn] | None = None
    response: str | None = None
    text: str | None = None
    prompt_ids: list[TokenId] | None = None
    response_ids: list[TokenId] | None = Field(
        None, description="ids of the reward model's own tokenizer, each below its vocabulary"
    )

    @model_validator(mode="after")
    def _one_form(self) -> ItemIn:
        forms = [
            self.text is not None,
            self.prompt is not None and self.response is not None,
            self.response_ids is not None,
        ]
        parts = {
            name
            for name in ("text", "prompt", "response", "prompt_ids", "response_ids")
            if getattr(self, name) is not None
        }
        allowed = [{"text"}, {"prompt", "response"}, {"prompt_ids", "response_ids"}]
        if not any(form and parts <= names for form, names in zip(forms, allowed, strict=True)):
            raise ValueError("give either text, or prompt and response, or response_ids")
        if self.prompt == []:
            raise ValueError("the dialogue has no messages")
        return self

    def to_item(self) -> ScoreItem:
        if self.response_ids is not None:
            ids = ItemIds(prompt=tuple(self.prompt_ids or ()), response=tuple(self.response_ids))
            return ScoreItem(ids=ids)
        if self.text is not None:
            return ScoreItem(response=self.text)
        assert self.response is not None
        if isinstance(self.prompt, str):
            return ScoreItem(prompt=self.prompt, response=self.response)
        turns = tuple(Message(role=m.role, content=m.content) for m in self.prompt or ())
        return ScoreItem(messages=turns, response=self.response)


class ScoreRequest(_Body):
    items: list[ItemIn] = Field(min_length=1)
    model: str | None = Field(None, description="which model; default: the first that is served")
    truncation: Truncation = Field(
        "error", description="beyond the model's context: an error, or drop the oldest tokens"
    )
    per_token: bool = Field(
        False,
        strict=True,
        description="also the head's value at each token of the response, EOS included: the score"
        " of the text up to there. The last is the score; their differences sum to it",
    )
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="shorter than the server's own deadline"
    )


class ScoreOut(BaseModel):
    index: int
    score: float | None = Field(allow_inf_nan=False, description="null when there is an error")
    tokens: int
    per_token: list[float] | None = None
    error: str | None = None


class ScoreResponse(BaseModel):
    model: str
    version: str
    fingerprint: str = ""
    data: list[ScoreOut]


class StatisticsOut(BaseModel):
    version: str
    count: int
    errors: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class ModelOut(BaseModel):
    id: str
    object: Literal["model"]
    version: str
    fingerprint: str
    context: int | None
    vocabulary: int | None
    replicas: int
    error: str | None
    reload_error: str | None
    statistics: list[StatisticsOut]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelOut]


class ReloadRequest(_Body):
    directory: str = Field(
        min_length=1, max_length=4096, description="inside the server's models root"
    )


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    ready: bool
    models: list[ModelOut] = Field(
        default_factory=list, description="only for those who show a token, where one is needed"
    )


class ErrorBody(BaseModel):
    code: str
    message: str
    param: str | None


class ErrorOut(BaseModel):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": description}
    for status, description in (
        (400, "not valid JSON"),
        (401, "no token, or a wrong one"),
        (404, "no such model"),
        (413, "the body is over the limit"),
        (415, "not sent as JSON"),
        (422, "a field is wrong, or no item could be scored"),
        (500, "the model failed"),
        (503, "too many requests wait, or no replica is up: Retry-After says when to try again"),
        (504, "not scored within the deadline"),
    )
}
