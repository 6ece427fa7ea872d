"""The networks of the board: pixels to symbols (`head`), symbols to a draft text (`draft`), and their bundle.

- `bundle`: the files of a model family, checked against their manifest
- `backends`: onnxruntime and LiteRT behind one protocol
- `draft_calibration`: from a draft's confidence to its quality relative to the server's text
- `preprocess`: encoded pictures to the head's input; imported by its own name, since it needs OpenCV
"""

from edge_runtime.inference.backends import BackendError, Model, load_fastest, load_model
from edge_runtime.inference.bundle import Bundle, BundleError, Manifest, open_bundle
from edge_runtime.inference.draft import Draft, Drafted
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.head import Head

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Calibration",
    "Draft",
    "Drafted",
    "Head",
    "Manifest",
    "Model",
    "load_fastest",
    "load_model",
    "open_bundle",
]
