"""The edge and cloud server; `service.py` is the path of a request and the place to start reading."""

import os

# OpenMP reads this once, when torch is imported: how often a thread that waits for work checks for it before it sleeps.
# By default it checks for milliseconds, which made two threads a hundred times slower than one on cores that other
# programs use too. Without any check, a pass on idle cores takes twice as long as with this number.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
