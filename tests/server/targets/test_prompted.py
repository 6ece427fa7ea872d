"""Prompts of another server as target: its words, its JSON, and the one try to repair it, over real sockets."""

import threading
import time
from collections.abc import Callable

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import CheckedObject, Options, Status, Usage, decode_event, topics
from server.app import run_server
from server.config import Config, OpenAIConfig, ServerConfig
from server.gateway import Arrival
from server.prompts import PromptConfig, read_prompts
from server.received import Received
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets import PictureJob, paid_calls, prompted
from server.targets.openai import OpenAITarget
from testbed.chat_server import COMPLETION_TOKENS, PROMPT_TOKENS, Asked, ChatServer, text_of
from tests.brokers import Mosquitto
from tests.listener import Listener
from tests.server.boards import Lane, board_of, is_balanced
from tests.server.boards import request as latent
from tests.server.targets.test_service import offload

PATIENCE_S = 60.0
SCHEMA = {"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"]}
PROMPTS = {
    "count": PromptConfig("How many people are there?", schema=SCHEMA),
    "drive": PromptConfig("Is a car there?", system="You watch a drive.", max_tokens=7),
    "moves": PromptConfig("What moves?", context="A red car is parked.", frames=3),
}
GOOD, BAD = '{"people": 2}', '{"people": "two"}'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paid_calls, "FIRST_WAIT_S", 0.01)


def target_of(other: ChatServer, **changes: object) -> OpenAITarget:
    return OpenAITarget(other.url, OpenAIConfig("fake", **changes), prompts=read_prompts(PROMPTS))


def job(prompt: str = "count", left_s: float = PATIENCE_S, **changes: object) -> PictureJob:
    pixels = np.zeros((224, 224, 3), np.uint8)
    return PictureJob(b"picture", "image/jpeg", pixels, time.monotonic() + left_s, prompt=prompt, **changes)


def calls(target: OpenAITarget) -> dict[str, int]:
    return target.status()["usage"]["calls"]


def is_repair(asked: Asked) -> bool:
    return asked.body["messages"][-2]["role"] == "assistant" if len(asked.body["messages"]) > 2 else False


def test_a_job_is_asked_in_the_words_of_its_prompt(other: ChatServer) -> None:
    target = target_of(other, prompt="drive")
    for named in ("drive", "", "door"):
        (answer,) = target.answer([job(named)])
        assert (answer.text, answer.checked) == (text_of(b"picture"), None)
    drive, usual, door = other.asked
    assert drive.body["messages"][0] == {"role": "system", "content": "You watch a drive."}
    assert (drive.prompt, drive.body["max_tokens"]) == ("Is a car there?", 7)
    assert usual.body == drive.body
    assert [message["role"] for message in door.body["messages"]] == ["user"]
    assert "response_format" not in door.body


def test_a_request_may_want_a_shorter_answer_than_the_prompt_and_not_a_longer_one(other: ChatServer) -> None:
    target_of(other).answer([job("drive", max_tokens=3)])
    target_of(other).answer([job("drive", max_tokens=300)])
    assert [asked.body["max_tokens"] for asked in other.asked] == [3, 7]


def test_an_object_that_matches_is_valid_and_alone_in_the_text(other: ChatServer) -> None:
    other.say = lambda _: f"```json\n{GOOD}\n```"
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (GOOD, CheckedObject("count", True))
    (asked,) = other.asked
    assert asked.body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "count", "schema": SCHEMA},
    }
    assert calls(target) == {"answered": 1}


@pytest.mark.parametrize("wrong", [BAD, "Two people.", "{"])
def test_one_call_more_repairs_an_answer_and_both_count(other: ChatServer, wrong: str) -> None:
    other.say = lambda asked: GOOD if is_repair(asked) else wrong
    target = target_of(other, input_price=1.0, output_price=10.0)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (GOOD, CheckedObject("count", True))
    cost = 2 * (PROMPT_TOKENS + 10.0 * COMPLETION_TOKENS) / 1e6
    assert answer.usage == Usage(2 * PROMPT_TOKENS, 2 * COMPLETION_TOKENS, pytest.approx(cost), "USD")
    assert target.status()["usage"]["cost"] == pytest.approx(cost)
    assert calls(target) == {"answered": 2, "repair": 1}
    assert answer.stages_ms.keys() == {"call", "repair"}
    first, second = (asked.body for asked in other.asked)
    *same, said, told = second["messages"]
    assert {**second, "messages": same} == first
    assert said == {"role": "assistant", "content": wrong}
    assert ("people" in told["content"]) == (wrong == BAD)


@pytest.mark.parametrize("unknown", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("repaired", [GOOD, BAD])
def test_a_call_without_counts_leaves_those_of_the_other_one(
    other: ChatServer, unknown: set[int], repaired: str
) -> None:
    other.say = lambda asked: repaired if is_repair(asked) else BAD
    other.behave = lambda call: "no_usage" if call in unknown else "answer"
    target = target_of(other, output_price=10.0)
    (answer,) = target.answer([job()])
    one = Usage(PROMPT_TOKENS, COMPLETION_TOKENS, pytest.approx(10.0 * COMPLETION_TOKENS / 1e6), "USD")
    assert answer.usage == (None if len(unknown) == 2 else one)
    assert answer.checked == CheckedObject("count", repaired == GOOD)


@pytest.mark.parametrize(("first", "second"), [("length", "stop"), ("stop", "length")])
def test_a_repaired_answer_says_if_the_repair_was_cut(other: ChatServer, first: str, second: str) -> None:
    def say(asked: Asked) -> str:
        other.finish_reason = second if is_repair(asked) else first
        return GOOD if is_repair(asked) else "{"

    other.say = say
    (answer,) = target_of(other).answer([job()])
    assert (answer.text, answer.is_cut) == (GOOD, second == "length")


def test_an_answer_that_stays_wrong_is_the_first_text_and_invalid(other: ChatServer) -> None:
    other.say = lambda asked: "still wrong" if is_repair(asked) else BAD
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.error, answer.checked) == (BAD, "", CheckedObject("count", False))
    assert answer.usage == Usage(2 * PROMPT_TOKENS, 2 * COMPLETION_TOKENS)
    assert calls(target) == {"answered": 2, "repair": 1, "invalid": 1}


@pytest.mark.parametrize("behaviour", ["error_500", "error_400", "limit", "html", "reset", "no_text"])
def test_a_repair_that_fails_leaves_the_first_text_and_is_tried_once(other: ChatServer, behaviour: str) -> None:
    other.say, other.behave = lambda _: BAD, lambda call: behaviour if call else "answer"
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (BAD, CheckedObject("count", False))
    assert answer.usage == Usage(PROMPT_TOKENS, COMPLETION_TOKENS)
    assert len(other.asked) == 2
    assert calls(target)["invalid"] == 1


def test_a_repair_leaves_time_for_its_reply(other: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    other.say, target, limits_s = lambda _: BAD, target_of(other), list[float]()
    post = target.calls.endpoint.post

    def noted(path: str, body: bytes, headers: dict[str, str], timeout_s: float) -> bytes:
        limits_s.append(timeout_s)
        return post(path, body, headers, timeout_s)

    monkeypatch.setattr(target.calls.endpoint, "post", noted)
    monkeypatch.setattr(prompted, "REPLY_S", 0.5 * PATIENCE_S)
    target.answer([job()])
    first_s, second_s = limits_s
    assert second_s <= 0.5 * PATIENCE_S < first_s


def test_a_repair_that_stalls_leaves_the_first_text(other: ChatServer) -> None:
    other.say, other.behave = lambda _: BAD, lambda call: "stall" if call else "answer"
    target = target_of(other, timeout_s=0.5)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (BAD, CheckedObject("count", False))
    assert calls(target) == {"answered": 1, "repair": 1, "timeout": 1, "invalid": 1}


def test_without_time_for_it_no_repair_is_paid_for(other: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompted, "REPLY_S", PATIENCE_S)
    other.say = lambda _: BAD
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (BAD, CheckedObject("count", False))
    assert calls(target) == {"answered": 1, "invalid": 1}


def test_a_repair_keeps_the_budget(other: ChatServer) -> None:
    other.say = lambda _: BAD
    cost = COMPLETION_TOKENS * 10.0 / 1e6
    target = target_of(other, output_price=10.0, max_tokens=20, budget_per_day=1.5 * cost)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.checked) == (BAD, CheckedObject("count", False))
    assert len(other.asked) == 1
    assert calls(target) == {"answered": 1, "repair": 1, "over_budget": 1, "invalid": 1}


# ---- several pictures in one question ----


def of_camera(seconds: int, camera: str, prompt: str = "moves", via: tuple[str, ...] = ()) -> Received:
    """A request of a board; its picture says when and where it was taken."""
    asked = offload(
        id=(seconds * 1000 << 16).to_bytes(8, "big"), options=Options(prompt=prompt, camera=camera, via=via)
    )
    asked = msgspec.structs.replace(asked, content=f"{camera} {seconds}".encode())
    arrival = Arrival("b1", b"", 0.0, lambda: None, lambda *_: None)
    return Received(arrival, asked, time.monotonic() + PATIENCE_S, np.zeros((224, 224, 3), np.uint8))


def test_a_prompt_may_show_the_last_pictures_of_its_camera_in_order(other: ChatServer) -> None:
    target = target_of(other)
    for received in (
        of_camera(10, "a"),
        of_camera(11, "b"),
        of_camera(12, "a"),
        of_camera(17, "a"),
        of_camera(20, "a"),
    ):
        target.answer([target.job(received)])
    assert [asked.pictures for asked in other.asked] == [
        (b"a 10",),
        (b"b 11",),
        (b"a 10", b"a 12"),
        (b"a 10", b"a 12", b"a 17"),
        (b"a 12", b"a 17", b"a 20"),
    ]
    assert "pictures" not in other.asked[0].prompt.partition("A red car")[2]
    *_, said = other.asked[-1].prompt.split("\n\n")
    assert said == "These 3 pictures are of the same camera, in the order of time: 8.0 s, 3.0 s before the last one."


def test_a_prompt_without_frames_shows_one_picture_and_counts_for_a_later_question(other: ChatServer) -> None:
    target = target_of(other)
    for received in (of_camera(10, "a"), of_camera(12, "a", "drive"), of_camera(13, "a")):
        target.answer([target.job(received)])
    assert [asked.pictures for asked in other.asked] == [(b"a 10",), (b"a 12",), (b"a 10", b"a 12", b"a 13")]


def test_a_tier_above_shows_one_picture_since_it_cannot_tell_cameras_apart(other: ChatServer) -> None:
    target = target_of(other)
    for seconds in (10, 12):
        target.answer([target.job(of_camera(seconds, "a", via=("edge1",)))])
    assert [asked.pictures for asked in other.asked] == [(b"a 10",), (b"a 12",)]


# ---- the path of a request ----


def test_an_unknown_prompt_is_refused_by_name_so_that_another_server_can_answer(other: ChatServer) -> None:
    service, lane = Service(ServerConfig("s1", target="openai:x"), target_of(other), ReplyCache()), Lane()
    service.receive(lane.arrival(offload(options=Options(prompt="gate"))))
    (reply,) = lane.replies
    assert (reply.status, reply.retry_after_ms is not None) == (Status.UNKNOWN_BUNDLE, True)
    assert "prompt 'gate' is not here, it has count, door, drive, moves" in reply.error
    assert service.counts["prompts", "unknown"] == 1
    assert is_balanced(service)


def test_a_bundle_reads_no_prompts(bundle, make_service: Callable[..., Service]) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(latent(bundle, options=Options(prompt="door"))))
    (reply,) = lane.replies
    assert reply.status is Status.UNKNOWN_BUNDLE
    assert "its target reads no prompts" in reply.error


def test_a_cameras_prompt_becomes_an_object_in_its_event(broker: Mosquitto, other: ChatServer, board_bundle) -> None:
    """Board, Mosquitto, server and HTTP; then a user switches the camera's prompt."""
    other.say = lambda asked: GOOD if "How many people" in asked.prompt else "A car."
    mqtt, stop = MqttConfig(port=broker.port), threading.Event()
    server = ServerConfig("s1", target=f"openai:{other.url}", tier="cloud")
    config = Config(server, mqtt, prompts=PROMPTS, openai=OpenAIConfig("fake"))
    board = RuntimeConfig(
        BoardConfig("b2", str(board_bundle.path), paradigm="offload", deadline_ms=60_000),
        (CameraConfig("door", "mqtt", prompt="count"),),
        mqtt,
    )
    frame = cv2.imencode(".jpg", np.full((240, 320, 3), 90, np.uint8))[1].tobytes()
    threads = [
        threading.Thread(target=run_server, args=(config, stop)),
        threading.Thread(target=run_board, args=(board, stop)),
    ]
    with (
        board_of(broker, "b1") as watcher,
        Listener(broker.port, topics.state("home", "b2", "door_prompt")) as switch,
        Listener(broker.port, topics.event("home", "b2")) as user,
    ):
        try:
            for thread in threads:
                thread.start()
            status = watcher.wait_for_status(state="online", share_proven=True)
            assert status["target"]["prompts"] == ["count", "door", "drive", "moves"]
            assert switch.next() == b"count"
            user.client.publish(topics.frame("home", "b2", "door"), frame)
            counted = decode_event(user.next())
            user.client.publish(topics.setting("home", "b2", "door_prompt"), b"drive")
            assert switch.next() == b"drive"
            user.client.publish(topics.frame("home", "b2", "door"), frame)
            driven = decode_event(user.next())
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)
    assert (counted.object, counted.schema, counted.valid, counted.text) == ({"people": 2}, "count", True, GOOD)
    assert (driven.object, driven.schema, driven.valid, driven.text) == (None, "", None, "A car.")
