"""What an administrator looks at: work done, agreement over time, people, models, flagged items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from reward_service.comparison import Comparison
from reward_service.feedback.aggregate import model_strengths
from reward_service.feedback.agreement import percent_agreement, wilson_interval
from reward_service.feedback.agreement_report import choice_counts, store_report
from reward_service.feedback.assignment import is_paused, open_answers
from reward_service.feedback.database import Database
from reward_service.feedback.leases import settle
from reward_service.feedback.raters import rater_quality
from reward_service.feedback.schema import (
    actions,
    assignments,
    comparisons,
    rankings,
    ratings,
    settings,
    tasks,
)
from reward_service.feedback.store import FeedbackStore

WINDOWS = 12
"""Points of the plot of agreement over time."""

ERRORS = "disagreements.json"
"""Below ``reward_model`` in a run directory; written when the reward model is trained."""


def fingerprint(connection: Connection) -> tuple[int, ...]:
    """Changes whenever something was said, done or set."""
    found = []
    for table in (comparisons, ratings, rankings, actions):
        found.append(connection.execute(select(func.max(table.c.number))).scalar() or 0)
        found.append(connection.execute(select(func.count()).select_from(table)).scalar() or 0)
    found.append(connection.execute(select(func.count()).select_from(tasks)).scalar() or 0)
    states = select(func.count()).select_from(tasks).where(tasks.c.state == "open")
    found.append(connection.execute(states).scalar() or 0)
    paused = connection.execute(select(func.count()).select_from(settings)).scalar()
    return (*found, paused or 0, int(is_paused(connection)))


def overview(store: FeedbackStore, *, seed: int = 0) -> dict[str, Any]:
    """All figures of the administrator's view, as JSON-able values."""
    said = store.comparisons()
    report = store_report(store, seed=seed)
    given, wanted = store.database.read(open_answers)
    return {
        "given": given,
        "wanted": wanted,
        "paused": store.database.read(is_paused),
        "states": store.database.read(_states),
        "agreement": report if report["items"] else None,
        "ratings": report["ratings"],
        "over_time": over_time(said),
        "people": [asdict(quality) for quality in rater_quality(store)],
        "others": store.database.read(_set_aside),
        "models": model_strengths(said, seed=seed),
        "flagged": store.database.read(_flagged),
    }


def over_time(said: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Agreement of two judges in up to twelve windows of as many judgements each, in order."""
    size = max(20, -(-len(said) // WINDOWS))
    by_item: dict[str, list[tuple[int, Comparison]]] = {}
    for number, comparison in enumerate(said):
        by_item.setdefault(comparison.pair.item_id, []).append((number, comparison))
    found = []
    for start in range(0, len(said), size):
        # An item belongs to the window of its last judgement.
        own = [
            [c for _, c in votes]
            for votes in by_item.values()
            if len(votes) > 1 and start <= votes[-1][0] < start + size
        ]
        if not own:
            continue
        value = percent_agreement(choice_counts([[c.choice for c in votes] for votes in own]))
        assert value is not None
        low, high = wilson_interval(value * len(own), len(own))
        found.append(
            {
                "until": said[min(start + size, len(said)) - 1].created_at[:16],
                "value": value,
                "low": low,
                "high": high,
                "items": len(own),
            }
        )
    return found


def reward_model_errors(run_dir: Path | None, most: int = 20) -> list[dict[str, Any]]:
    """Held-out pairs on which the reward model is surest and most people say the opposite."""
    if run_dir is None:
        return []
    # Of `rlhf loop`, the newest round that has one.
    of_rounds = sorted(run_dir.glob(f"round-*/reward_model/{ERRORS}"))
    path = of_rounds[-1] if of_rounds else run_dir / "reward_model" / ERRORS
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found[:most]


def set_task_state(database: Database, task_id: str, state: str) -> None:
    """Show a flagged item again (``open``, its flags forgotten) or close it.

    Raises:
        ValueError: Another state, or no such task.
    """
    if state not in ("open", "closed"):
        raise ValueError(f"a task can be opened or closed, not {state!r}")

    def write(connection: Connection) -> int:
        values: dict[str, Any] = {"state": state} | ({"flags": 0} if state == "open" else {})
        changed = tasks.update().where(tasks.c.task_id == task_id).values(**values)

        count = connection.execute(changed).rowcount
        settle(connection, task_id)
        return count

    if database.write(write) != 1:
        raise ValueError(f"there is no task {task_id!r}")


def _states(connection: Connection) -> dict[str, int]:
    query = select(tasks.c.state, func.count()).group_by(tasks.c.state)
    return {row[0]: row[1] for row in connection.execute(query)}


def _set_aside(connection: Connection) -> dict[str, dict[str, int]]:
    """Person -> how many they skipped and flagged."""
    query = (
        select(assignments.c.annotator_id, assignments.c.state, func.count())
        .where(assignments.c.state.in_(("skipped", "flagged")))
        .group_by(assignments.c.annotator_id, assignments.c.state)
    )
    found: dict[str, dict[str, int]] = {}
    for who, state, count in connection.execute(query):
        found.setdefault(who, {})[state] = count
    return found


def _flagged(connection: Connection) -> list[dict[str, Any]]:
    """Items that somebody flagged and nobody has decided on, with what was said of them."""
    rows = connection.execute(
        select(tasks.c.task_id, tasks.c.state, tasks.c.flags, tasks.c.content)
        .where(tasks.c.flags > 0, tasks.c.state != "closed")
        .order_by(tasks.c.flags.desc(), tasks.c.task_id)
        .limit(50)
    ).all()
    found = []
    for row in rows:
        reasons = connection.execute(
            select(actions.c.reason, actions.c.comment)
            .join(assignments, assignments.c.assignment_id == actions.c.assignment_id)
            .where(
                assignments.c.task_id == row.task_id,
                assignments.c.state == "flagged",
                actions.c.action == "flagged",
            )
        ).all()
        found.append(
            {
                "task_id": row.task_id,
                "state": row.state,
                "flags": row.flags,
                "prompt": row.content["prompt"],
                "texts": [candidate["text"] for candidate in row.content["candidates"]],
                "reasons": [(reason.reason, reason.comment) for reason in reasons],
            }
        )
    return found
