"""What every request passes before a route sees it: measurement, tokens, room, and the size of the
body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reward_service.http_metrics import ServiceMetrics
from reward_service.security import authorised

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/ready")
"""Probes of an orchestrator carry no token; what they learn without one is yes or no."""

AUTHORISED = "reward_service.authorised"
"""Key of the scope: whether the request showed a token, where one is needed."""


def error_answer(
    status: int, code: str, message: str, param: str = "", retry_after_s: int = 0
) -> JSONResponse:
    """``{"error": {"code", "message", "param"}}``, the form of every error."""
    return JSONResponse(
        {"error": {"code": code, "message": message, "param": param or None}},
        status_code=status,
        headers={"Retry-After": str(retry_after_s)} if retry_after_s else None,
    )


class Measured:
    """Counts and times every request by its route, never by what the caller wrote."""

    def __init__(self, app: App, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.begin()
        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.end(route, status, time.perf_counter() - started)


class Authenticated:
    """Lets through what carries a token, by Bearer or as the password of Basic."""

    def __init__(self, app: App, token_digests: Sequence[str]) -> None:
        self._app = app
        self._token_digests = tuple(token_digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            given = headers.get(b"authorization", b"").decode("latin-1")
            scope[AUTHORISED] = authorised(given, self._token_digests)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not scope[AUTHORISED] and path not in OPEN_PATHS:
                answer = error_answer(
                    401,
                    "unauthorised",
                    "send a token: 'Authorization: Bearer TOKEN', or http://any:TOKEN@host",
                )
                answer.headers["WWW-Authenticate"] = 'Basic realm="reward service", Bearer'
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Door:
    """How many requests for scores are inside, and whether more may come in."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def refusal(self) -> str | None:
        """Why nobody may come in now, or ``None``."""
        if self._closed:
            return "the server is shutting down"
        return "too many requests wait: try again" if self._inside >= self._most else None

    def enter(self) -> None:
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def close(self) -> None:
        """Let nobody in any more, and return when all have left."""
        self._closed = True
        await self._empty.wait()


class Admission:
    """Lets requests for scores in while there is room; the others get a 503 at once.

    Other methods always pass, so that a reload, a probe or a look at the metrics never waits
    behind the load that it is about. Every request for scores is a POST.
    """

    def __init__(self, app: App, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if (refusal := self._door.refusal) is not None:
            await error_answer(503, "overloaded", refusal, retry_after_s=2)(scope, receive, send)
            return
        self._door.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.leave()


class BodyLimit:
    """Refuses a body over the limit, by its announced length or while it comes in."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the body is over the limit of {self._max_bytes} bytes: send fewer items"
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            await error_answer(413, "body_too_large", message)(scope, receive, send)
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
