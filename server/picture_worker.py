"""The process that decodes foreign pictures for a server; pictures.py starts it as `python -m server.picture_worker`.

A picture that is small to send can cost any amount of time and memory to decode. So this happens in a process of its
own with a bound on both. The kernel enforces them, since a decoder in OpenCV cannot be interrupted from Python: a
picture that takes too long ends the process, and pictures.py starts another one. Loads numpy and OpenCV, never torch.

On the socket that is this process's standard input, each message is its kind (1 byte), its length (4 bytes, big-endian)
and its content. The process first says that it is ready (OK, empty). Then it answers each PICTURE with the head's input
(OK) or with the reason why there is none (REFUSED).
"""

import os
import resource
import signal
import socket
import struct
import sys
from io import BufferedRWPair
from pathlib import Path
from typing import Final

HEADER = struct.Struct(">BI")
PICTURE: Final = 0
OK: Final = 1
REFUSED: Final = 2
MAX_CONTENT = 1 << 20  # bytes; a picture has at most 256 KiB, an input of the head 147 KiB
MAX_REASON = 1024  # bytes


def main(cpu_s: float, memory_bytes: int, max_pixels: int) -> None:
    """Answers pictures until the server closes its end of the socket."""
    # Whoever stops the server may signal all of its processes, as a terminal that closes does, but the server still
    # needs this one to finish its work.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import cv2

    from edge_runtime.inference.preprocess import to_input
    from edge_runtime.picture_checks import PictureError, decode_picture

    os.nice(5)  # gives way to the engine: every request needs that
    cv2.setNumThreads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = socket.socket(fileno=0).makefile("rwb")
    send(stream, OK, b"")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the decoders' own messages, which a sender could repeat without end
    while (message := receive(stream)) is not None:
        # Measures the CPU time of this process, also inside OpenCV. The default action of SIGPROF ends the process.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            answer = OK, to_input(decode_picture(message[1], max_pixels)).tobytes()
        except PictureError as error:
            answer = REFUSED, str(error).encode()[:MAX_REASON]
        except MemoryError:
            answer = REFUSED, f"picture needs more than {memory_bytes >> 20} MiB: send a smaller one".encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(stream, *answer)


def send(stream: BufferedRWPair, kind: int, content: bytes) -> None:
    """Writes one message. Raises OSError."""
    stream.write(HEADER.pack(kind, len(content)) + content)
    stream.flush()


def receive(stream: BufferedRWPair) -> tuple[int, bytes] | None:
    """Reads one message: its kind and content. None: the other side is gone. Raises OSError."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    kind, length = HEADER.unpack(header)
    content = stream.read(min(length, MAX_CONTENT))
    return (kind, content) if len(content) == length else None


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
