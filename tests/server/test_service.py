"""The service behind a real broker, asked by a board."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.config import MetricsConfig
from edge_runtime.inference.bundle import MANIFEST, Bundle, BundleError, FileRecord, file_hash
from edge_runtime.picture_checks import decode_picture
from edge_runtime.wire import (
    ContentKind,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    encode_labels,
    encode_request,
)
from edge_runtime.wire.bitstream import Reference, encode
from server.app import load, run_server
from server.batch_times import BatchTimes
from server.batcher import Batch
from server.config import ServerConfig
from server.engine import Answer, Job
from server.pictures import Limits, PictureDecoder, PictureWorkerError
from server.service import readable_id
from server.serving import PICTURE_THREADS, serve
from server.targets.bundle import BundleTarget
from testbed.broker import free_port
from tests.brokers import Mosquitto
from tests.bundles import tiny_bundle
from tests.server.boards import (
    PATIENCE_S,
    SCRIPT,
    SYMBOLS,
    Board,
    Lane,
    board_of,
    config,
    is_balanced,
    request,
)
from tests.server.costly_jpeg import costly_jpeg


def test_split_and_speculative_requests_get_the_targets_own_text(server, board, bundle, engine) -> None:
    answers = [engine.answer([Job(symbols, wants_label=True)])[0] for symbols in SYMBOLS[:8]]
    i, own = next((i, answer) for i, answer in enumerate(answers) if len(answer.tokens) > 6)
    board.ask(request(bundle, i))
    split = board.reply()
    board.ask(request(bundle, i, draft=(*own.tokens[:4], 5, *own.tokens[5:])))
    speculative = board.reply()
    for reply in (split, speculative):
        assert (reply.status, tuple(reply.token_ids)) == (Status.OK, own.tokens)
        assert reply.text == bundle.text(list(own.tokens))
        assert (reply.tier, reply.server, reply.confidence) == (Tier.EDGE, "s1", own.confidence)
        assert (reply.label, reply.scores) == (next(iter(own.scores)), own.scores)
        assert reply.hops[0].server == "s1"
        assert set(reply.hops[0].stages_ms) == {"decode", "tail", "image", "passes"}
    assert (split.accepted, split.proposed, split.passes) == (0, 0, own.passes)
    assert 0 < speculative.accepted <= speculative.proposed
    assert speculative.passes < own.passes


def test_who_lets_the_server_propose_gets_the_same_texts_in_fewer_passes(server, board, bundle) -> None:
    passes = {False: 0, True: 0}
    for i in range(len(SYMBOLS)):
        texts = []
        for propose in passes:
            board.ask(request(bundle, i, options=Options(propose=propose)))
            reply = board.reply()
            assert (reply.status, reply.proposed) == (Status.OK, 0)  # of a draft's words
            passes[propose] += reply.passes
            texts.append(reply.token_ids)
        assert texts[0] == texts[1]
    assert passes[True] < passes[False]


def test_the_labels_that_the_board_has_seen_stand_in_the_reply(server, board, bundle) -> None:
    seen = dict.fromkeys(range(len(bundle.manifest.classes))[:2], 0.2)
    board.ask(request(bundle, labels=encode_labels(seen.items())))
    scores = board.reply().scores
    for number, probability in seen.items():
        assert scores[bundle.manifest.classes[number]] == pytest.approx(probability)


def test_a_label_that_the_bundle_does_not_have_is_refused_by_name(server, board, bundle) -> None:
    board.ask(request(bundle, labels=encode_labels([(len(bundle.manifest.classes), 0.5)])))
    reply = board.reply()
    assert (reply.status, "want a class of the bundle" in reply.error) == (Status.BAD_REQUEST, True)


def test_a_picture_is_answered_as_its_latent_would_be(server, board, bundle, engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    webp = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 95])[1].tobytes()
    own = engine.answer([Job(engine.symbols(decode_picture(webp)))])[0]
    offload = msgspec.structs.replace(request(bundle), bundle=bytes(8), paradigm=Paradigm.OFFLOAD)  # no head, no bundle
    board.ask(msgspec.structs.replace(offload, content_kind=ContentKind.WEBP, content=webp))
    assert tuple(board.reply().token_ids) == own.tokens
    damaged = msgspec.structs.replace(
        offload, id=bytes(8), content_kind=ContentKind.JPEG, content=b"\xff\xd8 no picture"
    )
    board.ask(damaged)
    reply = board.reply()
    assert (reply.status, "picture" in reply.error) == (Status.BAD_REQUEST, True)


def test_a_picture_of_a_board_with_another_bundle_gets_a_text_without_token_ids(server, board, bundle) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    asked = offload(bundle, cv2.imencode(".jpg", pixels)[1].tobytes(), options=Options(min_tokens=4))
    board.ask(asked)
    without = board.reply()
    board.ask(msgspec.structs.replace(asked, id=b"another1", bundle=b"another1"))
    another = board.reply()
    assert (another.status, another.text) == (Status.OK, without.text)
    assert (len(without.token_ids) > 0, another.tokens) == (True, b"")


def test_a_repeated_id_gets_the_same_bytes_and_no_second_computation(server, board, bundle) -> None:
    asked = request(bundle, 1)
    board.ask(asked)
    first = board.replies.get(timeout=PATIENCE_S)
    board.ask(msgspec.structs.replace(asked, age_ms=900, budget_ms=1000))
    assert board.replies.get(timeout=PATIENCE_S) == first  # its times too: nothing was computed again


def test_every_request_that_cannot_be_answered_is_refused_by_name(server, board, bundle) -> None:
    good = request(bundle)
    damaged = bytearray(good.content)
    damaged[20] ^= 1
    asked = {
        "unknown version": encode_request(good).replace(b"\x01", b"\x63", 1),
        "bundle": msgspec.structs.replace(good, bundle=b"\x00" * 8),
        "loop": msgspec.structs.replace(good, options=Options(via=("e0", "s1"))),
        "too many tiers": msgspec.structs.replace(good, options=Options(via=("e0", "e1", "e2", "e3"))),
        "bitstream": msgspec.structs.replace(good, content=bytes(damaged)),
        "bytes": msgspec.structs.replace(good, content=good.content[:40]),
    }
    wanted = dict.fromkeys(asked, Status.BAD_REQUEST) | {"bundle": Status.UNKNOWN_BUNDLE}
    for name, payload in asked.items():
        board.ask(payload)
        reply = board.reply()
        assert (reply.id, reply.status) == (good.id, wanted[name]), name
        assert reply.error
    for garbage in (b"", b"\xff" * 100, b"\x90"):
        board.ask(garbage)
        reply = board.reply()
        assert (reply.id, reply.status) == (bytes(8), Status.BAD_REQUEST)
    board.ask(good)
    assert board.reply().status is Status.OK


def test_a_request_without_time_left_is_stale(server, board, bundle) -> None:
    board.ask(request(bundle, budget_ms=0))
    assert board.reply().status is Status.STALE


def test_a_stopping_server_answers_what_it_accepted_and_says_offline(server, board, bundle) -> None:
    asked = [request(bundle, i) for i in range(5)]
    for one in asked:
        board.ask(one)
    first = board.reply()
    server.set()
    replies = [first, *(board.reply() for _ in asked[1:])]
    assert {reply.id for reply in replies} == {one.id for one in asked}
    assert {reply.status for reply in replies} <= {Status.OK, Status.BUSY}
    board.wait_for_status(state="offline")


def test_a_server_process_ends_well_on_sigterm(board: Board, bundle: Bundle, broker: Mosquitto, tmp_path: Path) -> None:
    text = f'[server]\nid = "s1"\nbundle = "{bundle.path}"\n[mqtt]\nport = {broker.port}\n'
    (tmp_path / "server.toml").write_text(text)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "server.toml")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            board.wait_for_status(state="online", share_proven=True)
            board.ask(request(bundle, 2))
            assert board.reply().status is Status.OK
            process.terminate()
            board.wait_for_status(state="offline")
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_a_broker_that_comes_back_empty_finds_the_server_again(server, board, bundle, broker) -> None:
    broker.kill()
    broker.start()
    board.status.queue.clear()  # those of before
    board.wait_for_status(state="online", share_proven=True)
    assert board.client.wait_online(PATIENCE_S)
    board.ask(request(bundle, 2))
    assert board.reply().status is Status.OK


def test_a_servers_counters_are_exported_with_its_connections(board, bundle, broker) -> None:
    port, stop = free_port(), threading.Event()
    exporting = msgspec.structs.replace(config(bundle, broker.port, max_batch=1), metrics=MetricsConfig(port=port))
    thread = threading.Thread(target=run_server, args=(exporting, stop))
    thread.start()
    try:
        board.wait_for_status(state="online", share_proven=True)
        board.ask(b"")
        assert board.reply().status is Status.BAD_REQUEST
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
            lines = response.read().decode().splitlines()
        assert 'aiflow_server_replies_total{status="bad_request"} 1.0' in lines
        assert 'aiflow_server_mqtt_total{what="connects"} 1.0' in lines
        assert {"aiflow_server_undelivered_total 0.0", "aiflow_server_foreign_topics_total 0.0"} <= set(lines)
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_a_metrics_port_that_is_in_use_is_a_problem_in_the_status(board, bundle, broker) -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as other:
        metrics = MetricsConfig(port=other.getsockname()[1])
        exporting = msgspec.structs.replace(config(bundle, broker.port, max_batch=1), metrics=metrics)
        thread = threading.Thread(target=run_server, args=(exporting, stop))
        thread.start()
        try:
            wanted = {"metrics": f"127.0.0.1:{metrics.port}: Address already in use"}
            board.wait_for_status(state="online", problems=wanted)
        finally:
            stop.set()
            thread.join(PATIENCE_S)


# ---- without a broker: the service as a value, its two threads played by the test ----


@pytest.mark.parametrize("options", [Options(tier=Tier.CLOUD), Options(min_confidence=1.0)])
def test_a_server_without_a_tier_above_answers_with_what_it_has(make_service, bundle, engine, options) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, options=options)))
    service.answer(service.target_queue.take(0))
    (reply,) = lane.replies
    assert (reply.status, reply.tier, reply.server, reply.final) == (Status.OK, Tier.EDGE, "s1", True)
    assert tuple(reply.token_ids) == engine.answer([Job(SYMBOLS[0])])[0].tokens
    assert service.counts["alone", "no_upstream"] == 1
    assert is_balanced(service)


def test_a_frame_with_a_reference_is_answered_as_it_would_be_alone(make_service, bundle, engine) -> None:
    service, lane = make_service(), Lane()
    earlier, later = SYMBOLS[0], SYMBOLS[1]

    def ask(number: int, content: bytes, lane: Lane = lane) -> Reply:
        service.receive(lane.arrival(request(bundle, content=content, id=number.to_bytes(8, "big"))))
        service.answer(service.target_queue.take(0))
        return lane.replies[-1]

    def against(name: int, symbols: np.ndarray, groups: int = 4) -> bytes:
        return encode(later, bundle.inter_tables, 1, groups, Reference(name, symbols))

    assert ask(1, encode(earlier, bundle.tables, 1)).is_reference
    reply = ask(2, against(1, earlier))
    assert (reply.status, reply.is_reference) == (Status.OK, True)
    assert tuple(reply.token_ids) == engine.answer([Job(later)])[0].tokens
    assert ask(3, against(2, later)).status is Status.OK
    lost = [
        ask(4, against(99, earlier)),  # never here
        ask(5, against(2, earlier)),  # another frame than the board means
        ask(6, against(1, earlier, groups=3)),
        ask(7, against(1, earlier)[:-1]),
    ]
    assert [reply.status for reply in lost] == 4 * [Status.REFERENCE_LOST]
    assert ask(4, encode(later, bundle.tables, 1)).status is Status.OK
    assert is_balanced(service)


def test_after_a_restart_the_references_are_lost_and_other_boards_have_none(make_service, bundle) -> None:
    content = encode(SYMBOLS[1], bundle.inter_tables, 1, 4, Reference(1, SYMBOLS[0]))
    service, first, other = make_service(), Lane("b1"), Lane("b2")
    service.receive(first.arrival(request(bundle, 0, id=(1).to_bytes(8, "big"))))
    service.answer(service.target_queue.take(0))
    for asked, lane in ((service, other), (make_service(), first)):
        asked.receive(lane.arrival(request(bundle, content=content)))
        asked.answer(asked.target_queue.take(0))
        assert (lane.replies[-1].status, lane.replies[-1].is_reference) == (Status.REFERENCE_LOST, False)
        assert is_balanced(asked)


def test_a_server_whose_bundle_has_no_tables_for_references_keeps_none(make_service, bundle, monkeypatch) -> None:
    service, lane = make_service(), Lane()
    monkeypatch.setitem(service.target.bundle.__dict__, "inter_tables", None)
    service.receive(lane.arrival(request(bundle)))
    service.answer(service.target_queue.take(0))
    assert (lane.replies[0].status, lane.replies[0].is_reference) == (Status.OK, False)
    assert service.target.latents.references.bytes == 0


def test_a_request_that_passed_this_server_before_is_counted_as_a_loop(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, options=Options(via=("s1",)))))
    assert "s1 -> s1" in lane.replies[0].error
    assert (service.counts["loop", ""], service.counts["replies", "bad_request"]) == (1, 1)
    assert is_balanced(service)


def offload(bundle: Bundle, content: bytes, **changes: object) -> Request:
    """A picture's request of a board without a head, so without a bundle."""
    plain = request(bundle, paradigm=Paradigm.OFFLOAD, content_kind=ContentKind.JPEG, content=content, **changes)
    return msgspec.structs.replace(plain, bundle=bytes(8))


PICTURE = cv2.imencode(".jpg", np.full((300, 400, 3), 120, np.uint8))[1].tobytes()


def test_a_picture_that_is_small_to_send_and_large_to_decode_is_refused(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    content = cv2.imencode(".png", np.zeros((2001, 2000), np.uint8))[1].tobytes()
    service.receive(lane.arrival(offload(bundle, content)))
    with PictureDecoder() as decoder:
        service.decode_picture(decoder)
    assert lane.replies[0].status is Status.BAD_REQUEST
    assert "claims 2000 x 2001 pixels, at most 4000000 are decoded" in lane.replies[0].error
    assert service.counts["pictures", "unreadable"] == 1
    assert is_balanced(service)


def test_pictures_that_are_expensive_to_decode_delay_only_the_board_that_sends_them(server, board, broker, bundle):
    costly = costly_jpeg(2000, 13_000)  # 200 KB, 14 s of CPU time
    with board_of(broker, "attacker") as attacker:
        for _ in range(3):
            attacker.ask(offload(bundle, costly))
        attacker.ask(b"")  # the broker keeps the order, so the server has the pictures when it refuses this
        assert attacker.reply().id == bytes(8)
        for i in range(4):
            for asked in (request(bundle, i, budget_ms=5000), offload(bundle, PICTURE, budget_ms=5000)):
                board.ask(asked)
                reply = board.reply()
                assert (reply.id, reply.status, reply.error) == (asked.id, Status.OK, "")
        assert {attacker.reply().status for _ in range(3)} == {Status.BAD_REQUEST}


def test_latents_are_answered_while_pictures_are_decoded(server, board, broker, bundle, monkeypatch) -> None:
    decode, decoding, release = PictureDecoder.decode, threading.Semaphore(0), threading.Event()

    def held(decoder: PictureDecoder, picture: bytes) -> np.ndarray:
        decoding.release()
        assert release.wait(PATIENCE_S)
        return decode(decoder, picture)

    monkeypatch.setattr(PictureDecoder, "decode", held)
    with ExitStack() as stack:
        others = [stack.enter_context(board_of(broker, f"sends-picture-{n}")) for n in range(PICTURE_THREADS)]
        for other in others:
            other.ask(offload(bundle, PICTURE))
        assert all(decoding.acquire(timeout=PATIENCE_S) for _ in others)
        board.ask(request(bundle))
        assert board.reply().status is Status.OK
        assert all(other.replies.empty() for other in others)
        release.set()
        assert {other.reply().status for other in others} == {Status.OK}


def test_a_picture_that_takes_too_much_is_refused_by_name_and_counted(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(offload(bundle, costly_jpeg(2000, 0))))
    with PictureDecoder(Limits(cpu_s=0.005)) as decoder:
        service.decode_picture(decoder)
    assert lane.replies[0].status is Status.BAD_REQUEST
    assert "took more than 0.005 s of CPU time" in lane.replies[0].error
    assert service.counts["pictures", "too_costly"] == 1
    assert is_balanced(service)


def test_a_server_without_a_process_for_pictures_is_busy_for_them(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(offload(bundle, PICTURE)))
    with PictureDecoder() as decoder:
        decoder.kill()
        service.decode_picture(decoder)
    assert lane.replies[0].status is Status.BUSY
    assert service.picture_queue.is_idle
    assert is_balanced(service)


def test_a_server_that_takes_no_pictures_refuses_them_at_once_and_says_so(make_service, bundle) -> None:
    service, lane = make_service(pictures=False), Lane()
    service.receive(lane.arrival(offload(bundle, PICTURE)))
    assert lane.replies[0].status is Status.UNKNOWN_BUNDLE  # another server of the pool may take it
    assert "takes no pictures" in lane.replies[0].error
    assert service.counts["pictures", "not_taken"] == 1
    assert service.status()["pictures"] is False
    service.receive(lane.arrival(request(bundle)))
    service.answer(service.target_queue.take(0))
    assert lane.replies[1].status is Status.OK
    assert make_service().status()["pictures"] is True


def test_a_board_whose_requests_cost_more_is_served_less_often(make_service, bundle, engine, monkeypatch) -> None:
    now_s = [time.monotonic() + 1]
    monkeypatch.setattr("server.service.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    service, costly, cheap = make_service(max_batch=1, queue=100), Lane("costly"), Lane("cheap")
    for lane in (costly, cheap):
        options = Options(max_tokens=24 if lane is costly else 2)
        for _ in range(40):
            service.receive(lane.arrival(request(bundle, options=options)))
    own = engine.answer([Job(SYMBOLS[0])])[0]

    def answer(jobs: list[Job]) -> list[Answer]:
        now_s[0] += 0.1 if jobs[0].max_tokens == 24 else 0.01
        return [own]

    monkeypatch.setattr(service.target.engine, "answer", answer)
    for _ in range(33):
        service.answer(service.target_queue.take(0))
    assert 2 <= len(costly.replies) <= 5
    assert len(costly.replies) + len(cheap.replies) == 33


def test_stopping_finishes_the_pictures_that_were_accepted(make_service, bundle) -> None:
    service, lane, stop = make_service(), Lane(), threading.Event()
    for _ in range(3):
        service.receive(lane.arrival(offload(bundle, PICTURE)))
    stop.set()
    serve(service, stop)
    assert [reply.status for reply in lane.replies] == [Status.OK] * 3
    assert {"decode", "tail"} <= lane.replies[0].hops[0].stages_ms.keys()
    assert service.counts["pictures", "decoded"] == 3
    assert is_balanced(service)


def test_a_request_for_another_bundle_is_answered_by_the_server_of_the_pool_that_has_it(
    broker, board, bundle, tmp_path
) -> None:
    other, stop = tiny_bundle(tmp_path / "other", seed=15), threading.Event()
    threads = []
    for name, installed in (("s1", bundle), ("s2", other)):
        plain = config(installed, broker.port, max_batch=1)
        own = msgspec.structs.replace(plain, server=msgspec.structs.replace(plain.server, id=name))
        threads.append(threading.Thread(target=run_server, args=(own, stop)))
        threads[-1].start()
    try:
        board.wait_for_status(state="online", share_proven=True)
        elsewhere = []
        for i, asked in enumerate([*(request(bundle, n) for n in (1, 2)), *(request(other, n) for n in (3, 4))] * 2):
            asked = msgspec.structs.replace(asked, id=i.to_bytes(8, "big"))  # noqa: PLW2901
            board.ask(asked)
            while (reply := board.reply()).status is Status.UNKNOWN_BUNDLE:
                elsewhere.append(reply)
                board.ask(asked)  # with the same id
            assert (reply.id, reply.status) == (asked.id, Status.OK)
            assert reply.server == ("s1" if asked.bundle == bundle.id else "s2")
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert elsewhere
    assert {reply.retry_after_ms for reply in elsewhere} == {100}


def test_a_vocabulary_that_is_none_is_found_at_start(bundle, tmp_path) -> None:
    for file in bundle.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    words = tmp_path / "vocabulary.txt"
    words.unlink()
    words.write_text("<pad>\n")
    files = bundle.manifest.files | {words.name: FileRecord(file_hash(words), words.stat().st_size)}
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle.manifest, files=files)))
    with pytest.raises(BundleError, match="has 1 words, the manifest says 40"):
        load(ServerConfig("s1", max_batch=1), str(tmp_path))


def test_a_full_queue_says_busy_at_once_and_when_to_come_back(make_service, bundle) -> None:
    service, lane = make_service(queue=2), Lane()
    for i in range(3):
        service.receive(lane.arrival(request(bundle, i)))
    assert [reply.status for reply in lane.replies] == [Status.BUSY]
    assert lane.replies[0].retry_after_ms > 0
    assert lane.accepted == 3  # to the broker all are done with: the board was told
    assert is_balanced(service)
    service.answer(service.target_queue.take(0))
    assert [reply.status for reply in lane.replies[1:]] == [Status.OK, Status.OK]
    assert is_balanced(service)


def test_a_request_that_cannot_be_answered_in_time_is_told_so_at_once(make_service, bundle) -> None:
    """Under overload a full queue would answer everything too late."""
    service, lane, other = make_service(max_batch=1), Lane(), Lane("other")
    service.receive(lane.arrival(request(bundle, 0)))
    service.answer(service.target_queue.take(0))
    service.batch_times = BatchTimes()
    service.batch_times.add(1000.0, 100.0)
    for i in (1, 2, 3):
        service.receive(lane.arrival(request(bundle, i, budget_ms=2500)))
    assert [(reply.status, reply.retry_after_ms) for reply in lane.replies[1:]] == [(Status.BUSY, 3000)]
    assert "3000 ms now" in lane.replies[1].error
    service.receive(other.arrival(request(bundle, 4, budget_ms=2500)))  # its turn comes sooner
    assert not other.replies
    assert is_balanced(service)


def test_a_flooding_board_cannot_keep_a_quiet_one_out(make_service, bundle) -> None:
    service, flood, quiet = make_service(queue=4), Lane("flood"), Lane("quiet")
    for i in range(6):
        service.receive(flood.arrival(request(bundle, i)))
    service.receive(quiet.arrival(request(bundle, 7)))
    assert [reply.status for reply in flood.replies] == [Status.BUSY] * 3
    service.answer(service.target_queue.take(0))
    assert [reply.status for reply in quiet.replies] == [Status.OK]
    assert is_balanced(service)


def test_a_request_that_comes_again_while_it_is_served_is_not_started_again(make_service, bundle) -> None:
    service, lane, asked = make_service(), Lane(), request(bundle)
    service.receive(lane.arrival(asked))
    service.receive(lane.arrival(asked))
    assert len(service.target_queue) == 1
    service.answer(service.target_queue.take(0))
    service.receive(lane.arrival(asked))
    assert len(lane.replies) == 2
    assert lane.replies[0] == lane.replies[1]
    assert (service.counts["joined", ""], service.counts["repeated", ""]) == (1, 1)
    assert is_balanced(service)


def test_a_repeat_that_crosses_its_reply_gets_the_reply_again(make_service, bundle) -> None:
    service, lane, asked = make_service(), Lane(), request(bundle)
    first = lane.arrival(asked)

    def reply_and_ask_again(data: bytes, expiry_s: float) -> None:
        first.reply(data, expiry_s)
        service.receive(lane.arrival(asked))

    service.receive(replace(first, reply=reply_and_ask_again))
    service.answer(service.target_queue.take(0))
    assert len(lane.replies) == 2
    assert lane.replies[0] == lane.replies[1]


def test_the_same_id_of_another_board_is_another_request(make_service, bundle) -> None:
    service, one, other, asked = make_service(), Lane("b1"), Lane("b2"), request(bundle)
    service.receive(one.arrival(asked))
    service.receive(other.arrival(asked))
    service.answer(service.target_queue.take(0))
    assert (len(one.replies), len(other.replies)) == (1, 1)


def test_a_busy_reply_is_not_remembered(make_service, bundle) -> None:
    service, lane, asked = make_service(queue=1), Lane(), request(bundle)
    service.receive(lane.arrival(request(bundle, 1)))
    service.receive(lane.arrival(asked))
    service.answer(service.target_queue.take(0))
    service.receive(lane.arrival(asked))
    service.answer(service.target_queue.take(0))
    assert [reply.status for reply in lane.replies] == [Status.BUSY, Status.OK, Status.OK]


def test_an_engine_that_breaks_fails_its_batch_by_name_and_the_next_is_served(
    make_service, bundle, monkeypatch
) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, 0)))

    def broken(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(service.target.engine, "answer", broken)
        service.answer(service.target_queue.take(0))
    service.receive(lane.arrival(request(bundle, 1)))
    service.answer(service.target_queue.take(0))
    assert [reply.status for reply in lane.replies] == [Status.FAILED, Status.OK]
    assert is_balanced(service)


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("out of memory"), Status.FAILED), (PictureWorkerError("away"), Status.BUSY)]
)
def test_a_content_that_the_target_fails_to_read_fails_alone(make_service, bundle, monkeypatch, error, status) -> None:
    service, lane, job = make_service(), Lane(), BundleTarget.job
    for i in range(2):
        service.receive(lane.arrival(request(bundle, i)))
    first = iter([True])

    def broken(target, accepted):
        if next(first, False):
            raise error
        return job(target, accepted)

    monkeypatch.setattr(BundleTarget, "job", broken)
    service.answer(service.target_queue.take(0))
    assert [reply.status for reply in lane.replies] == [status, Status.OK]
    assert is_balanced(service)


def test_stopping_finishes_what_was_accepted(make_service, bundle) -> None:
    service, lane, stop = make_service(), Lane(), threading.Event()
    for i in range(11):  # more than one batch
        service.receive(lane.arrival(request(bundle, i)))
    stop.set()
    serve(service, stop)
    assert [reply.status for reply in lane.replies] == [Status.OK] * 11
    assert is_balanced(service)


def test_stopping_without_time_left_still_answers_everybody(make_service, bundle) -> None:
    service, lane, stop = make_service(stop_s=0.0), Lane(), threading.Event()
    for i in range(3):
        service.receive(lane.arrival(request(bundle, i)))
    stop.set()
    serve(service, stop)
    service.receive(lane.arrival(request(bundle, 4)))
    assert [reply.status for reply in lane.replies] == [Status.BUSY] * 4
    assert is_balanced(service)
    assert service.answer(Batch()) is None


def test_the_status_names_bundle_queue_prices_and_numerics(make_service, bundle, engine) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle)))
    assert service.status()["queue"] == {"waiting": 1, "capacity": 64}
    service.answer(service.target_queue.take(0))
    status = json.loads(json.dumps(service.status()))
    assert status["bundles"] == {bundle.id.hex(): bundle.manifest.name}
    assert status["queue"]["waiting"] == 0
    assert status["numerics"] == engine.proof.numerics
    assert status["price_ms"]["batch"] > status["price_ms"]["pass"] > 0
    (reply,) = lane.replies
    decoding = {"proposed": 0, "accepted": 0, "tokens": len(reply.token_ids), "passes": reply.passes}
    assert status["counts"] == {"received": 1, "replies": {"ok": 1}, "batched": 1, "decoding": decoding}
    assert status["engine"]["batches"] == 1


@pytest.mark.parametrize("payload", [b"", b"\x90", b"\x92\x01\xc4\x04abcd", b"\xdd\xff\xff\xff\xff", b"[1]"])
def test_an_unreadable_request_has_the_zero_id(payload: bytes) -> None:
    assert readable_id(payload) == bytes(8)
