"""A server gives freed memory back, even if blocks that are in use lie between."""

import subprocess
import sys

BLOCKS, BLOCK_BYTES = 2000, 100_000  # below glibc's threshold for mappings of their own

PROGRAM = f"""
import os
import numpy as np
from server.freed_memory import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

blocks = [np.ones({BLOCK_BYTES}, np.uint8) for _ in range({BLOCKS})]
kept = blocks[::10]
del blocks
before = resident()
give_back()
print(before - resident())
"""


def test_blocks_between_others_that_are_in_use_are_given_back() -> None:
    given_back = int(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    assert given_back > BLOCKS * BLOCK_BYTES / 2
