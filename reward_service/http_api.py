"""The HTTP interface of the reward service: routes, limits, errors. No Ray, no torch.

``build_app`` turns anything that can score (``Backend``) into a FastAPI application; the Serve
ingress is one such backend, a test's stub another. Every request is checked here in full before
it may join a batch. Every error is ``{"error": {"code", "message", "param"}}``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, Union

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reward_service.config import RewardServiceConfig
from reward_service.encoding import Truncation
from reward_service.http_bodies import (
    ERRORS,
    Health,
    ModelList,
    ModelOut,
    Readiness,
    ReloadRequest,
    ScoreRequest,
    ScoreResponse,
)
from reward_service.http_metrics import CONTENT_TYPE, ServiceMetrics
from reward_service.http_middleware import (
    AUTHORISED,
    Admission,
    Authenticated,
    BodyLimit,
    Door,
    Measured,
    error_answer,
)
from reward_service.score import ModelScores, ScoreCall, ScoreItem
from reward_service.statistics import ModelStatus
from reward_service.wire_formats import SERVED, ServedFormat

API_VERSION = "1.0.0"
"""Of the OpenAPI document: the second number grows with what is added, the first with what breaks.
``docs/reward_service.openapi.json`` is the document of this version."""

Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        description="a request that is sent again with the same key is scored once",
    ),
]


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _request_error, (
            self.status,
            self.code,
            self.message,
            self.param,
            self.retry_after_s,
        )


def _request_error(status: int, code: str, message: str, param: str, after: int) -> RequestError:
    return RequestError(status, code, message, param=param, retry_after_s=after)


class Backend(Protocol):
    """What the application needs of whatever scores. Raises ``RequestError`` for the caller."""

    @property
    def model_names(self) -> Sequence[str]: ...

    async def score(self, call: ScoreCall) -> ModelScores: ...

    async def statuses(self) -> Mapping[str, ModelStatus]: ...

    async def reload(self, model: str, directory: str) -> ModelStatus: ...


def build_app(
    backend: Backend,
    config: RewardServiceConfig,
    *,
    token_digests: Sequence[str] = (),
    metrics: ServiceMetrics | None = None,
    door: Door | None = None,
) -> FastAPI:
    """The FastAPI application over a backend; its document is at ``/openapi.json``."""
    # No interactive pages: they would load scripts from elsewhere.
    app = FastAPI(
        title="ray-rlhf reward service", version=API_VERSION, docs_url=None, redoc_url=None
    )
    counted = metrics or ServiceMetrics()
    # The one added last sees a request first.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(Admission, door=door or Door(config.most_requests))
    app.add_middleware(Authenticated, token_digests=token_digests)
    app.add_middleware(Measured, metrics=counted)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestError, _on_request_error)
    _add_score(app, backend, config, counted)
    for path in dict.fromkeys(served.path for served in SERVED):
        _add_wire_format(app, backend, config, counted, path)
    _add_models(app, backend)
    _add_health(app, backend, counted)
    return app


def _add_score(
    app: FastAPI, backend: Backend, config: RewardServiceConfig, metrics: ServiceMetrics
) -> None:
    @app.post("/v1/score", response_model=ScoreResponse, responses=ERRORS)
    async def score(body: ScoreRequest, idempotency_key: Key = "") -> JSONResponse:
        """Score items; one that cannot be scored gets an error, alone."""
        call = ScoreCall(
            model=_pick_model(body.model, backend.model_names),
            items=_checked_items([item.to_item() for item in body.items], config),
            timeout_s=min(body.timeout_s or config.timeout_s, config.timeout_s),
            truncation=body.truncation,
            per_token=body.per_token,
            key=idempotency_key,
        )
        answer = await backend.score(call)
        metrics.count(answer)
        if all(error is not None for error in answer.errors):
            raise RequestError(
                422, "invalid_items", f"no item could be scored: {answer.errors[0]}", param="items"
            )
        return JSONResponse(_native_answer(answer), headers=_version_headers(answer))


def _native_answer(answer: ModelScores) -> dict[str, Any]:
    data = []
    rows = zip(answer.scores, answer.tokens, answer.errors, strict=True)
    for index, (score, tokens, error) in enumerate(rows):
        row: dict[str, Any] = {"index": index, "score": score, "tokens": tokens}
        if answer.per_token:
            row["per_token"] = answer.per_token[index]
        if error is not None:
            row["error"] = error
        data.append(row)
    return {
        "model": answer.model,
        "version": answer.version,
        "fingerprint": answer.fingerprint,
        "data": data,
    }


def _version_headers(answer: ModelScores) -> dict[str, str]:
    """In every answer, as other formats have no place for them."""
    return {
        "X-Reward-Model": answer.model,
        "X-Reward-Model-Version": answer.version,
        "X-Reward-Model-Fingerprint": answer.fingerprint,
    }


def _add_wire_format(
    app: FastAPI,
    backend: Backend,
    config: RewardServiceConfig,
    metrics: ServiceMetrics,
    path: str,
) -> None:
    """The formats that other trainers' clients speak at one path, told apart by their bodies."""
    formats: dict[type[BaseModel], ServedFormat] = {f.body: f for f in SERVED if f.path == path}

    async def endpoint(
        body: Any,
        model: Annotated[str | None, Query(description="which model; before the body's")] = None,
        truncation: Annotated[Truncation, Query()] = "left",
        idempotency_key: Key = "",
    ) -> JSONResponse:
        spoken = formats[type(body)]
        try:
            request = spoken.read(body)
        except ValueError as error:
            raise RequestError(422, "invalid_request", str(error)) from None
        if not request.items:
            raise RequestError(422, "invalid_request", "there is nothing to score")
        answer = await backend.score(
            ScoreCall(
                model=_wire_model(model, request.model, backend.model_names),
                items=_checked_items(request.items, config),
                timeout_s=config.timeout_s,
                truncation=truncation,
                key=idempotency_key,
            )
        )
        metrics.count(answer)
        for index, reason in enumerate(answer.errors):
            if reason is not None:  # the format has no place for an item's own error
                raise RequestError(
                    422, "invalid_items", f"item {index} cannot be scored: {reason}", param="items"
                )
        written = spoken.write(request, answer, int(time.time()))
        return JSONResponse(written, headers=_version_headers(answer))

    # FastAPI reads the body's type from the annotation, which is known only here.
    endpoint.__annotations__["body"] = Union[tuple(formats)]  # noqa: UP007  (made at run time)
    names = ", ".join(f.name for f in formats.values())
    app.post(path, responses=ERRORS, summary=f"Wire format: {names}", name=path[1:])(endpoint)


def _wire_model(chosen: str | None, sent: str | None, names: Sequence[str]) -> str:
    """The URL's choice; else the body's, if it is a name of ours (often it is a path of the
    client's own); else the first model."""
    if chosen is not None:
        return _pick_model(chosen, names)
    return sent if sent is not None and sent in names else names[0]


def _add_models(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models", response_model=ModelList, responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """Every served model, with its version and the statistics of its scores."""
        statuses = await backend.statuses()
        return {"object": "list", "data": [status.to_json() for status in statuses.values()]}

    @app.put("/v1/models/{name}", response_model=ModelOut, responses=ERRORS)
    async def reload(name: str, body: ReloadRequest) -> dict[str, Any]:
        """Load another version while the one before it serves; answers when all replicas have it.

        One that cannot be loaded changes nothing: 422 says why, and so does ``/ready``.
        """
        _pick_model(name, backend.model_names)
        return (await backend.reload(name, body.directory)).to_json()


def _add_health(app: FastAPI, backend: Backend, metrics: ServiceMetrics) -> None:
    @app.get("/health", response_model=Health)
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready(request: Request) -> JSONResponse:
        """Every model is loaded; with each one's version and why its last reload was refused."""
        statuses = (await backend.statuses()).values()
        is_ready = all(status.error is None for status in statuses)
        shown = list(statuses) if request.scope[AUTHORISED] else []
        return JSONResponse(
            {"ready": is_ready, "models": [status.to_json() for status in shown]},
            status_code=200 if is_ready else 503,
        )

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def prometheus() -> Response:
        """Metrics in Prometheus' text form."""
        return Response(metrics.text(await backend.statuses()), media_type=CONTENT_TYPE)


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


def _checked_items(
    items: Sequence[ScoreItem], config: RewardServiceConfig
) -> tuple[ScoreItem, ...]:
    if len(items) > config.max_items:
        raise RequestError(
            422,
            "too_many_items",
            f"{len(items)} items in one request, the limit is {config.max_items}: split it",
            param="items",
        )
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
        tokens = len(item.ids.prompt) + len(item.ids.response) if item.ids else 0
        if tokens > config.max_tokens:
            raise RequestError(
                422,
                "item_too_long",
                f"{tokens} token ids, the limit of one item is {config.max_tokens}",
                param=f"items.{index}",
            )
    return tuple(items)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["loc"][0] == "body":
        if "json" not in request.headers.get("content-type", ""):
            return error_answer(
                415, "not_json", "send the body as JSON, with Content-Type: application/json"
            )
        if first["type"] == "json_invalid":
            return error_answer(400, "invalid_json", "the body is not valid JSON")
    param = ".".join(str(part) for part in first["loc"][1:])
    # The offending key is the caller's text: keep it printable.
    return error_answer(422, "invalid_request", first["msg"], ascii(param[:200])[1:-1])


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {
        400: "invalid_request",
        404: "not_found",
        405: "method_not_allowed",
        413: "body_too_large",
    }
    code = codes.get(error.status_code, "error")
    return error_answer(error.status_code, code, str(error.detail))


async def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_answer(error.status, error.code, error.message, error.param, error.retry_after_s)
