"""Annotators, pairs, comparisons and ratings: the store of version 0.1.0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "annotators",
        sa.Column("annotator_id", sa.String(128), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
    )
    op.create_table(
        "pairs",
        sa.Column("item_id", sa.String(256), primary_key=True),
        sa.Column("prompt_id", sa.String(256), nullable=False, index=True),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("messages", sa.JSON, nullable=False),
        sa.Column("a_text", sa.Text, nullable=False),
        sa.Column("a_model", sa.String(256), nullable=False),
        sa.Column("b_text", sa.Text, nullable=False),
        sa.Column("b_model", sa.String(256), nullable=False),
    )
    op.create_table(
        "comparisons",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column(
            "item_id", sa.String(256), sa.ForeignKey("pairs.item_id"), nullable=False, index=True
        ),
        sa.Column(
            "annotator_id",
            sa.String(128),
            sa.ForeignKey("annotators.annotator_id"),
            nullable=False,
            index=True,
        ),
        sa.Column("choice", sa.String(16), nullable=False),
        sa.Column("strength", sa.Integer, nullable=False),
        sa.Column("shown_first", sa.String(1), nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("stored_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "ratings",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("item_id", sa.String(256), nullable=False, index=True),
        sa.Column("prompt_id", sa.String(256), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("response", sa.Text, nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column(
            "annotator_id",
            sa.String(128),
            sa.ForeignKey("annotators.annotator_id"),
            nullable=False,
            index=True,
        ),
        sa.Column("criterion", sa.String(128), nullable=False),
        sa.Column("value", sa.Integer, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("stored_at", sa.String(40), nullable=False),
    )


def downgrade() -> None:
    for table in ("ratings", "comparisons", "pairs", "annotators"):
        op.drop_table(table)
