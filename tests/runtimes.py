"""Inference runtimes that are installed and do not work, here and in child processes."""

import os
import sys
from pathlib import Path

import pytest

# Its import ends the process as a wheel for another processor does, never ends, or fails.
SIGILL = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
HANGS = "import threading; threading.Event().wait()"
RAISES = "raise ImportError('built for another numpy')"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str) -> None:
    """A package of this name, in front of the real one, until the test ends."""
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text(code)
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", os.getcwd())]))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
