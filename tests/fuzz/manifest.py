"""A bundle's manifest, and the first look at the files that it lists."""

import tempfile
from pathlib import Path

from edge_runtime.inference.bundle import MANIFEST, BundleError, open_bundle
from tests.fuzz.mutations import JSON
from tests.fuzz.target import Target

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-manifest-")


def manifest(data: bytes) -> None:
    """The files are missing, so each is reported."""
    (Path(FOLDER.name) / MANIFEST).write_bytes(data)
    bundle = open_bundle(Path(FOLDER.name))
    for name in bundle.manifest.files:
        bundle.file(name)


TARGETS = {"manifest": Target(manifest, BundleError, 8192, weight=2, format=JSON)}
