"""People: tasks, assignments, invitations, consent, rankings, erasure and imports."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("comparisons", "ratings"):
        with op.batch_alter_table(table) as batch:
            for column in _judgement_columns():
                batch.add_column(column)
    _create_tasks()
    _create_assignments()
    _create_people()
    op.create_table(
        "rankings",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column(
            "item_id", sa.String(256), sa.ForeignKey("tasks.task_id"), nullable=False, index=True
        ),
        _person(),
        sa.Column("ranking", sa.JSON, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("stored_at", sa.String(40), nullable=False),
        *_judgement_columns(),
    )
    op.create_table(
        "erasures",
        sa.Column("annotator_hash", sa.String(64), primary_key=True),
        sa.Column("erased_at", sa.String(40), nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
    )
    op.create_table(
        "imports",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("manifest_hash", sa.String(64), nullable=False, index=True),
        sa.Column("format", sa.String(32), nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("masked", sa.Integer, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    if "feedback_schema" in sa.inspect(op.get_bind()).get_table_names():
        op.drop_table("feedback_schema")  # the version number of 0.1.0


def _judgement_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("withdrawn", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("repeat", sa.Integer, nullable=False, server_default="0"),
    ]


def _person() -> sa.Column[Any]:
    return sa.Column(
        "annotator_id",
        sa.String(128),
        sa.ForeignKey("annotators.annotator_id"),
        nullable=False,
        index=True,
    )


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(256), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("priority", sa.Float, nullable=False),
        sa.Column("shuffle", sa.Integer, nullable=False),
        sa.Column("gold", sa.JSON, nullable=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("taken", sa.Integer, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("flags", sa.Integer, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_index("ix_tasks_next", "tasks", ["state", "priority", "taken", "shuffle"])


def _create_assignments() -> None:
    op.create_table(
        "assignments",
        sa.Column("assignment_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("task_id", sa.String(256), sa.ForeignKey("tasks.task_id"), nullable=False),
        sa.Column(
            "annotator_id", sa.String(128), sa.ForeignKey("annotators.annotator_id"), nullable=False
        ),
        sa.Column("repeat", sa.Integer, nullable=False),
        sa.Column("shown", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("shown_at", sa.Float, nullable=False),
        sa.Column("leased_until", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float, nullable=True),
        sa.Column("answer", sa.JSON, nullable=True),
        sa.UniqueConstraint("task_id", "annotator_id", "repeat", name="uq_assignments_once"),
    )
    op.create_index("ix_assignments_person", "assignments", ["annotator_id", "state"])
    op.create_index("ix_assignments_leases", "assignments", ["state", "leased_until"])
    op.create_table(
        "actions",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column(
            "assignment_id",
            sa.Integer,
            sa.ForeignKey("assignments.assignment_id"),
            nullable=False,
            index=True,
        ),
        _person(),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )


def _create_people() -> None:
    op.create_table(
        "invites",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        _person(),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("revoked", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_table(
        "consents",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        _person(),
        sa.Column("text_hash", sa.String(64), nullable=False),
        sa.Column("language", sa.String(8), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "settings",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    for table in (
        "imports",
        "erasures",
        "rankings",
        "settings",
        "consents",
        "invites",
        "actions",
        "assignments",
        "tasks",
    ):
        op.drop_table(table)
    for table in ("comparisons", "ratings"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("withdrawn")
            batch.drop_column("repeat")
