"""A vLLM server as the target: drafts that it verifies, over real sockets; honest, failing, lying."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import CheckedObject, Status, Usage, encode_tokens
from server.config import OpenAIConfig, ServerConfig
from server.pictures import PictureDecoder
from server.prompts import PromptConfig, read_prompts
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets import PictureJob, paid_calls
from server.targets.vllm import WRONG_DRAFT, VllmTarget
from testbed.chat_server import Behaviour
from testbed.vllm_server import TEMPLATE, Lie, VllmServer
from tests.server.boards import Lane, is_balanced
from tests.server.targets.test_service import offload

PATIENCE_S = 60.0
TEXT = "A man opens a door of the house."


@pytest.fixture
def other() -> Iterator[VllmServer]:
    with VllmServer() as server:
        server.say = lambda _: TEXT
        yield server
    assert server.objections == []  # every request has only documented fields


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paid_calls, "FIRST_WAIT_S", 0.01)


class Target(VllmTarget):
    """Its probes run when a test calls them."""

    def _probe_until_known(self) -> None:
        pass


def target_of(other: VllmServer, bundle: Bundle | None, **changes: object) -> Target:
    prompts = {"count": PromptConfig("How many?", schema={"type": "object"})}
    return Target(other.url, OpenAIConfig("fake", **changes), prompts=read_prompts(prompts), bundle=bundle)


@pytest.fixture
def target(other: VllmServer, bundle: Bundle) -> Target:
    """It has probed the other server, whose calls count from here."""
    probed = target_of(other, bundle)
    assert probed.probe()
    assert probed.abilities.drafts
    other.asked.clear()
    return probed


def job(draft: str = "", left_s: float = PATIENCE_S, **changes: object) -> PictureJob:
    pixels = np.zeros((224, 224, 3), np.uint8)
    return PictureJob(b"picture", "image/jpeg", pixels, time.monotonic() + left_s, draft, **changes)


def calls(target: VllmTarget) -> dict[str, int]:
    return target.status()["usage"]["calls"]


def begun(other: VllmServer) -> list[str | None]:
    """How each call began the answer; None: not at all."""
    return [
        asked.body["messages"][-1]["content"] if "continue_final_message" in asked.body else None
        for asked in other.asked
    ]


@pytest.mark.parametrize(
    ("draft", "accepted", "calls", "passes"),
    [
        (TEXT, 8, [TEXT], 1),
        ("a man opens a door of the house", 8, [TEXT], 1),  # in the style of the model's texts
        ("A man opens a window", 4, ["A man opens a window.", "A man opens a"], 6),
        ("A man opens", 2, ["A man opens.", "A man"], 8),
        ("A man opens a door of the house. It", 8, [f"{TEXT} It.", TEXT], 2),
        ("Two dogs", 0, ["Two dogs.", None], 10),
    ],
)
def test_a_text_is_the_servers_own_whatever_the_draft(
    other: VllmServer, target: Target, draft: str, accepted: int, calls: list[str | None], passes: int
) -> None:
    (alone,) = target.answer([job()])
    assert (alone.text, alone.passes, alone.proposed) == (TEXT, 9, 0)
    other.asked.clear()
    (answer,) = target.answer([job(draft)])
    assert (answer.text, answer.error, answer.accepted) == (TEXT, "", accepted)
    assert begun(other) == calls
    assert answer.passes == passes
    assert set(answer.stages_ms) == {"passes"}


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 30])
@pytest.mark.parametrize("draft", [TEXT, "A man opens a window", "Two dogs", ""])
def test_a_limit_cuts_a_text_where_it_would_without_a_draft(target: Target, draft: str, limit: int) -> None:
    answer, alone = target.answer([job(draft, max_tokens=limit), job(max_tokens=limit)])
    assert answer.text == alone.text


def test_a_vocabulary_that_spells_words_without_their_spaces_is_read(other: VllmServer, target: Target) -> None:
    respond = other.respond
    other.respond = lambda asked, usage: respond(asked, usage).replace(b'"decoded_token": " ', b'"decoded_token": "')
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, answer.accepted) == (TEXT, 4)


def test_all_calls_of_an_answer_are_paid(target: Target) -> None:
    (answer,) = target.answer([job("A man opens a window")])
    assert answer.usage == Usage(2 * len(TEMPLATE) + 5 + 4, 1 + 5)


def test_what_it_can_do_is_known_after_the_probe(other: VllmServer, bundle: Bundle) -> None:
    target = target_of(other, bundle)
    can = target.abilities
    assert (can.name, can.drafts, can.verified) == (f"vllm:{other.url}", False, "none")
    target.answer([job("A man")])
    assert begun(other) == [None]
    assert target.probe()
    assert (target.abilities.drafts, target.abilities.verified) == (True, "server")
    assert begun(other)[2:] == [TEXT, WRONG_DRAFT]
    assert target.status()["bundles"] == {bundle.id.hex(): bundle.manifest.name}


def test_it_probes_by_itself_and_only_with_a_bundle(other: VllmServer, bundle: Bundle) -> None:
    prompts = read_prompts({})
    VllmTarget(other.url, OpenAIConfig("fake"), prompts=prompts)
    own = VllmTarget(other.url, OpenAIConfig("fake"), prompts=prompts, bundle=bundle)
    for _ in range(3):
        assert other.arrived.acquire(timeout=PATIENCE_S)
    own.close()
    assert len(other.asked) == 3


@pytest.mark.parametrize("lie", Lie.__args__)
def test_a_server_that_lies_of_drafts_in_the_probe_gets_none(other: VllmServer, bundle: Bundle, lie: Lie) -> None:
    other.lie = lie
    target = target_of(other, bundle)
    assert target.probe()
    assert (target.abilities.drafts, target.abilities.verified) == (False, "none")
    assert calls(target)["draft_unread"] == 1
    other.asked.clear()
    (answer,) = target.answer([job(TEXT)])
    assert (answer.text, begun(other)) == (TEXT, [None])


@pytest.mark.parametrize("lie", [lie for lie in Lie.__args__ if not lie.startswith("all_")])
def test_a_server_that_lies_later_answers_without_the_draft_and_gets_no_more(
    other: VllmServer, target: Target, lie: Lie
) -> None:
    other.lie = lie
    for _ in range(2):
        (answer,) = target.answer([job("A man opens a window")])
        assert (answer.text, answer.error) == (TEXT, "")
    assert begun(other)[-2:] == [None, None]
    assert calls(target)["draft_unread"] == 1
    assert not target.abilities.drafts


@pytest.mark.parametrize("behaviour", ["error_400", "html", "endless"])
def test_a_server_that_refuses_drafts_answers_without(other: VllmServer, target: Target, behaviour: Behaviour) -> None:
    other.behave = lambda call: "answer" if call else behaviour
    (answer,) = target.answer([job(TEXT)])
    assert (answer.text, answer.error) == (TEXT, "")
    assert calls(target)["draft_refused"] == 1
    assert not target.abilities.drafts


@pytest.mark.parametrize("behaviour", ["error_500", "limit_silently", "reset", "stall", "cut"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_call_that_fails_for_a_while_costs_the_draft_and_not_the_answer(
    other: VllmServer, bundle: Bundle, behaviour: Behaviour, failing: int
) -> None:
    target = target_of(other, bundle, timeout_s=2.0)
    assert target.probe()
    other.asked.clear()
    other.behave = lambda call: behaviour if call == failing else "answer"
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, answer.error) == (TEXT, "")
    assert begun(other)[-1] is None
    assert target.abilities.drafts  # the next one may work


def test_a_server_that_is_away_is_probed_again(other: VllmServer, bundle: Bundle) -> None:
    target = target_of(other, bundle)
    other.behave = lambda _: "error_500"
    assert not target.probe()
    other.behave = lambda _: "answer"
    assert target.probe()
    assert target.abilities.drafts


def test_a_beginning_that_is_read_as_other_tokens_is_not_continued(other: VllmServer, target: Target) -> None:
    other.recut = True
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, begun(other)[-1]) == (TEXT, None)
    assert calls(target)["draft_recut"] == 1


def test_neither_an_object_nor_a_draft_of_other_letters_is_verified(other: VllmServer, target: Target) -> None:
    other.say = lambda asked: "{}" if "JSON" in asked.prompt else TEXT
    target.answer([job(TEXT, prompt="count"), job("Ein Käfer")])
    assert begun(other) == [None, None]


def test_at_the_deadline_nothing_more_is_asked(other: VllmServer, target: Target) -> None:
    other.behave = lambda _: "stall"
    (answer,) = target.answer([job(TEXT, left_s=0.3)])
    assert answer.retry_after_ms is not None
    assert len(other.asked) <= 2


def test_a_boards_draft_reaches_it_in_words_and_its_reply_says_what_was_accepted(
    other: VllmServer, target: Target, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["a", "man", "opens", "a", "window"]
    monkeypatch.setitem(vars(bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words))
    service, lane = Service(ServerConfig("s1", target="vllm:x"), target, ReplyCache()), Lane()
    draft = encode_tokens(range(4, 4 + len(words)))
    with PictureDecoder() as decoder:
        service.receive(lane.arrival(offload(bundle=bundle.id, draft=draft)))
        service.decode_picture(decoder)
    service.answer(service.batcher.take(0))
    (reply,) = lane.replies
    assert (reply.status, reply.text, reply.token_ids) == (Status.OK, TEXT, [])
    assert (reply.accepted, reply.proposed, reply.passes) == (4, 5, 6)
    assert begun(other) == ["A man opens a window.", "A man opens a"]
    assert service.status()["target"]["verified"] == "server"
    assert is_balanced(service)


def test_an_object_is_repaired_as_with_any_other_server(other: VllmServer, target: Target) -> None:
    other.say = lambda asked: "{}" if len(asked.body["messages"]) > 1 else "no object"
    (answer,) = target.answer([job(prompt="count")])
    assert (answer.text, answer.checked) == ("{}", CheckedObject("count", True))
    assert set(answer.stages_ms) == {"passes", "repair"}


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_goes_wrong_a_text_is_the_servers_own_or_there_is_none(
    other: VllmServer, target: Target, data: st.DataObject
) -> None:
    faults = ["answer", "no_usage", "error_500", "error_400", "reset", "cut", "html", "no_text", "promise_less"]
    behaviours = data.draw(st.lists(st.sampled_from(faults), max_size=6))
    lies = [None, None, *(lie for lie in Lie.__args__ if lie != "all_right")]
    other.lie, other.recut = data.draw(st.sampled_from(lies)), data.draw(st.booleans())
    draft = " ".join(data.draw(st.lists(st.sampled_from([*TEXT.split(" "), "zebra", "a"]), max_size=12)))
    target._takes_drafts = True
    other.asked.clear()
    other.behave = lambda call: behaviours[call] if call < len(behaviours) else "answer"
    (answer,) = target.answer([job(draft)])
    assert (answer.text, bool(answer.error)) in ((TEXT, False), ("", True))
    if set(behaviours) <= {"answer", "no_usage"}:
        assert not answer.error


def test_a_probe_ends_with_its_target(bundle: Bundle) -> None:
    before = set(threading.enumerate())
    target = VllmTarget("http://127.0.0.1:9/v1", OpenAIConfig("fake"), bundle=bundle)
    (probe,) = set(threading.enumerate()) - before
    target.close()
    probe.join(PATIENCE_S)
    assert not probe.is_alive()
