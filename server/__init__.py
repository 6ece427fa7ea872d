"""The edge and cloud server; `service.py` is the path of a request and the place to start reading."""

import os

# Read by OpenMP once, when torch is imported: threads that wait for work sleep instead of spinning. On cores that other
# programs use too, spinning made two threads a hundred times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
