"""Tiers: board -> broker -> edge server -> another broker -> cloud server."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.sampling import Sampler
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, MqttSettings
from edge_runtime.wire import (
    Options,
    Reply,
    Status,
    Tier,
    decode_reply,
    decode_request,
    encode_reply,
    encode_tokens,
    topics,
)
from edge_runtime.wire.bitstream import Reference, encode
from edge_runtime.wire.envelope import seed_of
from server.config import ServerConfig, UpstreamConfig
from server.engine import Engine, Job
from server.escalator import Escalator
from server.gateway import Gateway
from server.loading import load_engine
from server.packed import pack
from server.received import Received
from server.reply_cache import ReplyCache
from server.service import Service
from server.serving import serve
from server.targets.bundle import BundleTarget
from server.upstream import Upstream
from server.watchdog import Watchdog
from tests.brokers import Mosquitto
from tests.bundles import MAX_TOKENS
from tests.server.boards import PATIENCE_S, SCRIPT, SYMBOLS, Board, Lane, board_of, is_balanced, request

WANTS_CLOUD = Options(tier=Tier.CLOUD)


@dataclass
class Sites:
    """Two sites, and what runs a server between them."""

    bundle: Bundle
    engine: Engine
    below: Mosquitto
    above: Mosquitto

    def up(self, broker: Mosquitto | None = None, site: str = "hq", **changes: object) -> UpstreamConfig:
        """The table [upstream] to the upper site, with nothing going up that is not asked for."""
        quiet = {"min_confidence": 0.0, "max_share": 1.0, "explore": 0.0} | changes
        return UpstreamConfig(MqttConfig(port=(broker or self.above).port), site=site, **quiet)

    @contextmanager
    def serving(
        self, name: str, tier: str, broker: Mosquitto, site: str = "home", up: UpstreamConfig | None = None
    ) -> Iterator[Service]:
        """A server on a thread, as `run_server` puts it together, once its brokers have answered."""
        own = load_engine(self.bundle, (tier,))  # an engine is for one thread
        pack(own.tail, *own.decoders.values())
        own.proof = self.engine.proof
        upstream = Upstream(up, name) if up else None
        settings = ServerConfig(id=name, bundle="", site=site, tier=tier)
        bounds = up.bounds() if up else None
        target, stop = BundleTarget(self.bundle, own, tier), threading.Event()
        service = Service(settings, target, ReplyCache(), upstream, bounds)
        with ExitStack() as stack:
            client = MqttSettings("127.0.0.1", broker.port, client_id=name, receive_maximum=64)
            gateway = Gateway(client, site, name, "servers", service.receive, service.status)
            stack.enter_context(gateway)
            if upstream:
                stack.enter_context(upstream)
                assert upstream.wait_online(PATIENCE_S)
            stack.enter_context(Watchdog(service, gateway))
            thread = threading.Thread(target=serve, args=(service, stop))
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)
            assert gateway.is_proven.wait(PATIENCE_S)
            yield service

    @contextmanager
    def process(self, folder: Path, text: str) -> Iterator["subprocess.Popen[bytes]"]:
        (folder / "tiers.toml").write_text(text)
        command = [sys.executable, "-c", SCRIPT, str(folder / "tiers.toml")]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
            try:
                yield process
            finally:
                process.kill()

    def own_text(self, tier: str, i: int) -> tuple[int, ...]:
        return self.engine.answer([Job(SYMBOLS[i], tier=tier)])[0].tokens


@pytest.fixture
def sites(bundle: Bundle, engine: Engine, broker: Mosquitto, start_broker: Callable[..., Mosquitto]) -> Sites:
    return Sites(bundle, engine, broker, start_broker())


def test_a_frame_with_a_reference_goes_up_without_it(sites: Sites, board: Board) -> None:
    bundle = sites.bundle
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up()),
    ):
        board.ask(request(bundle, 0, id=(1).to_bytes(8, "big")))
        assert board.reply().is_reference
        content = encode(SYMBOLS[1], bundle.inter_tables, 1, 4, Reference(1, SYMBOLS[0]))
        board.ask(request(bundle, content=content, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
    assert (first.final, tuple(first.token_ids)) == (False, sites.own_text("edge", 1))
    assert (last.final, tuple(last.token_ids)) == (True, sites.own_text("cloud", 1))
    assert first.is_reference
    assert last.is_reference  # of the edge, which gets the board's next frame


def test_a_sampled_text_of_the_cloud_is_the_one_that_it_would_have_written_for_the_board(
    sites: Sites, board: Board
) -> None:
    options = msgspec.structs.replace(WANTS_CLOUD, temperature=1.0, min_tokens=6)
    asked = request(sites.bundle, 2, draft=(5, 6, 7), options=options)
    sampler = Sampler(options, seed_of(options, asked.id))
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up()),
    ):
        board.ask(asked)
        for tier in ("edge", "cloud"):
            own = sites.engine.answer([Job(SYMBOLS[2], tier=tier, sampler=sampler)])[0].tokens
            assert tuple(board.reply().token_ids) == own != sites.own_text(tier, 2)


def test_the_board_gets_the_edges_text_at_once_and_then_the_clouds_own(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        differing = sum(sites.own_text("edge", i) != sites.own_text("cloud", i) for i in range(4))
        for i in range(4):
            asked = request(sites.bundle, i, draft=(5, 6, 7), options=WANTS_CLOUD)
            board.ask(asked)
            first, last = board.reply(), board.reply()
            assert (first.id, first.tier, first.server, first.final) == (asked.id, Tier.EDGE, "e1", False)
            assert tuple(first.token_ids) == sites.own_text("edge", i)
            assert (last.id, last.tier, last.server, last.final) == (asked.id, Tier.CLOUD, "c1", True)
            assert tuple(last.token_ids) == sites.own_text("cloud", i)
            assert last.text == sites.bundle.text(last.token_ids)
            assert [(hop.tier, hop.server) for hop in last.hops] == [(Tier.EDGE, "e1"), (Tier.CLOUD, "c1")]
            # The edge's text was the draft, not the board's; its last token could not be followed by the end.
            assert last.proposed == min(len(first.token_ids), MAX_TOKENS - 1)
        board.ask(request(sites.bundle, 5))  # nobody wants more
        only = board.reply()
        assert (only.tier, only.final) == (Tier.EDGE, True)
        assert is_balanced(edge)
        assert is_balanced(cloud)
    assert (edge.counts["escalated", "tier"], edge.counts["answered_above", ""]) == (4, 4)
    assert edge.counts["changed", "tier"] == differing
    assert edge.counts["unchanged", ""] == 4 - differing
    assert (edge.counts["replies", "ok"], cloud.counts["replies", "ok"]) == (5, 4)
    status = json.loads(json.dumps(edge.status()))["upstream"]
    assert status["requests"]["answered"] == 4
    assert status["round_trip_ms"]["p95"] > 0


@pytest.mark.parametrize(
    ("reason", "bounds", "options"),
    [
        ("confidence", {"min_confidence": 1.0}, None),
        ("confidence", {}, Options(min_confidence=1.0)),
        ("explore", {"explore": 1.0}, None),
    ],
)
def test_an_unsure_answer_goes_up_and_so_does_a_share_of_the_others(sites, board, reason, bounds, options) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up(**bounds)) as edge,
    ):
        board.ask(request(sites.bundle, 1, options=options))
        assert [(reply.tier, reply.final) for reply in (board.reply(), board.reply())] == [
            (Tier.EDGE, False),
            (Tier.CLOUD, True),
        ]
    assert edge.counts["escalated", reason] == 1


def test_a_board_that_always_asks_for_a_higher_tier_gets_the_share_that_the_operator_grants(sites, board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up(max_share=0.0, max_requested_share=0.5)) as edge,
    ):
        tiers = []
        for i in range(6):
            board.ask(request(sites.bundle, i, options=WANTS_CLOUD))
            while not (reply := board.reply()).final:
                pass
            tiers.append(reply.tier)
        assert is_balanced(edge)
    assert tiers == [Tier.EDGE, Tier.CLOUD] * 3
    assert (edge.counts["escalated", "tier"], edge.counts["alone", "asked_too_often"]) == (3, 3)


def test_one_board_holds_half_of_the_places_above_and_another_one_still_gets_one(sites: Sites, board: Board) -> None:
    up = sites.up(open_requests=2)  # and nobody answers there
    with sites.serving("e1", "edge", sites.below, up=up) as edge, board_of(sites.below, "b2") as other:
        board.ask(request(sites.bundle, 1, options=WANTS_CLOUD))
        assert not board.reply().final
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        assert board.reply().final
        other.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        assert not other.reply().final
    assert edge.counts["alone", "board_full"] == 1


def test_three_tiers_tell_the_board_three_texts_and_the_last_is_the_highests_own(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("r1", "edge", sites.above, "region", up=sites.up()),
        sites.serving("e1", "edge", sites.below, up=sites.up(site="region")) as edge,
    ):
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        replies = [board.reply() for _ in range(3)]
        assert is_balanced(edge)
    assert [(reply.server, reply.final) for reply in replies] == [("e1", False), ("r1", False), ("c1", True)]
    assert tuple(replies[-1].token_ids) == sites.own_text("cloud", 2)
    assert [hop.server for hop in replies[-1].hops] == ["e1", "r1", "c1"]


def test_only_the_last_word_is_kept_and_a_board_that_asks_meanwhile_gets_the_first_again(sites, board) -> None:
    cloud_topic = topics.request("hq", "e1")
    requests: queue.Queue[Message] = queue.Queue()
    settings = MqttSettings("127.0.0.1", sites.above.port, client_id="c1")
    with (
        MqttClient(settings, subscriptions=[(cloud_topic, 1)], on_message=requests.put) as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        assert cloud.wait_online(PATIENCE_S)
        asked = request(sites.bundle, 3, options=WANTS_CLOUD)
        board.ask(asked)
        first = board.replies.get(timeout=PATIENCE_S)
        board.ask(asked)
        assert board.replies.get(timeout=PATIENCE_S) == first
        up = decode_request(requests.get(timeout=PATIENCE_S).payload)
        assert up.options == Options(tier=Tier.CLOUD, via=("e1",))
        answer = Reply(id=up.id, status=Status.OK, tokens=encode_tokens([9]), tier=Tier.CLOUD, server="c1")
        cloud.publish(topics.reply("hq", "e1"), encode_reply(answer))
        last = board.replies.get(timeout=PATIENCE_S)
        assert (decode_reply(last).token_ids, decode_reply(last).final) == ([9], True)
        board.ask(asked)
        assert board.replies.get(timeout=PATIENCE_S) == last
        assert is_balanced(edge)
    assert (edge.counts["joined", ""], edge.counts["repeated", ""], edge.counts["escalated", "tier"]) == (1, 1, 1)


def test_without_a_cloud_on_its_broker_the_edge_has_the_last_word(sites: Sites, board: Board) -> None:
    with sites.serving("e1", "edge", sites.below, up=sites.up()) as edge:
        board.ask(request(sites.bundle, 1, budget_ms=6000, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
        assert (last.tier, last.server, last.final) == (Tier.EDGE, "e1", True)
        assert last == msgspec.structs.replace(first, final=True)
        assert edge.counts["alone", "no_reply"] == 1
        board.ask(request(sites.bundle, 2, budget_ms=2500, options=WANTS_CLOUD))
        assert board.reply().final  # in less time there would be no reply either
        assert edge.counts["alone", "too_late"] == 1
        assert is_balanced(edge)


def test_a_refusal_from_above_leaves_the_edges_text(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        board.ask(request(sites.bundle, 1, options=Options(tier=Tier.CLOUD, via=("c1",))))
        first, last = board.reply(), board.reply()
        assert last == msgspec.structs.replace(first, final=True)
    assert (cloud.counts["loop", ""], edge.counts["alone", "bad_request"]) == (1, 1)


@pytest.mark.parametrize(("more", "counted"), [("", ("unchanged", "")), (" or two", ("changed", "tier"))])
def test_a_text_from_above_without_tokens_is_compared_as_a_text(sites: Sites, board: Board, more, counted) -> None:
    def answer(message: Message) -> None:
        asked = decode_request(message.payload)
        text = sites.bundle.text(asked.draft_ids) + more
        cloud.publish(topics.reply("hq", "e1"), encode_reply(Reply(id=asked.id, status=Status.OK, text=text)))

    settings = MqttSettings("127.0.0.1", sites.above.port, client_id="c1")
    cloud = MqttClient(settings, subscriptions=[(topics.request("hq", "e1"), 1)], on_message=answer)
    with cloud, sites.serving("e1", "edge", sites.below, up=sites.up()) as edge:
        assert cloud.wait_online(PATIENCE_S)
        board.ask(request(sites.bundle, 1, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
        assert (first.final, last.final, last.text) == (False, True, first.text + more)
    assert edge.counts[counted] == 1


def test_a_server_whose_tier_above_is_itself_refuses_the_loop_and_answers(sites: Sites, board: Board) -> None:
    itself = sites.up(sites.below, "home")
    with sites.serving("e1", "edge", sites.below, up=itself) as edge:
        board.ask(request(sites.bundle, 1, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        assert (edge.counts["loop", ""], edge.counts["alone", "bad_request"], edge.counts["replies", "ok"]) == (1, 1, 1)
        assert is_balanced(edge)


def test_a_frozen_broker_above_costs_the_update_and_never_the_answer(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        sites.above.freeze()
        while not edge.counts["alone", "offline"]:  # it is online until it has been silent for long enough
            board.ask(request(sites.bundle, 1, budget_ms=2000, options=WANTS_CLOUD))
            while not (reply := board.reply()).final:
                pass
            assert (reply.tier, reply.server) == (Tier.EDGE, "e1")
        sites.above.thaw()
        assert edge.upstream.wait_online(PATIENCE_S)
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        assert [(reply.tier, reply.final) for reply in (board.reply(), board.reply())] == [
            (Tier.EDGE, False),
            (Tier.CLOUD, True),
        ]
        assert is_balanced(edge)


def test_a_cloud_killed_with_a_request_in_hand_leaves_the_edges_text(
    sites: Sites, board: Board, tmp_path: Path
) -> None:
    text = f'[server]\nid = "c1"\nbundle = "{sites.bundle.path}"\nsite = "hq"\ntier = "cloud"\nmax_batch = 1\n'
    with (
        sites.process(tmp_path, text + f"[mqtt]\nport = {sites.above.port}\n") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()),
    ):
        replies: list[Reply] = []
        while not replies or replies[-1].tier is not Tier.CLOUD:  # until it is there
            board.ask(request(sites.bundle, 1, budget_ms=3000, options=WANTS_CLOUD))
            replies = [board.reply()]
            while not replies[-1].final:
                replies.append(board.reply())
        cloud.send_signal(signal.SIGSTOP)
        board.ask(request(sites.bundle, 2, budget_ms=8000, options=WANTS_CLOUD))
        first = board.reply()
        cloud.kill()
        last = board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        assert (last.tier, tuple(last.token_ids)) == (Tier.EDGE, sites.own_text("edge", 2))


def test_copies_of_one_request_that_wait_for_the_tier_above_count_each(sites: Sites) -> None:
    """A copy that comes after `max_flight_s` is new; the older one may end before it, or wait there as well."""
    asked, ended, lane = request(sites.bundle, options=WANTS_CLOUD), [], Lane()
    own = Reply(id=asked.id, status=Status.OK, tier=Tier.EDGE, server="e1", confidence=0.5)
    older, newer = (Received(lane.arrival(asked), asked, time.monotonic() + PATIENCE_S) for _ in range(2))
    with Upstream(sites.up(), "e1") as upstream:
        assert upstream.wait_online(PATIENCE_S)
        bounds = sites.up().bounds()
        escalator = Escalator(upstream, bounds, "e1", Tier.EDGE, lambda *_: None, lambda *of: ended.append(of))
        assert escalator.ask(newer, own)
        escalator.forget(older.key)  # it was stale
        assert len(escalator) == 1
        assert escalator.ask(older, own)
        assert len(escalator) == 2
    assert len(ended) == 2
    assert len(escalator) == 0


def test_a_server_that_stops_ends_what_it_asked_above_with_its_own_text(sites, board, tmp_path) -> None:
    text = f'[server]\nid = "s1"\nbundle = "{sites.bundle.path}"\nmax_batch = 1\n[mqtt]\nport = {sites.below.port}\n'
    text += f'[upstream]\nsite = "hq"\n[upstream.mqtt]\nport = {sites.above.port}\n'
    with sites.process(tmp_path, text) as edge:
        while True:
            status = board.wait_for_status(state="online", share_proven=True)
            if status["upstream"]["state"] == "online":
                break
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        first = board.reply()
        edge.terminate()
        last = board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        board.wait_for_status(state="offline")
        assert edge.wait(PATIENCE_S) == 0
