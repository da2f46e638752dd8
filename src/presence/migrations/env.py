"""What alembic runs: over the connection that `presence.migrate` hands it, in that connection's transaction."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run `presence migrate`: it holds the lock that several replicas need")

context.configure(
    connection=connection,
    target_metadata=None,
    on_version_apply=context.config.attributes["on_version_apply"],
)
context.run_migrations()
