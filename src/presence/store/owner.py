"""Who owns the rows that this process makes: a replica id, which it loses when it is swept. Owns nothing else."""

from __future__ import annotations

import asyncio
from uuid import UUID


class Owner:
    """The identity of this replica in the database.

    `swept` is set when a statement finds that the replica's row is gone; whoever takes on a new identity clears it.
    """

    def __init__(self, replica_id: UUID, label: str) -> None:
        self.replica_id = replica_id
        self.label = label
        self.swept = asyncio.Event()
