"""`python -m edge_runtime.inference.probe FOLDER BACKEND THREADS PROVIDERS`: how fast a bundle's networks run here.

THREADS and PROVIDERS are lists with commas. Prints a JSON object: for each number of threads the milliseconds that head
and draft decoder take for a frame. A process of its own, since a runtime may crash or hang: choice.py starts it.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.inference.choice import Setup
from edge_runtime.inference.networks import load_networks
from edge_runtime.inference.preprocess import PIXELS

MEASURED_S, MIN_RUNS = 0.2, 5


def milliseconds(bundle: Bundle, setup: Setup) -> float:
    """The fastest of some runs, since other work on the machine only adds time. Raises BundleError, BackendError.

    For one thread it is CPU time. A board that has just been switched on is busy: the CPU time of a backend hardly
    depends on that, and several threads must show their advantage in spite of it.
    """
    clock = time.process_time if setup.threads == 1 and not setup.providers else time.perf_counter
    head, draft, _ = load_networks(bundle, setup, has_labels=True)  # which tries the labels
    assert head
    assert draft
    pixels = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    runs: list[float] = []
    until = time.perf_counter() + MEASURED_S
    while len(runs) < MIN_RUNS or time.perf_counter() < until:
        started = clock()
        draft.write(head.symbols(pixels))
        runs.append(clock() - started)
    return 1e3 * min(runs)


def main(folder: str, backend: str, threads: str, providers: str) -> None:
    bundle = open_bundle(Path(folder))
    given = tuple(name for name in providers.split(",") if name)
    setups = [Setup(backend, int(count), given) for count in threads.split(",")]
    print(json.dumps({setup.threads: milliseconds(bundle, setup) for setup in setups}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except AiflowError as failure:
        sys.exit(str(failure))
