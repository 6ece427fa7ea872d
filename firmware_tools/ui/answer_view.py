"""How a camera's row shows an answer: texts with their changed words, labels, times by station, the last hour. Pure."""

from collections.abc import Mapping

from edge_runtime.wire import Event
from firmware_tools.event_parts import answered_by, marked, stages
from firmware_tools.ui.rows import CameraRow, Minute, Runs, shown

MINUTES = 60  # of the chart
MAX_LABELS = 3  # of an answer
MAX_COMPARED = 100  # words: comparing takes quadratic time


def show_answer(camera: CameraRow, event: Event, draft: str, now: float) -> None:
    """draft: the board's, for the same frame; empty: none. now: Unix seconds."""
    text = shown(event.text)
    camera.at, camera.frame, camera.type, camera.is_final = now, shown(event.frame), event.type, event.final
    camera.captured = event.captured.isoformat()
    camera.draft, camera.text = _runs(draft, text), _runs(text, draft or text)
    camera.by, camera.confidence = shown(answered_by(event)), event.confidence
    camera.is_unsure, camera.is_cut = event.unsure, event.cut
    camera.label = shown(event.label or "")
    camera.scores = [(shown(name), share) for name, share in list(event.scores.items())[:MAX_LABELS]]
    camera.answers = [(shown(question), *_likeliest(shares)) for question, shares in event.answers.items() if shares]
    camera.paradigm = event.paradigm or ""
    chosen = event.explain
    camera.reason = shown(event.why if event.type == "lost" or chosen is None else chosen.reason)
    camera.expected_ms = {str(paradigm): ms for paradigm, ms in chosen.expected_ms.items()} if chosen else {}
    camera.bytes_up, camera.jpeg_bytes, camera.after_ms = event.bytes_up, event.jpeg_bytes, event.after_ms
    camera.latency = _latency(event)


def _likeliest(shares: Mapping[str, float]) -> tuple[str, float]:
    name = max(shares, key=lambda name: shares[name])
    return shown(name), shares[name]


def _runs(text: str, other: str) -> Runs:
    if max(len(text.split()), len(other.split())) > MAX_COMPARED:
        return [(text, False)]
    return marked(text, other)


def _latency(event: Event) -> list[tuple[str, float]]:
    """The stations of the way: board, link, and each server's queue and computing."""
    times = stages(event)
    link = times.pop("link", None)
    board = [(name, ms) for name, ms in times.items() if name not in ("queue", "server")]
    if link is None:
        return board
    hops = [(hop, shown(f"{hop.tier} {hop.server}")) for hop in event.hops]
    parts = [part for hop, name in hops for part in ((f"{name} queue", hop.queue_ms), (name, hop.compute_ms))]
    return [*board, ("link", link), *parts]


def count_minute(hour: list[Minute], event: Event, minute: int) -> None:
    """Counts a final event. minute: the present one, Unix time in minutes."""
    if not hour or hour[-1].minute != minute:
        hour.append(Minute(minute))
    hour[-1].count(event.type == "lost", event.after_ms)
    hour[:] = [each for each in hour if minute - MINUTES < each.minute <= minute]
