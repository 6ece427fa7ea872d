"""Answers go back into Frigate, whatever Frigate does; each ends in one counter."""

import logging
import queue
import socket
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.errors import ConfigError
from edge_runtime.reporting import frigate as frigate_module
from edge_runtime.reporting.frigate import MAX_SUB_LABEL, MAX_WAITING, FrigateAnswers, calls_for
from edge_runtime.wire import Event
from edge_runtime.wire.event import FrigateEvent
from firmware_tools.certificates import made
from tests.frigate import SUCCESS, TOKEN, Answer, FrigateServer, faults
from tests.listener import PATIENCE_S, until

ID = "1607123955.475377-mxklsc"
PATH = f"/api/events/{ID}/description"
HTML: Answer = (200, "text/html", b"<html><form action=/login></form></html>")


def event(text: str = "a dog on a lawn", frigate_id: str = ID, **fields: Any) -> Event:
    values: dict[str, Any] = {"type": "update", "final": True, "frame": "0123456789abcdef", "camera": "front"} | fields
    captured = datetime.now(timezone.utc)
    return Event(text=text, captured=captured, frigate=FrigateEvent(frigate_id, "dog"), **values)


def once(bad: Answer | None) -> Callable[[str], Answer | None]:
    """A bad answer first, then good ones."""
    answers = iter([bad])
    return lambda path: next(answers, SUCCESS)


def answers_for(server: FrigateServer, **config: Any) -> FrigateAnswers:
    return FrigateAnswers(FrigateConfig(url=server.url, **config), min_pause_s=0.01)


def ended(answers: FrigateAnswers, what: str) -> dict[str, int]:
    """The counts as soon as one answer has ended so."""
    until(lambda: answers.counts()["frigate_answers"][what] > 0)
    return {name: count for name, count in answers.counts()["frigate_answers"].items() if count}


def test_a_final_answer_becomes_the_description_and_the_sub_label_of_its_event(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    config = {"token_file": str(tmp_path / "token"), "sub_label": "label"}
    with FrigateServer(token=TOKEN) as server, answers_for(server, **config) as answers:
        answers.put(event(label="collie", scores={"collie": 0.75, "fox": 0.25}))
        written = dict(server.written.get(timeout=PATIENCE_S) for _ in range(2))
    assert written == {
        PATH: {"description": "a dog on a lawn"},
        f"/api/events/{ID}/sub_label": {"subLabel": "collie", "subLabelScore": 0.75},
    }
    assert server.faults == []
    assert answers.counts()["frigate_waiting"] == 0


def test_a_taught_questions_likeliest_class_may_be_the_sub_label():
    asked = FrigateConfig(url="http://127.0.0.1", description=False, sub_label="parcel")
    assert calls_for(event(answers={"parcel": {"none": 0.2, "left": 0.8}}), asked) == [
        (f"/api/events/{ID}/sub_label", {"subLabel": "left", "subLabelScore": 0.8})
    ]
    assert calls_for(event(answers={}), asked) == []


@pytest.mark.parametrize("fields", [{"final": False}, {"frigate": None}, {"text": "", "type": "lost"}])
def test_what_is_no_final_answer_to_an_event_of_frigates_is_not_written(fields):
    values = {"text": "a dog", "frigate": FrigateEvent(ID, "dog"), "type": "update", "final": True} | fields
    plain = Event(frame="1", camera="front", captured=datetime.now(timezone.utc), **values)
    assert calls_for(plain, FrigateConfig(url="http://127.0.0.1")) == []


def test_a_hostile_text_stays_one_line_within_frigates_lengths():
    text = "<script>\n\r" + "\N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 200
    config = FrigateConfig(url="http://127.0.0.1", sub_label="label")
    calls = calls_for(event(text, label=text[:64], scores={text[:64]: 0.0}), config)
    description, sub_label = (body for _, body in calls)
    assert description["description"] == "<script> \N{REPLACEMENT CHARACTER}" + "x" * 200
    assert len(sub_label["subLabel"]) <= MAX_SUB_LABEL
    assert "subLabelScore" not in sub_label  # Frigate refuses a score of 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ((500, "application/json", b"{}"), "500"),
        ((503, "text/html", b"<html>"), "503"),
        (HTML, "a login page"),
        ((302, "text/html", b""), "final address"),
        ((401, "application/json", b'{"message": "Unauthorized"}'), "token_file"),
        ((403, "application/json", b"{}"), "role admin"),
        ((200, "application/json", b"[" * 100_000), "not Frigate's"),
        ((200, "application/json", b"x" * (2 << 20)), "more than"),
    ],
    ids=["500", "503", "html", "redirect", "401", "403", "nested", "huge"],
)
def test_a_frigate_that_answers_nonsense_is_named_and_gets_the_answer_later(bad, reason, caplog):
    caplog.set_level(logging.INFO)
    troubles: queue.Queue[str] = queue.Queue()
    with FrigateServer(once(bad)) as server:
        config = FrigateConfig(url=server.url)
        with FrigateAnswers(config, troubles.put, min_pause_s=0.01) as answers:
            answers.put(event())
            assert server.written.get(timeout=PATIENCE_S)[0] == PATH
            assert reason in troubles.get(timeout=PATIENCE_S)
            assert troubles.get(timeout=PATIENCE_S) == ""
            assert ended(answers, "written") == {"accepted": 1, "written": 1, "failed": 1}
    assert caplog.text.count("frigate takes no answers") == 1


def test_a_frigate_that_is_away_gets_the_answers_when_it_is_back():
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    troubles: queue.Queue[str] = queue.Queue()
    config = FrigateConfig(url=f"http://127.0.0.1:{port}")
    with FrigateAnswers(config, troubles.put, min_pause_s=0.01) as answers:
        answers.put(event())
        assert "no connection" in troubles.get(timeout=PATIENCE_S)
        with FrigateServer(port=port) as server:
            assert server.written.get(timeout=PATIENCE_S)[0] == PATH


def test_a_slow_frigate_holds_up_nobody_and_its_call_ends(monkeypatch):
    monkeypatch.setattr(frigate_module, "CALL_S", 0.2)
    troubles: queue.Queue[str] = queue.Queue()
    server = FrigateServer(once(None))
    config = FrigateConfig(url=server.url)
    with server, FrigateAnswers(config, troubles.put, min_pause_s=0.01) as answers:
        answers.put(event())  # returns at once
        assert "no whole response" in troubles.get(timeout=PATIENCE_S)
        assert server.written.get(timeout=PATIENCE_S)[0] == PATH


def test_an_event_that_frigate_does_not_know_yet_is_tried_again():
    with (
        FrigateServer(once((404, "application/json", b'{"success": false}'))) as server,
        answers_for(server) as answers,
    ):
        answers.put(event())
        assert server.written.get(timeout=PATIENCE_S)[0] == PATH


def test_an_event_that_frigate_does_not_know_delays_no_other():
    known = "1607123999.000000-zzzzzz"
    server = FrigateServer(lambda path: SUCCESS if known in path else (404, "application/json", b"{}"))
    with server, FrigateAnswers(FrigateConfig(url=server.url), min_pause_s=1e6) as answers:
        answers.put(event())
        ended(answers, "failed")
        answers.put(event(frigate_id=known))
        assert known in server.written.get(timeout=PATIENCE_S)[0]


@pytest.mark.parametrize("bad", [(422, "application/json", b"{}"), (200, "application/json", b'{"success": false}')])
def test_an_answer_that_frigate_refuses_is_not_tried_again(bad, caplog):
    with FrigateServer(lambda path: bad) as server, answers_for(server) as answers:
        answers.put(event())
        assert ended(answers, "refused") == {"accepted": 1, "refused": 1, "failed": 1}
    assert server.asked == 1
    assert "frigate answer refused" in caplog.text


@pytest.mark.parametrize("status", [400, 404])
def test_a_frigate_that_answers_again_is_no_trouble_even_if_it_takes_no_answer(status):
    troubles: queue.Queue[str] = queue.Queue()
    behaviour = iter([(503, "text/html", b"")])
    with (
        FrigateServer(lambda path: next(behaviour, (status, "application/json", b"{}"))) as server,
        FrigateAnswers(FrigateConfig(url=server.url), troubles.put, min_pause_s=0.01) as answers,
    ):
        answers.put(event())
        assert "503" in troubles.get(timeout=PATIENCE_S)
        assert troubles.get(timeout=PATIENCE_S) == ""


def test_an_answer_is_given_up_when_frigate_has_not_known_its_event_for_long(monkeypatch):
    monkeypatch.setattr(frigate_module, "MAX_AGE_S", 0.1)
    with FrigateServer(lambda path: (404, "application/json", b"{}")) as server, answers_for(server) as answers:
        answers.put(event())
        assert ended(answers, "expired")["accepted"] == 1


def test_of_too_many_answers_the_oldest_are_dropped_and_counted(caplog):
    with FrigateServer() as server:
        answers = answers_for(server)
        for _ in range(MAX_WAITING + 3):  # its thread has not started
            answers.put(event())
    assert answers.counts()["frigate_answers"]["dropped"] == 3
    assert answers.counts()["frigate_waiting"] == MAX_WAITING
    assert "more than 128 answers wait" in caplog.text


def test_at_the_end_each_waiting_answer_is_tried_once_more_and_the_rest_is_counted():
    with FrigateServer(lambda path: SUCCESS if "good" in path else (404, "application/json", b"{}")) as server:
        with FrigateAnswers(FrigateConfig(url=server.url), min_pause_s=1e6) as answers:
            answers.put(event())
            ended(answers, "failed")
            answers.put(event(frigate_id="1.0-good"))
        counts, waiting = answers.counts().values()
    assert waiting == 0
    assert (counts["written"], counts["dropped"], counts["accepted"]) == (1, 1, 2)


def test_a_token_that_is_replaced_is_used_for_the_next_call_and_never_shown(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    token = tmp_path / "token"
    token.write_text("old-secret")
    with FrigateServer(token=TOKEN) as server, answers_for(server, token_file=str(token)) as answers:
        answers.put(event())
        ended(answers, "failed")
        token.write_text(TOKEN)
        assert server.written.get(timeout=PATIENCE_S)[0] == PATH
    assert "old-secret" not in caplog.text
    assert TOKEN not in caplog.text


def test_a_certificate_is_checked_unless_the_configuration_says_otherwise(tmp_path):
    files = tmp_path / "cert.pem", tmp_path / "cert.key"
    for file, content in zip(files, made(tmp_path, "home", ["127.0.0.1"]), strict=True):
        file.write_bytes(content)
    with FrigateServer(certificate=files) as server:
        for trust in ({"ca_file": str(tmp_path / "ca.pem")}, {"insecure": True}):
            with answers_for(server, **trust) as answers:
                answers.put(event())
                assert server.written.get(timeout=PATIENCE_S)[0] == PATH
        troubles: queue.Queue[str] = queue.Queue()
        with FrigateAnswers(FrigateConfig(url=server.url), troubles.put, min_pause_s=1e6) as answers:
            answers.put(event())
            assert "CERTIFICATE_VERIFY_FAILED" in troubles.get(timeout=PATIENCE_S).upper().replace(" ", "_")
    assert server.asked == 2


@pytest.mark.parametrize("content", ["", "two words", "\xff"])
def test_a_token_file_that_has_no_token_is_refused_at_the_start(tmp_path, content):
    (tmp_path / "token").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"\[frigate\] token_file = "):
        FrigateAnswers(FrigateConfig(url="http://127.0.0.1", token_file=str(tmp_path / "token")))


@pytest.mark.parametrize("key", ["token_file", "ca_file"])
def test_a_file_that_is_not_there_is_refused_at_the_start(key):
    with pytest.raises(ConfigError, match=rf"\[frigate\] {key} = /no/such/file: cannot be read"):
        FrigateAnswers(FrigateConfig(url="https://frigate.lan:8971", **{key: "/no/such/file"}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"token_file": "x"}, "of no use without url"),
        ({"insecure": True}, "of no use without url"),
        ({"url": "http://127.0.0.1", "description": False}, "description = false and no sub_label"),
        ({"url": "frigate.lan:5000"}, "wants an address"),
        ({"url": "http://user:secret@127.0.0.1"}, "a token belongs into token_file"),
        ({"url": "http://127.0.0.1:port"}, "wants an address"),
        ({"url": "http://127.0.0.1/?a"}, "wants an address"),
        ({"url": "http://127.0.0.1/a\r\nb"}, "wants an address"),
        ({"url": "http://frigate.lan:5000"}, "insecure = true"),
    ],
)
def test_a_configuration_that_can_never_work_is_refused_by_name(config, said):
    with pytest.raises(ConfigError, match=said) as caught:
        FrigateConfig(**config)
    assert "secret" not in str(caught.value)


def test_the_tests_find_what_frigate_would_refuse():
    label = f"/api/events/{ID}/sub_label"
    assert faults("/api/events/1/other", b"{}") == ["no such path: /api/events/1/other"]
    for path, body in (
        (PATH, b"{}"),
        (PATH, b'{"description": 1}'),
        (label, b'{"subLabel": "%s"}' % (b"x" * 101)),
        (label, b'{"subLabel": "x", "subLabelScore": 0.0}'),
        (label, b'{"subLabel": "x", "score": 1}'),
    ):
        assert len(faults(path, body)) == 1, body
    assert faults(label, b'{"subLabel": "x", "subLabelScore": 1.0}') == []
