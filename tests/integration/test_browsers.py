"""Real browsers against the gateway: a page of the same host, on another port, opens the WebSocket and says how it went."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import Running, running_gateway

from servers import die_with_parent
from waiting import within

PAGE = """\
<!doctype html><title>An agent</title><script>
const report = (what) => fetch("/report", {method: "POST", body: JSON.stringify(what)});
const socket = new WebSocket(%(url)s);
socket.onopen = () => socket.send(%(request)s);
socket.onmessage = (message) => {
  const said = JSON.parse(message.data);
  report(said);
  if (said.type === "event") socket.close(1000);
};
socket.onclose = (event) => report({type: "closed", code: event.code, clean: event.wasClean});
</script>
"""
# Nothing but the page: no first-run pages, no updates, no proxy.
FIREFOX_PREFERENCES = """\
user_pref("network.proxy.type", 0);
user_pref("app.update.enabled", false);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("browser.startup.homepage_override.mstone", "ignore");
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
"""
START_S = 30.0  # a cold browser on a busy machine


def chromium(binary: str, home: Path, url: str) -> list[str]:
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --no-proxy-server"
    flags = f"--headless --no-sandbox --disable-gpu --disable-quic --remote-debugging-port=0 {quiet}"
    return [binary, *flags.split(), f"--user-data-dir={home / 'chromium'}", url]


def firefox(binary: str, home: Path, url: str) -> list[str]:
    profile = home / "firefox"
    profile.mkdir()
    (profile / "user.js").write_text(FIREFOX_PREFERENCES)
    return [binary, "--headless", "--no-remote", "--profile", str(profile), url]


BROWSERS: dict[str, tuple[tuple[str, ...], Callable[[str, Path, str], list[str]]]] = {
    "Chromium": (("chromium", "chromium-browser", "google-chrome"), chromium),
    "Firefox": (("firefox-esr", "firefox"), firefox),
}


class Site:
    """A small HTTP server of one page, which also takes that page's reports."""

    def __init__(self, page: str) -> None:
        self.page = page.encode()
        self.reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.open_connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.open_connections[task] = writer
        try:
            await self.answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # browsers open connections that they may never use
        finally:
            del self.open_connections[task]
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        body = b""
        if request.startswith("post /report "):
            length = request.partition("content-length: ")[2].partition("\r\n")[0]
            self.reports.put_nowait(json.loads(await reader.readexactly(int(length))))
        elif request.startswith("get / "):
            body = self.page
        kind = f"Content-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + kind.encode() + body)
        await writer.drain()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await asyncio.sleep(0)  # who was let in a moment ago is being served then
            serving = list(self.open_connections.items())
            for _, writer in serving:
                writer.transport.abort()
            await asyncio.gather(*(task for task, _ in serving))


@contextmanager
def browsing(command: list[str], home: Path) -> Iterator[None]:
    """The browser and all its processes: a session of their own, killed together in the end."""
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prctl, safe after fork
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as gateway:
        yield gateway


@pytest.mark.browser
@pytest.mark.parametrize("browser", BROWSERS)
async def test_a_page_connects_and_hears_an_event(browser: str, gateway: Running, tmp_path: Path) -> None:
    names, command = BROWSERS[browser]
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"{browser} is not installed (looked for {', '.join(names)})")
    site = Site(PAGE % {"url": json.dumps(gateway.url), "request": json.dumps(json.dumps(gateway.request()))})
    async with site.open() as port:
        assert port != gateway.app.gateway.port
        with browsing(command(binary, tmp_path, f"http://127.0.0.1:{port}/"), tmp_path):
            success = await within(site.reports.get(), START_S)
            assert (success["type"], success["payload"]["agent_id"]) == ("connect_success", "web.alice.presence")
            await gateway.publish("chat", {"text": "h\u00e9llo \U0001f44b"})
            event = await within(site.reports.get())
            assert (event["type"], event["payload"]) == ("event", {"text": "h\u00e9llo \U0001f44b"})
            assert await within(site.reports.get()) == {"type": "closed", "code": 1000, "clean": True}
    assert await gateway.reason_of(success["payload"]["session_id"]) == "closed"


@pytest.mark.browser
@pytest.mark.parametrize("browser", BROWSERS)
async def test_a_page_of_another_host_is_refused(browser: str, gateway: Running, tmp_path: Path) -> None:
    """`localhost` is another origin than 127.0.0.1, and the same machine."""
    names, command = BROWSERS[browser]
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"{browser} is not installed (looked for {', '.join(names)})")
    site = Site(PAGE % {"url": json.dumps(gateway.url), "request": json.dumps(json.dumps(gateway.request()))})
    async with site.open() as port:
        with browsing(command(binary, tmp_path, f"http://localhost:{port}/"), tmp_path):
            assert await within(site.reports.get(), START_S) == {"type": "closed", "code": 1006, "clean": False}
    value = gateway.app.metrics.registry.get_sample_value
    assert value("presence_upgrades_total", {"status": "403"}) == 1
    assert await gateway.rows() == []
