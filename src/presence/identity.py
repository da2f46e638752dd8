"""What is known of an agent once its token is accepted.

Owns: the identity's fields and how the agent's id is made of them. Knows nothing of tokens or of who checks them.
"""

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

__all__ = ["Identity", "agent_id_of"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an agent is. `expires_at` is Unix time in seconds; `classrooms` is what the token grants, None for nothing.

    Not meant to be kept for the life of a connection: a teacher's set of classrooms may be large.
    """

    sub: str
    aud: str
    expires_at: float
    classrooms: frozenset[UUID] | Literal["*"] | None


def agent_id_of(label: str, identity: Identity) -> str:
    """The agent's id, `<label>.<sub>.<aud>`."""
    return f"{label}.{identity.sub}.{identity.aud}"
