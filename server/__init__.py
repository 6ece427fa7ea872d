"""The edge and cloud server; `service.py` is the path of a request and the place to start reading."""

import os

# Read by OpenMP once, when torch is imported: how often a thread that waits for work looks before it sleeps. The default
# spins for milliseconds, which on cores that other programs use too made two threads a hundred times slower than one;
# with no spinning at all a pass on idle cores takes twice as long as with this.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
