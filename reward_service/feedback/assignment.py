"""Who judges what next: overlap, leases, repeats, gold items and priority, without collisions.

Every step is one transaction. On SQLite a writer has the store to itself; on PostgreSQL the
person's row and the task's row are locked, and a task that another transaction holds is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, case, func, select

from reward_service.comparison import Annotator, Pair
from reward_service.config import PeopleConfig
from reward_service.feedback.database import Database
from reward_service.feedback.leases import Assignment, Leases, assignment_of, joined, settle
from reward_service.feedback.presidio import scanner_of
from reward_service.feedback.privacy import mask
from reward_service.feedback.schema import (
    actions,
    assignments,
    comparisons,
    rankings,
    ratings,
    settings,
    tasks,
)
from reward_service.feedback.store import FeedbackStore, now
from reward_service.feedback.tasks import (
    Answer,
    Task,
    checked_answer,
    entries_of,
    row_of_task,
    task_of_row,
)

REASONS = {
    "skip": ("too_hard", "unfamiliar", "too_long", "other"),
    "flag": ("harmful", "personal_data", "broken", "wrong_language", "other"),
}
"""Why an item was skipped or flagged; the page has words for each."""

MOST_COMMENT = 500


class Assignments:
    """Hands out tasks and takes answers.

    Args:
        store: Where everything is.
        config: Length of a lease, shares of gold and repeats, criteria.
        clock: Seconds since 1970; replaced in tests.
        seed: Of sides and of the shares; ``None`` draws them unpredictably.
    """

    def __init__(
        self,
        store: FeedbackStore,
        config: PeopleConfig,
        *,
        clock: Callable[[], float] = time.time,
        seed: int | None = None,
    ) -> None:
        self._store = store
        self._database: Database = store.database
        self._config = config
        self._clock = clock
        self._leases = Leases(config, clock, seed)
        self._scanner = scanner_of(config.privacy)

    def add_tasks(self, new: Sequence[Task]) -> int:
        """Put tasks into the queue; how many were new. The pairs of comparisons are stored too.

        A known answer for a task that is there and was not judged yet makes a gold item of it,
        which counts as new.

        Raises:
            ValueError: A task of the same id shows something else, has another known answer, or
                was judged as an ordinary item.
        """
        pairs = [task.pair for task in new if task.kind == "comparison"]

        def write(connection: Connection) -> int:
            self._store.write_pairs(connection, pairs)
            known = {
                row.task_id: row
                for row in connection.execute(
                    select(tasks.c.task_id, tasks.c.content, tasks.c.gold)
                )
            }
            rows, answers = [], 0
            for task in {task.task_id: task for task in new}.values():
                if task.task_id not in known:
                    rows.append(row_of_task(task))
                elif known[task.task_id].content != task.content:
                    raise ValueError(
                        f"task {task.task_id!r} is there already and shows something else: what "
                        "people judge must not change, use a new id"
                    )
                else:
                    answers += give_answer(connection, task, known[task.task_id].gold)
            if rows:
                connection.execute(tasks.insert(), rows)
            return len(rows) + answers

        return self._database.write(write)

    def set_priorities(self, priorities: Mapping[str, float]) -> None:
        """Ask about tasks with a higher priority first."""

        def write(connection: Connection) -> None:
            for task_id, priority in priorities.items():
                connection.execute(
                    tasks.update().where(tasks.c.task_id == task_id).values(priority=priority)
                )

        self._database.write(write)

    def next(self, annotator_id: str) -> Assignment | None:
        """What this person judges now: the item they hold, or a new one.

        ``None`` when there is nothing left for them, or collection is paused.
        """

        def write(connection: Connection) -> Assignment | None:
            self._leases.lock_person(connection, annotator_id)
            self._leases.expire(connection)
            held = self._leases.held(connection, annotator_id)
            if held is not None:
                return held
            if is_paused(connection):
                return None
            return self._leases.lease_next(connection, annotator_id)

        return self._database.write(write)

    def get(self, annotator_id: str, assignment_id: int) -> Assignment:
        """This person's assignment, in whatever state. Raises NotYoursError for any other."""
        return self._database.read(lambda c: self._leases.own(c, annotator_id, assignment_id))

    def submit(self, annotator_id: str, assignment_id: int, answer: Mapping[str, Any]) -> bool:
        """Take an answer; it is on the disk when this returns.

        Sent twice, it counts once: ``False`` when the assignment was finished before. An answer
        that comes after its lease has expired is taken too: nobody's work is thrown away.

        Raises:
            NotYoursError: Not this person's assignment.
            ValueError: The answer does not fit the task.
        """

        def write(connection: Connection) -> bool:
            self._leases.lock_person(connection, annotator_id)
            given = self._leases.own(connection, annotator_id, assignment_id, lock=True)
            if given.state not in ("leased", "expired"):
                return False
            checked = checked_answer(given.task, answer, self._config.criteria)
            self._record(connection, given, checked, withdrawn=False)
            self._finish(connection, given, "done", checked)
            self._leases.count(connection, given, taken=int(given.state == "expired"), done=1)
            self._log(connection, given, "done")
            return True

        return self._database.write(write)

    def set_aside(
        self, annotator_id: str, assignment_id: int, *, action: str, reason: str, comment: str = ""
    ) -> bool:
        """Skip (``action="skip"``) or flag an item; it does not come back to this person.

        Enough flags take the item out of the queue until an administrator has looked at it.

        Raises:
            NotYoursError: Not this person's assignment.
            ValueError: An unknown reason, or a comment that is too long.
        """
        if action not in REASONS or reason not in REASONS[action]:
            raise ValueError(f"to {action} needs one of the reasons {REASONS.get(action)}")
        if len(comment) > MOST_COMMENT:
            raise ValueError(f"the comment has {len(comment)} characters; {MOST_COMMENT} fit")
        state = {"skip": "skipped", "flag": "flagged"}[action]

        def write(connection: Connection) -> bool:
            self._leases.lock_person(connection, annotator_id)
            given = self._leases.own(connection, annotator_id, assignment_id, lock=True)
            if given.state not in ("leased", "expired"):
                return False
            self._finish(connection, given, state, None)
            self._leases.count(connection, given, taken=-int(given.state == "leased"))
            if state == "flagged":
                self._flag(connection, given, 1)
            self._log(connection, given, state, reason, mask(comment.strip(), self._scanner).text)
            return True

        return self._database.write(write)

    def undo(self, annotator_id: str) -> Assignment | None:
        """Take back the last thing this person did; again and again goes further back.

        The item is theirs to judge again. ``None`` when there is nothing to take back.
        """

        def write(connection: Connection) -> Assignment | None:
            self._leases.lock_person(connection, annotator_id)
            last = connection.execute(
                joined()
                .where(
                    assignments.c.annotator_id == annotator_id,
                    assignments.c.state.in_(("done", "skipped", "flagged")),
                )
                .order_by(assignments.c.finished_at.desc(), assignments.c.assignment_id.desc())
                .limit(1)
            ).first()
            if last is None:
                return None
            given = assignment_of(last._mapping)
            held = self._leases.held(connection, annotator_id)
            if held is not None:
                self._leases.give_back(connection, held)
            if given.state == "done":
                assert given.answer is not None
                self._record(connection, given, given.answer, withdrawn=True)
                self._leases.count(connection, given, done=-1)
            else:
                self._leases.count(connection, given, taken=1)
                if given.state == "flagged":
                    self._flag(connection, given, -1)
            self._log(connection, given, "undone")
            return self._leases.lease_again(connection, given)

        return self._database.write(write)

    def _record(
        self, connection: Connection, given: Assignment, answer: Answer, *, withdrawn: bool
    ) -> None:
        self._store.write_history(
            connection,
            entries_of(
                given.task,
                answer,
                Annotator(annotator_id=given.annotator_id, kind="human"),
                shown=given.shown,
                seconds=round(max(0.0, self._clock() - given.shown_at), 2),
                created_at=now(),
                repeat=given.repeat,
                withdrawn=withdrawn,
            ),
        )

    def _finish(
        self, connection: Connection, given: Assignment, state: str, answer: Answer | None
    ) -> None:
        connection.execute(
            assignments.update()
            .where(assignments.c.assignment_id == given.assignment_id)
            .values(state=state, answer=answer, finished_at=self._clock())
        )

    def _flag(self, connection: Connection, given: Assignment, by: int) -> None:
        chosen = tasks.c.task_id == given.task.task_id
        connection.execute(tasks.update().where(chosen).values(flags=tasks.c.flags + by))
        limit = self._config.flags_to_withhold
        state, reached = (
            ("flagged", tasks.c.flags >= limit)
            if by > 0
            else ("open", and_(tasks.c.flags < limit, tasks.c.state == "flagged"))
        )
        connection.execute(tasks.update().where(chosen, reached).values(state=state))
        settle(connection, given.task.task_id)

    def _log(
        self,
        connection: Connection,
        given: Assignment,
        action: str,
        reason: str = "",
        comment: str = "",
    ) -> None:
        connection.execute(
            actions.insert().values(
                assignment_id=given.assignment_id,
                annotator_id=given.annotator_id,
                action=action,
                reason=reason,
                comment=comment,
                created_at=now(),
            )
        )


def give_answer(connection: Connection, task: Task, known: Answer | None) -> bool:
    """Store the answer of a task that is there with the answer ``known``; whether it was needed.

    Raises:
        ValueError: It has another, or was judged as an ordinary item.
    """
    if task.gold is None or task.gold == known:
        return False
    if known is not None:
        raise ValueError(
            f"task {task.task_id!r} has another known answer already, {known}: use a new id"
        )
    for table in (comparisons, ratings, rankings):
        said = select(table.c.number).where(table.c.item_id == task.task_id).limit(1)
        if connection.execute(said).first() is not None:
            raise ValueError(
                f"task {task.task_id!r} was judged as an ordinary item already, and a known answer "
                "would take that out of what is trained on: use a new id"
            )
    chosen = tasks.c.task_id == task.task_id
    connection.execute(tasks.update().where(chosen).values(gold=task.gold))
    return True


def is_paused(connection: Connection) -> bool:
    found = connection.execute(select(settings.c.value).where(settings.c.name == "paused"))
    return bool(found.scalar())


def set_paused(connection: Connection, paused: bool) -> None:
    connection.execute(settings.delete().where(settings.c.name == "paused"))
    connection.execute(settings.insert().values(name="paused", value=paused))


def open_answers(connection: Connection, round_number: int | None = None) -> tuple[int, int]:
    """(answers given, answers wanted) over all tasks but gold items."""
    is_open = tasks.c.state == "open"
    counted = case(
        (is_open & (tasks.c.done > tasks.c.overlap), tasks.c.overlap), else_=tasks.c.done
    )
    # What is withheld or closed is complete with what it has.
    asked = case((is_open, tasks.c.overlap), else_=tasks.c.done)
    query = select(func.coalesce(func.sum(counted), 0), func.coalesce(func.sum(asked), 0)).where(
        tasks.c.gold.is_(None)
    )
    if round_number is not None:
        query = query.where(tasks.c.round == round_number)
    given, wanted = connection.execute(query).one()
    return int(given), int(wanted)


def open_pairs(connection: Connection) -> list[Pair]:
    """Pairs that still want answers, gold items apart."""
    query = select(tasks).where(
        tasks.c.state == "open", tasks.c.kind == "comparison", tasks.c.gold.is_(None)
    )
    return [task_of_row(row._mapping).pair for row in connection.execute(query)]
