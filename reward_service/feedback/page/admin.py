"""The administrator's routes: who did how much, agreement, bias, flags, pause, invitations."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from reward_service.feedback import overview, people
from reward_service.feedback.agreement_words import reading, summary
from reward_service.feedback.assignment import set_paused
from reward_service.feedback.page.judging import page_of, render
from reward_service.feedback.page.session import Administrator, Form, field, language_of

router = APIRouter()

_cache: dict[int, tuple[tuple[int, ...], dict[str, Any]]] = {}
_computing = threading.Lock()


@router.get("")
def view(request: Request, person: Administrator) -> Response:  # noqa: ARG001
    page, language = page_of(request), language_of(request)
    return render(
        request,
        "admin.html.j2",
        summary=lambda report: summary(report, language),
        reading=lambda name, value: reading(name, value, language),
        overview=_overview(request),
        invitations=people.invitations(page.store.database),
        wrong=overview.reward_model_errors(page.run_dir),
        link=request.session.pop("link", None),
    )


@router.post("/invite")
def invite(request: Request, person: Administrator, form: Form) -> Response:  # noqa: ARG001
    page = page_of(request)
    database, days = page.store.database, page.config.invite_days
    known = {i.annotator_id: i.role for i in people.invitations(database)}
    name = field(form, "name")
    if name:
        if name not in known:
            raise ValueError(f"there is nobody called {name!r} to invite again")
        token = people.invite_again(database, name, role=known[name], days=days)
    else:
        name, token = people.invite(database, days=days)
    address = page.address or str(request.base_url).rstrip("/")
    # Shown once, on the next page; the store has its hash only.
    request.session["link"] = {"name": name, "url": f"{address}/join/{token}"}
    return RedirectResponse("/admin#people", status_code=303)


@router.post("/revoke")
def revoke(request: Request, person: Administrator, form: Form) -> Response:
    name = field(form, "name")
    if name == person.annotator_id:
        raise ValueError("you would lock yourself out: ask another administrator")
    people.revoke(page_of(request).store.database, name)
    return RedirectResponse("/admin#people", status_code=303)


@router.post("/pause")
def pause(request: Request, person: Administrator, form: Form) -> Response:  # noqa: ARG001
    paused = field(form, "paused") == "yes"
    page_of(request).store.database.write(lambda c: set_paused(c, paused))
    return RedirectResponse("/admin", status_code=303)


@router.post("/task")
def decide(request: Request, person: Administrator, form: Form) -> Response:  # noqa: ARG001
    """Show a flagged item again, or close it for good."""
    overview.set_task_state(
        page_of(request).store.database, field(form, "task"), field(form, "state")
    )
    return RedirectResponse("/admin#flagged", status_code=303)


def _overview(request: Request) -> dict[str, Any]:
    """Computed anew only when something has been said since: the bootstraps take a while."""
    store = page_of(request).store
    state = store.database.read(overview.fingerprint)
    with _computing:
        cached = _cache.get(id(store))
        if cached is None or cached[0] != state:
            cached = (state, overview.overview(store))
            _cache[id(store)] = cached
    return cached[1]
