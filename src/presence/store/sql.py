"""Every SQL statement. $1 is the replica that asks, wherever a row has an owner.

Row locks are taken in the order of session ids, keys are inserted in the order of (classroom_id, agent_id): replicas
that work on the same agents wait for each other and do not deadlock. All statements are for READ COMMITTED.
"""

from typing import Final

REGISTER_REPLICA: Final = """
INSERT INTO replica (id, label, registered_at, heartbeat_at) VALUES ($1, $2, now(), now())
ON CONFLICT (id) DO UPDATE SET label = excluded.label, heartbeat_at = now()
"""

HEARTBEAT: Final = "UPDATE replica SET heartbeat_at = now() WHERE id = $1 RETURNING true"

REMOVE_REPLICA: Final = """
DELETE FROM replica r WHERE r.id = $1 AND NOT EXISTS (SELECT FROM agent_session s WHERE s.replica_id = r.id)
"""

# New sessions. What is not returned had a row already: FIND_OWNERS says whose. Fenced by the replica's own row, which a
# sweep deletes: one row of NULLs when it is gone, and nothing was made. The lock holds off a sweep, not a heartbeat.
OPEN: Final = """
WITH me AS MATERIALIZED (
    SELECT id FROM replica WHERE id = $1 FOR KEY SHARE
), made AS (
    INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)
    SELECT w.agent_id, w.classroom_id, me.id, w.started_at
    FROM me, unnest($2::uuid[], $3::text[], $4::timestamptz[]) AS w (classroom_id, agent_id, started_at)
    ORDER BY w.classroom_id, w.agent_id
    ON CONFLICT (classroom_id, agent_id) DO NOTHING
    RETURNING id, classroom_id, agent_id
)
SELECT id, classroom_id, agent_id FROM made
UNION ALL
SELECT NULL, NULL, NULL WHERE NOT EXISTS (SELECT FROM me)
"""

# Whose are these rows? One that is not returned has vanished meanwhile: OPEN again.
FIND_OWNERS: Final = """
SELECT s.id, s.classroom_id, s.agent_id, s.started_at, s.replica_id
FROM unnest($1::uuid[], $2::text[]) AS w (classroom_id, agent_id)
JOIN agent_session s ON s.classroom_id = w.classroom_id AND s.agent_id = w.agent_id
"""

# Rows of other replicas go to history and new ones take their place, in one statement: nobody can come in between, and
# a replica that stops half way leaves no locks. Only the very sessions whose owners were asked to let go: what is not
# returned has vanished or changed hands meanwhile, OPEN again. Fenced as OPEN is.
TAKE_OVER: Final = """
WITH me AS MATERIALIZED (
    SELECT id FROM replica WHERE id = $1 FOR KEY SHARE
), found AS MATERIALIZED (
    SELECT s.id, w.started_at AS taken_at
    FROM unnest($2::bigint[], $3::timestamptz[]) AS w (id, started_at) JOIN agent_session s ON s.id = w.id
    WHERE s.replica_id <> $1 AND EXISTS (SELECT FROM me)
    ORDER BY s.id
    FOR UPDATE OF s
), gone AS (
    DELETE FROM agent_session s USING found f WHERE s.id = f.id
    RETURNING s.id, s.classroom_id, s.agent_id, s.started_at, f.taken_at
), moved AS (
    INSERT INTO agent_session_history (id, agent_id, classroom_id, lifetime, reason)
    SELECT id, agent_id, classroom_id, tstzrange(started_at, greatest(started_at, taken_at), '[]'), $4 FROM gone
), taken AS (
    INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)
    SELECT agent_id, classroom_id, $1, taken_at FROM gone
    RETURNING id, classroom_id, agent_id, started_at
)
SELECT id, classroom_id, agent_id, started_at FROM taken
UNION ALL
SELECT NULL, NULL, NULL, NULL WHERE NOT EXISTS (SELECT FROM me)
"""

# Did an attempt whose end is not known leave a row?
FIND_LEFT_BEHIND: Final = """
SELECT s.id, s.classroom_id, s.agent_id, s.started_at
FROM unnest($2::uuid[], $3::text[], $4::timestamptz[]) AS w (classroom_id, agent_id, started_at)
JOIN agent_session s ON s.classroom_id = w.classroom_id AND s.agent_id = w.agent_id AND s.started_at = w.started_at
WHERE s.replica_id = $1
"""

# A pooler may share the connection: the limits are for this transaction.
BEGIN_CLOSE: Final = """
BEGIN; SET LOCAL idle_in_transaction_session_timeout = '2s'; SET LOCAL lock_timeout = '2500ms'
"""

# Fenced: only rows that this replica still owns are moved and returned; with NULLs those that somebody has locked, who may
# be taking them over. The range is closed at both ends, so that a session that ended in the instant it began keeps its time.
CLOSE: Final = """
WITH wanted AS (
    SELECT w.id, w.ended_at, w.reason
    FROM unnest($2::bigint[], $3::timestamptz[], $4::text[]) AS w (id, ended_at, reason)
), owned AS MATERIALIZED (
    SELECT s.id FROM agent_session s WHERE s.id = ANY ($2::bigint[]) AND s.replica_id = $1
    ORDER BY s.id FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM agent_session s USING owned o WHERE s.id = o.id
    RETURNING s.id, s.agent_id, s.classroom_id, s.started_at
), moved AS (
    INSERT INTO agent_session_history (id, agent_id, classroom_id, lifetime, reason)
    SELECT g.id, g.agent_id, g.classroom_id, tstzrange(g.started_at, greatest(g.started_at, w.ended_at), '[]'), w.reason
    FROM gone g JOIN wanted w ON w.id = g.id
)
SELECT id, agent_id, classroom_id, started_at FROM gone
UNION ALL
SELECT s.id, NULL, NULL, NULL FROM agent_session s
WHERE s.id = ANY ($2::bigint[]) AND s.replica_id = $1 AND NOT EXISTS (SELECT FROM owned o WHERE o.id = s.id)
"""

# Which of these has a close of ours moved, though we never heard of it?
FIND_MOVED: Final = """
SELECT h.id
FROM unnest($1::bigint[], $2::timestamptz[], $3::text[]) AS w (id, ended_at, reason)
JOIN agent_session_history h
    ON h.id = w.id AND h.reason = w.reason AND upper(h.lifetime) = greatest(lower(h.lifetime), w.ended_at)
"""

# A dead replica, one at a time; of any number of survivors one sweeps it, the others pass it by. A statement of its own: what
# the replica made before it was locked here, the next one sees; after that it makes nothing.
LOCK_DEAD: Final = """
SELECT id FROM replica
WHERE id <> $1 AND heartbeat_at < now() - make_interval(secs => $2)
ORDER BY heartbeat_at LIMIT 1
FOR UPDATE SKIP LOCKED
"""

# Its sessions end at its last heartbeat, and its row goes, in one statement, so that it cannot come back half way.
SWEEP: Final = """
WITH dead AS MATERIALIZED (
    SELECT id, heartbeat_at FROM replica WHERE id = $1
), doomed AS MATERIALIZED (
    SELECT s.id FROM agent_session s WHERE s.replica_id = $1 ORDER BY s.id FOR UPDATE
), gone AS (
    DELETE FROM agent_session s USING doomed d WHERE s.id = d.id
    RETURNING s.id, s.agent_id, s.classroom_id, s.started_at
), ended AS (
    SELECT g.id, g.agent_id, g.classroom_id, g.started_at, greatest(g.started_at, d.heartbeat_at) AS ended_at
    FROM gone g, dead d
), moved AS (
    INSERT INTO agent_session_history (id, agent_id, classroom_id, lifetime, reason)
    SELECT id, agent_id, classroom_id, tstzrange(started_at, ended_at, '[]'), $2 FROM ended
), removed AS (
    DELETE FROM replica r WHERE r.id = $1
)
SELECT id, agent_id, classroom_id, started_at, ended_at FROM ended
"""

# The sweep may tell thousands of leaves before it commits.
BEGIN_SWEEP: Final = """
BEGIN; SET LOCAL idle_in_transaction_session_timeout = '10s'; SET LOCAL statement_timeout = '10s'; SET LOCAL lock_timeout = '2500ms'
"""

# Seconds until the next of the others' leases runs out; NULL without others.
NEXT_EXPIRY: Final = """
SELECT extract(epoch FROM min(heartbeat_at) + make_interval(secs => $2) - now())::float8 FROM replica WHERE id <> $1
"""

# Whose session goes on (true), itself or in those that replaced it in silence, and whose is over (false)? None of the former
# ends while these locks are held. What is not returned was replaced while its row was waited for: its successor is for the
# next statement to see, which has a new snapshot. The time is for the index: clocks differ by less than a minute, ids say
# what came later.
HOLD: Final = """
WITH wanted AS MATERIALIZED (
    SELECT w.id, w.classroom_id, w.agent_id, EXISTS (
        SELECT FROM agent_session_history h
        WHERE h.classroom_id = w.classroom_id AND lower(h.lifetime) > w.started_at - interval '1 minute'
            AND h.id >= w.id AND h.agent_id = w.agent_id AND h.reason <> $5
    ) AS has_ended
    FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::timestamptz[]) AS w (id, classroom_id, agent_id, started_at)
), held AS MATERIALIZED (
    SELECT w.id
    FROM wanted w JOIN agent_session s ON s.classroom_id = w.classroom_id AND s.agent_id = w.agent_id AND s.id >= w.id
    WHERE NOT w.has_ended
    ORDER BY s.id FOR SHARE OF s
)
SELECT id, true FROM held
UNION ALL
SELECT w.id, false FROM wanted w
WHERE w.has_ended OR NOT EXISTS (
    SELECT FROM agent_session s WHERE s.classroom_id = w.classroom_id AND s.agent_id = w.agent_id AND s.id >= w.id
)
"""

OWNED: Final = """
SELECT id, agent_id, classroom_id, replica_id, started_at FROM agent_session
WHERE replica_id = $1 AND id > $2
ORDER BY id LIMIT $3
"""

GET_SESSION: Final = """
SELECT id, agent_id, classroom_id, replica_id, started_at FROM agent_session WHERE classroom_id = $1 AND agent_id = $2
"""

LIST_AGENTS: Final = """
SELECT id, agent_id, classroom_id, replica_id, started_at FROM agent_session
WHERE classroom_id = $1 AND id > $2
ORDER BY id LIMIT $3
"""

COUNT_AGENTS: Final = """
SELECT classroom_id, count(*) FROM agent_session WHERE classroom_id = ANY ($1::uuid[]) GROUP BY classroom_id
"""
