"""The administrator's figures, retention, and what is withheld, by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, select, update

from reward_service.comparison import Annotator, Candidate, Comparison, Pair
from reward_service.config import PeopleConfig
from reward_service.feedback import people, schema
from reward_service.feedback.assignment import Assignments, open_answers
from reward_service.feedback.erasure import Expired, data_of, erase, expire
from reward_service.feedback.overview import over_time, overview, reward_model_errors
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task, task_of_pair


def said(item: int, judge: str, choice: str) -> Comparison:
    pair = Pair(
        item_id=f"i{item}", prompt_id=f"p{item}", prompt="?",
        a=Candidate(text="x", model="m1"), b=Candidate(text="y", model="m2"),
    )  # fmt: skip
    return Comparison(
        pair=pair,
        annotator=Annotator(annotator_id=judge, kind="human"),
        choice=choice,  # type: ignore[arg-type]
        created_at=f"2026-01-01T10:{item:02d}:00+00:00",
    )


def test_agreement_over_time_falls_where_people_part() -> None:
    comparisons = []
    for item in range(40):
        comparisons += [said(item, "x", "a"), said(item, "y", "a" if item < 20 else "b")]
    points = over_time(comparisons)
    # windows of 20 judgements: ten items each
    assert [p["value"] for p in points] == [1.0, 1.0, 0.0, 0.0]
    assert [p["items"] for p in points] == [10] * 4
    assert points[0]["until"] == "2026-01-01T10:09"
    assert over_time([said(1, "x", "a")]) == []


def tasks(count: int) -> list[Task]:
    return [task_of_pair(said(n, "", "a").pair, overlap=2) for n in range(count)]


def test_an_erased_persons_items_go_back_and_withheld_ones_are_not_waited_for(
    store_location: str,
) -> None:
    config = PeopleConfig(repeat_share=0, gold_share=0, flags_to_withhold=1)
    with FeedbackStore(store_location) as store:
        desk = Assignments(store, config, seed=0)
        desk.add_tasks(tasks(3))
        names = [people.invite(store.database, days=1)[0] for _ in range(3)]
        for name in names[:2]:
            given = desk.next(name)
            assert given is not None
            desk.submit(name, given.assignment_id, {"choice": "a"})
        assert store.database.read(open_answers) == (2, 6)
        given = desk.next(names[0])
        assert given is not None
        desk.set_aside(names[0], given.assignment_id, action="flag", reason="broken")
        assert store.database.read(open_answers) == (2, 4)
        found = overview(store)
        assert (found["given"], found["wanted"]) == (2, 4)
        assert found["states"] == {"complete": 1, "open": 1, "flagged": 1}
        assert found["flagged"][0]["reasons"] == [("broken", "")]
        assert len(data_of(store, names[0])["actions"]) == 2
        assert erase(store, names[0]) > 4
        assert [c.annotator.annotator_id for c in store.comparisons()] == [names[1]]
        assert store.database.read(open_answers) == (1, 4)
        given = desk.next(names[2])
        assert given is not None
        assert given.task.task_id == store.comparisons()[0].pair.item_id, "begun, so first"


def test_retention_ends_judgements_and_idle_accounts(store_location: str) -> None:
    config = PeopleConfig(repeat_share=0, gold_share=0)
    old = "2020-01-01T00:00:00.000+00:00"
    with FeedbackStore(store_location) as store:
        desk = Assignments(store, config, clock=lambda: 1.6e9, seed=0)
        desk.add_tasks(tasks(2))
        name, _ = people.invite(store.database, days=1)
        fresh, _ = people.invite(store.database, days=1)
        given = desk.next(name)
        assert given is not None
        desk.submit(name, given.assignment_id, {"choice": "a"})
        imported = replace(said(9, "data-set", "a"), created_at=old)
        store.add_comparisons([imported])
        assert expire(store, 30).judgements == 0

        def age(connection) -> None:
            for table in (schema.comparisons,):
                connection.execute(update(table).values(stored_at=old))
            own = schema.invites.c.annotator_id == name
            connection.execute(
                update(schema.invites).where(own).values(created_at=old, expires_at=1.6e9)
            )

        store.database.write(age)
        found = expire(store, 30)
        assert (found.judgements, found.people) == (1, 1)
        assert store.comparisons() == [imported], "a data set is not a person"
        assert {a.annotator_id for a in store.annotators()} == {fresh, "data-set"}


def test_retention_ends_what_was_never_finished(store_location: str) -> None:
    """A flag that was undone, and two leases that nobody kept, one of which is still counted."""
    then = time.time() - 800 * 86_400
    config = PeopleConfig(repeat_share=0, gold_share=0, flags_to_withhold=1)
    with FeedbackStore(store_location) as store:
        clock = [then]
        desk = Assignments(store, config, clock=lambda: clock[0], seed=0)
        desk.add_tasks(tasks(3))
        flagged, expired, leased, recent = (
            people.invite(store.database, days=1)[0] for _ in "1234"
        )
        given = desk.next(flagged)
        assert given is not None
        desk.set_aside(
            flagged, given.assignment_id, action="flag", reason="other", comment="no thanks"
        )
        assert desk.undo(flagged) is not None
        assert desk.next(expired) is not None
        clock[0] += 3 * 86_400
        assert desk.next(leased) is not None  # the leases before it expire with this
        clock[0] = time.time()
        store.database.write(lambda c: _ended_invitations(c, (flagged, expired, leased), then))
        assert sorted(rows_of(store, schema.assignments, "state")) == ["expired"] * 2 + ["leased"]
        assert expire(store, 365) == Expired(judgements=0, people=3)
        assert expire(store, 365) == Expired(judgements=0, people=0)
        assert {a.annotator_id for a in store.annotators()} == {recent}
        for table in (schema.assignments, schema.actions):
            assert rows_of(store, table, "annotator_id") == []
        assert rows_of(store, schema.tasks, "taken") == [0, 0, 0]
        assert desk.next(recent) is not None


def rows_of(store: FeedbackStore, table: Table, column: str) -> list[Any]:
    return store.database.read(lambda c: list(c.execute(select(table.c[column])).scalars()))


def _ended_invitations(connection: Connection, names: Sequence[str], then: float) -> None:
    own = schema.invites.c.annotator_id.in_(names)
    old = "2020-01-01T00:00:00.000+00:00"
    connection.execute(update(schema.invites).where(own).values(created_at=old, expires_at=then))


def test_the_reward_models_errors_are_read_from_the_run(tmp_path: Path) -> None:
    assert reward_model_errors(tmp_path) == []
    assert reward_model_errors(None) == []
    (tmp_path / "reward_model").mkdir()
    rows = [{"item_id": str(n)} for n in range(30)]
    (tmp_path / "reward_model" / "disagreements.json").write_text(json.dumps(rows))
    assert len(reward_model_errors(tmp_path)) == 20
    newest = tmp_path / "round-02" / "reward_model"
    newest.mkdir(parents=True)
    (newest / "disagreements.json").write_text("[]")
    assert reward_model_errors(tmp_path) == []
