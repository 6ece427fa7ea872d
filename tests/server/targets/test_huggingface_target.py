"""A small vision-language model behind a server: pictures and drafts in, replies out."""

import threading
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import AnsweredBy, ContentKind, Options, Status, decode_event, decode_request, topics
from server.app import load_target, run_server
from server.config import Config, HuggingFaceConfig, ServerConfig
from server.pictures import PictureDecoder
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.huggingface import HuggingFaceTarget
from server.targets.huggingface_target import PictureModel
from tests.brokers import Mosquitto
from tests.listener import Listener
from tests.server.boards import Lane, board_of, config, is_balanced
from tests.server.targets.test_target import picture
from tests.server.targets.tiny_models import LANGUAGE_MODELS, VISION_MODELS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

PATIENCE_S = 60.0
ASKED = HuggingFaceConfig(prompt="describe the photo", max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smolvlm")
    VISION_MODELS["smolvlm"](path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> HuggingFaceTarget:
    return HuggingFaceTarget.load(str(folder))


def replies(service: Service, *requests: object) -> list[object]:
    lane = Lane()
    with PictureDecoder() as decoder:
        for request in requests:
            service.receive(lane.arrival(request))
            service.decode_picture(decoder)
    while len(service.batcher):
        service.answer(service.batcher.take(0))
    assert is_balanced(service)
    return lane.replies


def test_a_picture_is_answered_with_the_models_own_text_whatever_the_draft(model, bundle: Bundle) -> None:
    service = Service(config(bundle).server, PictureModel(model, ASKED, bundle), ReplyCache())
    plain, drafted = replies(service, picture(bundle, 0), picture(bundle, 0, draft=(5, 6, 9)))
    assert (plain.status, drafted.status) == (Status.OK, Status.OK)
    assert plain.text == drafted.text != ""
    assert (plain.token_ids, plain.proposed) == ([], 0)
    assert 0 < plain.confidence < 1
    target = service.status()["target"]
    assert (target["name"], target["verified"], target["drafts"]) == (f"hf:{model.loaded.name}", "server", True)
    assert (target["latents"], target["pictures"]) == (False, True)
    assert service.status()["bundles"] == {bundle.id.hex(): bundle.manifest.name}  # whose drafts it reads
    assert "passes" in drafted.hops[0].stages_ms


def test_a_boards_draft_that_the_model_would_have_written_costs_one_pass(
    model, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(config(bundle).server, PictureModel(model, ASKED, bundle), ReplyCache())
    (alone,) = replies(service, picture(bundle, 0))
    words = alone.text.split(" ")
    monkeypatch.setitem(vars(bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words))
    draft = tuple(range(4, 4 + len(words)))
    asked = msgspec.structs.replace(picture(bundle, 0, draft), id=bytes(7) + b"\1")
    (verified,) = replies(service, asked)
    assert verified.text == alone.text
    assert (verified.passes, verified.accepted == verified.proposed > 1) == (1, True)


def test_a_request_may_want_a_shorter_text_and_never_gets_a_longer_one(model, bundle: Bundle) -> None:
    service = Service(config(bundle).server, PictureModel(model, ASKED), ReplyCache())
    texts = [
        reply.text
        for reply in replies(service, *(picture(bundle, 0, options=Options(max_tokens=n)) for n in (2, 8, 100)))
    ]
    assert texts[1].startswith(texts[0])
    assert texts[1] == texts[2]


def test_without_a_bundle_no_draft_is_used_and_the_status_says_so(model) -> None:
    assert not PictureModel(model, ASKED).abilities.drafts


def test_a_language_model_without_eyes_is_refused_by_name(tmp_path: Path) -> None:
    LANGUAGE_MODELS["llama"](tmp_path)
    with pytest.raises(ConfigError, match="takes no pictures: want an image-text-to-text model"):
        PictureModel(HuggingFaceTarget.load(str(tmp_path)), ASKED)


def test_the_configuration_names_the_model(folder: Path, bundle: Bundle) -> None:
    server = ServerConfig("s1", str(bundle.path), target=f"hf:{folder}")
    target, _ = load_target(Config(server, hf=ASKED))
    assert (target.abilities.name, target.abilities.drafts) == (f"hf:{folder}", True)


def test_its_table_without_its_target_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"\[hf\] is of no use with target"):
        Config(ServerConfig("s1", str(bundle.path)), hf=ASKED).check_target()


def test_a_board_sends_its_draft_with_the_picture_if_the_server_verifies_it(
    broker: Mosquitto, folder: Path, board_bundle: Bundle
) -> None:
    """Board, Mosquitto, server and model. Frames come until the board has read the server's status."""
    mqtt, stop = MqttConfig(port=broker.port), threading.Event()
    server = ServerConfig("s1", str(board_bundle.path), target=f"hf:{folder}", tier="cloud")
    board = RuntimeConfig(
        BoardConfig("b2", str(board_bundle.path), deadline_ms=5000), (CameraConfig("door", "mqtt"),), mqtt
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    frame = cv2.imencode(".jpg", pixels)[1].tobytes()
    threads = [
        threading.Thread(target=run_server, args=(Config(server, mqtt, hf=ASKED), stop)),
        threading.Thread(target=run_board, args=(board, stop)),
    ]
    with (
        board_of(broker, "b1") as watcher,
        Listener(broker.port, topics.state("home", "b2", "paradigm")) as switch,
        Listener(broker.port, topics.request("home", "b2")) as asked,
        Listener(broker.port, topics.event("home", "b2")) as user,
    ):
        try:
            threads[0].start()
            watcher.wait_for_status(state="online", share_proven=True)
            threads[1].start()
            assert switch.next() == b"auto"  # the board takes frames
            for _ in range(20):
                user.client.publish(topics.frame("home", "b2", "door"), frame)
                while not (event := decode_event(user.next())).final:
                    pass
                if event.paradigm == "offload":
                    break
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)
    assert (event.paradigm, event.answered_by) == ("offload", AnsweredBy("cloud", "s1"))
    assert event.why.startswith("offload: draft")
    while (request := decode_request(asked.next())).id.hex() != event.frame:
        pass
    assert request.content_kind is ContentKind.JPEG
    assert request.draft_ids
