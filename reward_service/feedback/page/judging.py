"""The rater's routes: sign in, agree, judge, set aside, undo. Every form ends in a redirect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from reward_service.feedback import people
from reward_service.feedback.assignment import REASONS, is_paused
from reward_service.feedback.erasure import data_of
from reward_service.feedback.leases import NotYoursError
from reward_service.feedback.page import views
from reward_service.feedback.page.session import (
    Form,
    Someone,
    field,
    language_of,
    maybe_signed_in,
    sign_in,
)
from reward_service.feedback.page.texts import LANGUAGES, TEXTS

if TYPE_CHECKING:
    from reward_service.feedback.page.app import Page

router = APIRouter()


def render(request: Request, template: str, status: int = 200, **values: object) -> Response:
    from reward_service.feedback.page.app import render as render_page  # it includes these routes

    return render_page(request, template, status, **values)


def page_of(request: Request) -> Page:
    page: Page = request.app.state.page
    return page


@router.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/")
def start(request: Request) -> Response:
    if maybe_signed_in(request) is not None:
        return RedirectResponse("/judge", status_code=303)
    return render(request, "sign_in.html.j2", token="", bad=False)


@router.get("/join/{token}")
def join(request: Request, token: str) -> Response:
    """An invitation link. Signing in takes a click, so that a link preview does not."""
    return render(request, "sign_in.html.j2", token=token, bad=False)


@router.post("/sign-in")
def enter(request: Request, form: Form) -> Response:
    person = sign_in(request, field(form, "token"))
    if person is None:
        return render(request, "sign_in.html.j2", 403, token="", bad=True)
    return RedirectResponse("/judge", status_code=303)


@router.post("/sign-out")
def leave(request: Request, form: Form) -> Response:  # noqa: ARG001  (checked)
    request.session.clear()
    return RedirectResponse("/", status_code=303)


@router.post("/language")
def choose_language(request: Request, form: Form) -> Response:
    language, back = field(form, "language"), field(form, "back")
    if language in LANGUAGES:
        request.session["language"] = language
    # Only a path of this page: `//elsewhere` would be another host.
    safe = back.startswith("/") and not back.startswith("//") and "\\" not in back
    return RedirectResponse(back if safe else "/", status_code=303)


@router.get("/welcome")
def welcome(request: Request, person: Someone) -> Response:
    page, language = page_of(request), language_of(request)
    return render(
        request,
        "welcome.html.j2",
        instructions=page.instructions[language],
        consent=page.consent[language],
        agreed=_has_agreed(request, person.annotator_id),
        missing=False,
    )


@router.post("/welcome")
def agree(request: Request, person: Someone, form: Form) -> Response:
    page, language = page_of(request), language_of(request)
    text = page.consent[language]
    if field(form, "agree") != "yes":
        return render(
            request,
            "welcome.html.j2",
            422,
            instructions=page.instructions[language],
            consent=text,
            agreed=False,
            missing=True,
        )
    people.agree(page.store.database, person.annotator_id, text=text, language=language)
    return RedirectResponse("/judge", status_code=303)


@router.get("/judge")
def judge(request: Request, person: Someone, diff: bool | None = None, note: str = "") -> Response:
    page = page_of(request)
    if diff is not None:
        request.session["diff"] = diff  # until it is switched off, not for one item
    differences = bool(request.session.get("diff"))
    if not _has_agreed(request, person.annotator_id):
        return RedirectResponse("/welcome", status_code=303)
    given = page.assignments.next(person.annotator_id)
    database = page.store.database
    progress = database.read(lambda c: views.progress_of(c, person.annotator_id))
    item = None if given is None else views.item_of(given, differences=differences)
    return render(
        request,
        "judge.html.j2",
        item=item,
        progress=progress,
        paused=given is None and database.read(is_paused),
        diff=differences,
        criteria=page.config.criteria,
        reasons=REASONS,
        note=TEXTS[language_of(request)].get(note, "") if note in _NOTES else "",
    )


_NOTES = ("undone", "nothing_to_undo")


@router.post("/judge")
def answer(request: Request, person: Someone, form: Form) -> Response:
    page = page_of(request)
    assignment_id = _assignment_id(form)
    given = page.assignments.get(person.annotator_id, assignment_id)
    said = views.answer_of(form, given, page.config.criteria)
    page.assignments.submit(person.annotator_id, assignment_id, said)
    return RedirectResponse("/judge", status_code=303)


@router.post("/aside")
def set_aside(request: Request, person: Someone, form: Form) -> Response:
    page_of(request).assignments.set_aside(
        person.annotator_id,
        _assignment_id(form),
        action=field(form, "action"),
        reason=field(form, "reason"),
        comment=field(form, "comment"),
    )
    return RedirectResponse("/judge", status_code=303)


@router.post("/undo")
def undo(request: Request, person: Someone, form: Form) -> Response:  # noqa: ARG001
    undone = page_of(request).assignments.undo(person.annotator_id)
    note = "undone" if undone is not None else "nothing_to_undo"
    return RedirectResponse(f"/judge?note={note}", status_code=303)


@router.get("/me.json")
def my_data(request: Request, person: Someone) -> Response:
    """Everything that is stored about the person who asks."""
    found = data_of(page_of(request).store, person.annotator_id)
    headers = {"Content-Disposition": "attachment; filename=my-judgements.json"}
    return JSONResponse(found, headers=headers)


def _has_agreed(request: Request, annotator_id: str) -> bool:
    page = page_of(request)
    return people.has_agreed(page.store.database, annotator_id, list(page.consent.values()))


def _assignment_id(form: Form) -> int:
    text = field(form, "assignment")
    if not text.isdecimal() or len(text) > 12:
        raise NotYoursError("this form names no item")
    return int(text)
