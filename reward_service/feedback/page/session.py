"""Who is asking: signed sessions, protection of forms, and the language of the page.

The session is a cookie signed with the run's secret (Starlette's SessionMiddleware on
itsdangerous): readable by its owner, impossible to alter. It holds the hash of the invitation, so
that a revoked invitation or an erased person is out at once.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.datastructures import FormData

from reward_service.feedback.agreement_words import Language
from reward_service.feedback.page.texts import LANGUAGES
from reward_service.feedback.people import Person, hash_of, who


class SignedOutError(Exception):
    """Nobody is signed in: the page sends them to the sign-in form."""


class ForbiddenError(PermissionError):
    """Signed in, but not allowed."""


class ForgedFormError(PermissionError):
    """A form that this page did not make, or that is too old."""


def sign_in(request: Request, token: str) -> Person | None:
    """Sign a person in by their invitation; ``None`` when it is not valid."""
    token_hash = hash_of(token.strip())
    person = who(request.app.state.page.store.database, token_hash)
    if person is not None:
        language = request.session.get("language")
        request.session.clear()  # nothing of an earlier visitor, and a new form secret
        request.session["invite"] = token_hash
        if language:
            request.session["language"] = language
    return person


def signed_in(request: Request) -> Person:
    person = maybe_signed_in(request)
    if person is None:
        raise SignedOutError
    return person


def maybe_signed_in(request: Request) -> Person | None:
    """Looked up once in a request, by what its session says now."""
    token_hash = request.session.get("invite")
    if not isinstance(token_hash, str):
        return None
    known: tuple[str, Person | None] | None = getattr(request.state, "person", None)
    if known is None or known[0] != token_hash:
        known = (token_hash, who(request.app.state.page.store.database, token_hash))
        request.state.person = known
    return known[1]


def administrator(request: Request) -> Person:
    person = signed_in(request)
    if person.role != "administrator":
        raise ForbiddenError
    return person


def form_secret(request: Request) -> str:
    """The secret that this session's forms carry; made when first asked for."""
    secret = request.session.get("form")
    if not isinstance(secret, str):
        secret = secrets.token_urlsafe(24)
        request.session["form"] = secret
    return secret


async def own_form(request: Request) -> FormData:
    """The fields of a form that this page made for this session.

    Raises:
        ForgedFormError: The secret is missing or another session's, or the browser says that
            the form stands on another site.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ForgedFormError
    form = await request.form(max_files=0, max_fields=64)
    given, expected = form.get("form"), request.session.get("form")
    if not (
        isinstance(given, str)
        and isinstance(expected, str)
        and secrets.compare_digest(given.encode(), expected.encode())
    ):
        raise ForgedFormError
    return form


def language_of(request: Request) -> Language:
    """Chosen on the page, or the first that the browser asks for and the page speaks."""
    chosen = request.session.get("language")
    if chosen in LANGUAGES:
        return "zh" if chosen == "zh" else "en"
    for part in request.headers.get("accept-language", "").split(","):
        if part.strip().lower().startswith("zh"):
            return "zh"
        if part.strip().lower().startswith("en"):
            break
    return "en"


def field(form: FormData, name: str) -> str:
    value: Any = form.get(name, "")
    return value if isinstance(value, str) else ""


Form = Annotated[FormData, Depends(own_form)]
Someone = Annotated[Person, Depends(signed_in)]
Administrator = Annotated[Person, Depends(administrator)]
