"""The path of a frame, with real networks and a real broker."""

import math
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.capture.cameras import Cameras, Frame
from edge_runtime.config import BoardConfig, CameraConfig, OutboxConfig, RuntimeConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft import Drafted
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.head import Latent
from edge_runtime.inference.labels import MIN_SENT, worth_sending
from edge_runtime.inference.networks import Networks, load_draft, load_head, load_labels
from edge_runtime.inference.preprocess import to_input
from edge_runtime.inference.rate import RatedSymbols
from edge_runtime.inference.references import ReferenceFrames
from edge_runtime.inference.reuse import ReusableAnswers
from edge_runtime.inference.sampling import Sampler
from edge_runtime.mqtt import MqttClient, MqttSettings
from edge_runtime.picture_checks import decode_picture
from edge_runtime.pipeline import Pipeline, build_request, to_jpeg
from edge_runtime.planning import BoardPlanner, FixedPlanner, Measurements, Plan
from edge_runtime.reporting import RemoteSettings, board_settings
from edge_runtime.reporting.events import Events
from edge_runtime.requests import NewRequest, RequestTracker
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.requests.outbox import Outbox
from edge_runtime.requests.tracked import Row
from edge_runtime.wire import (
    AnsweredBy,
    ContentKind,
    Event,
    Options,
    Paradigm,
    Reply,
    Status,
    Tier,
    bitstream,
    decode_request,
    encode_reply,
    topics,
)
from edge_runtime.wire.event import Rate
from tests.brokers import Mosquitto
from tests.listener import PATIENCE_S, QUICK, Listener, until

SITE, BOARD = "home", "b1"


def frame(seed: int = 0, captured_unix: float = 1.6e9, age_s: float = 0.0) -> Frame:
    """A coarse random picture, captured age_s ago by the clock that counts."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Frame("door", coarse.repeat(40, 0).repeat(40, 1), captured_unix, time.monotonic() - age_s)


class Board:
    """A pipeline with its ways out. `order` is what it did, in this order."""

    def __init__(
        self,
        stack: ExitStack,
        port: int,
        bundle: Bundle,
        plan: Plan,
        outbox: OutboxConfig | None = None,
        bytes_per_minute: int = 0,
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.order: list[str] = []
        order, reusable, references = self.order, ReusableAnswers(), ReferenceFrames(60.0)

        class RecordingTracker(RequestTracker):
            def submit(self, new: NewRequest) -> bool:
                is_sent = super().submit(new)
                order.extend(["submit"] * is_sent)
                return is_sent

            def announce(self, event: Event, compact: bytes = b"") -> None:
                announced.append(compact)
                super().announce(event, compact)

        def listener(event: Event) -> None:
            order.append(event.type)
            reusable.published(event)
            self.events.put(event)

        self.client = MqttClient(
            MqttSettings("127.0.0.1", port, client_id=BOARD, keepalive_s=2),
            subscriptions=[(topics.reply(SITE, BOARD), 1)],
            on_message=lambda message: self.tracker.reply_arrived(message.payload),
            timing=QUICK,
        )
        events = Events(self.client, SITE, BOARD, listener)
        self.announced: list[bytes] = []
        announced, budget = self.announced, ByteBudget(bytes_per_minute)
        self.tracker = RecordingTracker(
            self.client, bundle, SITE, BOARD, events, 64, 60.0, outbox, byte_budget=budget, on_reply=references.heard
        )
        head = load_head(bundle, "onnx", 1) if plan.paradigm != "offload" or plan.sends_draft else None
        writes_draft = plan.paradigm in ("device", "speculative") or plan.sends_draft
        draft = load_draft(bundle, "onnx", 1) if writes_draft else None
        labels = load_labels(bundle, head, "onnx", 1) if head else None
        networks = Networks(head, draft, labels)
        self.pipeline = Pipeline(
            bundle, networks, FixedPlanner(plan), self.tracker, events, reusable=reusable, references=references
        )
        stack.enter_context(self.client)
        stack.enter_context(self.tracker)
        assert self.client.wait_online(PATIENCE_S)

    def next_event(self) -> Event:
        return self.events.get(timeout=PATIENCE_S)


Start = Callable[..., Board]


def verified(payload: bytes) -> bytes:
    """A server's reply to a request."""
    return encode_reply(Reply(id=decode_request(payload).id, status=Status.OK, text="verified", server="s1"))


@pytest.fixture
def start(broker: Mosquitto, board_bundle: Bundle) -> Iterator[Start]:
    with ExitStack() as stack:

        def board(
            paradigm: str, budget_ms: int = 60_000, board: dict[str, object] | None = None, **plan: object
        ) -> Board:
            return Board(
                stack, broker.port, board_bundle, Plan(paradigm, "for the test", budget_ms, **plan), **board or {}
            )

        yield board


@pytest.fixture
def server(broker: Mosquitto) -> Iterator[Listener]:
    """Answers every request at once with the same text."""

    with Listener(broker.port, topics.request(SITE, BOARD), answer=verified, to=topics.reply(SITE, BOARD)) as listener:
        yield listener


def test_the_request_is_sent_before_the_event_and_before_jpeg_bytes_are_counted(start, broker, monkeypatch):
    board = start("speculative")
    monkeypatch.setattr(
        "edge_runtime.pipeline.to_jpeg", lambda *arguments: board.order.append("jpeg") or to_jpeg(*arguments)
    )
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        for seed in range(5):
            seen = board.pipeline.handle(frame(seed))
            assert board.next_event() == seen
            board.tracker.reply_arrived(verified(server.next()))
            update = board.next_event()
            assert (update.type, update.frame, update.text, update.final) == ("update", seen.frame, "verified", True)
    assert board.order == ["submit", "jpeg", "new", "update", *(4 * ["submit", "new", "update"])]


@pytest.mark.parametrize(("name", "encoded"), [("", 2), ("photo.jpg", 9)])
def test_one_frame_in_eight_of_a_camera_and_each_photo_of_a_folder_is_encoded_to_count_its_bytes(
    start, broker, monkeypatch, name, encoded
):
    board, sizes = start("device"), []
    monkeypatch.setattr("edge_runtime.pipeline.to_jpeg", lambda *arguments: sizes.append(0) or to_jpeg(*arguments))
    events = [board.pipeline.handle(replace(frame(0), name=name)) for _ in range(9)]
    assert len(sizes) == encoded
    assert {event.jpeg_bytes for event in events} == {len(to_jpeg(to_input(frame(0).pixels), 75))}


def test_a_reply_that_is_faster_than_the_draft_is_not_replaced_by_the_draft(start, broker):
    board = start("split")

    class Waiting:
        """A draft decoder that takes longer than the answer."""

        reads_labels = False

        def write(self, symbols: np.ndarray, labels: object, sampler: None) -> Drafted:
            board.tracker.reply_arrived(verified(server.next()))
            assert board.next_event().type == "update"
            return Drafted((5, 6, 2), 0.5)

    board.pipeline.draft = Waiting()
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        board.pipeline.handle(frame())
        until(lambda: board.tracker.summary()["reply"].get("overtaken") == 1)
    assert (board.order, len(board.announced)) == (["submit", "update"], 1)


@pytest.mark.parametrize(
    ("status", "order"), [(Status.BUSY, ["submit", "new", "lost"]), (Status.FAILED, ["submit", "lost"])]
)
def test_a_draft_that_comes_after_the_request_was_refused_is_in_the_event_of_its_loss(start, broker, status, order):
    board = start("split")

    class Waiting:
        """A draft decoder that takes longer than the server's reply."""

        reads_labels = False

        def write(self, symbols: np.ndarray, labels: object, sampler: None) -> Drafted:
            request_id = decode_request(server.next()).id
            board.tracker.reply_arrived(encode_reply(Reply(id=request_id, status=status, retry_after_ms=120_000)))
            until(lambda: board.tracker.summary()["busy" if status is Status.BUSY else "lost"] == 1)
            return Drafted((5, 6, 2), 0.5)

    board.pipeline.draft = Waiting()
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        board.pipeline.handle(frame())
        lost = [board.next_event() for _ in order[1:]][-1]
    assert (lost.type, lost.final, lost.tokens, lost.text) == ("lost", True, (5, 6, 2), "word5 word6")
    assert status.name.lower() in lost.why
    assert board.order == order


def test_a_picture_that_no_server_takes_in_time_is_kept_although_its_features_come_later(
    start, broker, board_bundle, tmp_path
):
    board = start("offload", board={"outbox": OutboxConfig(str(tmp_path / "outbox"))})
    head = load_head(board_bundle, "onnx", 1)
    board.pipeline.draft = load_draft(board_bundle, "onnx", 1)

    class Waiting:
        """A head that takes longer than the server's reply."""

        def latent(self, pixels: np.ndarray) -> Latent:
            request_id = decode_request(server.next()).id
            busy = Reply(id=request_id, status=Status.BUSY, retry_after_ms=120_000)
            board.tracker.reply_arrived(encode_reply(busy))
            until(lambda: board.tracker.summary()["busy"] == 1)
            return head.latent(pixels)

    board.pipeline.head = Waiting()
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        seen = board.pipeline.handle(frame())
        assert [board.next_event().type for _ in range(2)] == ["new", "update"]
        again = decode_request(server.next())
        board.tracker.reply_arrived(encode_reply(Reply(id=again.id, status=Status.FAILED)))
        lost = board.next_event()
    assert (again.content_kind, tuple(again.draft_ids)) == (ContentKind.LATENT, seen.tokens)
    assert (lost.type, lost.tokens) == ("lost", seen.tokens)


def test_in_split_the_draft_is_written_after_sending_and_shown_until_the_reply(start, broker, board_bundle):
    board = start("split")
    board.pipeline.draft = load_draft(board_bundle, "onnx", 1)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        seen = board.pipeline.handle(frame())
        assert decode_request(server.next()).draft == b""
        assert (board.next_event(), seen.paradigm, seen.final) == (seen, "split", False)
        assert seen.tokens


def test_the_new_event_has_the_draft_and_what_it_took(start, board_bundle):
    event = start("speculative").pipeline.handle(frame())
    assert (event.type, event.final, event.camera, event.paradigm, event.why) == (
        "new",
        False,
        "door",
        "speculative",
        "for the test",
    )
    assert event.tokens
    assert event.text == board_bundle.text(list(event.tokens))
    assert event.answered_by is not None
    assert event.answered_by.tier == "device"
    assert event.captured.timestamp() == 1.6e9
    assert event.jpeg_bytes > 1000
    assert {"resize", "head", "draft", "labels", "encode"} == set(event.timings_ms)
    assert event.after_ms >= sum(event.timings_ms.values())


@pytest.mark.parametrize("paradigm", ["split", "speculative", "offload"])
def test_the_event_counts_the_bytes_that_the_server_gets(start, server, paradigm):
    board = start(paradigm)
    seen = board.pipeline.handle(frame())
    payload = server.next()
    assert seen.bytes_up == len(payload)
    assert decode_request(payload).id.hex() == seen.frame


def test_a_speculative_request_carries_the_symbols_and_the_whole_draft(start, server, board_bundle):
    seen = start("speculative", tier=Tier.CLOUD).pipeline.handle(frame())
    request = decode_request(server.next())
    assert (request.paradigm, request.content_kind) == (Paradigm.SPECULATIVE, ContentKind.LATENT)
    assert request.bundle == board_bundle.id
    assert tuple(request.draft_ids) == seen.tokens
    symbols = bitstream.decode(request.content, board_bundle.tables).symbols
    assert np.array_equal(symbols, load_head(board_bundle, "onnx", 1).symbols(to_input(frame().pixels)))
    assert request.options is not None
    assert request.options.tier is Tier.CLOUD


@pytest.mark.parametrize(
    ("plan", "level", "groups"), [({"level": 0}, 0, 4), ({"level": 7}, 1, 4), ({"groups": 2}, 1, 2), ({}, 1, 4)]
)
def test_a_plan_says_at_which_rate_features_are_sent_and_the_event_repeats_it(
    start, server, board_bundle, plan, level, groups
):
    seen = start("split", **plan).pipeline.handle(frame())
    content = decode_request(server.next()).content
    decoded = bitstream.decode(content, board_bundle.tables)
    assert (decoded.header.level, decoded.header.groups, decoded.checked) == (level, groups, True)
    assert seen.rate == Rate(level, groups, len(content))


def test_features_that_are_too_long_are_sent_coarser(start, server, board_bundle):
    symbols = load_head(board_bundle, "onnx", 1).symbols(to_input(frame().pixels))
    limit = len(bitstream.encode(symbols, board_bundle.tables, 1)) * 3 // 4  # more than shrinking saves
    seen = start("split", max_bytes=limit).pipeline.handle(frame())
    assert seen.rate is not None
    assert (seen.rate.level, seen.rate.bytes) == (0, len(decode_request(server.next()).content))
    assert seen.rate.bytes <= limit


def test_features_that_do_not_fit_at_all_leave_the_answer_to_the_device(start):
    seen = start("speculative", max_bytes=40).pipeline.handle(frame())
    assert (seen.paradigm, seen.final, seen.bytes_up, seen.rate) == ("device", True, 0, None)
    assert seen.why == "speculative: the coarsest features do not fit into 40 bytes"


def test_split_sends_no_draft_and_has_no_event_before_the_answer(start, server):
    board = start("split")
    seen = board.pipeline.handle(frame())
    request = decode_request(server.next())
    assert (request.paradigm, request.draft) == (Paradigm.SPLIT, b"")
    update = board.next_event()
    assert (update.type, update.frame, update.text) == ("update", seen.frame, "verified")
    assert board.order == ["submit", "update"]


def test_a_plan_that_lets_the_server_propose_says_so(start, server):
    board = start("split", propose=True)
    board.pipeline.handle(frame())
    assert decode_request(server.next()).options == Options(propose=True)


def test_a_plan_with_a_prompt_sends_its_name(start, server):
    board = start("offload", prompt="drive")
    board.pipeline.handle(frame())
    assert decode_request(server.next()).options == Options(prompt="drive")


@pytest.mark.parametrize("seed", [None, 7])
def test_a_sampled_draft_has_the_noise_of_the_request_and_its_events_have_the_seed(start, server, seed):
    sampling = Options(temperature=100.0, repetition_penalty=10.0, seed=seed)
    board = start("speculative", sampling=sampling)
    seen = board.pipeline.handle(frame())
    request = decode_request(server.next())
    assert request.options == sampling
    noise = int.from_bytes(request.id, "big") if seed is None else seed
    latent = board.pipeline.head.latent(to_input(frame().pixels))
    labels = worth_sending(board.pipeline.labels.likeliest(latent.backbone_map))
    drafted = board.pipeline.draft.write(latent.symbols(), labels, Sampler(sampling, noise))
    assert tuple(request.draft_ids) == drafted.tokens == seen.tokens
    if seed is not None:  # the noise of a random id may choose the likeliest tokens
        assert drafted.tokens != board.pipeline.draft.write(latent.symbols(), labels).tokens
    while not (update := board.next_event()).final:
        pass
    assert seen.seed == update.seed == f"{noise:016x}"


def test_a_picture_names_its_camera_if_the_board_has_several_and_features_do_not(start, server):
    start("offload", camera="door").pipeline.handle(frame())
    assert decode_request(server.next()).options == Options(camera="door")
    start("split", camera="door").pipeline.handle(frame())
    assert decode_request(server.next()).options is None


def test_offload_sends_the_picture_and_needs_no_head(start, server):
    board = start("offload", jpeg_quality=90)
    assert board.pipeline.head is None
    board.pipeline.handle(frame())
    request = decode_request(server.next())
    assert (request.paradigm, request.content_kind) == (Paradigm.OFFLOAD, ContentKind.JPEG)
    assert decode_picture(request.content).shape == (224, 224, 3)


def test_a_draft_that_goes_with_the_picture_is_written_before_sending(start, server):
    board = start("offload", sends_draft=True)
    event = board.pipeline.handle(frame())
    request = decode_request(server.next())
    assert (request.paradigm, request.content_kind) == (Paradigm.OFFLOAD, ContentKind.JPEG)
    assert tuple(request.draft_ids) == event.tokens != ()
    assert request.bundle == board.pipeline.bundle.id
    stages = list(event.timings_ms)
    assert stages.index("draft") < stages.index("encode")
    assert request.labels is None


@pytest.mark.parametrize(("longest", "shape"), [(200, (150, 200, 3)), (1000, (240, 320, 3))])
def test_an_offloaded_picture_may_keep_its_proportions(start, server, longest, shape):
    start("offload", picture_pixels=longest).pipeline.handle(frame())
    assert decode_picture(decode_request(server.next()).content).shape == shape


def test_a_picture_that_no_request_can_hold_is_made_smaller(start, server):
    noise = replace(frame(), pixels=np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
    start("offload", picture_pixels=800, jpeg_quality=100).pipeline.handle(noise)
    assert decode_picture(decode_request(server.next()).content).shape == (300, 400, 3)


def test_device_sends_nothing_and_its_event_is_final(start):
    board = start("device")
    seen = board.pipeline.handle(frame())
    event = board.next_event()
    assert event == seen
    assert (event.type, event.final, event.bytes_up) == ("new", True, 0)
    assert board.order == ["new"]
    assert board.client.stats()["published"] == 2  # the event, and the retained last one


def test_a_board_without_a_head_can_send_nothing_and_says_why(start):
    board = start("offload")
    board.pipeline.planner = FixedPlanner(Plan("device", "device: no server has the prompt gate", 1000))
    board.pipeline.handle(frame())
    event = board.next_event()
    assert (event.type, event.final, event.bytes_up) == ("new", True, 0)
    assert (event.paradigm, event.why) == ("device", "device: no server has the prompt gate")
    assert board.order == ["new"]


def test_a_frame_that_was_handled_is_free_before_the_next_one_is_read(start):
    def frames() -> Iterator[Frame]:
        for seed in range(2):
            held = [frame(seed)]
            pixels = weakref.ref(held[0].pixels)
            yield held.pop()
            assert pixels() is None

    board = start("device")
    board.pipeline.run(frames())
    assert board.pipeline.handled["device"] == 2


def test_a_draft_with_enough_confidence_is_the_answer_and_nothing_is_sent(start):
    board = start("speculative", min_confidence=0.0)
    seen = board.pipeline.handle(frame())
    assert (seen.final, seen.paradigm, seen.bytes_up) == (True, "device", 0)
    assert seen.why.startswith("draft accepted: confidence 0.")
    assert board.order == ["new"]


@pytest.mark.parametrize("paradigm", ["split", "speculative", "offload"])
def test_a_frame_like_an_answered_one_gets_its_answer_and_nothing_is_sent(start, server, board_bundle, paradigm):
    board = start(paradigm, reuse_distance=0.15)
    board.pipeline.head = load_head(board_bundle, "onnx", 1)
    asked = board.pipeline.handle(frame())
    while not (update := board.next_event()).final:
        pass
    again = board.pipeline.handle(frame())
    assert (again.type, again.final, again.paradigm, again.bytes_up, again.rate) == ("new", True, "device", 0, None)
    assert (again.reuse.frame, again.reuse.distance) == (asked.frame, 0)
    assert (
        (again.text, again.answered_by) == (update.text, update.answered_by) == ("verified", AnsweredBy("edge", "s1"))
    )
    assert "draft" not in again.timings_ms
    other = board.pipeline.handle(frame(1))
    assert (other.reuse, other.bytes_up > 0, board.pipeline.reused) == (None, True, 1)


def test_an_answer_to_another_prompt_is_not_used_again(start, server):
    board = start("speculative", reuse_distance=0.15, prompt="drive")
    board.pipeline.handle(frame())
    while not board.next_event().final:
        pass
    assert board.pipeline.handle(frame()).reuse is not None
    board.pipeline.planner = FixedPlanner(replace(board.pipeline.planner.plan("door"), prompt="gate"))
    assert board.pipeline.handle(frame()).reuse is None


def test_a_frame_is_sent_while_the_one_like_it_has_no_answer(start, broker):
    board = start("speculative", reuse_distance=0.15)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        for _ in range(2):
            assert board.pipeline.handle(frame()).reuse is None
            server.next()


def test_an_accepted_draft_is_used_again_while_the_floor_allows_it(start):
    board = start("speculative", min_confidence=0.0, reuse_distance=0.15)
    first, again = board.pipeline.handle(frame()), board.pipeline.handle(frame())
    assert (again.reuse.frame, again.tokens, again.answered_by) == (first.frame, first.tokens, AnsweredBy("device"))
    board.pipeline.planner = FixedPlanner(replace(board.pipeline.planner.plan("door"), min_confidence=0.999))
    assert board.pipeline.handle(frame()).reuse is None


def test_a_draft_that_is_an_answer_for_want_of_bytes_is_not_used_again(start):
    board = start("speculative", reuse_distance=0.15, board={"bytes_per_minute": 200})
    assert [board.pipeline.handle(frame()).reuse for _ in range(2)] == [None, None]


def kept(payload: bytes) -> bytes:
    """The reply of a server that keeps the symbols."""
    return encode_reply(Reply(id=decode_request(payload).id, status=Status.OK, server="s1", is_reference=True))


def has_reference(payload: bytes) -> bool:
    return bitstream.Header.from_bytes(decode_request(payload).content).reference is not None


def test_a_frame_like_an_answered_one_is_coded_against_it_and_sent_alone_if_the_server_has_forgotten_it(start, broker):
    board = start("split", writes_draft=False)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        first = board.pipeline.handle(frame())
        alone = server.next()
        board.tracker.reply_arrived(kept(alone))
        until(lambda: board.tracker.summary()["answered"] == 1)
        again = board.pipeline.handle(frame())
        against = server.next()
        assert [has_reference(alone), has_reference(against)] == [False, True]
        assert again.bytes_up == len(against) < 0.8 * first.bytes_up
        assert again.rate.bytes == len(decode_request(against).content)
        lost = Reply(id=decode_request(against).id, status=Status.REFERENCE_LOST)
        board.tracker.reply_arrived(encode_reply(lost))
        resent = server.next()
        assert decode_request(resent).id == lost.id
        assert decode_request(resent).content == decode_request(alone).content
        board.tracker.reply_arrived(kept(resent))
        updates = [board.next_event() for _ in range(2)]
        assert (updates[1].type, updates[1].bytes_up) == ("update", len(against) + len(resent))
        assert board.tracker.summary()["reply"]["reference_lost"] == 1


def test_another_scene_is_sent_alone_since_that_is_shorter(start, broker):
    board = start("split", writes_draft=False)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        for seed in range(4):
            board.pipeline.handle(frame(seed))
            payload = server.next()
            board.tracker.reply_arrived(kept(payload))
            until(lambda count=seed + 1: board.tracker.summary()["answered"] == count)
            assert not has_reference(payload)


def test_what_goes_to_the_outbox_has_no_reference(start, broker, tmp_path, monkeypatch):
    rows: list[Row] = []
    monkeypatch.setattr(Outbox, "put", lambda _, row: rows.append(row))  # the request is sent all the same, a bit later
    outbox = OutboxConfig(str(tmp_path / "outbox"), every_request=True)
    board = start("split", board={"outbox": outbox}, writes_draft=False)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        board.pipeline.handle(frame())
        board.tracker.reply_arrived(kept(server.next()))
        until(lambda: board.tracker.summary()["answered"] == 1)
        board.pipeline.handle(frame())
        assert has_reference(server.next())
    assert [has_reference(row.payload) for row in rows] == [False, False]


def test_a_frame_that_is_only_kept_puts_off_no_frame_that_is_to_be_sent_alone(start, broker, tmp_path):
    board = start("split", 200_000, writes_draft=False, board={"outbox": OutboxConfig(str(tmp_path / "outbox"))})
    live = board.pipeline.planner.plan("door")
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        board.pipeline.handle(frame(age_s=70))
        board.tracker.reply_arrived(kept(server.next()))
        until(lambda: board.tracker.summary()["answered"] == 1)
        board.pipeline.planner = FixedPlanner(replace(live, keep=True))
        board.pipeline.handle(frame(age_s=20))
        board.pipeline.planner = FixedPlanner(live)
        board.pipeline.handle(frame())  # 60 s without a frame alone have passed
        assert not has_reference(server.next())


@pytest.mark.parametrize(("stated", "said"), [(0.25, 0.25), (math.nan, None)])
def test_an_event_has_the_confidence_of_its_draft_if_that_is_a_number(start, monkeypatch, stated, said):
    board = start("device")
    monkeypatch.setattr(board.pipeline.draft, "write", lambda *_: Drafted((7, 2), stated))
    assert board.pipeline.handle(frame()).confidence == said


def test_a_reply_without_confidence_does_not_take_over_that_of_the_draft(start, server):
    board = start("speculative")
    draft = board.pipeline.handle(frame())
    assert draft.confidence is not None
    answer = board.next_event()
    if answer.type == "new":  # unless the reply was faster
        answer = board.next_event()
    assert (answer.type, answer.confidence) == ("update", None)


@pytest.mark.parametrize(
    ("paradigm", "options"),
    [
        ("device", {}),
        ("speculative", {"min_confidence": 0.0}),
        ("speculative", {"board": {"bytes_per_minute": 200}}),
        ("split", {"board": {"bytes_per_minute": 200}}),
    ],
)
def test_a_frame_that_the_device_answers_alone_has_labels(start, board_bundle, paradigm, options):
    event = start(paradigm, **options).pipeline.handle(frame())
    assert event.final
    assert set(event.scores) == set(board_bundle.manifest.classes)
    assert event.label == max(event.scores, key=event.scores.get)
    assert event.timings_ms["labels"] > 0


@pytest.mark.parametrize("paradigm", ["speculative", "split"])
def test_labels_go_with_the_features_and_into_the_event(start, server, board_bundle, paradigm):
    board = start(paradigm)
    event = board.pipeline.handle(frame())
    assert not event.final
    assert event.label == next(iter(event.scores)) == max(event.scores, key=event.scores.get)
    labels = decode_request(server.next()).seen_labels
    for number, probability in labels.items():
        assert event.scores[board_bundle.manifest.classes[number]] == pytest.approx(probability, abs=1 / 255)
    assert len(labels) == sum(probability >= MIN_SENT for probability in event.scores.values()) > 0


@pytest.mark.parametrize("paradigm", ["device", "speculative", "split"])
@pytest.mark.parametrize("sends_labels", [True, False])
def test_a_draft_is_written_from_the_labels_that_the_board_looks_for(start, board_bundle, paradigm, sends_labels):
    board = start(paradigm)
    board.pipeline.draft = load_draft(board_bundle, "onnx", 1)
    board.pipeline.sends_labels = sends_labels
    latent = board.pipeline.head.latent(to_input(frame().pixels))
    seen = worth_sending(board.pipeline.labels.likeliest(latent.backbone_map))
    with_labels, without = (board.pipeline.draft.write(latent.symbols(), labels).tokens for labels in (seen, ()))
    assert with_labels != without
    tokens = board.pipeline.handle(frame()).tokens
    assert tokens == (with_labels if sends_labels or paradigm == "device" else without)


def test_a_draft_that_will_be_the_answer_is_written_from_labels_even_if_none_are_sent(start, board_bundle):
    board = start("split", board={"bytes_per_minute": 200})
    board.pipeline.draft, board.pipeline.sends_labels = load_draft(board_bundle, "onnx", 1), False
    latent = board.pipeline.head.latent(to_input(frame().pixels))
    seen = worth_sending(board.pipeline.labels.likeliest(latent.backbone_map))
    event = board.pipeline.handle(frame())
    assert event.final
    assert event.tokens == board.pipeline.draft.write(latent.symbols(), seen).tokens


@pytest.mark.parametrize("writes_draft", [True, False])
def test_what_a_picture_leaves_in_the_outbox_has_the_labels(start, board_bundle, tmp_path, writes_draft):
    outbox = OutboxConfig(str(tmp_path / "outbox"))
    board = start("offload", writes_draft=writes_draft, board={"outbox": outbox})
    board.pipeline.head = load_head(board_bundle, "onnx", 1)
    board.pipeline.labels = load_labels(board_bundle, board.pipeline.head, "onnx", 1)
    board.pipeline.handle(frame())
    assert decode_request(board.announced[0]).seen_labels


def test_a_draft_that_knows_no_labels_looks_for_none(start, board_bundle, monkeypatch):
    board = start("offload", sends_draft=True)
    board.pipeline.draft._labels = None
    monkeypatch.setattr("edge_runtime.inference.labels.Labels.likeliest", lambda *_: pytest.fail("was run"))
    assert board.pipeline.handle(frame()).tokens


@pytest.mark.parametrize("paradigm", ["speculative", "split", "offload"])
def test_a_frame_that_a_server_verifies_costs_a_board_that_sends_none_no_labels(start, paradigm, monkeypatch):
    board = start(paradigm)
    board.pipeline.sends_labels = False
    monkeypatch.setattr("edge_runtime.inference.labels.Labels.likeliest", lambda *_: pytest.fail("was run"))
    event = board.pipeline.handle(frame())
    assert (event.final, event.label, event.scores) == (False, None, {})


def test_without_a_network_for_labels_the_event_has_none(start):
    board = start("device")
    board.pipeline.labels = None
    event = board.pipeline.handle(frame())
    assert (event.label, event.scores) == (None, {})
    assert "labels" not in event.timings_ms


def test_a_kept_request_goes_to_the_outbox_whatever_the_confidence_of_its_draft(start, tmp_path):
    outbox = OutboxConfig(str(tmp_path / "outbox"))
    board = start("speculative", keep=True, min_confidence=0.0, board={"outbox": outbox})
    seen = board.pipeline.handle(frame())
    assert (seen.final, seen.paradigm) == (False, "speculative")
    assert board.next_event().frame == seen.frame
    assert board.order == ["submit", "new"]


@pytest.mark.parametrize("paradigm", ["offload", "split"])
def test_without_cpu_time_for_a_draft_only_what_the_request_needs_is_computed(start, server, board_bundle, paradigm):
    board = start(paradigm, writes_draft=False)
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    told: list[dict[str, float]] = []
    board.pipeline.planner.learn = lambda plan, timings_ms, confidence: told.append(timings_ms)
    board.pipeline.handle(frame())
    assert board.next_event().type == "update"
    assert set(told[0]) == {"resize", "encode", "publish"} | ({"head", "labels"} if paradigm == "split" else set())


@pytest.mark.parametrize("paradigm", ["offload", "split", "speculative"])
def test_if_the_request_does_not_fit_into_the_byte_budget_the_device_answers(start, board_bundle, paradigm):
    board = start(paradigm, board={"bytes_per_minute": 200})
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    seen = board.pipeline.handle(frame())
    assert (seen.final, seen.paradigm, seen.bytes_up) == (True, "device", 0)
    assert seen.why.endswith("bytes more do not fit into this minute's budget")
    assert seen.tokens
    assert board.order == ["new"]


def test_a_picture_is_kept_as_features(start, broker, board_bundle, tmp_path):
    board = start("offload", board={"outbox": OutboxConfig(str(tmp_path / "outbox"))})
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    seen = board.pipeline.handle(frame())
    request = decode_request(board.announced[0])
    assert (request.id.hex(), request.paradigm) == (seen.frame, Paradigm.SPECULATIVE)
    assert (request.content_kind, tuple(request.draft_ids)) == (ContentKind.LATENT, seen.tokens)


def test_without_cpu_time_for_a_draft_a_picture_is_kept_as_features_too(start, board_bundle, tmp_path):
    outbox = OutboxConfig(str(tmp_path / "outbox"))
    board = start("offload", writes_draft=False, board={"outbox": outbox})
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    assert board.pipeline.handle(frame()) is not None
    request = decode_request(board.announced[0])
    assert (request.content_kind, request.draft) == (ContentKind.LATENT, b"")


@pytest.mark.parametrize("writes_draft", [True, False])
def test_a_picture_that_is_stored_before_it_is_sent_is_stored_as_features(
    start, server, board_bundle, tmp_path, monkeypatch, writes_draft
):
    rows: list[Row] = []
    monkeypatch.setattr(Outbox, "put", lambda _, row: rows.append(row))  # the request is sent all the same, a bit later
    outbox = OutboxConfig(str(tmp_path / "outbox"), every_request=True)
    board = start("offload", writes_draft=writes_draft, board={"outbox": outbox})
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    board.pipeline.handle(frame())
    assert decode_request(server.next()).content_kind is ContentKind.JPEG
    assert [decode_request(row.payload).content_kind for row in rows] == [ContentKind.LATENT]


@pytest.mark.parametrize("every_request", [True, False])
def test_a_picture_whose_features_do_not_fit_is_sent_and_never_stored(
    start, broker, board_bundle, tmp_path, monkeypatch, every_request
):
    rows: list[Row] = []
    monkeypatch.setattr(Outbox, "put", lambda _, row: rows.append(row))
    outbox = OutboxConfig(str(tmp_path / "outbox"), every_request=every_request)
    board = start("offload", 1000, writes_draft=False, max_bytes=1, board={"outbox": outbox})
    board.pipeline.head = load_head(board_bundle, "onnx", 1)
    with Listener(broker.port, topics.request(SITE, BOARD)) as server:
        seen = board.pipeline.handle(frame())
        assert decode_request(server.next()).content_kind is ContentKind.JPEG
        lost = board.next_event()
    assert (lost.type, lost.frame, lost.why) == ("lost", seen.frame, "no reply to 1 sent")
    assert (board.announced, rows) == ([b""], [])


def test_the_encoding_time_of_a_picture_over_the_byte_budget_is_not_measured_as_that_of_a_latent(start, board_bundle):
    board = start("offload", board={"bytes_per_minute": 200})
    board.pipeline.head, board.pipeline.draft = load_head(board_bundle, "onnx", 1), load_draft(board_bundle, "onnx", 1)
    cameras = (CameraConfig("door", "mqtt"),)
    config = RuntimeConfig(BoardConfig(BOARD, "bundle", paradigm="offload"), cameras)
    measurements, remote = Measurements(), RemoteSettings(SITE, BOARD, board_settings(config))
    board.pipeline.planner = BoardPlanner(config, Cameras(cameras), remote, measurements, Calibration())
    assert board.pipeline.handle(frame()).paradigm == "device"
    measured = measurements.snapshot(time.monotonic()).board
    assert measured.encode_ms is None
    assert measured.picture_ms is not None


def test_nothing_waits_for_a_frozen_broker_and_every_request_ends_at_its_deadline(start, broker):
    board = start("speculative", budget_ms=2000)
    broker.freeze()
    frames = [frame(seed) for seed in range(20)]
    seen = [board.pipeline.handle(each) for each in frames]
    assert board.order.count("submit") == 20
    ended = {}
    while len(ended) < 20:
        event = board.next_event()
        if event.type != "new":
            ended[event.frame] = event
    assert ended.keys() == {event.frame for event in seen}
    assert all((e.type, e.final, e.text) == ("lost", True, s.text) for s, e in zip(seen, ended.values(), strict=True))
    broker.thaw()


def test_a_frame_that_the_head_refuses_is_counted_and_the_next_one_is_handled(start):
    board = start("device")
    grey = replace(frame(), pixels=np.zeros((300, 300), np.uint8))
    board.pipeline.run([grey, frame()])
    assert board.pipeline.failed == 1
    assert board.order == ["new"]


def test_ids_rise_even_when_the_clock_goes_back(start):
    board = start("device")
    ids = [board.pipeline.handle(frame(captured_unix=unix)).frame for unix in (1.6e9, 1.0e9, 1.7e9)]
    assert ids == sorted(set(ids))


def test_what_is_left_of_the_budget_is_counted_from_capture(board_bundle):
    pixels, symbols = np.zeros((224, 224, 3), np.uint8), RatedSymbols(np.zeros((64, 7, 7), np.int8), 1, 4)
    plan = Plan("split", "for the test", 1000)
    fresh, old = (build_request(board_bundle, bytes(8), plan, pixels, symbols, (), age) for age in (300, 5000))
    assert (fresh.age_ms, fresh.budget_ms) == (300, 700)
    assert (old.age_ms, old.budget_ms) == (5000, 0)
