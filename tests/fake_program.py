"""What a camera's program does for a test: FAKE_DOES says what, FAKE_PICTURE is a file with a JPEG to write."""

import os
import signal
import sys
import time
from pathlib import Path

does, picture = os.environ["FAKE_DOES"], Path(os.environ["FAKE_PICTURE"]).read_bytes()
# gst-launch-1.0 is told the descriptor to write to, rpicam-vid writes to its standard output.
descriptors = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("fd=")]
descriptor = int(descriptors[0]) if descriptors else 1
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\n")


def show(count: int) -> None:
    for _ in range(count):
        os.write(descriptor, picture)
        time.sleep(0.02)


print("Camera: 1280x720", file=sys.stderr, flush=True)
if does == "fails":
    print("ERROR: *** no cameras available ***\n", file=sys.stderr)
    sys.exit(255)
if does == "ignores signals":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if does == "chatters":
    print("x" * 1_000_000, file=sys.stderr)
if does == "garbage":
    os.write(descriptor, b"GST_ARGUS: Creating output stream\n" * 100)
if does == "endless":
    while True:
        os.write(descriptor, bytes(1 << 16))
show(10 if does in ("dies", "stalls", "stops") else 1_000_000)
if does == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
if does == "stalls":
    signal.pause()
