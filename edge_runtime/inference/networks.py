"""The networks of a bundle, loaded: head, draft decoder and labels."""

import ctypes
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import SUFFIXES, BackendError, load_model
from edge_runtime.inference.bundle import DRAFT_LABELS, MAX_DRAFT_LABELS_BYTES, Bundle, BundleError
from edge_runtime.inference.choice import Setup
from edge_runtime.inference.draft import STATE, Draft
from edge_runtime.inference.head import Head
from edge_runtime.inference.labels import Labels
from edge_runtime.inference.preprocess import PIXELS


class Networks(NamedTuple):
    """The networks that a board runs on a frame. Without a head there are no others."""

    head: Head | None = None
    draft: Draft | None = None
    labels: Labels | None = None


def load_networks(bundle: Bundle, setup: Setup, *, has_labels: bool) -> Networks:
    """All of them. has_labels: False leaves out the labels. Raises BundleError, BackendError."""
    backend, threads, providers = setup.backend, setup.threads, setup.providers
    head = load_head(bundle, backend, threads, providers)
    draft = load_draft(bundle, backend, threads)
    labels = load_labels(bundle, head, backend, threads, providers) if has_labels else None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)  # the files of the networks, and what optimising them took
    return Networks(head, draft, labels)


def load_head(bundle: Bundle, backend: str, threads: int, providers: Sequence[str] = ()) -> Head:
    """The bundle's head in a backend of SUFFIXES. providers: see load_model. Raises BundleError, BackendError."""
    latent = bundle.manifest.latent
    model = load_model(bundle.file(f"head{SUFFIXES[backend]}"), threads, providers)
    return Head(model, latent.gains, latent.scales)


def load_draft(bundle: Bundle, backend: str, threads: int) -> Draft:
    """The bundle's draft decoder in a backend, on the CPU: its steps are too small to wait for a GPU.

    Raises BundleError, BackendError.
    """
    encoder, step = (load_model(bundle.file(f"draft_{part}{SUFFIXES[backend]}"), threads) for part in ("look", "step"))
    latent, labels = bundle.manifest.latent, _draft_labels(bundle)
    draft = Draft(encoder, step, bundle.manifest.max_tokens, labels)
    with np.errstate(invalid="ignore"):  # the difference of two infinite logits
        tried = draft.write(np.zeros((latent.channels, latent.height, latent.width), np.int8))
    if not isfinite(tried.confidence):
        raise BackendError(f"the draft decoder of {bundle.path} computes no finite numbers: install another bundle")
    return draft


def _draft_labels(bundle: Bundle) -> npt.NDArray[np.float16] | None:
    """What each label adds to the draft decoder's first state, [classes, STATE]. None: it knows no labels."""
    if DRAFT_LABELS not in bundle.manifest.files:
        return None
    data, classes = bundle.read(DRAFT_LABELS, MAX_DRAFT_LABELS_BYTES), len(bundle.manifest.classes)
    if len(data) != (wanted := 2 * STATE * classes):
        raise BundleError(
            f"{bundle.path / DRAFT_LABELS} has {len(data)} bytes, {classes} classes want {wanted}: build it again"
        )
    labels = np.frombuffer(data, "<f2").reshape(classes, STATE)
    if not np.isfinite(labels).all():
        raise BundleError(f"{bundle.path / DRAFT_LABELS} has numbers that are not finite: build it again")
    return labels


def load_labels(bundle: Bundle, head: Head, backend: str, threads: int, providers: Sequence[str] = ()) -> Labels | None:
    """The network of the labels in a backend. None: there is none. Raises BundleError, BackendError."""
    manifest = bundle.manifest
    backbone_map = head.latent(np.zeros((PIXELS, PIXELS, 3), np.uint8)).backbone_map
    if backbone_map is None or not any(f"labels{suffix}" in manifest.files for suffix in SUFFIXES.values()):
        return None
    model = load_model(bundle.file(f"labels{SUFFIXES[backend]}"), threads, providers)
    labels = Labels(model, manifest.classes, manifest.label_temperature)
    labels.likeliest(backbone_map)  # finds a network that does not fit the head or the manifest
    return labels
