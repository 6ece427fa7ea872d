"""The edge and cloud server; `service.py` is the path of a request and the place to start reading."""

import os

# Read by OpenMP once, when torch is imported: how often a thread that waits for work looks before it sleeps. By default
# that takes milliseconds, which made two threads a hundred times slower than one on cores that other programs use too;
# with no look at all, a pass on idle cores takes twice as long as with these.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
