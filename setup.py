"""Refuses 32-bit systems before anything is installed. All else is in setup.cfg, which cannot do this."""

import os
import sys

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

if sys.maxsize < 2**32:
    sys.exit(
        "aiflow-edge: this Python has 32 bits, for which onnxruntime and LiteRT have no packages: install a 64-bit "
        "system, such as Raspberry Pi OS (64-bit)"
    )


class Wheel(bdist_wheel):
    """A wheel for the systems that `make wheels` names, so that pip refuses it on all others: docs/adr/0033."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return python, abi, os.environ.get("AIFLOW_WHEEL_SYSTEMS", system)


setup(cmdclass={"bdist_wheel": Wheel})
