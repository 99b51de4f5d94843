"""The HTTP interface of the reward service: bodies, limits, errors. No Ray, no torch.

``build_app`` turns anything that can score (``Backend``) into a FastAPI application; the Serve
ingress is one such backend, a test's stub another. Every request is checked here in full before
it may join a batch. Every error is ``{"error": {"code", "message", "param"}}``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from actors.trajectory import Message
from reward_service.config import RewardServiceConfig
from reward_service.encoding import Truncation
from reward_service.score import ModelScores, ScoreItem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageIn(_Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ItemIn(_Body):
    """Either ``text``, or ``prompt`` (a string or chat messages) with ``response``."""

    prompt: str | list[MessageIn] | None = None
    response: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ItemIn:
        pair = self.prompt is not None and self.response is not None
        neither = self.prompt is None and self.response is None
        if not (pair and self.text is None) and not (neither and self.text is not None):
            raise ValueError("give either text, or prompt and response")
        if self.prompt == []:
            raise ValueError("the dialogue has no messages")
        return self

    def to_item(self) -> ScoreItem:
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


class ScoreOut(BaseModel):
    index: int
    score: float | None = Field(allow_inf_nan=False, description="null when there is an error")
    tokens: int
    error: str | None = None


class ScoreResponse(BaseModel):
    model: str
    version: str
    fingerprint: str = ""
    data: list[ScoreOut]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatus:
    """What one served model says of itself; ``error`` is set when it could not be loaded."""

    model: str
    version: str = ""
    fingerprint: str = ""
    context: int | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "version": self.version,
            "fingerprint": self.fingerprint,
            "context": self.context,
            "error": self.error,
        }


class Backend(Protocol):
    """What the application needs of whatever scores. Raises ``RequestError`` for the caller."""

    @property
    def model_names(self) -> Sequence[str]: ...

    async def score(
        self, model: str, items: Sequence[ScoreItem], truncation: Truncation
    ) -> ModelScores: ...

    async def statuses(self) -> Mapping[str, ModelStatus]: ...


def build_app(backend: Backend, config: RewardServiceConfig) -> FastAPI:
    """The FastAPI application over a backend; its document is at ``/openapi.json``."""
    # No interactive pages: they would load scripts from elsewhere.
    app = FastAPI(title="ray-rlhf reward service", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit, max_bytes=config.max_body_bytes)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestError, _on_request_error)

    @app.post("/v1/score", response_model=ScoreResponse, response_model_exclude_none=False)
    async def score(body: ScoreRequest) -> JSONResponse:
        model = _pick_model(body.model, backend.model_names)
        answer = await backend.score(model, _checked_items(body, config), body.truncation)
        if all(error is not None for error in answer.errors):
            raise RequestError(
                422, "invalid_items", f"no item could be scored: {answer.errors[0]}", param="items"
            )
        rows = zip(answer.scores, answer.tokens, answer.errors, strict=True)
        return JSONResponse(
            {
                "model": answer.model,
                "version": answer.version,
                "fingerprint": answer.fingerprint,
                "data": [
                    {"index": i, "score": value, "tokens": tokens}
                    | ({} if error is None else {"error": error})
                    for i, (value, tokens, error) in enumerate(rows)
                ],
            }
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        statuses = await backend.statuses()
        return {"object": "list", "data": [status.to_json() for status in statuses.values()]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        statuses = (await backend.statuses()).values()
        is_ready = all(status.error is None for status in statuses)
        return JSONResponse(
            {"ready": is_ready, "models": [status.to_json() for status in statuses]},
            status_code=200 if is_ready else 503,
        )

    return app


def _pick_model(wanted: str | None, names: Sequence[str]) -> str:
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise RequestError(
            404,
            "unknown_model",
            f"no model is called {wanted[:80]!a}; served: {', '.join(names)}",
            param="model",
        )
    return wanted


def _checked_items(body: ScoreRequest, config: RewardServiceConfig) -> list[ScoreItem]:
    if len(body.items) > config.max_items:
        raise RequestError(
            422,
            "too_many_items",
            f"{len(body.items)} items in one request, the limit is {config.max_items}: split it",
            param="items",
        )
    items = [item.to_item() for item in body.items]
    for index, item in enumerate(items):
        chars = len(item.prompt) + len(item.response)
        chars += sum(len(m["content"]) for m in item.messages)
        if chars > config.max_chars:
            raise RequestError(
                422,
                "item_too_long",
                f"{chars} characters, the limit of one item is {config.max_chars}",
                param=f"items.{index}",
            )
    return items


def _error(status: int, code: str, message: str, param: str, retry_after_s: int) -> JSONResponse:
    return JSONResponse(
        {"error": {"code": code, "message": message, "param": param or None}},
        status_code=status,
        headers={"Retry-After": str(retry_after_s)} if retry_after_s else None,
    )


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if "json" not in request.headers.get("content-type", ""):
        return _error(
            415, "not_json", "send the body as JSON, with Content-Type: application/json", "", 0
        )
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(400, "invalid_json", "the body is not valid JSON", "", 0)
    param = ".".join(str(part) for part in first["loc"][1:])
    # The offending key is the caller's text: keep it printable.
    return _error(422, "invalid_request", first["msg"], ascii(param[:200])[1:-1], 0)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "error")
    return _error(error.status_code, code, str(error.detail), "", 0)


async def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return _error(error.status, error.code, error.message, error.param, error.retry_after_s)


class _BodyLimit:
    """Refuses a body over the limit, by its announced length or while it comes in."""

    def __init__(self, app: Callable[..., Awaitable[None]], max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the body is over the limit of {self._max_bytes} bytes: send fewer items"
        if announced.isdigit() and int(announced) > self._max_bytes:
            await _error(413, "body_too_large", message, "", 0)(scope, receive, send)
            return
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counted, send)
