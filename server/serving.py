"""The threads of a service, and its orderly end.

Pictures are decoded on threads of their own, each with a process of its own. The thread that calls `serve` calls the
target; a target that takes several calls at once gets more such threads.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.sd_notify import Notifier
from server.pictures import PictureDecoder
from server.service import TAKE_S, Service

# Threads that decode pictures. One board occupies one of them, so the pictures of another one do not wait for it.
PICTURE_THREADS = 2
SILENT_S = 3.0  # a batch without a step for longer may hang: what other threads do is then no progress


def serve(
    service: Service,
    stop: threading.Event,
    notifier: Notifier | None = None,
    connection_hangs: Callable[[], bool] = lambda: False,
) -> None:
    """Answers until `stop` is set, then finishes what was accepted, as far as `stop_s` allows.

    notifier: hears of each batch, of each step of the target, and that there is nothing to do; of none of them while
    connection_hangs, or while another thread's batch is silent for too long.
    """
    notifier = notifier or Notifier()
    silent_s = service.target.limits.silent_s
    notifier.allow(silent_s)

    def progress() -> None:
        now = time.monotonic()
        service.batch_times.step(now)
        if not (service.batch_times.silent_s(now) > SILENT_S + silent_s or connection_hangs()):
            notifier.progress()

    service.target.on_step(progress)
    decoders = [PictureDecoder() for _ in range(PICTURE_THREADS)] if service.takes_pictures else []
    with _threads(service, decoders), _bounded_stop(service, decoders, stop):
        while not stop.is_set():
            service.answer(service.target_queue.take(TAKE_S))
            progress()
        notifier.stopping()
        service.accept_no_more()
        # In this order: a picture goes from the first to the second.
        while not service.picture_queue.is_idle or not service.target_queue.is_idle:
            service.answer(service.target_queue.take(TAKE_S))


@contextmanager
def _threads(service: Service, decoders: list[PictureDecoder]) -> Iterator[None]:
    """Those that decode pictures, and those besides this one that call the target."""
    done = threading.Event()

    def decode(decoder: PictureDecoder) -> None:
        with decoder:
            while not done.is_set():
                service.decode_picture(decoder)

    def answer() -> None:
        while not done.is_set():
            service.answer(service.target_queue.take(TAKE_S))

    threads = [
        threading.Thread(target=decode, args=(decoder,), name=f"pictures-{i}", daemon=True)
        for i, decoder in enumerate(decoders)
    ]
    threads += [
        threading.Thread(target=answer, name=f"target-{i}", daemon=True) for i in range(1, service.target.limits.calls)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


@contextmanager
def _bounded_stop(service: Service, decoders: list[PictureDecoder], stop: threading.Event) -> Iterator[None]:
    """Gives up what is not answered `stop_s` after `stop`. On a thread of its own: others may be in long calls."""
    has_ended = threading.Event()

    def watch() -> None:
        while not stop.wait(TAKE_S):
            if has_ended.is_set():
                return
        service.accept_no_more()
        if has_ended.wait(service.config.stop_s):
            return
        while True:  # again: a picture that was being decoded may have moved on since
            service.hand_back("this server stops before it could answer: another one may")
            service.target.close()
            for decoder in decoders:
                decoder.kill()
            if has_ended.wait(TAKE_S):
                return

    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        has_ended.set()
        watcher.join()
