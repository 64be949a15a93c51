"""A headless Chromium, driven by its DevTools protocol over a WebSocket."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

# The numbers of keys that pages ask for by name.
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


def find_browser() -> str | None:
    """The program, if there is one here."""
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Browser:
    """One page in a browser of its own; an async context manager."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._count = 0

    async def __aenter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="glm3-browser-")
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
        self._process = subprocess.Popen(
            [
                self._program,
                *options,
                "--remote-debugging-port=0",
                f"--user-data-dir={self._folder}",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"ws://(127\.0\.0\.1:\d+)/", line):
                break
        else:
            raise AssertionError("the browser didn't start")
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{found[1]}/json/list") as response:
            [page] = [one for one in await response.json() if one["type"] == "page"]
        self._socket = await self._session.ws_connect(
            page["webSocketDebuggerUrl"], max_msg_size=2**26
        )
        await self.send("Page.enable")
        await self.send("Runtime.enable")
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._socket.close()
        await self._session.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command, and returns its result."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    async def open(self, url: str, width: int, height: int, *, is_dark: bool = False) -> None:
        """Opens a page in a window of this size."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, script: str) -> Any:
        """The value of a script in the page."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 30) -> None:
        """Waits until a script is true in the page."""
        started = time.monotonic()
        while not await self.value(f"Boolean({script})"):
            if time.monotonic() - started > seconds:
                seen = await self.value("document.body.innerText")
                raise AssertionError(f"never {script}; the page shows:\n{seen}")
            await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        """Types a text where the focus is."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Presses a key that has a name."""
        number, text = _KEYS[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        await self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    async def screenshot(self, path: Path) -> None:
        """Writes what is seen as a PNG file."""
        found = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))
