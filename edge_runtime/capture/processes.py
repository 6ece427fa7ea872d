"""Child processes that read a camera: none outlives the board, and none that hangs keeps the board from going on."""

import signal
import subprocess
import sys
from contextlib import suppress

# PR_SET_PDEATHSIG of prctl(2). Not setpriv(1): it also sets capabilities, which the unit of a board forbids.
KILLED_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
TERMINATE_S = 1.0  # for a process to end by itself


def ending_with_parent(command: list[str]) -> list[str]:
    """The command, run so that it is killed when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", "-c", KILLED_WITH_PARENT, *command]


def end(process: "subprocess.Popen[bytes]", by_itself_s: float = 0.0) -> str:
    """How it ended: "has ended with code 1". A process that does not end by itself, or is stopped, is killed.

    Waits for as long as the kernel keeps a killed process, which is for ever if it hangs inside of a driver.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(by_itself_s)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()
    code = process.returncode
    return f"has ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
