"""`aiflow distil`: from unlabelled photos to a server whose own model answers the features of boards."""

import os
import re
import shutil
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.app import run_board
from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import ContentKind, Event, decode_request, topics
from edge_runtime.wire.bitstream import decode
from firmware_tools import cli
from models.distilling import Settings
from models.tower_tail import read_tower_tail
from server.app import load_target, run_server
from server.config import Config, HuggingFaceConfig, ServerConfig
from server.prompts import PromptConfig
from server.targets.huggingface_prompts import Job
from tests.brokers import Mosquitto
from tests.listener import Listener
from tests.server.boards import PATIENCE_S, board_of
from tests.server.targets import trained_tower
from tests.server.targets.tiny_models import smolvlm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

PROMPT = "describe the photo"
PHOTOS, KINDS = 40, 4
SMALL = partial(Settings, batch=8, kl_batch=2, learning_rate=2e-3, inner_width=64, layers=1)
DATA = os.environ.get("AIFLOW_CLASS_PHOTOS", "")  # a tar or a folder of photos class/name.jpg


@dataclass(frozen=True)
class Made:
    """The input of the command, its folder and its output."""

    model: Path
    photos: Path
    out: Path
    said: str

    def command(self, bundle: Bundle, *more: str) -> list[str]:
        paths = {"--photos": self.photos, "--bundle": bundle.path, "--out": self.out}
        named = [str(each) for pair in paths.items() for each in pair]
        sizes = ["--pixels", "32", "--steps", "150", "--kl-steps", "4", "--prompt", PROMPT]
        return ["distil", "--target", f"hf:{self.model}", *named, *sizes, *more]


@pytest.fixture(scope="module")
def made(board_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tail for a model with random weights, from photos of two colours each, and of four kinds."""
    folder = tmp_path_factory.mktemp("distilled")
    made = Made(folder / "model", folder / "photos", folder / "tail", "")
    smolvlm(made.model)
    made.photos.mkdir()
    for number in range(PHOTOS):
        colours = np.random.default_rng(number % KINDS).integers(20, 236, (2, 1, 3))
        colours += np.random.default_rng(number).integers(-4, 5, (2, 1, 3))
        cv2.imwrite(str(made.photos / f"{number}.png"), colours.astype(np.uint8).repeat(60, 0).repeat(160, 1))
    (made.photos / "broken.png").write_bytes(b"no photo")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *lines, **_: said.extend(map(str, lines)))
        patch.setattr("models.distilling.Settings", SMALL)
        patch.setattr("firmware_tools.distil.MAX_TEXT", 6)
        assert cli.main(made.command(board_bundle)) == 0
    return Made(made.model, made.photos, made.out, "\n".join(said))


def rows(said: str) -> dict[str, list[float]]:
    """The printed table: bytes, error, nats per token, shares of equal first tokens and texts."""
    cells = (re.split(r" *\| *", line.strip("| ")) for line in said.splitlines() if line.startswith("| "))
    return {name: [float(cell) for cell in others] for name, *others in cells if re.match(r"[\d.]+\Z", others[0])}


def test_the_tails_tokens_are_much_nearer_to_the_towers_than_the_mean_photo(made: Made, board_bundle: Bundle) -> None:
    table = rows(made.said)
    assert list(table) == ["the mean photo", "level 0, 4 groups", "level 1, 2 groups", "level 1, 4 groups"]
    mean, finest = table["the mean photo"], table["level 1, 4 groups"]
    assert mean[0] == 0 < table["level 0, 4 groups"][0] < finest[0]
    for row in list(table.values())[1:]:  # on photos that were held out
        assert (row[1] < 0.6 * mean[1], row[2] < 0.6 * mean[2]) == (True, True)
    record, _ = read_tower_tail(made.out, board_bundle)
    assert (record.tokens, record.width, record.pixels) == (4, 32, 32)
    assert record.photos == PHOTOS - PHOTOS // 10
    assert record.quality["level 1, 4 groups error"] == pytest.approx(finest[1], abs=1e-3)
    assert "1 photos left out" in made.said


def test_a_second_run_goes_on_where_the_first_one_ended(
    made: Made, board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (made.out / "manifest.json").read_bytes()

    def never(*args: object) -> None:
        raise AssertionError("a photo was looked at again, or a step was repeated")

    monkeypatch.setattr("server.targets.huggingface_tower.Tower.tokens", never)
    monkeypatch.setattr("models.distilling.Distilling._batch", never)
    monkeypatch.setattr("models.distilling.Settings", SMALL)
    assert cli.main(made.command(board_bundle)) == 0
    assert (made.out / "manifest.json").read_bytes() == first


def test_too_few_photos_are_refused_with_what_to_do(made: Made, board_bundle: Bundle, capsys) -> None:
    assert cli.main(made.command(board_bundle, "--limit", "19")) == 1
    assert re.search("19 different photos, want at least 20.*need no captions", capsys.readouterr().err)


def configured(made: Made, bundle: Bundle, port: int = 1, model: Path | None = None) -> Config:
    server = ServerConfig("s1", str(bundle.path), target=f"hf:{model or made.model}", tier="cloud")
    return Config(
        server,
        MqttConfig(port=port),
        prompts={"photo": PromptConfig(PROMPT)},
        hf=HuggingFaceConfig("photo", 8, tail=str(made.out)),
    )


def test_a_model_with_another_token_count_or_other_weights_is_refused(
    made: Made, board_bundle: Bundle, tmp_path: Path
) -> None:
    smolvlm(tmp_path / "larger", side=64)
    with pytest.raises(ConfigError, match=r"a tail for 4 tokens of 32 numbers, the tower of .* makes 16 of 32"):
        load_target(configured(made, board_bundle, model=tmp_path / "larger"))
    smolvlm(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="has other weights: run `aiflow distil --target hf:"):
        load_target(configured(made, board_bundle, model=tmp_path / "other"))


def test_a_tail_without_the_boards_bundle_is_refused(made: Made) -> None:
    server = ServerConfig("s1", target=f"hf:{made.model}")
    with pytest.raises(ConfigError, match="reads features of the boards' bundle: name it as `bundle`"):
        Config(server, hf=HuggingFaceConfig(tail=str(made.out))).check_target()


def test_a_boards_features_are_answered_by_the_model_through_the_tail(
    made: Made, board_bundle: Bundle, broker: Mosquitto, tmp_path: Path
) -> None:
    """Board, head, bits, Mosquitto, server, tail and language model: no picture is sent."""
    stream = tmp_path / "stream"
    stream.mkdir()
    for number in range(3):
        shutil.copy(made.photos / f"{number}.png", stream)
    (tmp_path / "board.toml").write_text(
        f'[board]\nid = "b2"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\nparadigm = "speculative"\n'
        f'deadline_ms = 60000\n[mqtt]\nport = {broker.port}\n[[cameras]]\nname = "yard"\nsource = "{stream}"\n'
        "interval_s = 2\n"
    )
    config, stop, events = configured(made, board_bundle, broker.port), threading.Event(), list[Event]()
    loaded = load_target(config)
    serving = threading.Thread(target=run_server, args=(config, stop, None, loaded))
    with board_of(broker, "b1") as watcher, Listener(broker.port, topics.request("home", "b2")) as asked:
        serving.start()
        try:
            status = watcher.wait_for_status(state="online", share_proven=True)
            run_board(load_toml(tmp_path / "board.toml", RuntimeConfig), threading.Event(), events.append)
        finally:
            stop.set()
            serving.join(PATIENCE_S)
        requests = [decode_request(asked.next()) for _ in range(3)]
    assert status["target"]["latents"]
    answered = {event.frame: event.text for event in events if event.type == "update"}
    model, reader = loaded[0].model, loaded[0].features.reader
    for request in requests:
        assert (request.content_kind, bool(request.draft)) == (ContentKind.LATENT, True)
        sent = decode(request.content, board_bundle.tables)
        tokens = reader.tokens(sent.symbols, sent.header.level, sent.complete_channels)
        (written,) = model.answer([Job(PROMPT, max_tokens=8, image_tokens=tokens)])
        assert answered[request.id.hex()] == written.text != ""
    assert len(set(answered.values())) > 1  # the model tells the photos apart


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not DATA, reason="AIFLOW_CLASS_PHOTOS names no photos class/name.jpg")
def test_a_tower_that_has_learnt_classes_is_imitated_from_the_shipped_bundles_bits(tmp_path: Path, capsys) -> None:
    """Trains a small tower to name the class of a photo, then a tail on the same photos without their classes."""
    from models import SHIPPED_BUNDLE

    trained_tower.train(tmp_path / "model", list(read_pictures(Path(DATA))))
    made = Made(tmp_path / "model", Path(DATA), tmp_path / "tail", "")
    sizes = ("--pixels", str(trained_tower.SIDE), "--steps", "600", "--kl-steps", "200")
    assert cli.main(made.command(open_bundle(SHIPPED_BUNDLE), *sizes)) == 0
    table = rows(capsys.readouterr().out)
    assert table["level 4, 4 groups"][3] > table["the mean photo"][3]  # shares of equal first words, which are classes
    assert table["level 4, 4 groups"][2] < table["the mean photo"][2]
