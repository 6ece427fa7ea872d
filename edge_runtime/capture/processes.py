"""Child processes that read a camera: none outlives the board, and none that hangs keeps the board from going on."""

import shutil
import signal
import subprocess
from contextlib import suppress

TERMINATE_S = 1.0  # for a process to end by itself


def ending_with_parent(command: list[str]) -> list[str]:
    """The command, run so that it is killed when the thread that starts it ends, if util-linux is installed.

    Otherwise, if the board is killed, the process ends when it next uses its pipe or socket.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def end(process: "subprocess.Popen[bytes]", by_itself_s: float = 0.0) -> str:
    """What became of it: "has ended with code 1". A process that does not end by itself, or is stopped, is killed.

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
