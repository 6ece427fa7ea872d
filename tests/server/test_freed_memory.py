"""A server gives freed memory back, even if blocks that are in use lie between."""

import subprocess
import sys

BLOCKS, BLOCK_BYTES = 2000, 100_000  # below glibc's threshold for mappings of their own

START = """
import os
import threading
import numpy as np
from server.freed_memory import give_back, use_one_heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
"""

BETWEEN_OTHERS = f"""
blocks = [np.ones({BLOCK_BYTES}, np.uint8) for _ in range({BLOCKS})]
kept = blocks[::10]
del blocks
before = resident()
give_back()
print(before - resident())
"""

# A freed block of 30 MB, such as a large tensor, lets glibc keep the end of a heap up to twice that size.
AT_THE_END_OF_A_THREADS_HEAP = f"""
use_one_heap()
np.ones(30 << 20, np.uint8)
before = resident()

def work():
    blocks = [np.ones({BLOCK_BYTES}, np.uint8) for _ in range({BLOCKS // 10})]

thread = threading.Thread(target=work)
thread.start()
thread.join()
give_back()
print(resident() - before)
"""


def printed(program: str) -> int:
    run = subprocess.run([sys.executable, "-c", START + program], check=True, capture_output=True, text=True)
    return int(run.stdout)


def test_blocks_between_others_that_are_in_use_are_given_back() -> None:
    assert printed(BETWEEN_OTHERS) > BLOCKS * BLOCK_BYTES / 2


def test_the_end_of_the_heap_is_given_back_also_if_another_thread_has_used_it() -> None:
    assert printed(AT_THE_END_OF_A_THREADS_HEAP) < BLOCKS // 10 * BLOCK_BYTES / 10
