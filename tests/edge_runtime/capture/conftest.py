"""Fixtures of this room."""

import threading
from collections.abc import Iterator

import pytest

from edge_runtime.capture import camera
from tests.edge_runtime.capture.helpers import MjpegCamera
from tests.listener import until


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when the test ends, so that no source outlives it, nor what the test has patched."""
    event, before = threading.Event(), set(threading.enumerate())
    yield event
    event.set()
    until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cameras are opened again at once."""
    monkeypatch.setattr(camera, "MIN_PAUSE_S", 0.01)


@pytest.fixture
def network_camera(stop: threading.Event, no_pause: None) -> Iterator[MjpegCamera]:
    with MjpegCamera() as running:
        yield running
        stop.set()
