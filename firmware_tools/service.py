"""`aiflow service`: installs a board or a server as a service of systemd, shows how it is, and removes it."""

import argparse
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from firmware_tools import systemd_units
from firmware_tools.systemd_units import ACCOUNT, STATE, USER, VIDEO, Role, Service, ServiceError, mark, unit_name

UNITS = Path("etc/systemd/system")
BOOTED = Path("run/systemd/system")  # exists if systemd runs the system: man sd_booted(3)
COMMAND_S = 900.0  # `enable --now` waits for a server that loads its networks: TimeoutStartSec=
MAX_UNIT_BYTES = 1 << 16
EXIT_RUNNING, EXIT_STOPPED, EXIT_NOT_INSTALLED = 0, 3, 4  # as `systemctl status`: Linux Standard Base
EPILOG = """\
Exit codes of `status`: 0 it runs, 3 it does not, 4 it is not installed, 1 systemd does not answer.
"""
# What `systemctl show` is asked, and the words for it.
SHOWN = {
    "ActiveState": "state",
    "UnitFileState": "at boot",
    "ActiveEnterTimestamp": "since",
    "StatusText": "says",
    "WatchdogTimestamp": "last progress",
    "NRestarts": "restarts",
    "Result": "last result",
    "ExecMainStatus": "last exit code",
    "MemoryCurrent": "memory",
}


def run_command(command: Sequence[str]) -> str:
    """Its standard output. Raises ServiceError if it fails, hangs or does not exist."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_S, check=False)
    except FileNotFoundError:
        raise ServiceError(f"{command[0]} is not installed: this needs Linux with systemd") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"`{shown}` did not work: {error}") from error
    if done.returncode:
        raise ServiceError(f"`{shown}` failed with exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class System:
    """The machine that gets the service. Tests hand in a directory in the place of / and what runs commands."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str] = run_command
    is_root: bool = os.geteuid() == 0

    def unit(self, role: Role) -> Path:
        return self.root / UNITS / unit_name(role)

    def state_of(self, config: Path) -> Path | None:
        """The working directory of the service that runs this board.toml, below which it writes; None: none runs it."""
        try:
            text = self.unit("board").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        runs_it = os.path.realpath(_config_of(text)) == os.path.realpath(config)
        return self.root / STATE.relative_to("/") if runs_it else None

    def check(self, *, changes: bool) -> None:
        """Raises ServiceError if systemd does not run here, or may not be changed by this user."""
        if not (self.root / BOOTED).is_dir():
            raise ServiceError(
                "systemd does not run this system (a container?): let what starts it here run `aiflow run board.toml` "
                "or `aiflow serve server.toml`, and start it again after any exit code but 0 and 78"
            )
        if changes and not self.is_root:
            raise ServiceError("only root can change services: run it again with sudo, or look with --dry-run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    install = actions.add_parser("install", help="write the unit, start it now and at each boot; again: update it")
    install.add_argument("config", type=Path, help="board.toml or server.toml")
    status = actions.add_parser("status", help="whether it runs, since when, its last progress, exit code and memory")
    uninstall = actions.add_parser("uninstall", help="stop it and remove its unit; configuration and data stay")
    for action in (status, uninstall):
        action.add_argument("role", choices=("board", "server"))
    for action in (install, uninstall):
        action.add_argument("--dry-run", action="store_true", help="print what would be done, and change nothing")


def run(args: argparse.Namespace, system: System | None = None) -> int:
    """Raises ConfigError for a configuration that a service cannot use, and ServiceError for what the system lacks."""
    system = system or System()
    if args.action == "install":
        aiflow = systemd_units.program()
        systemd_units.check_program(aiflow)
        service = systemd_units.service_of(args.config, aiflow)
        systemd_units.check_files(service)
        install(service, aiflow, system, dry_run=args.dry_run)
        return 0
    if args.action == "uninstall":
        uninstall(args.role, system, dry_run=args.dry_run)
        return 0
    return status(args.role, system)


def install(service: Service, aiflow: Path, system: System, *, dry_run: bool) -> None:
    """Prints what it does. Raises ServiceError; before the account can use the configuration, no unit is written."""
    path, name = system.unit(service.role), system.unit(service.role).name
    before = _installed(path, service.role)
    _check_config(before or "", service, name)
    account = ["systemd-sysusers", "--inline", ACCOUNT]
    # As the service's account: the rights of files are the most frequent mistake.
    validate = ["runuser", "-u", USER, "--", str(aiflow), "validate", str(service.config)]
    start = [["systemctl", "enable", "--now", name]]
    if before != service.unit:
        start.insert(0, ["systemctl", "daemon-reload"])
        if before is not None:
            start.append(["systemctl", "restart", name])
    if dry_run:
        print(f"{path}:\n\n{service.unit}\nCommands:\n")
        for command in (account, validate, *start):
            print(shlex.join(command))
        return
    system.check(changes=True)
    if VIDEO in service.unit.splitlines():
        try:
            system.run(["getent", "group", "video"])
        except ServiceError as error:
            raise ServiceError(
                "this system has no group video, to which cameras belong: groupadd --system video, and a udev rule "
                "that gives it the camera's devices"
            ) from error
    system.run(account)
    if not service.uses_credentials:  # these exist for the running service only
        try:
            system.run(validate)
        except ServiceError as error:
            raise ServiceError(
                f"the account {USER}, as which the service runs, cannot use {service.config}: {error}. If rights are "
                f"missing: chgrp {USER} FILE; chmod g+r FILE (g+rx for a directory)"
            ) from error
    if before != service.unit:
        _write(path, service.unit)
        print(f"{path} is written")
    try:
        for command in start:
            system.run(command)
    except ServiceError as error:
        raise ServiceError(f"{error}. The log says why: journalctl -u {name} -n 50") from error
    print(f"{name} runs, now and after each boot. Its log: journalctl -u {name} -f")
    if before == service.unit:
        print(f"Nothing has changed. If the configuration has: systemctl restart {name}")


def uninstall(role: Role, system: System, *, dry_run: bool) -> None:
    """Stops the service and removes what `install` wrote. Prints what stays. Raises ServiceError."""
    path = system.unit(role)
    if _installed(path, role) is None:
        raise ServiceError(f"{path} does not exist: the {role} is not installed as a service")
    stop = ["systemctl", "disable", "--now", path.name]
    # systemd lists a failed service even after its unit is gone. As a pattern, since it is no error if that finds none.
    afterwards = [["systemctl", "daemon-reload"], ["systemctl", "reset-failed", f"{path.name}*"]]
    if dry_run:
        print("\n".join([shlex.join(stop), f"rm {path}", *map(shlex.join, afterwards)]))
        return
    system.check(changes=True)
    system.run(stop)
    try:
        path.unlink()
    except OSError as error:
        raise ServiceError(f"{path} cannot be removed: {error.strerror}: is the file system read-only?") from error
    for command in afterwards:
        system.run(command)
    print(
        f"{path} is removed. The configuration, {STATE} and the account {USER} stay. "
        f"If nothing needs them: userdel {USER}; rm -r {STATE}"
    )


def status(role: Role, system: System) -> int:
    """Prints a table, and returns the exit code."""
    if not system.unit(role).exists():
        print(f"{unit_name(role)} is not installed: aiflow service install CONFIG")
        return EXIT_NOT_INSTALLED
    system.check(changes=False)
    properties = f"--property={','.join((*SHOWN, 'SubState', 'MemoryMax', 'WatchdogUSec'))}"
    shown = system.run(["systemctl", "show", unit_name(role), properties])
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    for name, value in status_rows(values):
        print(f"{name:15} {value}")
    return EXIT_RUNNING if values.get("ActiveState") == "active" else EXIT_STOPPED


def status_rows(values: dict[str, str]) -> list[tuple[str, str]]:
    """What `systemctl show` says of a service, for people; without what is not known."""
    extras = {
        "ActiveState": f" ({values.get('SubState', '')})",
        "WatchdogTimestamp": f" (after {values.get('WatchdogUSec', '')} without any it starts again)",
    }
    rows = []
    for key, name in SHOWN.items():
        value = values.get(key, "")
        if key == "MemoryCurrent":
            value = f"{megabytes(value)} of {megabytes(values.get('MemoryMax', ''))}" if value.isdigit() else ""
        if value:
            rows.append((name, value + extras.get(key, "")))
    return rows


def megabytes(text: str) -> str:
    """A number of bytes as systemd writes it: digits, or "infinity"."""
    return f"{int(text) / 1e6:.0f} MB" if text.isdigit() else "no limit"


def _installed(path: Path, role: Role) -> str | None:
    """The text of our unit; None: there is none. Raises ServiceError if there is one that is not ours."""
    if not path.exists() and not path.is_symlink():
        return None
    text = ""
    if path.is_file() and not path.is_symlink():  # a masked unit is a link to /dev/null
        with path.open("rb") as file:
            text = file.read(MAX_UNIT_BYTES).decode(errors="replace")
    if text.partition("\n")[0] != mark(role):
        raise ServiceError(
            f"{path} was not written by `aiflow service install`: look at it, then disable and move it "
            f"(systemctl disable --now {path.name}; mv {path} {path}.old)"
        )
    return text


def _config_of(unit: str) -> str:
    """The configuration that a unit of ours names; "": it is no unit."""
    start = next((line for line in unit.splitlines() if line.startswith("ExecStart=")), "")
    return start.rpartition(" ")[2]


def _check_config(installed: str, service: Service, name: str) -> None:
    """Raises ServiceError if the unit that is installed has another configuration: it would end, without a word."""
    other = _config_of(installed)
    if other and os.path.realpath(other) != os.path.realpath(service.config):
        raise ServiceError(
            f"{name} runs {other}: a machine has one {service.role} as a service. To replace it: "
            f"aiflow service uninstall {service.role}, then install {service.config}"
        )


def _write(path: Path, text: str) -> None:
    """The whole file or nothing, readable by all. Raises ServiceError."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ServiceError(f"{path} cannot be written: {error.strerror}: is the root file system read-only?") from error
