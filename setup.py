"""Refuses 32-bit systems before anything is installed. All else is in setup.cfg, which cannot do this."""

import sys

from setuptools import setup

if sys.maxsize < 2**32:
    sys.exit(
        "aiflow-edge: this Python has 32 bits, for which onnxruntime and LiteRT have no packages: install a 64-bit "
        "system, such as Raspberry Pi OS (64-bit)"
    )
setup()
