"""A person's rights: what is stored of them, its erasure, and the end of its time.

The one exception to append-only. What is erased leaves the tables and the files, and does not come
back by an import; that somebody was erased stays on record, under a hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Table, and_, delete, exists, func, select, union

from reward_service.feedback import schema
from reward_service.feedback.leases import settle
from reward_service.feedback.people import hash_of
from reward_service.feedback.store import FeedbackStore, now

# Rows that point at others go first.
_ABOUT_A_PERSON: Sequence[tuple[str, Table]] = (
    ("actions", schema.actions),
    ("assignments", schema.assignments),
    ("comparisons", schema.comparisons),
    ("ratings", schema.ratings),
    ("rankings", schema.rankings),
    ("consents", schema.consents),
    ("invites", schema.invites),
    ("annotators", schema.annotators),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expired:
    """What had reached the end of its time."""

    judgements: int
    people: int


def data_of(store: FeedbackStore, annotator_id: str) -> dict[str, Any]:
    """Everything that is stored about a person, as JSON-able values.

    Raises:
        ValueError: There is nobody of this name.
    """

    def read(connection: Connection) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, table in _ABOUT_A_PERSON:
            columns = [c for c in table.columns if c.name not in ("key", "token_hash")]
            query = select(*columns).where(table.c.annotator_id == annotator_id)
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
        return found

    found = store.database.read(read)
    if not found["annotators"]:
        raise ValueError(f"there is nobody called {annotator_id!r} in {store.database.shown}")
    return {"person": annotator_id, "exported_at": now(), **found}


def erase(store: FeedbackStore, annotator_id: str) -> int:
    """Delete a person and all that they said, for good; how many rows.

    Items that they judged go back into the queue. Sets of judgements exported or models trained
    before still hold what they said: train again to be rid of it.

    Raises:
        ValueError: There is nobody of this name.
    """

    def write(connection: Connection) -> int:
        known = select(schema.annotators).where(schema.annotators.c.annotator_id == annotator_id)
        if connection.execute(known.with_for_update()).first() is None:
            raise ValueError(f"there is nobody called {annotator_id!r} in {store.database.shown}")
        _return_tasks(connection, schema.assignments.c.annotator_id == annotator_id)
        rows = 0
        for _, table in _ABOUT_A_PERSON:
            result = connection.execute(delete(table).where(table.c.annotator_id == annotator_id))
            rows += result.rowcount
        tombstones = schema.erasures
        hashed = hash_of(annotator_id)
        connection.execute(delete(tombstones).where(tombstones.c.annotator_hash == hashed))
        connection.execute(
            tombstones.insert().values(annotator_hash=hashed, erased_at=now(), rows=rows)
        )
        return rows

    rows = store.database.write(write)
    store.database.forget_deleted()
    return rows


def erased(connection: Connection, annotator_ids: Sequence[str]) -> set[str]:
    """Those of the names that were erased: an import leaves them out."""
    hashes = set(connection.execute(select(schema.erasures.c.annotator_hash)).scalars())
    return {name for name in annotator_ids if hash_of(name) in hashes}


def expire(store: FeedbackStore, retention_days: int) -> Expired:
    """Delete what people said more than ``retention_days`` ago, and accounts left with nothing.

    It is about people who were invited to judge: simulated judges, and data sets that were
    imported, keep their judgements. Accounts whose invitation is still valid stay.
    """
    limit = datetime.now(UTC) - timedelta(days=retention_days)
    before = limit.isoformat(timespec="milliseconds")
    human = select(schema.invites.c.annotator_id)

    def write(connection: Connection) -> Expired:
        given = schema.assignments
        # What was never finished, or undone, ended with its lease.
        ended = func.coalesce(given.c.finished_at, given.c.leased_until)
        old = and_(given.c.annotator_id.in_(human), ended < limit.timestamp())
        _return_tasks(connection, and_(old, given.c.state == "leased"))
        gone = select(given.c.assignment_id).where(old)
        connection.execute(delete(schema.actions).where(schema.actions.c.assignment_id.in_(gone)))
        connection.execute(delete(given).where(old))
        judgements = 0
        for table in (schema.comparisons, schema.ratings, schema.rankings):
            result = connection.execute(
                delete(table).where(table.c.annotator_id.in_(human), table.c.stored_at < before)
            )
            judgements += result.rowcount
        return Expired(judgements=judgements, people=_forget_idle(connection, limit, before))

    found = store.database.write(write)
    if found.judgements or found.people:
        store.database.forget_deleted()
    return found


def _forget_idle(connection: Connection, limit: datetime, before: str) -> int:
    """Delete people with nothing stored and no invitation that is younger than the limit."""
    busy = union(
        *(
            select(table.c.annotator_id)
            for name, table in _ABOUT_A_PERSON
            if name not in ("consents", "invites", "annotators")
        )
    ).subquery()
    people = schema.annotators
    invites = schema.invites
    idle = connection.execute(
        select(people.c.annotator_id).where(
            people.c.kind == "human",
            people.c.annotator_id.not_in(select(busy.c.annotator_id)),
            exists().where(invites.c.annotator_id == people.c.annotator_id),
            ~exists().where(
                invites.c.annotator_id == people.c.annotator_id,
                (invites.c.expires_at >= limit.timestamp()) | (invites.c.created_at >= before),
            ),
        )
    ).scalars()
    names = list(idle)
    for table in (schema.consents, schema.invites, people):
        connection.execute(delete(table).where(table.c.annotator_id.in_(names)))
    return len(names)


def _return_tasks(connection: Connection, condition: Any) -> None:
    """Take answers and promises off the counts of their tasks."""
    given = schema.assignments
    tasks = schema.tasks
    rows = connection.execute(
        select(given.c.task_id, given.c.state)
        .join(tasks, tasks.c.task_id == given.c.task_id)
        .where(
            condition,
            given.c.repeat == 0,
            tasks.c.gold.is_(None),
            given.c.state.in_(("leased", "done")),
        )
    ).all()
    for row in rows:
        connection.execute(
            tasks.update()
            .where(tasks.c.task_id == row.task_id)
            .values(taken=tasks.c.taken - 1, done=tasks.c.done - int(row.state == "done"))
        )
        settle(connection, row.task_id)
