"""Leases: a task promised to one person for a while. Steps inside a transaction of the caller's.

``tasks.taken`` counts the answers given and promised, so a task is never promised more often than
its overlap asks for. A promise that is not kept in time returns the task to the queue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, select

from reward_service.config import PeopleConfig
from reward_service.feedback.schema import annotators, assignments, tasks
from reward_service.feedback.tasks import Answer, Task, task_of_row


class NotYoursError(PermissionError):
    """The assignment is somebody else's, or does not exist: the same answer to both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One task shown to one person.

    Attributes:
        shown: Numbers of the candidates in the order in which they are shown.
        repeat: 1 for a second look, with the sides swapped.
        state: leased, expired, done, skipped or flagged.
        shown_at, leased_until: Seconds since 1970.
    """

    assignment_id: int
    annotator_id: str
    task: Task
    shown: tuple[int, ...]
    repeat: int
    state: str
    shown_at: float
    leased_until: float
    answer: Answer | None


class Leases:
    """Finds, gives and takes back leases."""

    def __init__(self, config: PeopleConfig, clock: Callable[[], float], seed: int | None) -> None:
        self._config = config
        self._clock = clock
        self._random = random.SystemRandom() if seed is None else random.Random(seed)

    def lock_person(self, connection: Connection, annotator_id: str) -> None:
        query = select(annotators.c.annotator_id).where(annotators.c.annotator_id == annotator_id)
        if connection.execute(query.with_for_update()).first() is None:
            raise NotYoursError(f"there is nobody called {annotator_id!r}")

    def expire(self, connection: Connection) -> None:
        """Return tasks whose lease is over to the queue."""
        late = connection.execute(
            joined()
            .where(assignments.c.state == "leased", assignments.c.leased_until < self._clock())
            .with_for_update(of=assignments, skip_locked=True)
        ).all()
        for row in late:
            self.give_back(connection, assignment_of(row._mapping))

    def give_back(self, connection: Connection, given: Assignment) -> None:
        connection.execute(
            assignments.update()
            .where(assignments.c.assignment_id == given.assignment_id)
            .values(state="expired")
        )
        self.count(connection, given, taken=-1)

    def held(self, connection: Connection, annotator_id: str) -> Assignment | None:
        row = connection.execute(
            joined()
            .where(assignments.c.annotator_id == annotator_id, assignments.c.state == "leased")
            .order_by(assignments.c.assignment_id)
            .limit(1)
        ).first()
        return None if row is None else assignment_of(row._mapping)

    def lease_next(self, connection: Connection, annotator_id: str) -> Assignment | None:
        """A gold item or a second look when its turn has come, else the next of the queue."""
        draw = self._random.random()
        config = self._config
        plain = and_(tasks.c.gold.is_(None), tasks.c.taken < tasks.c.overlap)
        found: Assignment | None = None
        if draw < config.repeat_share:
            # Only in between: somebody who waits for new items would get all theirs again.
            if self._next_open(connection, annotator_id, plain) is not None:
                found = self._lease_repeat(connection, annotator_id)
        elif draw < config.repeat_share + config.gold_share:
            found = self._lease_new(connection, annotator_id, tasks.c.gold.is_not(None))
        if found is None:
            found = self._lease_new(connection, annotator_id, plain)
        return found

    def _next_open(
        self, connection: Connection, annotator_id: str, condition: ColumnElement[bool]
    ) -> Task | None:
        """The first of the queue that this person has not seen; locked for the transaction."""
        seen = exists().where(
            assignments.c.task_id == tasks.c.task_id,
            assignments.c.annotator_id == annotator_id,
            assignments.c.state != "expired",
        )
        row = connection.execute(
            select(tasks)
            .where(tasks.c.state == "open", condition, ~seen)
            # Those that others have begun come first among equals: agreement is known early.
            .order_by(tasks.c.priority.desc(), tasks.c.taken.desc(), tasks.c.shuffle.desc())
            .limit(1)
            .with_for_update(of=tasks, skip_locked=True)
        ).first()
        return None if row is None else task_of_row(row._mapping)

    def _lease_new(
        self, connection: Connection, annotator_id: str, condition: ColumnElement[bool]
    ) -> Assignment | None:
        task = self._next_open(connection, annotator_id, condition)
        if task is None:
            return None
        before = connection.execute(
            joined().where(
                assignments.c.task_id == task.task_id,
                assignments.c.annotator_id == annotator_id,
                assignments.c.repeat == 0,
            )
        ).first()
        if before is not None:  # their lease of it had expired
            given = assignment_of(before._mapping)
            self.count(connection, given, taken=1)
            return self.lease_again(connection, given)
        shown = list(range(len(task.candidates)))
        self._random.shuffle(shown)
        return self._insert(connection, annotator_id, task, shown, repeat=0)

    def _lease_repeat(self, connection: Connection, annotator_id: str) -> Assignment | None:
        """An item this person judged a while ago, with the sides swapped."""
        again = assignments.alias("again")
        row = connection.execute(
            joined()
            .where(
                assignments.c.annotator_id == annotator_id,
                assignments.c.state == "done",
                assignments.c.repeat == 0,
                tasks.c.state.in_(("open", "complete")),
                tasks.c.gold.is_(None),
                ~exists().where(
                    again.c.task_id == assignments.c.task_id,
                    again.c.annotator_id == annotator_id,
                    again.c.repeat == 1,
                ),
            )
            .order_by(assignments.c.finished_at.desc())
            .offset(self._config.repeat_gap)
            .limit(1)
        ).first()
        if row is None:
            return None
        given = assignment_of(row._mapping)
        return self._insert(connection, annotator_id, given.task, given.shown[::-1], repeat=1)

    def _insert(
        self,
        connection: Connection,
        annotator_id: str,
        task: Task,
        shown: Sequence[int],
        *,
        repeat: int,
    ) -> Assignment:
        clock = self._clock()
        values = {
            "task_id": task.task_id,
            "annotator_id": annotator_id,
            "repeat": repeat,
            "shown": list(shown),
            "state": "leased",
            "shown_at": clock,
            "leased_until": clock + self._config.lease_minutes * 60,
        }
        result = connection.execute(assignments.insert().values(**values))
        number = result.inserted_primary_key
        assert number is not None
        given = self.own(connection, annotator_id, int(number[0]))
        self.count(connection, given, taken=1)
        return given

    def lease_again(self, connection: Connection, given: Assignment) -> Assignment:
        clock = self._clock()
        connection.execute(
            assignments.update()
            .where(assignments.c.assignment_id == given.assignment_id)
            .values(
                state="leased",
                shown_at=clock,
                leased_until=clock + self._config.lease_minutes * 60,
                finished_at=None,
                # What was said before stays, so that the page can show it.
            )
        )
        return self.own(connection, given.annotator_id, given.assignment_id)

    def own(
        self, connection: Connection, annotator_id: str, assignment_id: int, *, lock: bool = False
    ) -> Assignment:
        """This person's assignment; with ``lock`` nobody lets its lease expire meanwhile."""
        query = joined().where(
            assignments.c.assignment_id == assignment_id,
            assignments.c.annotator_id == annotator_id,
        )
        if lock:
            query = query.with_for_update(of=assignments)
        row = connection.execute(query).first()
        if row is None:
            raise NotYoursError("this item is not yours to judge")
        return assignment_of(row._mapping)

    def count(
        self, connection: Connection, given: Assignment, *, taken: int = 0, done: int = 0
    ) -> None:
        """Gold items and second looks are outside the overlap."""
        if given.repeat or given.task.gold is not None or not (taken or done):
            return
        connection.execute(
            tasks.update()
            .where(tasks.c.task_id == given.task.task_id)
            .values(taken=tasks.c.taken + taken, done=tasks.c.done + done)
        )
        if done:
            settle(connection, given.task.task_id)


def settle(connection: Connection, task_id: str) -> None:
    """A task that has its answers is complete, and open again when one is taken back.

    The queue is read through an index on the state: complete tasks cost it nothing.
    """
    enough = tasks.c.done >= tasks.c.overlap
    for before, after, reached in (("open", "complete", enough), ("complete", "open", ~enough)):
        connection.execute(
            tasks.update()
            .where(tasks.c.task_id == task_id, tasks.c.state == before, reached)
            .values(state=after)
        )


@cache  # to build it costs more than to run it
def joined() -> Select[Any]:
    """Assignments with their tasks; columns of both under their own names."""
    own = [c.label(f"given_{c.name}") for c in assignments.columns]
    return select(*own, *tasks.columns).join(tasks, tasks.c.task_id == assignments.c.task_id)


def assignment_of(row: Mapping[Any, Any]) -> Assignment:
    return Assignment(
        assignment_id=row["given_assignment_id"],
        annotator_id=row["given_annotator_id"],
        task=task_of_row(row),
        shown=tuple(row["given_shown"]),
        repeat=row["given_repeat"],
        state=row["given_state"],
        shown_at=row["given_shown_at"],
        leased_until=row["given_leased_until"],
        answer=row["given_answer"],
    )
