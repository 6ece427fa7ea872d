"""A static camera, end to end: a board's pipeline, a real broker and a real server that is started again."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from edge_runtime.capture.cameras import Frame
from edge_runtime.inference.bundle import Bundle
from edge_runtime.planning import FixedPlanner, Plan
from edge_runtime.wire import Event, topics
from server.app import run_server
from tests.brokers import Mosquitto
from tests.edge_runtime.test_pipeline import BOARD, SITE, Board, frame
from tests.listener import Listener
from tests.server.boards import board_of, config

pytestmark = pytest.mark.timeout(400)  # two servers load torch, on a machine that may be busy


@contextmanager
def serving(broker: Mosquitto, bundle: Bundle, name: str) -> Iterator[None]:
    """A server, until the end of the block."""
    stop = threading.Event()
    with board_of(broker, name) as watcher:  # reads the server's status
        thread = threading.Thread(target=run_server, args=(config(bundle, broker.port), stop))
        thread.start()
        try:
            watcher.wait_for_status(state="online", share_proven=True)
            yield
        finally:
            stop.set()
            thread.join()


def noisy(seed: int) -> Frame:
    """The same scene, with sensor noise."""
    still = frame(0)
    noise = np.random.default_rng(seed).normal(0, 2, still.pixels.shape)
    return Frame("door", (still.pixels + noise).clip(0, 255).astype(np.uint8), still.captured_unix, still.captured)


def answer(board: Board, seed: int) -> tuple[Event, Event]:
    """The event of a frame and that of its answer."""
    seen = board.pipeline.handle(noisy(seed))
    while not (update := board.next_event()).final:
        pass
    return seen, update


def test_a_still_scene_costs_few_bytes_or_none_and_survives_a_restart_of_the_server(
    broker: Mosquitto, board_bundle: Bundle
) -> None:
    with ExitStack() as stack:
        sent = stack.enter_context(Listener(broker.port, topics.request(SITE, BOARD)))
        plan = Plan("split", "for the test", 60_000, writes_draft=False)
        board = Board(stack, broker.port, board_bundle, plan)
        texts, sizes = [], []
        for run in ("w1", "w2"):  # the second server knows nothing of the first one's frames
            with serving(broker, board_bundle, run):
                for seed in range(4):
                    _, update = answer(board, seed)
                    texts.append(update.text)
                    sizes.append(update.bytes_up)
        replies = board.tracker.summary()["reply"]
        assert (replies["ok"], replies["reference_lost"], board.tracker.summary()["lost"]) == (8, 1, 0)
        assert board.pipeline.with_reference == 6 + 1
        assert max(sizes[1:4] + sizes[5:]) < sizes[0] < sizes[4]  # of a bundle whose tables are none too good
        assert texts[:4] == texts[4:]
        assert sum(1 for _ in range(9) if sent.next()) == 9

        reusing = Plan("split", "for the test", 60_000, writes_draft=False, reuse_distance=0.5)
        board.pipeline.planner = FixedPlanner(reusing)
        with serving(broker, board_bundle, "w3"):
            first, update = answer(board, 0)
            for seed in range(1, 9):
                seen, last = answer(board, seed)
                assert (seen, seen.bytes_up, seen.text) == (last, 0, update.text)
                assert seen.reuse.frame == first.frame
        assert sent.heard.qsize() <= 2
