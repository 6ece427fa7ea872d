"""A target that is another server, asked over real sockets; the other server behaves as badly as servers do."""

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.http_call import MAX_RESPONSE, CallError, Endpoint
from edge_runtime.wire import Usage
from edge_runtime.wire.envelope import MAX_TEXT
from firmware_tools.certificates import made
from server.config import OpenAIConfig
from server.prompts import QUESTION, PromptConfig, read_prompts
from server.targets import PictureJob, paid_calls
from server.targets.chat import fitted
from server.targets.openai import OpenAITarget
from server.targets.paid_calls import (
    DELAYED_S,
    FIRST_TRIAL_S,
    KNOWN,
    LAST_TRIAL_S,
    MAX_REQUESTS,
    RECENT,
    SLOWER,
    TRIES,
    BilledCalls,
    UsualTime,
    retry_after_s,
)
from server.targets.prompted import REPLY_S
from testbed.chat_server import COMPLETION_TOKENS, PROMPT_TOKENS, Behaviour, ChatServer, completion, text_of

PATIENCE_S = 60.0
KEY = "b1", bytes(8)
DAY_S = 86_400
PERMANENT: dict[Behaviour, str] = {
    "error_400": "refused",
    "error_401": "refused",
    "redirect": "refused",
    "endless": "too_long",
    "large": "too_long",
    "html": "no_answer",
    "no_json": "no_answer",
    "no_utf8": "no_answer",
    "no_choices": "no_answer",
    "no_text": "no_answer",
    "promise_less": "no_answer",
}
TEMPORARY: dict[Behaviour, str] = {
    "error_500": "server_error",
    "error_503": "server_error",
    "limit_silently": "rate_limited",
    "reset": "cut_off",
    "cut": "cut_off",
    "promise_more": "cut_off",
    "chunk_lie": "cut_off",
    "stall": "timeout",
    "drip": "timeout",
    "drip_body": "timeout",
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paid_calls, "FIRST_WAIT_S", 0.01)


def target_of(other: ChatServer, clock: Callable[[], float] = time.time, **changes: object) -> OpenAITarget:
    return OpenAITarget(other.url, OpenAIConfig("fake", **changes), clock)


def job(picture: bytes = b"picture", left_s: float = PATIENCE_S, **changes: object) -> PictureJob:
    pixels = np.zeros((224, 224, 3), np.uint8)
    return PictureJob(picture, "image/jpeg", pixels, time.monotonic() + left_s, **changes)


def calls(target: OpenAITarget) -> dict[str, int]:
    return target.status()["usage"]["calls"]


def test_the_other_server_gets_the_picture_as_it_was_sent_and_the_prompt(other: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret\nanother line\n")
    other.key = "sk-secret"
    target = target_of(other, key_file=str(tmp_path / "key"), max_tokens=50)
    (answer,) = target.answer([job(b"\xff\xd8 bytes", max_tokens=9)])
    assert (answer.text, answer.tokens, answer.error, answer.confidence) == (text_of(b"\xff\xd8 bytes"), (), "", None)
    assert set(answer.stages_ms) == {"call"}
    (asked,) = other.asked
    assert (asked.picture, asked.prompt) == (b"\xff\xd8 bytes", QUESTION)
    assert {name: asked.body[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "fake",
        "max_tokens": 9,
        "temperature": 0,
    }
    target.answer([job()])
    assert other.asked[1].body["max_tokens"] == 50


@pytest.mark.parametrize("host", ["model..lan", f"{64 * 'a'}.lan"])
def test_a_host_that_cannot_be_a_name_is_no_connection_and_costs_nothing(host: str) -> None:
    target = OpenAITarget(f"http://{host}/v1", OpenAIConfig("fake", output_price=10.0, budget_per_day=1.0))
    (answer,) = target.answer([job()])
    assert f"no connection to {host}" in answer.error
    assert answer.retry_after_ms is not None
    assert (calls(target)["no_connection"], target.status()["usage"]["cost"]) == (TRIES, 0.0)


def test_a_field_that_the_api_does_not_have_would_be_seen() -> None:
    with ChatServer() as other:
        body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_token": 5}
        with pytest.raises(CallError, match="400"):
            Endpoint(other.url).post("/chat/completions", json.dumps(body).encode(), {}, PATIENCE_S)
        assert "max_token" in other.objections[0]


def test_an_answer_says_what_it_used_and_cost(other: ChatServer) -> None:
    target = target_of(other, input_price=2.0, output_price=10.0, currency="EUR")
    (answer,) = target.answer([job()])
    cost = (2.0 * PROMPT_TOKENS + 10.0 * COMPLETION_TOKENS) / 1e6
    assert answer.usage == Usage(PROMPT_TOKENS, COMPLETION_TOKENS, pytest.approx(cost), "EUR")
    assert target_of(other).answer([job()])[0].usage == Usage(PROMPT_TOKENS, COMPLETION_TOKENS)
    usage = target.status()["usage"]
    assert usage["tokens"] == {"input": PROMPT_TOKENS, "output": COMPLETION_TOKENS}
    assert usage["cost"] == usage["cost_today"] == pytest.approx(cost)


def test_answers_that_max_tokens_cut_are_counted_and_told_ever_more_seldom(
    other: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    target = target_of(other)
    assert not target.answer([job()])[0].is_cut
    other.finish_reason = "length"
    assert {(answer.text, answer.is_cut) for answer in target.answer([job()] * 9)} == {(text_of(b"picture"), True)}
    assert calls(target) == {"answered": 10, "cut": 9}
    told = [record.message for record in caplog.records if "answers are cut" in record.message]
    assert [line.rpartition("=")[2] for line in told] == ["1", "2", "4", "8"]


@pytest.mark.parametrize("behaviour", ["no_usage", "odd_usage"])
def test_an_answer_without_sound_counts_costs_the_estimate(other: ChatServer, behaviour: Behaviour) -> None:
    other.behave = lambda _: behaviour
    target = target_of(other, output_price=10.0, budget_per_day=1.0, max_tokens=100)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.usage) == (text_of(b"picture"), None)
    assert calls(target) == {"answered": 1, "usage_unknown": 1}
    assert target.status()["usage"]["cost"] == pytest.approx(100 * 10.0 / 1e6)


@pytest.mark.parametrize(
    ("usage", "why"),
    [
        ({"prompt_tokens": 0, "completion_tokens": 0}, "its usage says 0 tokens"),
        ({"prompt_tokens": 300, "completion_tokens": 0}, "its usage says 0 tokens"),
        ({"prompt_tokens": 0, "completion_tokens": 20}, "its usage says 0 tokens"),
        ({"prompt_tokens": 4_000_000_000, "completion_tokens": 20}, "its usage is not two counts of 0 to 10000000 tok"),
        ({"prompt_tokens": 300, "completion_tokens": 10_000_001}, "its usage is not two counts of 0 to 10000000 tok"),
        (None, "the response has no usage"),
    ],
)
def test_counts_that_cannot_be_true_cost_the_estimate_and_are_told_once(
    other: ChatServer, usage: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    other.respond = lambda asked, _: completion("A dog.", usage)
    target = target_of(other, input_price=1.0, output_price=10.0, budget_per_day=1.0, max_tokens=100)
    assert {(answer.text, answer.usage) for answer in target.answer([job()] * 3)} == {("A dog.", None)}
    used = target.status()["usage"]
    assert (used["calls"], used["tokens"]) == ({"answered": 3, "usage_unknown": 3}, {})
    assert used["cost"] == pytest.approx(3 * (1500 * 1.0 + 100 * 10.0) / 1e6)
    (told,) = [record.message for record in caplog.records if "costs the estimate" in record.message]
    assert why in told


def test_a_text_that_is_too_long_for_a_reply_is_paid_so_it_is_cut_between_two_words(other: ChatServer) -> None:
    other.say = lambda _: 2000 * "words "
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.is_cut, answer.error) == ((1365 * "words ").rstrip(), True, "")
    assert len(answer.text) <= MAX_TEXT
    assert calls(target) == {"answered": 1, "cut": 1}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a" * MAX_TEXT, "a" * MAX_TEXT),
        ("a" * (MAX_TEXT + 1), "a" * MAX_TEXT),
        ("b " + "a" * MAX_TEXT, "b"),
        ("b " + "a" * (MAX_TEXT - 2) + " c", "b " + "a" * (MAX_TEXT - 2)),
        ("b " + "a" * (MAX_TEXT - 3) + " c", "b " + "a" * (MAX_TEXT - 3)),
    ],
    ids=["fits", "one word", "in a word", "after a word", "before a word"],
)
def test_a_text_is_cut_between_two_words_if_there_are_two(text: str, kept: str) -> None:
    assert fitted(text) == kept


@pytest.mark.parametrize(("behaviour", "kind"), PERMANENT.items())
def test_what_gets_no_better_is_an_error_at_once(other: ChatServer, behaviour: Behaviour, kind: str) -> None:
    other.behave = lambda _: behaviour
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert answer.error
    assert answer.retry_after_ms is None
    assert (len(other.asked), calls(target)) == (1, {kind: 1})


@pytest.mark.parametrize(("behaviour", "kind"), TEMPORARY.items())
def test_what_may_get_better_is_tried_again(other: ChatServer, behaviour: Behaviour, kind: str) -> None:
    other.behave = lambda call: "answer" if call == TRIES - 1 else behaviour
    target = target_of(other, timeout_s=0.5)
    (answer,) = target.answer([job()])
    assert (answer.text, answer.error) == (text_of(b"picture"), "")
    assert calls(target) == {kind: TRIES - 1, "retried": TRIES - 1, "answered": 1}


def test_what_does_not_get_better_is_given_to_another_server(other: ChatServer) -> None:
    other.behave = lambda _: "error_500"
    target = target_of(other)
    (answer,) = target.answer([job()])
    assert "500" in answer.error
    assert answer.retry_after_ms is not None
    assert (len(other.asked), calls(target)) == (TRIES, {"server_error": TRIES, "retried": TRIES - 1})


def test_nothing_is_tried_after_the_deadline(other: ChatServer) -> None:
    other.behave = lambda _: "stall"
    target = target_of(other)
    (answer,) = target.answer([job(left_s=REPLY_S + 0.3)])
    assert answer.retry_after_ms is not None
    assert (len(other.asked), calls(target)) == (1, {"timeout": 1})


def test_a_call_leaves_time_for_its_reply_and_says_that_the_deadline_is_too_short(other: ChatServer) -> None:
    other.behave = lambda _: "stall"
    target, asked = target_of(other), job(left_s=REPLY_S + 0.3, key=KEY)
    (answer,) = target.answer([asked])
    assert time.monotonic() < asked.deadline
    assert "no whole response within 0.3 s" in answer.error
    assert "raise `deadline_ms` of the board" in answer.error
    assert (answer.retry_after_ms is not None, calls(target)) == (True, {"timeout": 1})


def test_without_time_for_a_call_none_is_made_and_nothing_is_billed(other: ChatServer) -> None:
    target = target_of(other, output_price=10.0, budget_per_day=1.0)
    (answer,) = target.answer([job(left_s=REPLY_S, key=KEY)])
    assert "0.0 s are left for a call: the model needs longer, raise `deadline_ms`" in answer.error
    assert (other.asked, calls(target), target.status()["usage"]["cost"]) == ([], {"too_late": 1}, 0.0)
    assert answer.retry_after_ms is not None  # a faster server of the pool may answer


def test_what_usually_takes_too_long_is_asked_only_now_and_then(
    other: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt is slow. Another one is not, and a longer deadline is enough."""
    target = OpenAITarget(other.url, OpenAIConfig("fake"), prompts=read_prompts({"count": PromptConfig("How many?")}))
    for _ in range(KNOWN):
        target.calls._usual["door"].timed_out(10.0)
    trial, refused = target.answer([job(left_s=12.0), job(left_s=12.0, prompt="door")])
    assert (trial.text, "raise `deadline_ms`" in refused.error) == (text_of(b"picture"), False)  # it is faster again
    for _ in range(KNOWN):
        target.calls._usual["door"].timed_out(10.0)
    target.calls._usual["door"].is_trial_due(time.monotonic(), 11.0)
    refused, longer, other_prompt = target.answer(
        [job(left_s=12.0), job(left_s=20.0), job(left_s=12.0, prompt="count")]
    )
    assert re.match(r"a call takes 15\.0 s lately, and 1[01]\.\d s are left: the model needs longer", refused.error)
    assert (longer.error, other_prompt.error) == ("", "")
    assert calls(target) == {"answered": 4, "too_late": 1}


def test_a_usual_time_is_a_median_which_a_faster_call_replaces() -> None:
    usual = UsualTime()
    for took_s, median_s in ((9.0, 0.0), (9.0, 0.0), (2.0, 9.0), (2.0, 5.5), (2.0, 2.0)):
        usual.answered(took_s, was_doubted=False)
        assert usual.seconds == median_s
    for _ in range(RECENT):
        usual.timed_out(4.0)
    assert usual.seconds == SLOWER * 4.0
    usual.answered(1.0, was_doubted=True)
    assert usual.seconds == 0.0


def test_a_model_that_stays_slow_is_tried_ever_more_seldom_and_never_for_the_last_time() -> None:
    usual, trials = UsualTime(), list[float]()
    for second in range(86_400):
        if usual.is_trial_due(float(second), 5.0):
            trials.append(second)
    assert trials[:4] == [0, 30, 90, 210]
    assert 140 < len(trials) < 160  # in a day
    usual.answered(1.0, was_doubted=True)
    assert usual.is_trial_due(86_400.0 + LAST_TRIAL_S, 5.0)
    assert usual.is_trial_due(86_400.0 + LAST_TRIAL_S + FIRST_TRIAL_S, 5.0)


def test_a_late_copy_of_a_request_is_no_trial_and_one_that_times_out_is_no_sign_of_a_faster_model() -> None:
    usual = UsualTime()
    for _ in range(KNOWN):
        usual.answered(9.0, was_doubted=False)
    assert usual.is_trial_due(0.0, 8.0)
    usual.timed_out(0.5)
    assert usual.seconds == 9.0
    assert [usual.is_trial_due(100.0, left_s) for left_s in (2.0, 7.0, 7.9)] == [False, False, True]


def test_no_draft_is_paid_for_an_answer_that_would_come_too_late(other: ChatServer) -> None:
    target = target_of(other, prediction=True)
    for _ in range(KNOWN):
        target.calls._usual["door"].timed_out(10.0)
    target.calls._usual["door"].is_trial_due(time.monotonic(), 11.0)
    (answer,) = target.answer([job(left_s=12.0, draft="a cat", key=KEY)])
    assert "raise `deadline_ms`" in answer.error
    assert (other.asked, calls(target)) == ([], {"too_late": 1})


@pytest.mark.parametrize(("status", "cost"), [(504, 4.0), (524, 4.0), (502, 0.0)])
def test_a_gateway_that_stopped_waiting_may_have_had_the_call_billed(
    other: ChatServer, status: int, cost: float
) -> None:
    other.behave = lambda _: f"error_{status}"
    target = target_of(other, output_price=1e4, max_tokens=100, budget_per_day=100.0)  # 1 a call
    (answer,) = target.answer([job(key=KEY)])
    assert (answer.retry_after_ms is None, target.status()["usage"]["cost"]) == (cost > 0, cost)


def test_the_copies_of_a_request_share_the_calls_that_may_be_billed(other: ChatServer) -> None:
    other.behave = lambda call: "error_503" if call in (1, 2, 3) else "reset"
    target = target_of(other)
    (busy,) = target.answer([job(key=KEY)])
    assert (len(other.asked), busy.retry_after_ms is not None) == (4, True)
    (failed,) = target.answer([job(key=KEY)])
    assert (len(other.asked), failed.retry_after_ms) == (3 + TRIES, None)
    assert f"{TRIES} calls for this request may have been billed" in failed.error
    assert "the response broke off" in failed.error
    assert target.answer([job(key=KEY)])[0].retry_after_ms is None
    assert (len(other.asked), calls(target)["given_up"]) == (3 + TRIES, 2)
    other.behave = lambda _: "answer"
    assert [answer.error for answer in target.answer([job(key=("b1", bytes(7) + b"2")), job(key=("b2", KEY[1]))])] == [
        "",
        "",
    ]


def test_calls_that_cost_nothing_give_no_request_up(other: ChatServer) -> None:
    other.behave = lambda _: "error_503"
    target = target_of(other)
    for _ in range(3):
        assert target.answer([job(key=KEY)])[0].retry_after_ms is not None
    other.behave = lambda _: "answer"
    assert target.answer([job(key=KEY)])[0].error == ""


def test_billed_calls_are_remembered_until_the_deadline_and_not_for_more_requests_than_may_be() -> None:
    billed = BilledCalls()
    billed.add(KEY, 10.0, 0.0)
    billed.add(KEY, 10.0, 9.0)
    billed.add(("b2", bytes(8)), 99.0, 10.0)
    assert billed.count(KEY) == 2
    billed.add(("b2", bytes(8)), 99.0, 10.0 + DELAYED_S)
    assert (billed.count(KEY), billed.count(("b2", bytes(8)))) == (0, 2)
    for number in range(MAX_REQUESTS):
        billed.add(("b3", number.to_bytes(8, "big")), 99.0, 10.0)
    assert (billed.count(("b2", bytes(8))), len(billed._calls)) == (0, MAX_REQUESTS)


def test_nobody_listening_is_told_by_name() -> None:
    target = OpenAITarget("http://127.0.0.1:9/v1", OpenAIConfig("fake"))
    (answer,) = target.answer([job()])
    assert "no connection to 127.0.0.1" in answer.error
    assert calls(target) == {"no_connection": TRIES, "retried": TRIES - 1}


def test_a_body_longer_than_any_answer_is_not_read(other: ChatServer) -> None:
    other.behave = lambda _: "endless"
    (answer,) = target_of(other).answer([job()])
    assert f"more than {MAX_RESPONSE} bytes" in answer.error


def test_all_calls_wait_as_long_as_the_other_server_says(other: ChatServer) -> None:
    other.behave, other.retry_after = lambda _: "limit", "100"
    target = target_of(other)
    (answer,) = target.answer([job(left_s=10.0)])
    assert 100_000 <= answer.retry_after_ms < 110_000
    (second,) = target.answer([job(left_s=10.0)])
    assert 90_000 < second.retry_after_ms < 110_000
    assert len(other.asked) == 1  # the second was not sent
    assert calls(target) == {"rate_limited": 1, "paused": 1}
    assert "limits the rate" in target.why_closed(time.monotonic())
    assert target.why_closed(time.monotonic() + 100) == ""


def test_a_long_limit_is_not_waited_for_whatever_the_deadline(other: ChatServer) -> None:
    """The thread would be taken for one that hangs, and the server has left its share."""
    other.behave, other.retry_after = lambda call: "answer" if call else "limit", "20"
    target = target_of(other)
    (answer,) = target.answer([job(left_s=600.0)])
    assert "says 429" in answer.error
    assert 20_000 <= answer.retry_after_ms < 30_000
    assert "limits the rate" in target.why_closed(time.monotonic())


def test_a_short_limit_is_waited_for_within_the_deadline(other: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    other.behave, other.retry_after = lambda call: "answer" if call else "limit", "0.25"
    target, waits = target_of(other), list[float]()
    wait = target.calls.stop.wait
    monkeypatch.setattr(target.calls.stop, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
    assert target.answer([job()])[0].text == text_of(b"picture")
    assert max(waits) >= 0.25


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("1e999", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("99999999", 3600.0),
        ("Fri, 04 Oct 2024 12:00:30 GMT", 30.0),
        ("Fri, 04 Oct 2024 11:00:00 GMT", 0.0),
        ("Fri, 99 Oct 2024 12:00:30 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_more_than_an_hour(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, now=20_000.5 * DAY_S) == seconds


@pytest.mark.parametrize("behaviour", ["error_401", "error_400", "error_500", "html", "answer"])
def test_the_key_is_in_no_error_status_and_log(
    other: ChatServer, tmp_path: Path, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key").write_text("sk-very-secret")
    other.behave = lambda _: behaviour  # its errors quote the key
    target = target_of(other, key_file=str(tmp_path / "key"))
    with caplog.at_level(logging.DEBUG):
        (answer,) = target.answer([job()])
    assert other.asked[0].headers["authorization"] == "Bearer sk-very-secret"
    for said in (caplog.text, repr(answer), repr(vars(target)), json.dumps(target.status()), target.abilities.name):
        assert "very-secret" not in said


def test_a_key_is_read_again_for_each_call(other: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("old")
    target = target_of(other, key_file=str(tmp_path / "key"))
    (tmp_path / "key").write_text("new")
    other.key = "new"
    assert target.answer([job()])[0].error == ""


@pytest.mark.parametrize("content", [b"", b"\n", b"two words\n", b"caf\xc3\xa9\n", b"tab\there"])
def test_a_key_that_is_none_is_found_at_the_start_and_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\[openai\] key_file = .*: its first line is") as found:
        OpenAIConfig("fake", key_file=str(tmp_path / "key")).check("http://127.0.0.1:9/v1", read_prompts({}))
    assert "words" not in str(found.value)


def test_only_a_certificate_of_a_trusted_authority_gets_the_key_and_the_picture(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    made(tmp_path / "other", "home", ["127.0.0.1"])
    files = tmp_path / "cert.pem", tmp_path / "cert.key"
    for file, content in zip(files, made(tmp_path, "home", ["127.0.0.1"]), strict=True):
        file.write_bytes(content)
    with ChatServer(certificate=files) as other:
        trusting = target_of(other, ca_file=str(tmp_path / "ca.pem"))
        assert trusting.answer([job()])[0].text == text_of(b"picture")
        for foreign in (str(tmp_path / "other" / "ca.pem"), None):
            (answer,) = target_of(other, ca_file=foreign).answer([job()])
            assert "CERTIFICATE_VERIFY_FAILED" in answer.error.upper().replace(" ", "_")
        assert len(other.asked) == 1


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_authorities_that_are_none_are_found_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as PEM"):
        OpenAIConfig("fake", ca_file=str(tmp_path / "ca.pem")).check("https://127.0.0.1/v1", read_prompts({}))


# ---- money ----


def test_a_spent_budget_makes_no_calls_until_the_next_day(other: ChatServer) -> None:
    now = [20_000.5 * DAY_S]
    cost = COMPLETION_TOKENS * 10.0 / 1e6
    target = target_of(other, lambda: now[0], output_price=10.0, max_tokens=20, budget_per_day=2.5 * cost)
    for _ in range(2):
        assert target.answer([job()])[0].error == ""
    (refused,) = target.answer([job()])
    assert "budget of the day is spent" in refused.error
    assert refused.retry_after_ms is not None
    assert len(other.asked) == 2
    assert calls(target) == {"answered": 2, "over_budget": 1}
    assert "begins at 2024-10-05 00:00 UTC" in target.why_closed(0.0)
    now[0] += DAY_S
    assert target.why_closed(0.0) == ""
    assert target.answer([job()])[0].error == ""


def test_a_budget_for_less_than_one_answer_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"one answer may cost 0\.001 USD"):
        OpenAIConfig("fake", output_price=10.0, max_tokens=100, budget_per_day=0.0005).check(
            "http://127.0.0.1/v1", read_prompts({})
        )


def test_the_first_estimate_is_of_the_prompt_with_the_longest_answer() -> None:
    prompts = read_prompts({"long": PromptConfig(max_tokens=1000), "short": PromptConfig(max_tokens=10)})
    config = OpenAIConfig("fake", output_price=10.0, max_tokens=100, budget_per_day=0.005)
    config.check("http://127.0.0.1/v1", read_prompts({}))
    with pytest.raises(ConfigError, match=r"one answer may cost 0\.01 USD"):
        config.check("http://127.0.0.1/v1", prompts)


@pytest.mark.parametrize(
    ("behaviour", "is_charged"),
    [
        ("cut", True),
        ("stall", True),
        ("html", True),
        ("error_500", False),
        ("error_400", False),
        ("limit_silently", False),
    ],
)
def test_only_calls_that_the_other_server_may_have_billed_count(
    other: ChatServer, behaviour: Behaviour, is_charged: bool
) -> None:
    other.behave = lambda _: behaviour
    target = target_of(other, output_price=10.0, budget_per_day=1.0, timeout_s=0.2)
    target.answer([job(left_s=REPLY_S + 1.0)])
    assert (target.status()["usage"]["cost"] > 0) == is_charged


# ---- the end ----


def test_a_call_ends_when_the_server_stops(other: ChatServer) -> None:
    other.behave = lambda _: "stall"
    target, answers = target_of(other), list[object]()
    thread = threading.Thread(target=lambda: answers.extend(target.answer([job()])))
    thread.start()
    assert other.arrived.acquire(timeout=PATIENCE_S)
    target.close()
    thread.join(PATIENCE_S)
    assert [answer.error for answer in answers] == ["this server stops"]
    (later,) = target.answer([job()])  # none begins
    assert (later.error, later.retry_after_ms is not None) == ("this server stops", True)
    assert calls(target) == {"stopped": 2}


# ---- predicted outputs ----


def predicting(other: ChatServer, bundle, **changes: object) -> OpenAITarget:
    prompts = read_prompts({"count": PromptConfig("How many?", schema={"type": "object"})})
    config = OpenAIConfig("fake", prediction=True, **changes)
    return OpenAITarget(other.url, config, prompts=prompts, bundle=bundle)


def test_a_draft_goes_along_as_a_prediction_and_what_was_right_of_it_is_counted(other: ChatServer, bundle) -> None:
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}
    other.respond = lambda asked, usage: completion("A dog.", usage | {"completion_tokens_details": details})
    target = predicting(other, bundle)
    (answer,) = target.answer([job(draft="a dog on a bed")])
    assert other.asked[0].body["prediction"] == {"type": "content", "content": "a dog on a bed"}
    assert (answer.text, answer.accepted, answer.proposed) == ("A dog.", 3, 5)
    tokens = target.status()["usage"]["tokens"]
    assert (tokens["prediction_accepted"], tokens["prediction_rejected"]) == (3, 2)
    assert (target.abilities.drafts, target.abilities.verified) == (True, "none")
    assert target.status()["bundles"] == {bundle.id.hex(): bundle.manifest.name}
    target.answer([job(draft="a cat")])
    assert other.asked[1].body["prediction"]["content"] == "A cat."  # as that model writes


@pytest.mark.parametrize(
    "details", [None, 5, {}, {"accepted_prediction_tokens": -1}, {"accepted_prediction_tokens": None}]
)
def test_odd_counts_of_predictions_are_none(other: ChatServer, bundle, details: object) -> None:
    other.respond = lambda asked, usage: completion("A dog.", usage | {"completion_tokens_details": details})
    (answer,) = predicting(other, bundle).answer([job(draft="a dog")])
    assert (answer.text, answer.accepted, answer.proposed) == ("A dog.", 0, 0)
    assert answer.usage == Usage(PROMPT_TOKENS, COMPLETION_TOKENS)


def test_no_prediction_without_a_draft_or_for_an_object(other: ChatServer, bundle) -> None:
    other.say = lambda _: "{}"
    predicting(other, bundle).answer([job(), job(draft="a dog", prompt="count")])
    target_of(other).answer([job(draft="a dog")])
    assert not any("prediction" in asked.body for asked in other.asked)


def test_a_server_that_refuses_predictions_answers_without_and_gets_none_for_a_while(other: ChatServer, bundle) -> None:
    other.behave = lambda call: "answer" if call else "error_400"
    target = predicting(other, bundle)
    for _ in range(2):
        assert target.answer([job(draft="a dog")])[0].text == text_of(b"picture")
    assert ["prediction" in asked.body for asked in other.asked] == [True, False, False]
    assert calls(target) == {"refused": 1, "draft_refused": 1, "answered": 2}
    assert not target.abilities.drafts
    assert "says 400" in target.abilities.refused["drafts"]
    target._drafts.due = -inf  # the wait is over
    assert (target.abilities.drafts, target.abilities.refused) == (True, {})
    target.answer([job(draft="a dog")])
    assert "prediction" in other.asked[-1].body
    assert target._drafts.is_taken


def test_a_request_that_is_refused_with_and_without_its_prediction_says_nothing_of_predictions(
    other: ChatServer, bundle
) -> None:
    other.behave = lambda _: "error_400"
    target = predicting(other, bundle)
    assert target.answer([job(draft="a dog")])[0].error
    assert target.abilities.drafts


def test_a_wrong_key_costs_one_call_with_a_draft_too_and_says_nothing_of_predictions(other: ChatServer, bundle) -> None:
    other.behave = lambda _: "error_401"
    target = predicting(other, bundle)
    (answer,) = target.answer([job(draft="a dog")])
    assert ("key_file" in answer.error, answer.retry_after_ms) == (True, None)
    assert (len(other.asked), calls(target)) == (1, {"refused": 1})
    assert target.abilities.drafts


def test_a_budget_that_is_spent_counts_once_with_a_draft(other: ChatServer, bundle) -> None:
    target = predicting(other, bundle, output_price=1000.0, budget_per_day=0.1, max_tokens=1)
    target.answer([job(draft="a dog")] * 8)
    counted = calls(target)
    assert counted["over_budget"] + counted["answered"] == 8
