"""Agent sessions, their history, and the replicas that own them."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make the three tables."""
    # No foreign key to the replica: rows outlive a replica that is swept, and each insert would lock its replica's row.
    op.execute(
        """
        CREATE TABLE agent_session (
            id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            agent_id     text NOT NULL,
            classroom_id uuid NOT NULL,
            replica_id   uuid NOT NULL,
            started_at   timestamptz NOT NULL,
            UNIQUE (classroom_id, agent_id)
        )
        -- Every row is deleted within hours: without this, dead rows gather until a fifth of the table is dead.
        WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000)
        """
    )
    op.execute("CREATE INDEX agent_session_replica ON agent_session (replica_id)")
    # Lists of a classroom go by id, a page at a time.
    op.execute("CREATE INDEX agent_session_page ON agent_session (classroom_id, id)")
    op.execute(
        """
        CREATE TABLE agent_session_history (
            id           bigint PRIMARY KEY,  -- the session's own
            agent_id     text NOT NULL,
            classroom_id uuid NOT NULL,
            lifetime     tstzrange NOT NULL,
            reason       text NOT NULL
        )
        """
    )
    # Attendance asks for one classroom and a span of time. A GiST index over both would cost each insert more.
    op.execute("CREATE INDEX agent_session_history_attendance ON agent_session_history (classroom_id, lower(lifetime))")
    op.execute(
        """
        CREATE TABLE replica (
            id            uuid PRIMARY KEY,
            label         text NOT NULL,
            registered_at timestamptz NOT NULL,
            heartbeat_at  timestamptz NOT NULL
        )
        """
    )


def downgrade() -> None:
    """Drop them, with what is in them."""
    op.execute("DROP TABLE replica, agent_session_history, agent_session")
