"""Rows of other files into the store: masked, without erased people, each set of files once."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, select

from actors.trajectory import Message
from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.feedback.assignment import give_answer
from reward_service.feedback.erasure import erased
from reward_service.feedback.privacy import Scanner, mask, scan
from reward_service.feedback.schema import imports, settings, tasks
from reward_service.feedback.store import Entry, FeedbackStore, item_of, now
from reward_service.feedback.tasks import Answer, Task, row_of_task, task_of_judgement


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        rows: Judgements in the files.
        new: Those that were not there yet.
        masked: Pieces of personal data replaced.
        left_out: Judgements of people who were erased.
        again: These very files were imported before.
    """

    rows: int
    new: int
    masked: int
    left_out: int
    again: bool


def import_entries(
    store: FeedbackStore,
    entries: Sequence[Entry[Any]],
    *,
    manifest_hash: str,
    form: str,
    gold: Mapping[str, Answer] | None = None,
    masking: bool = True,
    scanner: Scanner = scan,
) -> Imported:
    """Add judgements, all or none.

    Args:
        manifest_hash: SHA-256 of the files; kept with the import.
        gold: Known answers by item: what was said of these measures people and is not trained on.
        masking: Replace personal data in texts, and names of people that are personal data by
            pseudonyms that only this store can make.
        scanner: What finds personal data.

    Raises:
        ValueError: An item of the same id shows something else, here or in the store.
    """
    answers = gold or {}
    salt = _salt(store)
    cleaner = _Cleaner(salt, scanner) if masking else None
    cleaned = [entry if cleaner is None else cleaner.entry(entry) for entry in entries]

    def write(connection: Connection) -> Imported:
        gone = _erased_names(connection, salt, entries)
        kept = [
            clean
            for entry, clean in zip(entries, cleaned, strict=True)
            if entry.judgement.annotator.annotator_id not in gone
        ]
        about = (
            task_of_judgement(e.judgement, answers.get(item_of(e.judgement)))
            for e in kept
            if isinstance(e.judgement, Ranking) or item_of(e.judgement) in answers
        )
        _add_closed(connection, about, store.database.shown)
        new = store.write_history(connection, kept)
        before = select(imports.c.number).where(imports.c.manifest_hash == manifest_hash)
        again = connection.execute(before).first() is not None
        found = Imported(
            rows=len(entries),
            new=new,
            masked=0 if cleaner is None else cleaner.found,
            left_out=len(cleaned) - len(kept),
            again=again,
        )
        connection.execute(
            imports.insert().values(
                manifest_hash=manifest_hash,
                format=form,
                rows=found.rows,
                masked=found.masked,
                created_at=now(),
            )
        )
        return found

    return store.database.write(write)


class _Cleaner:
    """Masks texts and counts what it found."""

    def __init__(self, salt: str, scanner: Scanner) -> None:
        self._salt = salt
        self._scanner = scanner
        self.found = 0

    def entry(self, entry: Entry[Any]) -> Entry[Any]:
        said = entry.judgement
        changes: dict[str, Any] = {"annotator": self._annotator(said.annotator)}
        if isinstance(said, Comparison):
            changes["pair"] = self._pair(said.pair)
        else:
            changes["prompt"] = self.text(said.prompt)
            if isinstance(said, Rating):
                changes["response"] = self.candidate(said.response)
            else:
                changes["messages"] = self.messages(said.messages)
                changes["candidates"] = tuple(self.candidate(c) for c in said.candidates)
        return replace(entry, judgement=replace(said, **changes))

    def _annotator(self, annotator: Annotator) -> Annotator:
        name = annotator.annotator_id
        if annotator.kind == "human" and self._scanner(name):
            name = _pseudonym(self._salt, name)
        return replace(annotator, annotator_id=name)

    def _pair(self, pair: Pair) -> Pair:
        return replace(
            pair,
            prompt=self.text(pair.prompt),
            messages=self.messages(pair.messages),
            a=self.candidate(pair.a),
            b=self.candidate(pair.b),
        )

    def candidate(self, candidate: Candidate) -> Candidate:
        return replace(candidate, text=self.text(candidate.text))

    def messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(Message(role=m["role"], content=self.text(m["content"])) for m in messages)

    def text(self, text: str) -> str:
        masked = mask(text, self._scanner)
        self.found += len(masked.findings)
        return masked.text


def masked_task(task: Task, scanner: Scanner = scan) -> Task:
    """A task with personal data masked, for storage."""
    cleaner = _Cleaner("", scanner)
    return replace(
        task,
        prompt=cleaner.text(task.prompt),
        messages=cleaner.messages(task.messages),
        candidates=tuple(cleaner.candidate(c) for c in task.candidates),
    )


def _erased_names(connection: Connection, salt: str, entries: Sequence[Entry[Any]]) -> set[str]:
    """Those of the names that were erased, as they are or under the pseudonym made of them.

    Both, as an import may have been with masking before and without it now, or the reverse.
    """
    names = {entry.judgement.annotator.annotator_id for entry in entries}
    pseudonyms = {name: _pseudonym(salt, name) for name in names}
    gone = erased(connection, sorted(names.union(pseudonyms.values())))
    return {name for name in names if name in gone or pseudonyms[name] in gone}


def _add_closed(connection: Connection, about: Iterable[Task], shown: str) -> None:
    """The closed tasks that imported rankings and gold items are about."""
    added: dict[str, Task] = {}
    for task in about:
        if added.get(task.task_id) == task:
            continue
        query = select(tasks).where(tasks.c.task_id == task.task_id)
        known = connection.execute(query).first()
        if known is None:
            connection.execute(tasks.insert().values(**row_of_task(task) | {"state": "closed"}))
        else:
            other = _difference(known, task)
            if other:
                raise ValueError(
                    f"tasks: {task.task_id!r} is in {shown} already with another {other}: what "
                    "was judged must not change, use a new id"
                )
            give_answer(connection, task, known.gold)
        added[task.task_id] = task


def _difference(known: Row[Any], task: Task) -> str:
    """What a task shows otherwise than the stored one of its id; empty when it is the same."""
    mine, theirs = task.content, known.content
    if known.kind != task.kind:
        return "kind"
    if theirs["prompt"] != mine["prompt"]:
        return "prompt"
    if task.kind != "rating" and theirs["messages"] != mine["messages"]:  # ratings keep none
        return "messages"
    texts = [[c["text"] for c in content["candidates"]] for content in (mine, theirs)]
    return "candidates" if texts[0] != texts[1] else ""


def _pseudonym(salt: str, name: str) -> str:
    digest = hmac.new(salt.encode(), name.encode(), hashlib.sha256).hexdigest()
    return f"person-{digest[:12]}"


def _salt(store: FeedbackStore) -> str:
    """The store's own secret for pseudonyms; made once."""

    def write(connection: Connection) -> str:
        found = connection.execute(select(settings.c.value).where(settings.c.name == "salt"))
        salt = found.scalar()
        if salt is None:
            salt = secrets.token_hex(16)
            connection.execute(settings.insert().values(name="salt", value=salt))
        return str(salt)

    return store.database.write(write)
