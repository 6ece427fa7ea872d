"""Board and server as services of a real systemd: killed, frozen, starved, reloaded, misconfigured, removed.

CONTRIBUTING.md says how to run this. A broker and a camera run beside the container, and see and hear its services.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.faults.frame_records import FrameRecords
from benchmarks.faults.scenario import final_counters
from edge_runtime import opencv_process
from edge_runtime.wire import Event, decode_event, topics
from firmware_tools.service import EXIT_NOT_INSTALLED, EXIT_RUNNING, EXIT_STOPPED
from tests.brokers import Mosquitto, skip
from tests.container import AIFLOW, Container, booted
from tests.listener import Listener
from tests.rtsp_camera import RtspCamera

DEBIAN = os.environ.get("AIFLOW_DEBIAN_ROOT", "")
BACK_S = 180.0  # the watchdog takes some seconds, a server loads PyTorch, and the machine may be busy
STARVED = "40M"  # too little for either to start
SLOW = "CPUQuota=25%"  # of one core
SLOW_ANSWERS = 20
BUNDLE = "/opt/code/models/zoo/everyday-lite0"  # as the container sees it
CONFIGS = {
    "server": '[server]\nid = "s1"\nbundle = "{bundle}"\n[mqtt]\nport = {port}\n',
    "board": """
[board]
id = "b1"
bundle = "{bundle}"
paradigm = "speculative"
deadline_ms = 20000
[mqtt]
port = {port}
[outbox]
file = "outbox.sqlite"
every_request = true
[[cameras]]
name = "door"
source = "{camera}"
""",
}
MISTAKE = "bundle =", "bundel ="
CHANGES: dict[str, tuple[str, str, Callable[[Event], bool]]] = {
    "server": ('"s1"', '"s2"', lambda event: event.answered_by is not None and event.answered_by.server == "s2"),
    "board": ("name =", 'paradigm = "offload"\nname =', lambda event: event.paradigm == "offload"),
}
EVENTS = topics.event("home", "b1")
ROLES = pytest.mark.parametrize("role", CONFIGS)

pytestmark = [
    pytest.mark.skipif(not DEBIAN, reason="`make test-systemd` runs it: AIFLOW_DEBIAN_ROOT is not set"),
    pytest.mark.timeout(900),
]


class Site:
    """A board and a server as services, and what becomes of each frame."""

    def __init__(self, container: Container, told: Listener, folder: Path, configs: dict[str, str]) -> None:
        """told: hears events and the status of the board."""
        self.container, self.configs, self.records = container, configs, FrameRecords()
        self._told, self._folder = told, folder
        self.status: dict[str, Any] = {}  # of the board

    def configure(self, role: str, was: str = "", now: str = "") -> str:
        """Writes the configuration with this change. Returns its path inside the container."""
        file = self._folder / f"{role}.toml"
        file.write_text(self.configs[role].replace(was, now) if was else self.configs[role])
        file.chmod(0o644)
        return f"/etc/aiflow/{file.name}"

    def aiflow_service(self, *words: str) -> int:
        return self.container.call(AIFLOW, "service", *words).returncode

    def systemctl(self, verb: str, role: str, *words: str) -> int:
        return self.container.call("systemctl", verb, f"aiflow-{role}", *words).returncode

    def signal(self, role: str, name: str) -> int:
        return self.systemctl("kill", role, f"--signal={name}", "--kill-whom=main")

    def shows(self, role: str, *names: str) -> tuple[str, ...]:
        return tuple(self.container.shows(f"aiflow-{role}", name) for name in names)

    def log(self, role: str) -> str:
        return self.container.log(f"aiflow-{role}")

    def await_answer(self, is_it: Callable[[Event], bool] = lambda _: True) -> None:
        """Of the server, to a frame that was captured after this call."""
        now = datetime.now(timezone.utc)
        for event in self._told_events():
            if event and event.captured > now and event.type == "update" and event.final and is_it(event):
                return

    def await_end_of_all(self) -> None:
        """Once the camera gives no frame any more: each frame has its last event."""
        for _ in self._told_events():
            if self.status.get("cameras") != {"door": "live"} and not self.records.counts().unsettled:
                return

    def await_offline(self) -> None:
        """The board's last message."""
        for _ in self._told_events():
            if self.status["state"] == "offline":
                return

    def _told_events(self) -> Iterator[Event | None]:
        """Counts what comes. None: the board's status."""
        end = time.monotonic() + BACK_S
        while True:
            message = self._told.heard.get(timeout=end - time.monotonic())
            event = None
            if message.topic == EVENTS:
                event = decode_event(message.payload)
                self.records.add(event, time.monotonic())
            else:
                self.status = json.loads(message.payload)
            yield event


@pytest.fixture(scope="module")
def camera() -> Iterator[RtspCamera]:
    with RtspCamera() as camera:
        yield camera


@pytest.fixture(scope="module")
def site(camera: RtspCamera, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("etc")
    folder.chmod(0o755)  # the tests' own folders are for one user only
    broker = Mosquitto(tmp_path_factory.mktemp("broker"))
    told = Listener(broker.port, EVENTS, topics.status("home", "b1"))
    with broker, told, booted(Path(DEBIAN), {"/etc/aiflow": folder}, folder / "container.log") as container:
        values = {"bundle": BUNDLE, "port": broker.port, "camera": camera.url}
        configs = {role: text.format(**values) for role, text in CONFIGS.items()}
        site = Site(container, told, folder, configs)
        for role in configs:
            assert site.aiflow_service("status", role) == EXIT_NOT_INSTALLED
            for _ in range(2):
                done = container.call(AIFLOW, "service", "install", site.configure(role))
                assert done.returncode == 0, done.stderr
            assert site.aiflow_service("status", role) == EXIT_RUNNING
        yield site
        for role in configs:
            print(site.log(role))  # pytest shows it if a test has failed


@pytest.fixture
def recovery(site: Site, capsys: pytest.CaptureFixture[str]) -> Callable[[str], AbstractContextManager[None]]:
    """A `with` block for the fault of this name. After it, the next answer is awaited, and its time printed."""

    @contextmanager
    def recovery(fault: str) -> Iterator[None]:
        site.await_answer()
        began = time.monotonic()
        yield
        site.await_answer()
        took_s, load = time.monotonic() - began, os.getloadavg()[0]
        with capsys.disabled():
            print(f"\n{fault}: an answer after {took_s:.1f} s, load {load:.1f} on {os.cpu_count()} cores")

    return recovery


@ROLES
@pytest.mark.parametrize(("name", "result"), [("KILL", "signal"), ("STOP", "watchdog")])
def test_a_service_that_is_killed_or_stands_still_comes_back_and_answers(
    site: Site, recovery: Callable[[str], AbstractContextManager[None]], role: str, name: str, result: str
) -> None:
    pid, restarts = site.shows(role, "MainPID", "NRestarts")
    with recovery(f"{role} {name}"):
        assert site.signal(role, name) == 0
    assert site.shows(role, "NRestarts") == (str(int(restarts) + 1),)
    assert site.shows(role, "MainPID") != (pid,)
    assert f"Failed with result '{result}'." in site.log(role)


def test_a_board_whose_camera_stands_still_in_its_driver_opens_it_again(
    site: Site, recovery: Callable[[str], AbstractContextManager[None]]
) -> None:
    site.await_answer()
    pid = site.shows("board", "MainPID")
    readers = psutil.Process(site.container.leader).children(recursive=True)
    (reader,) = [process for process in readers if opencv_process.__name__ in process.cmdline()]
    with recovery("camera STOP"):
        reader.suspend()
    assert not reader.is_running()
    assert site.shows("board", "MainPID") == pid


@ROLES
def test_a_service_on_a_slow_machine_makes_progress_in_time(site: Site, role: str) -> None:
    restarts = site.shows(role, "NRestarts")
    assert site.systemctl("set-property", role, "--runtime", SLOW) == 0
    for _ in range(SLOW_ANSWERS):
        site.await_answer()
    assert site.shows(role, "NRestarts") == restarts
    assert site.systemctl("set-property", role, "--runtime", "CPUQuota=") == 0


@ROLES
def test_a_service_without_enough_memory_is_killed_and_comes_back_once_there_is_enough(site: Site, role: str) -> None:
    enough, used = site.shows(role, "MemoryMax", "MemoryCurrent")
    if not used.isdigit():
        skip("this machine gives a container no limits of memory to set")
    assert site.systemctl("set-property", role, f"MemoryMax={STARVED}") == 0
    assert site.systemctl("restart", role) != 0
    assert site.shows(role, "ExecMainStatus") == (str(int(signal.SIGKILL)),)
    assert site.systemctl("set-property", role, f"MemoryMax={enough}") == 0
    site.await_answer()


@ROLES
def test_a_reload_takes_a_configuration_that_is_in_order_and_no_other(site: Site, role: str) -> None:
    site.await_answer()
    pid = site.shows(role, "MainPID")
    site.configure(role, *MISTAKE)
    assert site.systemctl("reload", role) != 0
    site.await_answer()
    assert site.shows(role, "MainPID") == pid
    was, now, is_new = CHANGES[role]
    site.configure(role, was, now)
    assert site.systemctl("reload", role) == 0
    site.await_answer(is_new)


@ROLES
def test_a_hangup_while_a_service_starts_starts_it_again(site: Site, role: str) -> None:
    assert site.systemctl("stop", role) == 0
    assert site.shows(role, "Result", "ExecMainStatus") == ("success", "0")
    assert site.systemctl("start", role, "--no-block") == 0
    while site.signal(role, "HUP") != 0:  # it has no process yet
        pass
    site.await_answer()
    assert site.shows(role, "NRestarts") == ("1",)


@ROLES
def test_a_mistake_in_the_configuration_leaves_a_service_stopped(site: Site, role: str) -> None:
    site.configure(role, *MISTAKE)
    assert site.systemctl("restart", role) != 0
    assert site.shows(role, "ActiveState", "ExecMainStatus", "NRestarts") == ("failed", "78", "0")
    assert site.aiflow_service("status", role) == EXIT_STOPPED
    site.configure(role)
    assert site.systemctl("start", role) == 0
    site.await_answer()


def test_after_all_that_every_request_has_been_answered_or_reported_lost(site: Site, camera: RtspCamera) -> None:
    site.await_answer()
    camera.stalls.set()
    site.await_end_of_all()
    assert site.systemctl("stop", "board") == 0
    site.await_offline()
    counts, last = site.records.counts(), final_counters(site.log("board"))
    assert (counts.unsettled, counts.duplicates, last.get("kept", 0), last.get("open", 0)) == (0, 0, 0, 0)
    assert last["accepted"] + last.get("found", 0) == last["answered"] + last.get("lost", 0)


def test_the_journal_finds_a_line_by_its_logger(site: Site) -> None:
    select = ("--unit=aiflow-server", "LOGGER=edge_runtime.mqtt.client", "PRIORITY=6", "SYSLOG_IDENTIFIER=aiflow")
    found = site.container.call("journalctl", "--no-pager", "--output=cat", *select).stdout.splitlines()
    assert found
    assert all(line.startswith("mqtt online client=") for line in found)


@ROLES
def test_a_service_is_removed(site: Site, role: str) -> None:
    assert site.aiflow_service("uninstall", role) == 0
    assert site.aiflow_service("status", role) == EXIT_NOT_INSTALLED
    assert site.container.call("systemctl", "--failed", "--no-legend").stdout == ""
