"""Fakes of the programs that read a board's own cameras: real processes, which do what a test says."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.edge_runtime.capture.helpers import large_jpeg

PROGRAMS = {"rpicam": "rpicam-vid", "nvargus": "gst-launch-1.0"}


class Programs:
    """The fake programs, and what they were called with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._log, self._patch = folder / "log", monkeypatch
        (folder / "picture.jpg").write_bytes(large_jpeg(100))
        for name in PROGRAMS.values():
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent}/fake_program.py "$@"\n')
            script.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setenv("FAKE_PICTURE", str(folder / "picture.jpg"))
        monkeypatch.setenv("FAKE_LOG", str(self._log))

    def do(self, what: str) -> None:
        self._patch.setenv("FAKE_DOES", what)

    def calls(self) -> list[list[str]]:
        """The arguments of each call, after the process id."""
        return [line.split() for line in self._log.read_text().splitlines()]

    def all_gone(self) -> bool:
        def runs(pid: int) -> bool:
            with suppress(ProcessLookupError):
                os.kill(pid, 0)
                return True
            return False

        return not any(runs(int(call[0])) for call in self.calls())
