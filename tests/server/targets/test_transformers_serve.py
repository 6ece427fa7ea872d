"""A real server with OpenAI's API as the target: `transformers serve`, with a small vision-language model.

Skipped unless TRANSFORMERS_SERVE_PYTHON names the interpreter of an environment with that server, of the same version
as here: `pip install 'transformers[serving]==5.24.0' torch torchvision`.
"""

import base64
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.http_call import Endpoint
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import AnsweredBy, Event, decode_request, topics
from server.app import run_server
from server.config import Config, OpenAIConfig, ServerConfig
from server.prompts import QUESTION
from tests.brokers import Mosquitto
from tests.listener import Listener
from tests.server.boards import PATIENCE_S, board_of
from tests.server.targets.real_servers import serving
from tests.server.targets.test_vllm_features import Site
from tests.server.targets.tiny_models import llava

PYTHON = os.environ.get("TRANSFORMERS_SERVE_PYTHON", "")
HOW = "TRANSFORMERS_SERVE_PYTHON names no Python with `pip install 'transformers[serving]==5.24.0' torch torchvision`"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
LIMIT = 8  # tokens

pytestmark = pytest.mark.skipif(not PYTHON, reason=HOW)


@dataclass(frozen=True)
class Served:
    """The other server."""

    url: str
    model: str

    def ask(self, picture: bytes) -> dict[str, Any]:
        """Its response to the usual question about a JPEG, without the code under test."""
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
        message = {"role": "user", "content": content}
        body = {"model": self.model, "messages": [message], "max_tokens": LIMIT, "temperature": 0}
        return json.loads(Endpoint(self.url).post("/chat/completions", json.dumps(body).encode(), {}, PATIENCE_S))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    llava(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"min_new_tokens": 4}))  # no empty texts
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--log-level", "info"]
    with serving([PYTHON, "-c", code, "serve", str(folder), *options], r"running on (http://[\d.:]+)") as found:
        yield Served(f"{found[1]}/v1", str(folder))


@pytest.mark.timeout(600)
def test_a_boards_pictures_become_events_with_its_texts(
    served: Served, broker: Mosquitto, board_bundle: Bundle, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for i in range(2):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), cv2.resize(pixels, (320, 240), interpolation=cv2.INTER_NEAREST))
    mqtt, stop, events = MqttConfig(port=broker.port), threading.Event(), list[Event]()
    server = ServerConfig("s1", target=f"openai:{served.url}", tier="cloud")
    board = RuntimeConfig(
        BoardConfig("b2", str(board_bundle.path), paradigm="offload", deadline_ms=60_000),
        (CameraConfig("door", str(tmp_path), interval_s=1.0),),
        mqtt,
    )
    asked = Config(server, mqtt, openai=OpenAIConfig(served.model, max_tokens=LIMIT))
    serving = threading.Thread(target=run_server, args=(asked, stop))
    with board_of(broker, "b1") as watcher, Listener(broker.port, topics.request("home", "b2")) as sent:
        serving.start()
        try:
            watcher.wait_for_status(state="online", share_proven=True)
            run_board(board, threading.Event(), events.append)
        finally:
            stop.set()
            serving.join(PATIENCE_S)
        requests = [decode_request(sent.next()) for _ in range(2)]
    updates = {event.frame: event for event in events if event.type == "update"}
    for request in requests:
        event, response = updates[request.id.hex()], served.ask(request.content)
        assert event.text == response["choices"][0]["message"]["content"].strip() != ""
        assert event.answered_by == AnsweredBy("cloud", "s1")
        assert event.hops[0].usage.input_tokens == response["usage"]["prompt_tokens"]
    assert len({event.text for event in updates.values()}) == 2  # the model tells them apart


@pytest.mark.timeout(600)
def test_the_probes_of_vllm_find_that_it_is_another_server(served: Served, bundle: Bundle, tmp_path: Path) -> None:
    site = Site(served.url, bundle, tmp_path, served.model)
    assert not site.target.probe()
    assert not site.target.probe_features()
    can = site.target.abilities
    assert (can.drafts, can.bundles, can.pictures) == (False, (), True)
    assert (site.calls["draft_refused"], site.calls["features_refused"]) == (1, 1)
