"""What the kernel lost on the way: packets that its loopback queue had no room for, and what TCP sent again.

Both are the machine's, whoever caused them. A lost packet comes 200 ms late: no gateway's doing, but in every figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self


def loopback_queue() -> int:
    """How many packets may wait on a core: `net.core.netdev_max_backlog`."""
    return int(Path("/proc/sys/net/core/netdev_max_backlog").read_text())


@dataclass(frozen=True)
class Losses:
    dropped: int = 0  # softnet_stat's second column: beyond net.core.netdev_max_backlog
    sent_again: int = 0  # TCP segments

    @classmethod
    def now(cls) -> Self:
        """Since the machine was started."""
        dropped = sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())
        names, values = (
            line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
        )
        return cls(dropped, int(dict(zip(names, values, strict=True))["RetransSegs"]))

    def since(self, before: Losses) -> Losses:
        return Losses(self.dropped - before.dropped, self.sent_again - before.sent_again)
