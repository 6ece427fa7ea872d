"""A vLLM server as the target: drafts that it verifies, over real sockets; honest, failing, lying."""

import threading
import time
from math import inf

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
from server.targets.acceptance import Acceptance
from server.targets.openai import DraftError
from server.targets.vllm import WRONG_DRAFT, VllmTarget
from testbed.chat_server import Behaviour
from testbed.vllm_server import TEMPLATE, TEXT, Lie, VllmServer
from tests.server.boards import Lane, is_balanced
from tests.server.targets.test_service import offload

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paid_calls, "FIRST_WAIT_S", 0.01)


class Target(VllmTarget):
    """It probes when a test wants it."""

    def _probe_until_closed(self) -> None:
        pass


def target_of(vllm: VllmServer, bundle: Bundle | None, **changes: object) -> Target:
    prompts = {"count": PromptConfig("How many?", schema={"type": "object"})}
    return Target(vllm.url, OpenAIConfig("fake", **changes), prompts=read_prompts(prompts), bundle=bundle)


@pytest.fixture
def target(vllm: VllmServer, bundle: Bundle) -> Target:
    """It has probed the other server, whose calls count from here."""
    probed = target_of(vllm, bundle)
    assert probed.probe()
    assert probed.abilities.drafts
    vllm.asked.clear()
    return probed


def job(draft: str = "", left_s: float = PATIENCE_S, **changes: object) -> PictureJob:
    pixels = np.zeros((224, 224, 3), np.uint8)
    return PictureJob(b"picture", "image/jpeg", pixels, time.monotonic() + left_s, draft, **changes)


def calls(target: VllmTarget) -> dict[str, int]:
    return target.status()["usage"]["calls"]


def wait_out(acceptance: Acceptance) -> None:
    """As if the wait before the next probe were over."""
    acceptance._asked_at, acceptance.due = -inf, acceptance.due if acceptance.due == inf else -inf


def begun(vllm: VllmServer) -> list[str | None]:
    """How each call began the answer; None: not at all."""
    return [
        asked.body["messages"][-1]["content"] if "continue_final_message" in asked.body else None
        for asked in vllm.asked
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
    vllm: VllmServer, target: Target, draft: str, accepted: int, calls: list[str | None], passes: int
) -> None:
    (alone,) = target.answer([job()])
    assert (alone.text, alone.passes, alone.proposed) == (TEXT, 9, 0)
    vllm.asked.clear()
    (answer,) = target.answer([job(draft)])
    assert (answer.text, answer.error, answer.accepted) == (TEXT, "", accepted)
    assert begun(vllm) == calls
    assert answer.passes == passes
    assert set(answer.stages_ms) == {"passes"}


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 30])
@pytest.mark.parametrize("draft", [TEXT, "A man opens a window", "Two dogs", ""])
def test_a_limit_cuts_a_text_where_it_would_without_a_draft(target: Target, draft: str, limit: int) -> None:
    answer, alone = target.answer([job(draft, max_tokens=limit), job(max_tokens=limit)])
    assert (answer.text, answer.is_cut) == (alone.text, alone.is_cut)
    assert calls(target).get("cut", 0) == 2 * answer.is_cut


def test_a_vocabulary_that_spells_words_without_their_spaces_is_read(vllm: VllmServer, target: Target) -> None:
    respond = vllm.respond
    vllm.respond = lambda asked, usage: respond(asked, usage).replace(b'"decoded_token": " ', b'"decoded_token": "')
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, answer.accepted) == (TEXT, 4)


def test_all_calls_of_an_answer_are_paid(target: Target) -> None:
    (answer,) = target.answer([job("A man opens a window")])
    assert answer.usage == Usage(2 * len(TEMPLATE) + 5 + 4, 1 + 5)


def test_what_it_can_do_is_known_after_the_probe(vllm: VllmServer, bundle: Bundle) -> None:
    target = target_of(vllm, bundle)
    can = target.abilities
    assert (can.name, can.drafts, can.verified) == (f"vllm:{vllm.url}", False, "none")
    target.answer([job("A man")])
    assert begun(vllm) == [None]
    assert target.probe()
    assert (target.abilities.drafts, target.abilities.verified) == (True, "server")
    assert begun(vllm)[2:] == [TEXT, WRONG_DRAFT]
    assert target.status()["bundles"] == {bundle.id.hex(): bundle.manifest.name}


def test_it_probes_by_itself_and_only_with_a_bundle(vllm: VllmServer, bundle: Bundle) -> None:
    prompts = read_prompts({})
    VllmTarget(vllm.url, OpenAIConfig("fake"), prompts=prompts)
    own = VllmTarget(vllm.url, OpenAIConfig("fake"), prompts=prompts, bundle=bundle)
    for _ in range(3):
        assert vllm.arrived.acquire(timeout=PATIENCE_S)
    own.close()
    assert len(vllm.asked) == 3


@pytest.mark.parametrize("lie", Lie.__args__)
def test_a_server_that_lies_of_drafts_in_the_probe_gets_none(vllm: VllmServer, bundle: Bundle, lie: Lie) -> None:
    vllm.lie = lie
    target = target_of(vllm, bundle)
    assert not target.probe()
    assert (target.abilities.drafts, target.abilities.verified) == (False, "none")
    assert target.abilities.refused["drafts"].endswith(": asked again after 30 s")
    assert calls(target)["draft_unread"] == 1
    vllm.asked.clear()
    (answer,) = target.answer([job(TEXT)])
    assert (answer.text, begun(vllm)) == (TEXT, [None])


@pytest.mark.parametrize("lie", [lie for lie in Lie.__args__ if not lie.startswith("all_")])
def test_a_server_that_lies_later_answers_without_the_draft_and_gets_no_more_after_a_probe(
    vllm: VllmServer, target: Target, lie: Lie
) -> None:
    vllm.lie = lie
    wait_out(target._drafts)
    for _ in range(2):
        (answer,) = target.answer([job("A man opens a window")])
        assert (answer.text, answer.error) == (TEXT, "")
        target.probe_due()
    assert begun(vllm)[-1] is None
    assert calls(target)["draft_unread"] == 2  # by the request, and by the probe
    assert not target.abilities.drafts


@pytest.mark.parametrize("behaviour", ["error_400", "html", "endless"])
def test_one_refused_draft_costs_a_probe_and_not_the_drafts_of_others(
    vllm: VllmServer, target: Target, behaviour: Behaviour
) -> None:
    vllm.behave = lambda call: "answer" if call else behaviour
    wait_out(target._drafts)
    (answer,) = target.answer([job(TEXT)])
    assert (answer.text, answer.error, calls(target)["draft_refused"]) == (TEXT, "", 1)
    vllm.asked.clear()
    vllm.behave = lambda _: "answer"
    target.probe_due()
    assert begun(vllm) == [None, TEXT, WRONG_DRAFT]
    assert target.abilities.drafts


def test_a_request_that_is_refused_with_and_without_its_draft_says_nothing_of_drafts(
    vllm: VllmServer, target: Target
) -> None:
    vllm.behave = lambda _: "error_400"
    wait_out(target._drafts)
    (answer,) = target.answer([job(TEXT)])
    assert "says 400" in answer.error
    assert "draft_refused" not in calls(target)
    assert target._drafts.due == inf


@pytest.mark.parametrize("behaviour", ["error_401", "error_400", "html"])
def test_a_probe_that_is_refused_is_made_again_and_the_status_and_the_log_say_so_once(
    vllm: VllmServer, bundle: Bundle, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    target = target_of(vllm, bundle)
    vllm.behave = lambda _: behaviour
    for wait_s in (30, 60, 120):
        wait_out(target._drafts)
        target.probe_due()
        assert target.abilities.status(target.limits)["refused"]["drafts"].endswith(f": asked again after {wait_s} s")
    target.probe_due()  # it is not due
    assert calls(target)["draft_refused"] == 3
    assert caplog.text.count("the other server gets no drafts") == 1
    vllm.behave = lambda _: "answer"
    wait_out(target._drafts)
    target.probe_due()
    assert (target.abilities.drafts, target.abilities.refused) == (True, {})


def test_another_model_under_the_same_name_is_probed_anew(vllm: VllmServer, target: Target) -> None:
    target.probe_due()
    vllm.models[0]["created"] = 2  # vLLM writes the time of the answer there
    target.probe_due()
    assert vllm.asked == []
    vllm.models[0]["root"] = "hub/large"
    vllm.lie = "no_logprobs"
    target.probe_due()
    assert (len(vllm.asked), target.abilities.drafts) == (2, False)


def test_a_server_that_was_away_is_probed_anew(bundle: Bundle) -> None:
    with VllmServer() as before:
        target = target_of(before, bundle)
        target.probe_due()
        assert target.abilities.drafts
    target.probe_due()
    assert not target.abilities.drafts
    assert "no connection" in target.abilities.refused["drafts"]
    with VllmServer() as after:
        target.calls.endpoint._port = after.server_address[1]
        target.probe_due()
        assert (len(after.asked), target.abilities.drafts) == (3, True)
        target.calls.count("no_connection")  # a request found it away between two checks
        target.probe_due()
        assert len(after.asked) == 6


def test_a_restart_while_it_is_probed_is_noticed_at_the_next_check(vllm: VllmServer, target: Target) -> None:
    wait_out(target._drafts)
    target._draft_failed(DraftError("no ranks"))
    vllm.behave = lambda _: target.calls.count("no_connection") or "answer"  # a request finds nobody meanwhile
    target.probe_due()
    vllm.behave = lambda _: "answer"
    vllm.asked.clear()
    target.probe_due()
    assert len(vllm.asked) == 3
    target.probe_due()
    assert len(vllm.asked) == 3


def test_a_server_that_was_away_behind_a_proxy_is_probed_anew(vllm: VllmServer, target: Target) -> None:
    vllm.is_down = True
    target.probe_due()
    assert target.abilities.drafts  # it may only be busy
    vllm.is_down, vllm.lie = False, "no_logprobs"
    target.probe_due()
    assert not target.abilities.drafts
    vllm.lie, vllm.is_down = None, True
    target.probe_due()
    vllm.is_down = False
    target.probe_due()
    assert target.abilities.drafts
    vllm.asked.clear()
    target.probe_due()
    assert vllm.asked == []


@pytest.mark.parametrize("behaviour", ["error_500", "limit_silently", "reset", "stall", "cut"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_call_that_fails_for_a_while_costs_the_draft_and_not_the_answer(
    vllm: VllmServer, bundle: Bundle, behaviour: Behaviour, failing: int
) -> None:
    target = target_of(vllm, bundle, timeout_s=2.0)
    assert target.probe()
    vllm.asked.clear()
    vllm.behave = lambda call: behaviour if call == failing else "answer"
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, answer.error) == (TEXT, "")
    assert begun(vllm)[-1] is None
    assert target.abilities.drafts  # the next one may work


def test_a_server_that_is_away_is_probed_again(vllm: VllmServer, bundle: Bundle) -> None:
    target = target_of(vllm, bundle)
    vllm.behave = lambda _: "error_500"
    assert not target.probe()
    assert target.abilities.refused == {}  # it may only be starting
    vllm.behave = lambda _: "answer"
    assert target.probe()


def test_a_beginning_that_is_read_as_other_tokens_is_not_continued(vllm: VllmServer, target: Target) -> None:
    vllm.recut = True
    (answer,) = target.answer([job("A man opens a window")])
    assert (answer.text, begun(vllm)[-1]) == (TEXT, None)
    assert calls(target)["draft_recut"] == 1


def test_neither_an_object_nor_a_draft_of_other_letters_is_verified(vllm: VllmServer, target: Target) -> None:
    vllm.say = lambda asked: "{}" if "JSON" in asked.prompt else TEXT
    target.answer([job(TEXT, prompt="count"), job("Ein Käfer")])
    assert begun(vllm) == [None, None]


def test_at_the_deadline_nothing_more_is_asked(vllm: VllmServer, target: Target) -> None:
    vllm.behave = lambda _: "stall"
    (answer,) = target.answer([job(TEXT, left_s=0.3)])
    assert answer.retry_after_ms is not None
    assert len(vllm.asked) <= 2


def test_a_boards_draft_reaches_it_in_words_and_its_reply_says_what_was_accepted(
    vllm: VllmServer, target: Target, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["a", "man", "opens", "a", "window"]
    monkeypatch.setitem(vars(bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words))
    service, lane = Service(ServerConfig("s1", target="vllm:x"), target, ReplyCache()), Lane()
    draft = encode_tokens(range(4, 4 + len(words)))
    with PictureDecoder() as decoder:
        service.receive(lane.arrival(offload(bundle=bundle.id, draft=draft)))
        service.decode_picture(decoder)
    service.answer(service.target_queue.take(0))
    (reply,) = lane.replies
    assert (reply.status, reply.text, reply.token_ids) == (Status.OK, TEXT, [])
    assert (reply.accepted, reply.proposed, reply.passes) == (4, 5, 6)
    assert begun(vllm) == ["A man opens a window.", "A man opens a"]
    assert service.status()["target"]["verified"] == "server"
    assert is_balanced(service)


def test_an_object_is_repaired_as_with_any_other_server(vllm: VllmServer, target: Target) -> None:
    vllm.say = lambda asked: "{}" if len(asked.body["messages"]) > 1 else "no object"
    (answer,) = target.answer([job(prompt="count")])
    assert (answer.text, answer.checked) == ("{}", CheckedObject("count", True))
    assert set(answer.stages_ms) == {"passes", "repair"}


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_goes_wrong_a_text_is_the_servers_own_or_there_is_none(
    vllm: VllmServer, target: Target, data: st.DataObject
) -> None:
    faults = ["answer", "no_usage", "error_500", "error_400", "reset", "cut", "html", "no_text", "promise_less"]
    behaviours = data.draw(st.lists(st.sampled_from(faults), max_size=6))
    lies = [None, None, *(lie for lie in Lie.__args__ if lie != "all_right")]
    vllm.lie, vllm.recut = data.draw(st.sampled_from(lies)), data.draw(st.booleans())
    draft = " ".join(data.draw(st.lists(st.sampled_from([*TEXT.split(" "), "zebra", "a"]), max_size=12)))
    target._drafts.taken(0.0)
    vllm.asked.clear()
    vllm.behave = lambda call: behaviours[call] if call < len(behaviours) else "answer"
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
