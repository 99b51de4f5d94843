"""Run by Alembic: the connection comes from ``feedback.database``, in a transaction of its own."""

from __future__ import annotations

from alembic import context

from reward_service.feedback.schema import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("revisions are applied when a store is opened: use `rlhf feedback stats`")
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
