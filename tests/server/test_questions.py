"""Taught questions on a server: loaded all or none, asked by name, answered from the tail's one pass."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.picture_checks import decode_picture
from edge_runtime.wire import ContentKind, Options, Paradigm, Reply, Status, Tier, topics
from models.questions import FEATURES, Question, Record
from server.app import run_server
from server.engine import Engine, Job
from server.escalation import passed_down
from server.pictures import PictureDecoder
from server.questions import MAX_FILES, MAX_MESSAGE, Questions
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.bundle import BundleTarget
from tests.server.boards import PATIENCE_S, SYMBOLS, Board, Lane, board_of, config, request

CLASSES = ("closed", "half open", "open")


def question(bundle: Bundle, seed: int = 0, of: str = "") -> Question:
    """Taught with nothing: its answers differ between the latents of these tests."""
    rng = np.random.default_rng(seed)
    record = Record(CLASSES, of or bundle.id.hex(), "tiny", 1.0, 2.0, 30, 0.97)
    weight = rng.normal(size=(3, FEATURES), scale=0.01).astype(np.float32)
    label_weight = rng.normal(size=(3, len(bundle.manifest.classes))).astype(np.float32)
    return Question(record, weight, label_weight, np.zeros(3, np.float32))


@pytest.fixture
def folder(tmp_path: Path, bundle: Bundle) -> Path:
    """With the files gate and door, one of another bundle and one that is damaged."""
    folder = tmp_path / "questions"
    folder.mkdir()
    question(bundle, 0).write(folder / "gate.safetensors")
    question(bundle, 1).write(folder / "door.safetensors")
    question(bundle, 2, of="00" * 8).write(folder / "foreign.safetensors")
    (folder / "damaged.safetensors").write_bytes((folder / "gate.safetensors").read_bytes()[:5000])
    return folder


def expected(engine: Engine, asked: Question, i: int) -> dict[str, float]:
    return asked.answer(engine.evidence([Job(SYMBOLS[i])])[0])


def serve(service: Service, payload: msgspec.Struct) -> Reply:
    lane = Lane()
    service.receive(lane.arrival(payload))
    service.answer(service.target_queue.take(0))
    return lane.replies[-1]


def test_a_batch_of_several_boards_is_answered_from_one_pass_of_the_tail(
    bundle: Bundle, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, tail = [], Engine.features
    monkeypatch.setattr(Engine, "features", lambda self, jobs: passes.append(len(jobs)) or tail(self, jobs))
    asked = {"gate": question(bundle, 0), "door": question(bundle, 1)}
    jobs = [Job(SYMBOLS[0], questions=asked), Job(SYMBOLS[1]), Job(SYMBOLS[2], questions={"door": asked["door"]})]
    answers = [answer.answers for answer in engine.answer(jobs)]
    assert passes == [3]
    monkeypatch.undo()
    assert answers[0] == {name: expected(engine, asked[name], 0) for name in asked}
    assert answers[1] == {}
    assert answers[2] == {"door": expected(engine, asked["door"], 2)}


def test_answers_do_not_depend_on_neighbours_and_drafts(bundle: Bundle, engine: Engine) -> None:
    asked = {"gate": question(bundle)}
    alone = [engine.answer([Job(symbols, questions=asked)])[0].answers for symbols in SYMBOLS[:8]]
    together = engine.answer([Job(symbols, draft=(5, 6, 7), questions=asked) for symbols in SYMBOLS[:8]])
    assert [answer.answers for answer in together] == alone
    assert len({answer["gate"]["open"] for answer in alone}) == 8  # otherwise this would show nothing


def test_a_question_reads_the_labels_that_the_board_has_seen(bundle: Bundle, engine: Engine) -> None:
    gate, seen = question(bundle), {1: 0.9}
    with_labels, alone = engine.evidence([Job(SYMBOLS[0], labels=seen), Job(SYMBOLS[0])])
    assert (with_labels.has_seen_labels, alone.has_seen_labels) == (True, False)
    assert with_labels.labels[1] == pytest.approx(0.9)
    assert with_labels.labels.sum() == pytest.approx(1)
    answers = engine.answer([Job(SYMBOLS[0], questions={"gate": gate}, labels=each) for each in (seen, {})])
    assert [each.answers["gate"] for each in answers] == [gate.answer(with_labels), gate.answer(alone)]
    assert answers[0].answers != answers[1].answers


def test_a_request_is_answered_what_it_asks_and_the_server_has(bundle: Bundle, engine: Engine, folder: Path) -> None:
    questions = Questions(bundle, {"gate": str(folder / "gate.safetensors")})
    service = Service(config(bundle).server, BundleTarget(bundle, engine, questions=questions), ReplyCache())
    reply = serve(service, request(bundle, 3, options=Options(questions=("gate", "door"))))
    assert reply.status is Status.OK
    assert reply.answers == {"gate": expected(engine, question(bundle, 0), 3)}
    assert service.counts["questions", "asked"] == service.counts["questions", "unknown"] == 1
    assert serve(service, request(bundle, 3)).answers is None
    assert service.status()["questions"] == {"gate": 0.97}


def test_a_picture_is_asked_as_its_latent_would_be(bundle: Bundle, engine: Engine, folder: Path) -> None:
    questions = Questions(bundle, {"gate": str(folder / "gate.safetensors")})
    service = Service(config(bundle).server, BundleTarget(bundle, engine, questions=questions), ReplyCache())
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    lane, asked = Lane(), request(bundle, options=Options(questions=("gate",)), paradigm=Paradigm.OFFLOAD)
    service.receive(lane.arrival(msgspec.structs.replace(asked, content_kind=ContentKind.JPEG, content=jpeg)))
    with PictureDecoder() as decoder:
        service.decode_picture(decoder)
    service.answer(service.target_queue.take(0))
    known = engine.evidence([Job(engine.symbols(decode_picture(jpeg)))])[0]
    assert lane.replies[-1].answers == {"gate": question(bundle, 0).answer(known)}


def test_a_file_that_is_wrong_ends_the_start_and_is_named(bundle: Bundle, folder: Path) -> None:
    for name, said in (("foreign", "teach it again"), ("damaged", "is damaged"), ("none", "No such file")):
        with pytest.raises(ConfigError, match=f"question gate: .*{name}.*{said}"):
            Questions(bundle, {"gate": str(folder / f"{name}.safetensors")})
    with pytest.raises(ConfigError, match="want a name of 1 to 32"):
        Questions(bundle, {"a gate": str(folder / "gate.safetensors")})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"door": "door.safetensors", "gate": "foreign.safetensors"}, "teach it again"),
        ({"door": "door.safetensors", "gate": "damaged.safetensors"}, "damaged"),
        ({"door": "door.safetensors", "gate": "none"}, "No such file"),
        ({"door": "../questions/door.safetensors"}, "without slashes"),
        ({"door": "/etc/passwd"}, "without slashes"),
        ({"door": ".."}, "without slashes"),
        ({"a door": "door.safetensors"}, "message is not as"),
        (["door"], "message is not as"),
        ({f"q{i}": "door.safetensors" for i in range(MAX_FILES + 1)}, f"at most {MAX_FILES}"),
        ("x" * MAX_MESSAGE, "at most"),
    ],
)
def test_a_message_with_one_mistake_changes_nothing_and_says_why(bundle, folder, caplog, message, said) -> None:
    questions = Questions(bundle, {"gate": str(folder / "gate.safetensors")}, str(folder))
    before = questions.known
    questions.message_arrived(json.dumps(message).encode())
    assert questions.load() is False
    assert questions.known is before
    assert said in questions.error
    assert said in caplog.text
    questions.message_arrived(b'{"door": "door.safetensors"}')
    assert questions.load() is True
    assert (list(questions.known), questions.error) == (["door"], "")
    assert questions.load() is None


def test_only_the_newest_message_is_read_and_none_without_a_folder(bundle: Bundle, folder: Path) -> None:
    questions = Questions(bundle, folder=str(folder))
    for payload in (b"garbage", b'{"gate": "gate.safetensors"}', b"{}"):
        questions.message_arrived(payload)
    assert questions.load() is True
    assert questions.known == {}
    closed = Questions(bundle)
    closed.message_arrived(b'{"gate": "gate.safetensors"}')
    assert closed.load() is False
    assert "questions_folder" in closed.error


def test_answers_of_the_tier_above_come_with_those_that_it_lacks() -> None:
    own = Reply(id=bytes(8), status=Status.OK, answers={"gate": {"open": 0.6}, "door": {"open": 0.5}})
    above = Reply(id=bytes(8), status=Status.OK, tier=Tier.CLOUD, answers={"gate": {"open": 0.9}})
    assert passed_down(own, above).answers == {"gate": {"open": 0.9}, "door": {"open": 0.5}}
    assert passed_down(own, msgspec.structs.replace(above, answers=None)).answers == own.answers
    many = {f"q{i}": {"a": 1.0} for i in range(16)}
    assert len(passed_down(own, msgspec.structs.replace(above, answers=many)).answers) == 16
    assert passed_down(Reply(id=bytes(8), status=Status.OK), Reply(id=bytes(8), status=Status.OK)).answers is None


@pytest.fixture
def start(broker, bundle: Bundle) -> Iterator[Callable[..., Board]]:
    """A function that runs a server with these questions, and gives a board that asks it."""
    stop, threads = threading.Event(), []
    with board_of(broker, "b1") as board:

        def started(questions: dict[str, str], folder: Path | None) -> Board:
            setting = {} if folder is None else {"questions_folder": str(folder)}
            settings = msgspec.structs.replace(config(bundle, broker.port, **setting), questions=questions)
            threads.append(threading.Thread(target=run_server, args=(settings, stop)))
            threads[0].start()
            board.wait_for_status(state="online", share_proven=True)
            return board

        yield started
        stop.set()
        threads[0].join(PATIENCE_S)


def test_a_running_server_takes_questions_over_its_topic_and_never_a_retained_one(
    broker, bundle: Bundle, engine: Engine, folder: Path, start: Callable[..., Board]
) -> None:
    topic = topics.server_setting("home", "s1", "questions")
    with board_of(broker, "anna") as person:
        person.client.publish(topic, b'{"old": "door.safetensors"}', retain=True)
        board = start({"gate": str(folder / "gate.safetensors")}, folder)
        person.client.publish(topic, b'{"door": "foreign.safetensors"}')
        refused = next_with(board, lambda status: status["questions_error"])
        assert refused["questions"] == {"gate": 0.97}
        assert refused["counts"]["setting"] == {"refused": 1}
        board.ask(request(bundle, 4, options=Options(questions=("gate", "door", "old"))))
        assert list(board.reply().answers) == ["gate"]
        person.client.publish(topic, b'{"door": "door.safetensors"}')
        changed = next_with(board, lambda status: "door" in status["questions"])
        assert (changed["questions"], changed["questions_error"]) == ({"door": 0.97}, "")
        board.ask(request(bundle, 4, options=Options(questions=("gate", "door"))))
        assert board.reply().answers == {"door": expected(engine, question(bundle, 1), 4)}


def test_without_a_folder_the_topic_is_not_read(broker, folder: Path, start: Callable[..., Board]) -> None:
    board = start({}, None)
    board.client.publish(topics.server_setting("home", "s1", "questions"), b'{"gate": "gate.safetensors"}')
    status = board.wait_for_status(state="online")
    assert (status["questions"], status["questions_error"]) == ({}, "")


def next_with(board: Board, is_wanted: Callable[[dict], object]) -> dict:
    while not is_wanted(status := board.wait_for_status(state="online")):
        pass
    return status
