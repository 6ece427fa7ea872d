"""A vLLM server that answers features: image tokens of a tail in the place of a picture, over real sockets."""

import io
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from edge_runtime.app import run_board
from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import ContentKind, Event, Status, decode_request, topics
from models.tower_tail import Record, TowerTail, write_tower_tail
from server.app import check, load_target, run_server
from server.config import Config, OpenAIConfig, ServerConfig, VllmConfig
from server.pictures import PictureDecoder
from server.prompts import read_prompts
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.features import load_features
from server.targets.image_embeds import ImageEmbeds
from testbed.chat_server import Behaviour
from testbed.vllm_server import IMAGE_TOKENS, TEXT, WIDTH, VllmServer
from tests.brokers import Mosquitto
from tests.bundles import lively
from tests.listener import Listener
from tests.server.boards import PATIENCE_S, SYMBOLS, Lane, board_of, is_balanced
from tests.server.boards import request as latent
from tests.server.targets.test_service import offload
from tests.server.targets.test_vllm import Target, wait_out

PIXELS = 96


def write_tail(folder: Path, bundle: Bundle, **changes: object) -> Path:
    """A tail with random weights for the model that the other server has loaded."""
    fields = {"target": "hub/tiny", "tokens": IMAGE_TOKENS, "width": WIDTH, **changes}
    record = Record(
        bundle.id.hex(),
        bundle.manifest.name,
        architecture="LlavaForConditionalGeneration",
        target_weights="0" * 64,
        pixels=PIXELS,
        inner_width=32,
        layers=1,
        photos=20,
        quality={},
        **fields,
    )
    torch.manual_seed(0)
    write_tower_tail(folder, record, lively(TowerTail(record.tokens, record.width, 32, 1)).eval())
    return folder


class Site:
    """A server without a broker, and a board."""

    def __init__(
        self, url: str, bundle: Bundle, folder: Path, model: str = "fake", timeout_s: float = 60.0, **tail: object
    ) -> None:
        self.bundle, self.reader = bundle, load_features(write_tail(folder, bundle, **tail), bundle, "cpu", 1)
        embeds, prompts = ImageEmbeds(self.reader), read_prompts({})
        self.target = Target(
            url, OpenAIConfig(model, timeout_s=timeout_s), prompts=prompts, bundle=bundle, features=embeds
        )
        self.service, self.lane = Service(ServerConfig("s1", target="vllm:x"), self.target, ReplyCache()), Lane()

    def ask(self, *requests: object) -> list:
        """The replies."""
        before = len(self.lane.replies)
        for request in requests:
            self.service.receive(self.lane.arrival(request))
        while not self.service.target_queue.is_idle:
            self.service.answer(self.service.target_queue.take(0))
        assert is_balanced(self.service)
        return self.lane.replies[before:]

    def ask_picture(self) -> object:
        self.service.receive(self.lane.arrival(offload()))
        with PictureDecoder() as decoder:
            self.service.decode_picture(decoder)
        self.service.answer(self.service.target_queue.take(0))
        return self.lane.replies[-1]

    @property
    def calls(self) -> dict[str, int]:
        return self.target.status()["usage"]["calls"]


@pytest.fixture
def site(vllm: VllmServer, bundle: Bundle, tmp_path: Path) -> Site:
    """It has probed the other server, whose calls count from here."""
    site = Site(vllm.url, bundle, tmp_path / "tail")
    assert site.target.probe_features()
    vllm.asked.clear()
    return site


def parts(vllm: VllmServer) -> list[str]:
    """The type of the picture in each call."""
    return [asked.body["messages"][0]["content"][-1]["type"] for asked in vllm.asked]


def test_a_latents_image_tokens_go_in_the_place_of_a_picture(vllm: VllmServer, site: Site) -> None:
    replies = site.ask(latent(site.bundle, 0), latent(site.bundle, 1))
    assert [(reply.status, reply.text, reply.tokens) for reply in replies] == [(Status.OK, TEXT, b"")] * 2
    assert parts(vllm) == ["image_embeds"] * 2
    sent = [torch.load(io.BytesIO(asked.picture), weights_only=True) for asked in vllm.asked]
    assert [(list(each.shape), each.dtype) for each in sent] == [([1, IMAGE_TOKENS, WIDTH], torch.bfloat16)] * 2
    assert not torch.equal(*sent)
    for i, each in enumerate(sent):
        tokens = site.reader.reader.tokens(SYMBOLS[i], site.bundle.tables.levels - 1, 64)
        assert torch.equal(each[0], tokens.bfloat16())
    assert all(len(asked.picture) < 3000 for asked in vllm.asked)  # the tensor alone, and no storage behind it


def test_a_draft_that_comes_with_features_is_verified(
    vllm: VllmServer, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.target.probe()
    words = ["a", "man", "opens", "a", "window"]
    monkeypatch.setitem(vars(site.bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words))
    vllm.asked.clear()
    (reply,) = site.ask(latent(site.bundle, draft=tuple(range(4, 4 + len(words)))))
    assert (reply.status, reply.text, reply.accepted, reply.proposed) == (Status.OK, TEXT, 4, 5)
    assert parts(vllm) == ["image_embeds"] * 2  # the call that read the draft, and the one that went on


def test_features_are_offered_when_the_probe_has_shown_that_they_are_taken(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path
) -> None:
    site = Site(vllm.url, bundle, tmp_path)
    assert not site.service.status()["target"]["latents"]
    (early,) = site.ask(latent(bundle))
    assert early.status is Status.UNKNOWN_BUNDLE
    assert site.target.probe_features()
    can = site.target.abilities
    assert (can.bundles, can.pictures, can.references) == ((bundle.id,), True, bundle.inter_tables is not None)
    assert parts(vllm) == ["image_url", "image_embeds"]
    pixels = cv2.imdecode(np.frombuffer(vllm.asked[0].picture, np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (PIXELS, PIXELS, 3)
    assert site.ask_picture().status is Status.OK


REFUSED: dict[str, tuple[Callable[[VllmServer], object], dict[str, object], str, int]] = {
    # A change of the other server, one of the tail, the expected log, and the number of calls.
    "another model": (
        lambda vllm: vllm.models[0].update(root="hub/large"),
        {},
        "made for hub/tiny, but vLLM's fake.*large",
        0,
    ),
    "not its model": (lambda vllm: vllm.models.clear(), {}, "fake is not known", 0),
    "models of no kind": (lambda vllm: setattr(vllm, "models", "html"), {}, "list of models cannot be read", 0),
    "another count": (lambda vllm: None, {"tokens": 9}, "makes 9 tokens, but a picture of 96 x 96 has 4 in vLLM", 1),
    "another width": (lambda vllm: None, {"width": 32}, "image tokens of 32 numbers .*says 400", 1),
    "no flag": (lambda vllm: setattr(vllm, "takes_embeds", False), {}, "says 400.*with --enable-mm-embeds", 1),
    "ignored": (
        lambda vllm: setattr(vllm, "ignores_embeds", True),
        {},
        "4 tokens with image tokens, and 8 .* a picture",
        2,
    ),
    "no token ids": (lambda vllm: setattr(vllm, "lie", "no_ids"), {}, "no prompt_token_ids", 1),
    "a crash": (lambda vllm: setattr(vllm, "behave", crashing), {}, "broke off", 2),
    "a fault": (lambda vllm: setattr(vllm, "behave", lambda n: "error_500" if n else "answer"), {}, "says 500", 2),
}


def crashing(call: int) -> str:
    return "reset" if call else "answer"


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_does_not_take_them_gets_pictures_only_and_the_log_says_why(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, tail, said, calls = REFUSED[case]
    spoil(vllm)
    site = Site(vllm.url, bundle, tmp_path, **tail)
    with caplog.at_level(logging.WARNING):
        assert not site.target.probe_features()
    assert caplog.text.count("pictures only") == 1
    assert re.search(said, caplog.text)
    assert len(vllm.asked) == calls
    assert site.calls["features_refused"] == 1
    status = site.service.status()["target"]
    assert not status["latents"]
    again_s = 3600 if case in ("a crash", "a fault") else 30
    assert re.search(f"{said}.*: asked again after {again_s} s", status["refused"]["features"])
    vllm.behave = lambda _: "answer"
    (reply,) = site.ask(latent(bundle))
    assert reply.status is Status.UNKNOWN_BUNDLE
    assert site.ask_picture().text == TEXT


@pytest.mark.parametrize("behaviour", ["error_500", "limit_silently", "reset"])
def test_a_server_that_is_away_is_probed_again(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path, behaviour: Behaviour
) -> None:
    site = Site(vllm.url, bundle, tmp_path)
    vllm.behave = lambda _: behaviour
    assert not site.target.probe_features()
    vllm.behave = lambda _: "answer"
    assert site.target.probe_features()
    assert site.target.abilities.bundles == (bundle.id,)


def test_a_server_that_takes_them_no_more_gets_pictures_only_after_a_probe_until_it_takes_them_again(
    vllm: VllmServer, site: Site
) -> None:
    vllm.takes_embeds = False
    wait_out(site.target._latents)
    (first,) = site.ask(latent(site.bundle))
    site.target.probe_due()
    (second,) = site.ask(latent(site.bundle))
    assert (first.status, "says 400" in first.error, second.status) == (Status.BUSY, True, Status.UNKNOWN_BUNDLE)
    assert (site.calls["features_refused"], len(vllm.refused)) == (2, 2)  # by the request, and by the probe
    vllm.takes_embeds = True
    site.target.probe_due()  # it is not due
    assert site.ask(latent(site.bundle))[0].status is Status.UNKNOWN_BUNDLE
    wait_out(site.target._latents)
    site.target.probe_due()
    assert site.ask(latent(site.bundle))[0].status is Status.OK


def test_one_refused_request_costs_a_probe_and_not_the_features_of_others(vllm: VllmServer, site: Site) -> None:
    wait_out(site.target._latents)
    for wait_s in (60, 120):  # at least, before a probe after the next refusal
        vllm.behave = lambda _: "error_400"
        assert site.ask(latent(site.bundle))[0].status is Status.BUSY
        assert site.target.abilities.bundles == (site.bundle.id,)
        vllm.behave = lambda _: "answer"
        vllm.asked.clear()
        site.target.probe_due()
        assert "image_embeds" in parts(vllm)
        assert site.ask(latent(site.bundle))[0].status is Status.OK
        site.target._latents._asked_at -= wait_s


@pytest.mark.parametrize("behaviour", ["error_401", "error_400"])
def test_a_wrong_key_at_the_start_is_no_longer_in_the_way_when_it_is_right(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path, behaviour: Behaviour
) -> None:
    site = Site(vllm.url, bundle, tmp_path)
    vllm.behave = lambda _: behaviour
    site.target.probe_due()
    assert behaviour[-3:] in site.target.abilities.refused["features"]
    vllm.behave = lambda _: "answer"
    wait_out(site.target._latents)
    site.target.probe_due()
    assert site.ask(latent(bundle))[0].status is Status.OK


@pytest.mark.parametrize("change", [{"root": "hub/large"}, {"max_model_len": 512}, {"id": "new"}])
def test_another_model_under_the_same_name_gets_no_features_before_it_is_probed(
    vllm: VllmServer, site: Site, change: dict[str, object]
) -> None:
    site.target.probe_due()
    vllm.asked.clear()
    vllm.models[0].update(change)
    site.target.probe_due()
    takes_features = "max_model_len" in change  # the same model with another option
    assert ("image_embeds" in parts(vllm), site.target.abilities.bundles != ()) == (takes_features,) * 2
    vllm.models[0].update(id="fake", root="hub/tiny")
    site.target.probe_due()
    assert site.ask(latent(site.bundle))[0].status is Status.OK


def test_a_server_that_may_have_crashed_is_left_alone_when_it_is_back_but_another_model_is_probed(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path
) -> None:
    site = Site(vllm.url, bundle, tmp_path)
    vllm.behave = crashing
    site.target.probe_features()
    vllm.behave = lambda _: "answer"
    site.target.calls.count("no_connection")
    site.target.probe_due()
    assert parts(vllm)[2:] == ["image_url"] * 3  # about drafts
    vllm.models[0].update(root="new/tiny")
    site.target.probe_due()
    assert parts(vllm)[-1] == "image_embeds"
    assert site.target.abilities.bundles == (bundle.id,)


def test_one_lost_connection_costs_a_probe_and_not_the_features_even_if_it_is_busy(
    vllm: VllmServer, site: Site
) -> None:
    site.target.calls.count("no_connection")
    vllm.behave = lambda _: "limit_silently"
    site.target.probe_due()
    assert len(vllm.asked) == 2  # about drafts, and about features
    vllm.behave = lambda _: "answer"
    assert site.target.abilities.bundles == (site.bundle.id,)
    assert site.ask(latent(site.bundle))[0].status is Status.OK


def test_a_server_that_hangs_with_image_tokens_gets_the_next_ones_after_an_hour_and_then_two(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path
) -> None:
    site = Site(vllm.url, bundle, tmp_path, timeout_s=1.0)
    for again_s, behaviour in (3600, "reset"), (7200, "stall"):
        vllm.asked.clear()
        vllm.behave = lambda call, behaviour=behaviour: behaviour if call else "answer"
        assert not site.target.probe_features()
        assert site.target.abilities.refused["features"].endswith(f": asked again after {again_s} s")
        wait_out(site.target._latents)


def test_a_server_that_has_taken_image_tokens_may_be_too_busy_for_the_next_ones(
    vllm: VllmServer, bundle: Bundle, tmp_path: Path
) -> None:
    site = Site(vllm.url, bundle, tmp_path, timeout_s=1.0)
    assert site.target.probe_features()
    vllm.asked.clear()
    vllm.behave = lambda call: "stall" if call else "answer"
    assert site.target.probe_features()
    assert "features_refused" not in site.calls


def test_image_tokens_have_the_whole_time_of_a_call_however_long_the_picture_took(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, read = [], site.target._read_prompt
    monkeypatch.setattr(site.target, "_read_prompt", lambda job: deadlines.append(job.deadline) or read(job))
    assert site.target.probe_features()
    picture, image_tokens = deadlines
    assert image_tokens > picture


def test_a_refusal_of_features_that_come_with_a_draft_says_nothing_about_drafts(
    vllm: VllmServer, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.target.probe()
    monkeypatch.setitem(vars(site.bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", "a", "man"))
    vllm.takes_embeds = False
    wait_out(site.target._latents)
    (reply,) = site.ask(latent(site.bundle, draft=(4, 5)))
    site.target.probe_due()
    assert (reply.status, site.target.abilities.bundles, site.target.abilities.drafts) == (Status.BUSY, (), True)
    assert "draft_refused" not in site.calls


def test_a_wrong_key_says_nothing_about_features(vllm: VllmServer, site: Site) -> None:
    vllm.key = "another"
    (reply,) = site.ask(latent(site.bundle))
    assert (reply.status, "key_file" in reply.error) == (Status.FAILED, True)
    assert site.target.abilities.bundles == (site.bundle.id,)


def test_image_tokens_that_are_not_finite_are_refused_and_others_are_answered(vllm: VllmServer, site: Site) -> None:
    net = site.reader.reader.tower_tail
    scale = net.scale
    net.scale = torch.full_like(scale, 3e38)
    (lost,) = site.ask(latent(site.bundle))
    assert (lost.status, "not finite: run `aiflow distil` again" in lost.error) == (Status.FAILED, True)
    assert vllm.asked == []
    net.scale = scale
    assert site.ask(latent(site.bundle))[0].status is Status.OK
    assert site.service.counts["replies", "failed"] == 1


def test_features_of_another_bundle_and_damaged_ones_are_refused(vllm: VllmServer, site: Site) -> None:
    known = latent(site.bundle)
    strange, damaged = site.ask(
        msgspec.structs.replace(known, bundle=bytes(8)), latent(site.bundle, content=known.content[:-3])
    )
    assert (strange.status, damaged.status) == (Status.UNKNOWN_BUNDLE, Status.BAD_REQUEST)
    assert vllm.asked == []


def config(vllm: VllmServer, bundle: Bundle, tail: Path, **server: object) -> Config:
    return Config(
        ServerConfig("s1", str(bundle.path), target=f"vllm:{vllm.url}", tier="cloud", **server),
        openai=OpenAIConfig("fake"),
        vllm=VllmConfig(str(tail)),
    )


def test_it_probes_by_itself(vllm: VllmServer, bundle: Bundle, tmp_path: Path) -> None:
    target, _ = load_target(config(vllm, bundle, write_tail(tmp_path, bundle), pictures=False))
    for _ in range(5):
        assert vllm.arrived.acquire(timeout=PATIENCE_S)
    target.close()
    assert parts(vllm) == ["image_url"] * 4 + ["image_embeds"]  # the first three about drafts


def test_a_tail_that_is_none_is_found_before_the_start(vllm: VllmServer, bundle: Bundle, tmp_path: Path) -> None:
    assert "bundle" in check(config(vllm, bundle, write_tail(tmp_path / "tail", bundle)))
    (tmp_path / "tail" / "tail.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(ConfigError, match="is not the file that"):
        check(config(vllm, bundle, tmp_path / "tail"))


def test_a_boards_frame_becomes_an_event_and_no_picture_is_sent(
    vllm: VllmServer, board_bundle: Bundle, broker: Mosquitto, tmp_path: Path
) -> None:
    """Board, head, bits, Mosquitto, server, tail and the other server."""
    (tmp_path / "stream").mkdir()
    cv2.imwrite(str(tmp_path / "stream" / "1.png"), np.full((60, 160, 3), 90, np.uint8))
    (tmp_path / "board.toml").write_text(
        f'[board]\nid = "b2"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\nparadigm = "split"\n'
        f'deadline_ms = 60000\n[mqtt]\nport = {broker.port}\n[[cameras]]\nname = "yard"\n'
        f'source = "{tmp_path / "stream"}"\n'
    )
    served = config(vllm, board_bundle, write_tail(tmp_path / "tail", board_bundle))
    served = msgspec.structs.replace(served, mqtt=MqttConfig(port=broker.port))
    stop, events = threading.Event(), list[Event]()
    serving = threading.Thread(target=run_server, args=(served, stop))
    with board_of(broker, "b1") as watcher, Listener(broker.port, topics.request("home", "b2")) as asked:
        serving.start()
        try:
            while not watcher.wait_for_status(state="online", share_proven=True)["target"]["latents"]:
                pass
            run_board(load_toml(tmp_path / "board.toml", RuntimeConfig), threading.Event(), events.append)
        finally:
            stop.set()
            serving.join(PATIENCE_S)
        request = decode_request(asked.next())
    assert request.content_kind is ContentKind.LATENT
    (event,) = (event for event in events if event.type == "update")
    assert (event.text, event.answered_by.server) == (TEXT, "s1")
    assert parts(vllm)[-1] == "image_embeds"
