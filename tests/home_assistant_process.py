"""Home Assistant itself, without its pages: `python home_assistant_process.py FOLDER PORT`, with the broker's port.

FOLDER/automations.json may hold automations; they find the blueprints of examples/ and an input_text `notified`.

It runs with the interpreter of an environment of its own, which has the packages homeassistant and paho-mqtt. For each
line on standard input it writes one line of JSON: entity id to state and attributes, and what it has logged as wrong.
"""

import asyncio
import json
import logging
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from homeassistant import bootstrap, runner
from homeassistant.helpers import entity_registry


class Faults(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if any(word in record.name for word in ("mqtt", "template", "automation", "blueprint")):
            self.lines.append(f"{record.name}: {record.getMessage()}"[:500])


def configure(folder: Path, port: int) -> None:
    """One integration, MQTT, with what its dialog asks for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        page = {"server_host": "127.0.0.1", "server_port": free.getsockname()[1]}
    configuration: dict[str, Any] = {"http": page, "input_text": {"notified": {"max": 255}}}
    if (automations := folder / "automations.json").exists():
        configuration["automation"] = json.loads(automations.read_text())
    (folder / "configuration.yaml").write_text(json.dumps(configuration))  # JSON is YAML
    blueprints = Path(__file__).parents[1] / "examples" / "homeassistant"
    shutil.copytree(blueprints, folder / "blueprints" / "automation" / "aiflow", dirs_exist_ok=True)
    storage = folder / ".storage"
    storage.mkdir(exist_ok=True)
    entry = {
        "entry_id": "mqtt",
        "version": 1,
        "minor_version": 2,
        "domain": "mqtt",
        "title": "broker",
        "data": {"broker": "127.0.0.1", "port": port},
        "options": {},
        "pref_disable_new_entities": False,
        "pref_disable_polling": False,
        "source": "user",
        "unique_id": None,
        "disabled_by": None,
        "created_at": "2026-01-01T00:00:00+00:00",
        "modified_at": "2026-01-01T00:00:00+00:00",
        "discovery_keys": {},
    }
    document = {"version": 1, "minor_version": 4, "key": "core.config_entries", "data": {"entries": [entry]}}
    (storage / "core.config_entries").write_text(json.dumps(document))


async def serve(folder: Path) -> None:
    faults = Faults()
    bootstrap.DEFAULT_INTEGRATIONS = bootstrap.CRITICAL_INTEGRATIONS = set()  # its pages need one more large package
    hass = await bootstrap.async_setup_hass(runner.RuntimeConfig(config_dir=str(folder), skip_pip=True))
    assert hass
    logging.getLogger().addHandler(faults)
    await hass.async_start()
    loop = asyncio.get_running_loop()
    while (line := await loop.run_in_executor(None, sys.stdin.readline)).strip():
        service, _, data = line.strip().partition(" ")
        if "." in service:  # such as: switch.turn_off {"entity_id": ...}
            await hass.services.async_call(*service.split("."), json.loads(data), blocking=True)
        await hass.async_block_till_done()
        states = {state.entity_id: [state.state, dict(state.attributes)] for state in hass.states.async_all()}
        registered = list(entity_registry.async_get(hass).entities)
        print(json.dumps({"states": states, "registered": registered, "faults": faults.lines}, default=str), flush=True)
    await hass.async_stop(force=True)


if __name__ == "__main__":
    configure(Path(sys.argv[1]), int(sys.argv[2]))
    asyncio.run(serve(Path(sys.argv[1])))
