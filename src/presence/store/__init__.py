"""Sessions and replicas in PostgreSQL: every statement, batched; every caller with its own answer or its own error.

Owns the connections, the statements, and the closes that wait through an outage. Knows nothing of sockets or NATS.

    store      what the rest of the program calls
    opening    new, kept and taken-over sessions          closing   sessions to history, fenced
    sql        the statements                             database  connections and what their errors mean
    owner      in whose name rows are made
    batch      whatever arrives while a batch is under way forms the next
"""

from presence.store.closing import ClosedSession
from presence.store.opening import Elsewhere, LetGo, OpenedSession
from presence.store.store import MAX_QUEUED_CLOSES, SessionRow, Store

__all__ = ["MAX_QUEUED_CLOSES", "ClosedSession", "Elsewhere", "LetGo", "OpenedSession", "SessionRow", "Store"]
