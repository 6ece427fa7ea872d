"""The networks of a bundle, loaded and tried once: head, draft decoder and labels."""

import ctypes
from typing import NamedTuple

import numpy as np

from edge_runtime.inference.backends import SUFFIXES, load_fastest, load_model
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft import Draft
from edge_runtime.inference.head import Head
from edge_runtime.inference.labels import Labels
from edge_runtime.inference.preprocess import PIXELS


class Networks(NamedTuple):
    """What a board runs on a frame. Without a head there are no others."""

    head: Head | None = None
    draft: Draft | None = None
    labels: Labels | None = None


def load_networks(bundle: Bundle, backend: str, threads: int, *, has_labels: bool) -> Networks:
    """All of them. has_labels: False leaves out the labels. Raises BundleError, BackendError."""
    head, draft = load_head(bundle, backend, threads), load_draft(bundle, backend, threads)
    labels = load_labels(bundle, head, backend, threads) if has_labels else None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)  # the files of the networks, and what optimising them took
    return Networks(head, draft, labels)


def load_head(bundle: Bundle, backend: str, threads: int) -> Head:
    """The bundle's head in a backend: "onnx", "litert", or "auto" for the faster one of those that are installed.

    Raises BundleError, BackendError.
    """

    def load(suffix: str) -> Head:
        latent = bundle.manifest.latent
        return Head(load_model(bundle.file(f"head{suffix}"), threads), latent.gains, latent.scales)

    pixels = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    return load_fastest(backend, load, lambda head: head.symbols(pixels))


def load_draft(bundle: Bundle, backend: str, threads: int) -> Draft:
    """The bundle's draft decoder in a backend. "auto" may choose another one than for the head.

    Raises BundleError, BackendError.
    """

    def load(suffix: str) -> Draft:
        look, step = (load_model(bundle.file(f"draft_{part}{suffix}"), threads) for part in ("look", "step"))
        return Draft(look, step, bundle.manifest.max_tokens)

    symbols = np.zeros(bundle.tables.shape, np.int8)
    return load_fastest(backend, load, lambda draft: draft.write(symbols))


def load_labels(bundle: Bundle, head: Head, backend: str, threads: int) -> Labels | None:
    """The network of the labels in a backend. "auto" may choose another one than for the head. None: there is none.

    Raises BundleError, BackendError.
    """
    manifest = bundle.manifest
    backbone_map = head.latent(np.zeros((PIXELS, PIXELS, 3), np.uint8)).backbone_map
    if backbone_map is None or not any(f"labels{suffix}" in manifest.files for suffix in SUFFIXES.values()):
        return None

    def load(suffix: str) -> Labels:
        model = load_model(bundle.file(f"labels{suffix}"), threads)
        labels = Labels(model, manifest.classes, manifest.label_temperature)
        labels.likeliest(backbone_map)  # finds a network that does not fit the head or the manifest
        return labels

    return load_fastest(backend, load, lambda labels: labels.likeliest(backbone_map))
