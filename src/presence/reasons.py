"""The catalogue of why a connection ends: one row per reason, and nothing else decides what a reason implies.

Owns: the type strings that agents and history rows see, titles, statuses, close codes, and what each end means for the
session.
Knows nothing of sockets, sessions, JSON or time.

Codes 4000 to 4499 ask the agent to reconnect, 4500 to 4999 tell it not to; the others are RFC 6455's own (7.4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = [
    "ACCESS_DENIED",
    "AUTH_TIMED_OUT",
    "BY_TYPE",
    "CLOSED",
    "INTERNAL_ERROR",
    "LOST",
    "PONG_TIMED_OUT",
    "PROTOCOL_ERROR",
    "RATE_LIMITED",
    "REMOVED",
    "REPLACED",
    "REPLICA_LOST",
    "SERIALIZATION_FAILED",
    "SLOW_CONSUMER",
    "TERMINATED",
    "TOKEN_EXPIRED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNSUPPORTED_REQUEST",
    "Reason",
]


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason for which a connection ends.

    type: what the agent reads in `payload.type` and history keeps in `reason`.
    title: one safe sentence for a human; never holds anything the agent sent.
    status: the HTTP status a reader would expect for it.
    close_code: of the close frame (1006 is never sent: it means that no close frame came).
    reconnect: whether the agent may come back with the same request.
    leaves: whether a session that was open ends: row to history and agent.leave. Not so when the session lives on.
    announced: whether an error message goes before the close frame.
    """

    type: str
    title: str
    status: int
    close_code: int
    reconnect: bool
    leaves: bool = True
    announced: bool = True


# Told to the agent, not recoverable: the same request would fail again.
AUTH_TIMED_OUT: Final = Reason("auth_timed_out", "No connect_request came in time", 408, 4500, reconnect=False)
SERIALIZATION_FAILED: Final = Reason("serialization_failed", "The message is malformed", 400, 4501, reconnect=False)
UNSUPPORTED_REQUEST: Final = Reason("unsupported_request", "The request is not supported", 400, 4502, reconnect=False)
UNAUTHENTICATED: Final = Reason("unauthenticated", "The token was not accepted", 401, 4503, reconnect=False)
ACCESS_DENIED: Final = Reason("access_denied", "No access to this classroom", 403, 4504, reconnect=False)
# The session lives on under the connection that replaced this one: no leave, no history.
REPLACED: Final = Reason("replaced", "The same agent connected again", 409, 4505, reconnect=False, leaves=False)
RATE_LIMITED: Final = Reason("rate_limited", "Too many messages or pings", 429, 4506, reconnect=False)
REMOVED: Final = Reason("removed", "Removed by an operator", 410, 4507, reconnect=False)

# Told to the agent, recoverable: connect again after `reconnect_after_ms`.
PONG_TIMED_OUT: Final = Reason("pong_timed_out", "A ping was not answered in time", 408, 4001, reconnect=True)
SLOW_CONSUMER: Final = Reason("slow_consumer", "Events were not read fast enough", 429, 4002, reconnect=True)
UNAVAILABLE: Final = Reason("unavailable", "The service cannot take this connection now", 503, 4003, reconnect=True)
TOKEN_EXPIRED: Final = Reason("token_expired", "The token expired and was not refreshed", 401, 4004, reconnect=True)
TERMINATED: Final = Reason("terminated", "This replica is shutting down", 503, 1012, reconnect=True)

# Not announced by a message: the agent did it itself, is gone, or cannot be trusted to read one.
CLOSED: Final = Reason("closed", "The agent closed the connection", 200, 1000, reconnect=True, announced=False)
LOST: Final = Reason("lost", "The socket went without a close frame", 499, 1006, reconnect=True, announced=False)
PROTOCOL_ERROR: Final = Reason(
    "protocol_error", "The agent broke the WebSocket protocol", 400, 1002, reconnect=False, announced=False
)
# Nobody is left to close anything: the others find its lease run out.
REPLICA_LOST: Final = Reason(
    "replica_lost", "The replica that held the session was lost", 503, 1006, reconnect=True, announced=False
)
INTERNAL_ERROR: Final = Reason("internal_error", "Internal error", 500, 1011, reconnect=True, announced=False)

# Every reason by its type, in the order of the table in docs/protocol.md.
BY_TYPE: Final[Mapping[str, Reason]] = MappingProxyType(
    {
        reason.type: reason
        for reason in (
            AUTH_TIMED_OUT,
            SERIALIZATION_FAILED,
            UNSUPPORTED_REQUEST,
            UNAUTHENTICATED,
            ACCESS_DENIED,
            REPLACED,
            RATE_LIMITED,
            REMOVED,
            PONG_TIMED_OUT,
            SLOW_CONSUMER,
            UNAVAILABLE,
            TOKEN_EXPIRED,
            TERMINATED,
            CLOSED,
            LOST,
            PROTOCOL_ERROR,
            REPLICA_LOST,
            INTERNAL_ERROR,
        )
    }
)
