"""What a server tells its service manager: ready, progress with each step of its engine, silence when that hangs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, client
from edge_runtime.sd_notify import Notifier
from edge_runtime.wire import Status
from server.app import run_server
from server.engine import DecodingBatch, Engine
from server.serving import serve
from tests.brokers import Mosquitto
from tests.server.boards import PATIENCE_S, SCRIPT, Board, Lane, config, request
from tests.service_manager import WATCHDOG_S, ServiceManager, at


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with at(tmp_path) as manager:
        yield manager


@pytest.fixture
def stop(broker: Mosquitto, board: Board, bundle: Bundle, manager: ServiceManager) -> Iterator[threading.Event]:
    """Of a running server."""
    stop = threading.Event()
    notifier = Notifier(manager.address, WATCHDOG_S)
    thread = threading.Thread(target=run_server, args=(config(bundle, broker.port, max_batch=1), stop, notifier))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_server_is_ready_makes_progress_and_says_that_it_stops(
    stop: threading.Event, board: Board, bundle: Bundle, broker: Mosquitto, manager: ServiceManager
) -> None:
    seen = {manager.next()}
    while not {"READY=1", "WATCHDOG=1", f"STATUS=broker 127.0.0.1:{broker.port} online"} <= seen:
        seen.add(manager.next())
    board.wait_for_status(state="online", share_proven=True)
    board.ask(request(bundle))
    assert board.reply().status is Status.OK
    manager.pending()
    manager.wait_for("WATCHDOG=1")
    stop.set()
    manager.wait_for("STOPPING=1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, os.EX_OK), (signal.SIGHUP, os.EX_TEMPFAIL)])
def test_a_signal_ends_a_server_in_order_and_a_hangup_lets_it_start_again(
    board: Board, bundle: Bundle, broker: Mosquitto, manager: ServiceManager, tmp_path: Path, number: int, code: int
) -> None:
    path = tmp_path / "server.toml"
    path.write_text(f'[server]\nid = "s1"\nbundle = "{bundle.path}"\nmax_batch = 1\n[mqtt]\nport = {broker.port}\n')
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=os.environ | manager.environment) as process:
        try:
            board.wait_for_status(state="online", share_proven=True)
            process.send_signal(number)
            manager.wait_for("STOPPING=1")
            board.wait_for_status(state="offline")
            assert process.wait(PATIENCE_S) == code
        finally:
            process.kill()


def test_a_server_whose_engine_hangs_falls_silent_until_it_works_again(
    stop: threading.Event, board: Board, bundle: Bundle, manager: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, release, answer = threading.Event(), threading.Event(), Engine.answer

    def hanging(engine, jobs):
        hangs.set()
        release.wait(PATIENCE_S)
        return answer(engine, jobs)

    monkeypatch.setattr(Engine, "answer", hanging)
    board.wait_for_status(state="online", share_proven=True)
    board.ask(request(bundle))
    assert hangs.wait(PATIENCE_S)
    assert manager.hears_the_last_ping()
    release.set()
    assert board.reply().status is Status.OK
    manager.wait_for("WATCHDOG=1")


def test_a_server_whose_connection_hangs_falls_silent_until_it_works_again(
    stop: threading.Event, board: Board, manager: ServiceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, release, watch = threading.Event(), threading.Event(), MqttClient._watch

    def hanging(client: MqttClient, *arguments: Any) -> None:
        if threading.current_thread().name == "mqtt-s1":
            hangs.set()
            release.wait(PATIENCE_S)
        watch(client, *arguments)

    board.wait_for_status(state="online", share_proven=True)
    monkeypatch.setattr(client, "HANG_S", 1.0)
    monkeypatch.setattr(MqttClient, "_watch", hanging)
    assert hangs.wait(PATIENCE_S)
    assert manager.hears_the_last_ping()
    release.set()
    manager.wait_for("WATCHDOG=1")


def test_each_pass_of_a_long_batch_is_progress(make_service, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service, lane, stop, steps, progress = make_service(), Lane(), threading.Event(), [], []
    step = DecodingBatch.step

    def counted(batch):
        steps.append(batch)
        return step(batch)

    class Counting(Notifier):
        def progress(self) -> None:
            progress.append(len(steps))

    monkeypatch.setattr(DecodingBatch, "step", counted)
    service.receive(lane.arrival(request(bundle)))
    stop.set()
    serve(service, stop, Counting())
    assert len(steps) > 1
    assert progress == list(range(1, len(steps) + 1))


def test_a_target_whose_answers_are_one_long_step_makes_systemd_wait_longer(
    make_service, manager: ServiceManager
) -> None:
    service, stop = make_service(), threading.Event()
    service.target.limits = replace(service.target.limits, silent_s=300)
    stop.set()
    serve(service, stop, Notifier(manager.address, watchdog_s=20))
    assert manager.pending() == ["WATCHDOG_USEC=320000000", "STOPPING=1"]


def test_a_server_whose_batch_hangs_on_another_thread_falls_silent(make_service, manager: ServiceManager) -> None:
    service, stop = make_service(), threading.Event()
    thread = threading.Thread(target=serve, args=(service, stop, Notifier(manager.address, WATCHDOG_S)))
    thread.start()
    try:
        manager.wait_for("WATCHDOG=1")
        with ThreadPoolExecutor(1) as other:
            other.submit(service.batch_times.begin, time.monotonic()).result()
            assert manager.hears_the_last_ping()
            other.submit(service.batch_times.end).result()
        manager.wait_for("WATCHDOG=1")
    finally:
        stop.set()
        thread.join(PATIENCE_S)
