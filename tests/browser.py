"""Chromium without a window, driven by its own protocol over a pipe: what a person sees and does in the pages."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-background-networking", "--no-first-run", "--remote-debugging-pipe"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"),  # WebGL without a GPU
)
_WAIT_S = 60.0


class Browser:
    """A tab of a browser of its own."""

    def __init__(self, profile: Path):
        program = next((path for name in _NAMES if (path := shutil.which(name))), None)
        if program is None:
            pytest.skip("needs Chromium, which is not on this machine")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads 3 and writes 4
        start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", start, "bash", program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", ""
        tab = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        self._ask("Page.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._send("Browser.close", {}, "")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)  # a process group of its own
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, address: str, width: int = 1280, height: int = 900) -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, after awaiting it."""
        found = self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until a JavaScript expression holds."""
        end = time.monotonic() + _WAIT_S
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never: {expression}; {self.run('document.body.innerText.slice(0, 500)')}"
            time.sleep(0.1)

    def press(self, key: str, code: int = 0) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path | None = None, whole: bool = False) -> bytes:
        """Returns a PNG of what is visible, or of the whole page, and saves it as `path`."""
        png = b64decode(self._ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(png)
        return png

    def _ask(self, method: str, **parameters: Any) -> Any:
        number = self._send(method, parameters, self._session)
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._in, 1 << 20)
                assert read, "the browser has ended"
                self._rest += read
            message, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _send(self, method: str, parameters: dict[str, Any], session: str) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Gives a browser whose profile is in `folder`. Skips the test where there is no Chromium."""
    found = Browser(folder / "profile")
    try:
        yield found
    finally:
        found.close()
