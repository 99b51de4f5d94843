"""What the templates are given: an item as a person sees it, with no trace of who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    ScalarSelect,
    and_,
    bindparam,
    func,
    select,
)

from actors.trajectory import Message
from reward_service.feedback.leases import Assignment
from reward_service.feedback.schema import assignments, tasks
from reward_service.feedback.tasks import Answer

# Words, single Chinese and Japanese characters, white space, and anything else by itself.
_PIECES = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|\s+|[^\w\s]"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of a text; ``marked`` when the other text does not have it there."""

    text: str
    marked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An assignment as the page shows it.

    Attributes:
        texts: The candidates in the order shown, each in pieces.
        before: The answer that was taken back, as a form value; empty without one.
    """

    assignment_id: int
    kind: str
    prompt: str
    messages: tuple[Message, ...]
    texts: tuple[tuple[Piece, ...], ...]
    before: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a person is.

    Attributes:
        done: Items judged by this person.
        left: Open items that this person has not seen.
        pace: Median seconds of the last twenty; ``None`` before the first.
    """

    done: int
    left: int
    pace: float | None


_MINE = assignments.c.annotator_id == bindparam("person")
_OPEN = and_(tasks.c.state == "open", tasks.c.gold.is_(None))


def _count(of: FromClause, *conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(of).where(*conditions).scalar_subquery()


# Built once: that costs more than to run them. What is left are the open tasks less those among
# them that the person has seen: two counts by index.
_COUNTS = select(
    _count(assignments, _MINE, assignments.c.state == "done"),
    _count(tasks, _OPEN),
    _count(
        assignments.join(tasks, tasks.c.task_id == assignments.c.task_id),
        _OPEN,
        _MINE,
        assignments.c.repeat == 0,
        assignments.c.state.in_(("done", "skipped", "flagged")),
    ),
)
_LATEST = (
    select(assignments.c.finished_at - assignments.c.shown_at)
    .where(_MINE, assignments.c.state == "done")
    .order_by(assignments.c.finished_at.desc())
    .limit(20)
)


def item_of(given: Assignment, *, differences: bool) -> Item:
    texts = [given.task.candidates[number].text for number in given.shown]
    pieces: list[tuple[Piece, ...]] = [(Piece(text=text),) for text in texts]
    if differences and len(texts) == 2:
        pieces = list(difference(texts[0], texts[1]))
    return Item(
        assignment_id=given.assignment_id,
        kind=given.task.kind,
        prompt=given.task.prompt,
        messages=given.task.messages,
        texts=tuple(pieces),
        before="" if given.answer is None else _shown_answer(given),
    )


def difference(first: str, second: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, word by word (Chinese: character by character).

    The pieces of a text put together are the text.
    """
    words: list[list[str]] = [_PIECES.findall(first), _PIECES.findall(second)]
    # White space is compared as one kind, or a double blank would tear the words around it apart.
    keys = [[" " if word.isspace() else word for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, from_a, to_a, from_b, to_b in matcher.get_opcodes():
        for side, piece in (
            (0, "".join(words[0][from_a:to_a])),
            (1, "".join(words[1][from_b:to_b])),
        ):
            if piece:
                sides[side].append(Piece(text=piece, marked=tag != "equal"))
    return tuple(sides[0]), tuple(sides[1])


def answer_of(form: Mapping[str, Any], given: Assignment, criteria: Sequence[str]) -> Answer:
    """A form's fields as an answer, with the order shown taken out of it.

    Raises:
        ValueError: A field is missing or has no meaning.
    """
    if given.task.kind == "comparison":
        choice = str(form.get("choice", ""))
        if choice in ("tie", "both_bad"):
            return {"choice": choice}
        side, _, strength = choice.partition("_")
        if side not in ("first", "second") or strength not in ("1", "2", "3"):
            raise ValueError(f"choice has no meaning: {choice!r}")
        number = given.shown[0 if side == "first" else 1]
        return {"choice": "ab"[number], "strength": int(strength)}
    if given.task.kind == "rating":
        return {"ratings": {c: _digit(form.get(f"rating-{n}")) for n, c in enumerate(criteria)}}
    places = [_digit(form.get(f"place-{n}")) for n in range(len(given.shown))]
    if sorted(places) != list(range(1, len(places) + 1)):
        raise ValueError("each text needs a place of its own")
    order = sorted(range(len(places)), key=lambda n: places[n])
    return {"ranking": [given.shown[n] for n in order]}


def progress_of(connection: Connection, annotator_id: str) -> Progress:
    person = {"person": annotator_id}
    done, open_tasks, seen = connection.execute(_COUNTS, person).one()
    seconds = sorted(float(value) for value in connection.execute(_LATEST, person).scalars())
    return Progress(
        done=done,
        left=max(0, open_tasks - seen),
        pace=seconds[len(seconds) // 2] if seconds else None,
    )


def _shown_answer(given: Assignment) -> str:
    """The choice as the form has it, so that the button can be marked."""
    answer = given.answer or {}
    choice = answer.get("choice", "")
    if choice not in ("a", "b"):
        return str(choice)
    side = "first" if given.shown[0] == "ab".index(choice) else "second"
    return f"{side}_{answer['strength']}"


def _digit(value: object) -> int:
    if isinstance(value, str) and len(value) == 1 and value in "123456789":
        return int(value)
    raise ValueError(f"a number from 1 to 9 is missing, got {value!r}")
