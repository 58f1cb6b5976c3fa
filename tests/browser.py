"""A headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.waiting import wait_until

#: Debian's package `chromium`.
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_ANSWER_S = 20.0


class Tab:
    """One page. What it complains of is in `complaints`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.complaints: list[str] = []
        self.requested: list[str] = []  #: URLs that it asked for
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What DevTools answer."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=_ANSWER_S))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(str(params["entry"]))
        elif message["method"] == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Have a window of this size, and this taste."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])

    def go(self, url: str) -> None:
        """Load `url`."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression, or of what it promises."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, within_s: float = 20.0) -> Any:
        """The value of an expression as soon as it is one that is true."""

        def value() -> Any:
            try:
                return self.run(script)
            except AssertionError:
                return None  # the page is being replaced

        return wait_until(value, within_s)

    def text(self, selector: str) -> str:
        """What people read there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Write where the focus is."""
        self.call("Input.insertText", text=text)

    def close(self) -> None:
        """Close the page; one that is left open goes on asking its server."""
        self._socket.send(json.dumps({"id": next(self._ids), "method": "Page.close"}))
        self._socket.close()

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """Keep what is to be seen as PNG. `whole`: also what one would have to scroll to."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Callable[[], Tab]]:
    """Opens tabs. `folder`: for its profile."""
    assert PROGRAM is not None, "install Debian's chromium, as `./pd test` does"
    profile = folder / "chromium"
    arguments = [PROGRAM, "--headless=new", "--remote-debugging-port=0"]
    arguments += [f"--user-data-dir={profile}", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
    arguments += ["--hide-scrollbars", "--force-color-profile=srgb"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # it cannot have one then
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [*arguments, "about:blank"], stdout=log, stderr=log, start_new_session=True
        )
    sockets = ExitStack()
    try:
        told = profile / "DevToolsActivePort"
        port = int(wait_until(lambda: told.exists() and told.read_text()).split()[0])

        def tab() -> Tab:
            made = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=20)
            url = made.raise_for_status().json()["webSocketDebuggerUrl"]
            # (A page that is closed does not always say goodbye.)
            opened = connect(url, max_size=None, open_timeout=20, close_timeout=1, proxy=None)
            return Tab(sockets.enter_context(opened))

        yield tab
    finally:
        sockets.close()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
