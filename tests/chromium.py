"""A headless Chromium for tests, driven by the DevTools protocol over two pipes: https://chromedevtools.github.io/.

`apt-get install --no-install-recommends chromium`; without it, the tests that use it are skipped.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not PROGRAM, reason="chromium is not installed: apt-get install chromium")
# Runs a command with these two files as its files 3, which Chromium reads, and 4, which it writes.
FILES_3_AND_4 = """
import fcntl, os, sys
high = [fcntl.fcntl(int(file), fcntl.F_DUPFD, 10) for file in sys.argv[1:3]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Tab": 9, "Enter": 13}


class Chromium:
    """`with` starts it with one empty tab, and ends it."""

    def __init__(self, folder: Path) -> None:
        """folder: for its profile."""
        assert PROGRAM
        options = (
            f"--headless --no-sandbox --disable-gpu --no-first-run --user-data-dir={folder} --remote-debugging-pipe"
        )
        self._command = [PROGRAM, *options.split(), "about:blank"]
        self._number, self._session = 0, ""
        self.errors: list[str] = []  # what the page has logged as an error, such as what its policy blocked

    def __enter__(self) -> "Chromium":
        from_us, self._to = os.pipe()
        answers, to_us = os.pipe()
        command = [sys.executable, "-c", FILES_3_AND_4, str(from_us), str(to_us), *self._command]
        self._process = subprocess.Popen(
            command, pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(to_us)
        self._answers = os.fdopen(answers, "rb")
        self._rest = b""
        try:
            tab = self.do("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.do("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.do(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        self._process.kill()
        self._process.wait()
        self._answers.close()

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != self._number:
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
                self.errors.append(json.dumps(message["params"]))
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._answers.fileno(), 1 << 16)
            assert data, "chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, is_right: Callable[[Any], bool] = bool) -> Any:
        """Waits until the expression has the right value. An error counts as null: the page may still be loading."""
        expression = f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"
        end = time.monotonic() + PATIENCE_S
        while not is_right(value := self.read(expression)):
            assert time.monotonic() < end, f"{expression} is {value!r}; errors: {self.errors}"
            time.sleep(0.05)
        return value

    def show(self, width: int, height: int, is_dark: bool = False) -> None:
        """The size of its screen in CSS pixels, and whether its user wants dark pages."""
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """One of KEYS."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = KEYS[key]
        self.do("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.do("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """As if typed into what has the focus."""
        self.do("Input.insertText", text=text)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))
