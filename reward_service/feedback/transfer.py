"""Rows of other files into the store: masked, without erased people, each set of files once."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, select

from actors.trajectory import Message
from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.feedback.erasure import erased
from reward_service.feedback.privacy import Scanner, mask, scan
from reward_service.feedback.schema import imports, settings, tasks
from reward_service.feedback.store import Entry, FeedbackStore, now
from reward_service.feedback.tasks import Task, row_of_task


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
    masking: bool = True,
    scanner: Scanner = scan,
) -> Imported:
    """Add judgements, all or none.

    Args:
        manifest_hash: SHA-256 of the files; kept with the import.
        masking: Replace personal data in texts, and names of people that are personal data by
            pseudonyms that only this store can make.
        scanner: What finds personal data.
    """
    cleaner = _Cleaner(_salt(store), scanner) if masking else None
    cleaned = [entry if cleaner is None else cleaner.entry(entry) for entry in entries]

    def write(connection: Connection) -> Imported:
        names = {e.judgement.annotator.annotator_id for e in cleaned}
        gone = erased(connection, sorted(names))
        kept = [e for e in cleaned if e.judgement.annotator.annotator_id not in gone]
        _add_ranked(connection, [e.judgement for e in kept if isinstance(e.judgement, Ranking)])
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
            digest = hmac.new(self._salt.encode(), name.encode(), hashlib.sha256).hexdigest()
            name = f"person-{digest[:12]}"
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


def _add_ranked(connection: Connection, rankings: Sequence[Ranking]) -> None:
    """The closed tasks that imported rankings are about."""
    for ranking in {r.item_id: r for r in rankings}.values():
        known = select(tasks.c.task_id).where(tasks.c.task_id == ranking.item_id)
        if connection.execute(known).first() is None:
            task = Task(
                task_id=ranking.item_id,
                kind="ranking",
                prompt_id=ranking.prompt_id,
                prompt=ranking.prompt,
                messages=ranking.messages,
                candidates=ranking.candidates,
            )
            connection.execute(tasks.insert().values(**row_of_task(task) | {"state": "closed"}))


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
