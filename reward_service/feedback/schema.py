"""The tables of the store. A change here needs a revision in ``migrations/versions``.

Three kinds of table. *What is judged*: pairs and tasks. *Who does what*: annotators, their
invitations and consent, assignments. *What was said*: comparisons, ratings, rankings and the log
of actions, all append-only; a row is taken back by a later row that supersedes it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

HEAD = "r0002"
"""The newest revision in ``migrations/versions``."""

FIRST = "r0001"
"""The revision that a store of version 0.1.0 is at: it was made before stores had revisions."""

metadata = MetaData()

annotators = Table(
    "annotators",
    metadata,
    Column("annotator_id", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
)
pairs = Table(
    "pairs",
    metadata,
    Column("item_id", String(256), primary_key=True),
    Column("prompt_id", String(256), nullable=False, index=True),
    Column("prompt", Text, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("a_text", Text, nullable=False),
    Column("a_model", String(256), nullable=False),
    Column("b_text", Text, nullable=False),
    Column("b_model", String(256), nullable=False),
)


def _judgement_columns() -> list[Column[Any]]:
    """What every row of judgement has besides what was said."""
    return [
        Column("created_at", String(40), nullable=False),
        Column("stored_at", String(40), nullable=False),
        # True: this person's earlier judgement of this item no longer holds.
        Column("withdrawn", Boolean, nullable=False, server_default=false()),
        # 1 for the second look at an item that was shown again on purpose.
        Column("repeat", Integer, nullable=False, server_default="0"),
    ]


comparisons = Table(
    "comparisons",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item_id", ForeignKey("pairs.item_id"), nullable=False, index=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    Column("choice", String(16), nullable=False),
    Column("strength", Integer, nullable=False),
    Column("shown_first", String(1), nullable=False),
    Column("seconds", Float, nullable=False),
    *_judgement_columns(),
)
ratings = Table(
    "ratings",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item_id", String(256), nullable=False, index=True),
    Column("prompt_id", String(256), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("model", String(256), nullable=False),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    Column("criterion", String(128), nullable=False),
    Column("value", Integer, nullable=False),
    *_judgement_columns(),
)
rankings = Table(
    "rankings",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item_id", ForeignKey("tasks.task_id"), nullable=False, index=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    # Numbers of the candidates, best first.
    Column("ranking", JSON, nullable=False),
    Column("seconds", Float, nullable=False),
    *_judgement_columns(),
)
tasks = Table(
    "tasks",
    metadata,
    Column("task_id", String(256), primary_key=True),
    Column("kind", String(16), nullable=False),
    # What is shown: prompt_id, prompt, messages and candidates, each {text, model}.
    Column("content", JSON, nullable=False),
    Column("overlap", Integer, nullable=False),
    # Higher is asked first: how little a reward model knows of it.
    Column("priority", Float, nullable=False),
    # Decides among equals; a hash, so that neighbours in the data do not come in a row.
    Column("shuffle", Integer, nullable=False),
    # The known answer of a gold item, as an answer of the page is kept.
    Column("gold", JSON(none_as_null=True), nullable=True),
    Column("round", Integer, nullable=False),
    # open, complete (it has its answers), flagged (withheld) or closed (by an administrator).
    Column("state", String(16), nullable=False),
    # Answers given and promised: finished assignments and leases that have not expired.
    Column("taken", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("flags", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
    Index("ix_tasks_next", "state", "priority", "taken", "shuffle"),
)
assignments = Table(
    "assignments",
    metadata,
    Column("assignment_id", Integer, primary_key=True, autoincrement=True),
    Column("task_id", ForeignKey("tasks.task_id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False),
    Column("repeat", Integer, nullable=False),
    # Numbers of the candidates in the order in which they are shown.
    Column("shown", JSON, nullable=False),
    # leased, expired, done, skipped or flagged.
    Column("state", String(16), nullable=False),
    # Seconds since 1970.
    Column("shown_at", Float, nullable=False),
    Column("leased_until", Float, nullable=False),
    Column("finished_at", Float, nullable=True),
    Column("answer", JSON(none_as_null=True), nullable=True),
    UniqueConstraint("task_id", "annotator_id", "repeat", name="uq_assignments_once"),
    Index("ix_assignments_person", "annotator_id", "state"),
    Index("ix_assignments_leases", "state", "leased_until"),
)
actions = Table(
    "actions",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("assignment_id", ForeignKey("assignments.assignment_id"), nullable=False, index=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    # done, skipped, flagged or undone.
    Column("action", String(16), nullable=False),
    Column("reason", String(32), nullable=False),
    Column("comment", Text, nullable=False),
    Column("created_at", String(40), nullable=False),
)
invites = Table(
    "invites",
    metadata,
    # SHA-256 of the token; the token itself is kept nowhere.
    Column("token_hash", String(64), primary_key=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    # rater or administrator.
    Column("role", String(16), nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked", Boolean, nullable=False, server_default=false()),
)
consents = Table(
    "consents",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    # SHA-256 of the text that was agreed to.
    Column("text_hash", String(64), nullable=False),
    Column("language", String(8), nullable=False),
    Column("created_at", String(40), nullable=False),
)
settings = Table(
    "settings",
    metadata,
    # paused; more may come.
    Column("name", String(64), primary_key=True),
    Column("value", JSON, nullable=False),
)
erasures = Table(
    "erasures",
    metadata,
    # SHA-256 of the pseudonym, so that an import does not bring an erased person back.
    Column("annotator_hash", String(64), primary_key=True),
    Column("erased_at", String(40), nullable=False),
    Column("rows", Integer, nullable=False),
)
imports = Table(
    "imports",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    # SHA-256 of the files that were read, as the manifest says it.
    Column("manifest_hash", String(64), nullable=False, index=True),
    Column("format", String(32), nullable=False),
    Column("rows", Integer, nullable=False),
    Column("masked", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
)
