"""Other people's servers as processes."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def serving(command: list[str], ready: str) -> Iterator[re.Match[str]]:
    """Runs a server. Yields the match of the pattern `ready` once the server has written a line with it."""
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ) as process:
        try:
            for line in process.stdout:
                said.append(line)
                if found := re.search(ready, line):
                    break
            else:
                pytest.fail("".join(said[-100:]))
            reading = threading.Thread(target=process.stdout.read)  # else the server waits when the pipe is full
            reading.start()
            yield found
        finally:
            process.terminate()
        reading.join()
