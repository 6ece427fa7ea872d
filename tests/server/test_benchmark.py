"""The benchmark of the server, on a small bundle."""

import json

from benchmarks.server import run
from edge_runtime.inference.bundle import Bundle
from server.engine import Engine, Job
from tests.bundles import random_symbols


def test_verified_captions_are_the_targets_own_and_take_fewer_passes(bundle: Bundle, engine: Engine) -> None:
    symbols = random_symbols(4, seed=1)
    texts = [answer.tokens for answer in engine.answer([Job(s) for s in symbols])]
    drafts = [(*text[:-2], 5, 5) for text in texts]  # right but for the end
    result = json.loads(json.dumps(run(bundle, symbols, drafts, rounds=1)))
    for figures in result["batches"].values():
        assert figures["same_texts"]["verified"] == 1.0
        assert figures["passes"]["verified"] < figures["passes"]["alone"]
        assert min(figures["per_second"].values()) > 0
    assert 0 < result["accepted"] <= result["proposed"]
