"""One HTTP exchange with a service outside: bounded in time and size, redirects never followed.

Owns: the bounds, and turning every way to fail into one error. Knows nothing of what is asked or what an answer means.
"""

import asyncio
from typing import Any, Final

import httpx

from presence.errors import PresenceError

__all__ = ["ExchangeFailed", "Outbound"]

MAX_SOCKETS: Final = 8


class ExchangeFailed(PresenceError):
    """No usable answer came; the text says why in a few words and never holds the URL."""


class Outbound:
    """A pool of connections to one service; `timeout_s` bounds a whole exchange, `max_bytes` the body of an answer."""

    def __init__(self, *, timeout_s: float, max_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        # Waiting for one's turn is not the service's fault: the time runs when the request may go.
        self._turns = asyncio.Semaphore(MAX_SOCKETS)
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=MAX_SOCKETS, max_keepalive_connections=MAX_SOCKETS),
            # A compressed answer could unfold to far more than its bound.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        )

    async def exchange(self, method: str, url: str, json: Any = None) -> tuple[int, bytes]:
        """Status and body of the answer; raises ExchangeFailed."""
        try:
            async with (
                self._turns,
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, url, json=json) as response,
            ):
                return response.status_code, await self._read(response)
        except TimeoutError:
            raise ExchangeFailed("timed out") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ExchangeFailed(type(error).__name__) from None

    async def _read(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ExchangeFailed("the answer is compressed")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_bytes:
                raise ExchangeFailed(f"the answer is larger than {self._max_bytes} bytes")
        return bytes(body)

    async def close(self) -> None:
        await self._client.aclose()
