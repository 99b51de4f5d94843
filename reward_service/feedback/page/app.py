"""The page on which people judge: a FastAPI application of its own, rendered on the server.

It needs the store and nothing else of the run: neither Ray nor a model. It keeps no log of
requests and no addresses. Texts of models are data: templates escape them, and the content
security policy lets no script run but the page's own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware.sessions import SessionMiddleware
from starlette.staticfiles import StaticFiles

from reward_service.config import PeopleConfig
from reward_service.feedback.agreement_words import Language
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.leases import NotYoursError
from reward_service.feedback.page import admin, judging
from reward_service.feedback.page.session import (
    ForbiddenError,
    ForgedFormError,
    SignedOutError,
    form_secret,
    language_of,
    maybe_signed_in,
)
from reward_service.feedback.page.texts import CONSENT, INSTRUCTIONS, LANGUAGES, TEXTS
from reward_service.feedback.store import FeedbackStore

HERE = Path(__file__).parent
MOST_BYTES = 64 << 10
"""Of a form; the longest has a comment of some hundred characters."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the invitation is in the address
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the routes work with."""

    store: FeedbackStore
    assignments: Assignments
    config: PeopleConfig
    instructions: Mapping[Language, str]
    consent: Mapping[Language, str]
    run_dir: Path | None
    templates: Environment
    address: str
    """What people open, without a slash at the end."""


def create_app(
    store: FeedbackStore,
    config: PeopleConfig,
    *,
    secret: str,
    run_dir: Path | None = None,
    address: str = "",
    seed: int | None = None,
) -> FastAPI:
    """The application.

    Args:
        secret: Signs the sessions; whoever has it can sign in as anybody.
        run_dir: Where the administrator's view looks for what the reward model gets wrong.
        address: What people open, for invitation links.
        seed: Of sides and shares; ``None`` draws them unpredictably.
    """
    templates = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # No documentation pages: their scripts come from elsewhere.
    app = FastAPI(title="ray-rlhf", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.page = Page(
        store=store,
        assignments=Assignments(store, config, seed=seed),
        config=config,
        instructions=_text(config.instructions, INSTRUCTIONS),
        consent=_text(config.consent, CONSENT),
        run_dir=run_dir,
        templates=templates,
        address=address.rstrip("/"),
    )
    app.include_router(judging.router)
    app.include_router(admin.router, prefix="/admin")
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.add_middleware(
        SessionMiddleware,
        secret_key=secret,
        session_cookie="rlhf_session",
        max_age=int(config.session_hours * 3600),
        same_site="lax",
        https_only=address.startswith("https://"),
    )
    app.middleware("http")(_guard)
    for error, status, words in (
        (NotYoursError, 404, "not_yours"),
        (ForbiddenError, 403, "forbidden"),
        (ForgedFormError, 403, "expired_form"),
    ):
        app.add_exception_handler(error, _says(status, words))
    app.add_exception_handler(SignedOutError, _to_sign_in)
    app.add_exception_handler(ValueError, _says(422, None))
    app.add_exception_handler(HTTPException, _http_error)
    return app


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page in the visitor's language."""
    page: Page = request.app.state.page
    language = language_of(request)
    words = TEXTS[language]
    text = page.templates.get_template(template).render(
        t=words,
        name_of=lambda key: words.get(key, key),
        language=language,
        languages=LANGUAGES,
        person=maybe_signed_in(request),
        form_secret=form_secret(request),
        path=request.url.path,
        **values,
    )
    return HTMLResponse(text, status_code=status)


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    length = request.headers.get("content-length", "0")
    chunked = request.method == "POST" and "content-length" not in request.headers
    if chunked or not length.isdigit() or int(length) > MOST_BYTES:
        return Response("the form is too large\n", status_code=413)
    response = await call_next(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if request.url.path.startswith("/static/"):
        response.headers["Cache-Control"] = "public, max-age=3600"
    return response


def _says(status: int, words: str | None) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        message = TEXTS[language_of(request)][words] if words else str(error)
        return render(request, "error.html.j2", status, message=message)

    return handle


def _to_sign_in(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return RedirectResponse("/", status_code=303)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = TEXTS[language_of(request)]
    message = words["not_found"] if error.status_code == 404 else str(error.detail)
    return render(request, "error.html.j2", error.status_code, message=message)


def _text(path: str | None, default: Mapping[Language, str]) -> Mapping[Language, str]:
    """A file of the user's stands for both languages."""
    if path is None:
        return default
    text = Path(path).read_text(encoding="utf-8")
    return {"en": text, "zh": text}
