"""One small bundle and its engine for all tests of the server."""

import pytest

from edge_runtime.inference.bundle import Bundle
from server.engine import Engine
from server.loading import load_engine
from server.numerics import prove
from tests.bundles import tiny_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def engine(bundle: Bundle) -> Engine:
    """Both tiers, on one thread, with every proven batch size."""
    engine = load_engine(bundle, ("edge", "cloud"), threads=1)
    engine.proof = prove(engine)
    return engine
