"""`python -m tests.whole_site EXAMPLE BUNDLE FOLDER`: runs a set-up of examples/ with its files as they are.

In namespaces of its own (`unshare`): the network has nothing but this set-up, so brokers, servers and cameras have the
names and ports of the files. Each machine has its own /etc/aiflow, /etc/mosquitto/aiflow, /opt/aiflow and /var/lib.
Only cameras and Frigate are programs of the tests. Validates each configuration, and ends when each tier has answered.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from edge_runtime.mqtt import MqttClient, MqttConfig
from testbed.broker import find_mosquitto
from testbed.processes import Process
from tests.frigate import TOKEN, FrigateServer, change
from tests.rtsp_camera import RtspCamera

AIFLOW = [sys.executable, "-m", "firmware_tools"]
BROKERS = {"site-region": "127.0.0.3"}  # two brokers of one port need two addresses; any other one is at 127.0.0.2
PATIENCE_S = 200.0
CONFIGS = re.compile(r"(board|server|edge|cloud)\.toml")
# Lays the machine's folders over those of this one, in the mount namespace of `unshare`.
ENTER = """
for name in etc opt; do mount -t overlay overlay -o lowerdir=$0/$name:/$name /$name || exit 99; done
mount -t tmpfs tmpfs /var/lib && mkdir /var/lib/aiflow || exit 99
exec "$@"
"""


class WholeSite:
    """The machines of one set-up; `with` ends all of them."""

    def __init__(self, example: Path, bundle: Path, folder: Path) -> None:
        self.example, self.bundle, self.folder = example, bundle, folder
        self.page = (example / "README.md").read_text()
        self.commands = [line for line in self.page.splitlines() if line.startswith("aiflow ")]
        self.running = ExitStack()

    def run(self) -> None:
        _loopback_up()
        for command in self.commands:
            if command.startswith("aiflow broker config"):
                subprocess.run([*AIFLOW, *shlex.split(command)[1:]], cwd=self.folder, check=True)
                self.start_broker(Path(re.findall(r"--out (\S+)", command)[0]))
        (self.folder / "camera-password").write_text("s3cret\n")
        (self.folder / "frigate-broker-password").write_text("s3cret\n")
        (self.folder / "frigate-token").write_text(f"{TOKEN}\n")
        configs = {}
        for machine, files in re.findall(r"(?m)^\| (board|server|edge|cloud) \| (.*) \|$", self.page):
            root = self.machine(machine)
            for source, _, name in re.findall(r"`([^`]+)`( as `([^`]+)`)?", files):
                path = next(folder / source for folder in (self.example, self.folder) if (folder / source).exists())
                shutil.copy(path, root / "etc/aiflow" / (name or path.name))
                if CONFIGS.fullmatch(path.name):
                    configs[machine] = f"/etc/aiflow/{path.name}"
            print(self.call(machine, [*AIFLOW, "validate", configs[machine]]), flush=True)
        if (local := self.example / "mosquitto.conf").exists():
            self.mosquitto("local", "127.0.0.1", local.read_text())
        servers = [self.serve(machine, configs[machine]) for machine in configs if machine != "board"]
        for server in servers:
            while "server ready" not in server.said():
                server.check_running()
                time.sleep(0.2)  # a log has no event
        self.start_cameras()
        self.process("board", [*AIFLOW, "run", configs["board"]])
        self.watch({"cloud", "edge"} if "edge" in configs else {"cloud"})

    # ---- machines ----

    def machine(self, name: str) -> Path:
        root = self.folder / "machines" / name
        for path in ("etc/aiflow", "etc/mosquitto", "opt/aiflow/bundles"):
            (root / path).mkdir(parents=True, exist_ok=True)
        names = {"127.0.0.1": "gate.lan dock.lan belt.lan yard.lan frigate.lan localhost"}
        names |= {"127.0.0.2": "broker.lan broker.example.org"}
        if (self.folder / "site-region").exists():
            names |= {"127.0.0.2": "broker.lan", "127.0.0.3": "broker.example.org"}
        (root / "etc/hosts").write_text("".join(f"{address} {hosts}\n" for address, hosts in names.items()))
        if not (link := root / "opt/aiflow/bundles/everyday-lite0").exists():
            link.symlink_to(self.bundle)
        return root

    def inside(self, machine: str, command: list[str]) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", ENTER, str(self.machine(machine)), *command]

    def call(self, machine: str, command: list[str]) -> str:
        done = subprocess.run(
            self.inside(machine, command), cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{machine}: {' '.join(command[-3:])}: {done.stdout}{done.stderr}")
        return done.stdout

    def process(self, machine: str, command: list[str]) -> Process:
        log = self.folder / f"{machine}.log"
        return self.running.enter_context(Process(self.inside(machine, command), log, machine))

    def serve(self, machine: str, config: str) -> Process:
        return self.process(machine, [*AIFLOW, "serve", config])

    def start_broker(self, out: Path) -> None:
        address = BROKERS.get(out.name, "127.0.0.2")
        shutil.copytree(
            self.folder / out / "broker", self.machine(out.name) / "etc/mosquitto/aiflow", dirs_exist_ok=True
        )
        config = (self.folder / out / "broker" / "aiflow.conf").read_text()
        self.mosquitto(out.name, address, config.replace("listener 8883", f"listener 8883 {address}"))

    def mosquitto(self, machine: str, address: str, config: str) -> None:
        """user root: it may not change to another one in this namespace."""
        path = self.folder / f"{machine}.conf"
        path.write_text(f"user root\npersistence false\n{config}")
        broker = self.process(machine, [str(find_mosquitto()), "-c", str(path)])
        port = int(re.findall(r"(?m)^listener (\d+)", config)[0])
        while socket.socket().connect_ex((address, port)):
            broker.check_running()
            time.sleep(0.02)

    # ---- what is no part of this program ----

    def start_cameras(self) -> None:
        board = (self.example / "board.toml").read_text()
        if "rtsp://" in board:
            challenge = 'Basic realm="camera"' if 'username = "viewer"' in board else ""
            self.running.enter_context(RtspCamera(challenge=challenge, port=554))
        if "[frigate]" in board:
            self.start_frigate()

    def start_frigate(self) -> None:
        """Its broker, its interface with a certificate of its own, and an object that it sees again and again."""
        made = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        certificate = self.folder / "frigate.pem", self.folder / "frigate.key"
        subprocess.run(
            [*made, "-subj", "/CN=frigate", "-out", str(certificate[0]), "-keyout", str(certificate[1])], check=True
        )
        users = self.folder / "frigate-users"
        users.write_text("aiflow:s3cret\nfrigate:s3cret\n")
        subprocess.run(["mosquitto_passwd", "-U", str(users)], check=True)
        self.mosquitto(
            "frigate", "127.0.0.1", f"listener 1883 127.0.0.1\nallow_anonymous false\npassword_file {users}\n"
        )
        self.frigate = self.running.enter_context(FrigateServer(token=TOKEN, port=8971, certificate=certificate))
        login = MqttConfig(username="frigate", password_file=str(self.folder / "frigate-broker-password"))
        self.publisher = self.running.enter_context(MqttClient(login.settings("frigate")))

    def see(self) -> None:
        from tests.edge_runtime.test_app import photo

        event = f"{time.time():.6f}-abcdef"
        self.publisher.publish("frigate/events", change("new", event))
        self.publisher.publish("frigate/front_door/person/snapshot", photo(1), retain=True)
        self.publisher.publish("frigate/events", change("end", event))

    def watch(self, tiers: set[str]) -> None:
        """The last command of the page, until it has shown an answer of each tier."""
        command = shlex.split(self.commands[-1])[1:]
        log = self.process("person", [*AIFLOW, *command])
        until = time.monotonic() + PATIENCE_S
        while tiers - set(re.findall(r" update .*\[(?:for now, )?(edge|cloud)\b", log.said())):
            if hasattr(self, "publisher"):
                self.see()
            time.sleep(0.5)
            log.check_running()
            if time.monotonic() > until:
                raise SystemExit(f"no answer of {' and of '.join(sorted(tiers))} within {PATIENCE_S:g} s: {log.said()}")
        print(log.said())
        if hasattr(self, "publisher"):
            print(json.dumps(self.frigate.written.get(timeout=60)))
            assert not self.frigate.faults


def _loopback_up() -> None:
    with socket.socket() as sock:  # netdevice(7): SIOCSIFFLAGS with IFF_UP
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 1))


if __name__ == "__main__":
    example, bundle, folder = map(Path, sys.argv[1:])
    os.chdir(folder)
    site = WholeSite(example, bundle, folder)
    with site.running:
        site.run()
