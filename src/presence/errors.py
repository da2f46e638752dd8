"""The errors that cross module borders.

Owns nothing but their types. Every text here is one line and safe to show: never a token, never a part of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from presence.reasons import Reason


class PresenceError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(PresenceError):
    """A setting cannot be used; the text is one line: the setting, its value unless secret, and why."""


class StartError(PresenceError):
    """The start cannot go on (a port is taken, a server cannot be reached); the text is one line."""


class SessionError(PresenceError):
    """A session ends for a reason of the catalogue; `title` is text that the agent may read."""

    def __init__(self, reason: Reason, title: str | None = None) -> None:
        super().__init__(reason, title)
        self.reason = reason
        self.title = reason.title if title is None else title

    def __str__(self) -> str:
        return f"{self.reason.type}: {self.title}"


class Unavailable(SessionError):
    """The database or NATS cannot serve this now; the agent may come again."""

    def __init__(self, title: str | None = None) -> None:
        from presence.reasons import UNAVAILABLE  # noqa: PLC0415 - reasons has no need of this module at import time

        super().__init__(UNAVAILABLE, title)
