"""docs/homeassistant.md names the entities that a board has, its attributes, its settings and its topics."""

import re
from pathlib import Path

from edge_runtime.config import (
    BoardConfig,
    CameraConfig,
    HomeAssistantConfig,
    RuntimeConfig,
    UpdatesConfig,
    load_toml,
)
from edge_runtime.reporting import board_settings
from edge_runtime.reporting.home_assistant import CAPTION_FIELDS, EVENT_FIELDS, device_message
from edge_runtime.reporting.images import MAX_IMAGE, MAX_SIDE, PERIOD_S
from edge_runtime.wire import topics
from firmware_tools.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "homeassistant.md").read_text()
CONFIG = RuntimeConfig(
    BoardConfig("porch", "bundle"),
    (CameraConfig("front", "mqtt", questions=("gate",)),),
    homeassistant=HomeAssistantConfig(images=True),
    updates=UpdatesConfig("bundles"),
)
ENTITIES = device_message(CONFIG, board_settings(CONFIG), has_labels=True, has_link=True)["cmps"]


def rows() -> dict[str, tuple[str, str]]:
    """Entity id to its state and attributes, as the page says."""
    table = PAGE.split("<!-- entities -->")[1].strip().split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name.strip("`"): (state, attributes) for name, state, attributes in cells}


def test_its_entities_are_those_of_the_board_by_the_ids_that_home_assistant_makes_of_their_names():
    ids = {f"{keys['p']}.porch_{keys['name'].lower().replace(' ', '_')}" for keys in ENTITIES.values()}
    assert rows().keys() == ids


def test_its_attributes_are_those_of_the_templates():
    said = {name: set(re.findall("`([a-z_]+)`", attributes)) for name, (_, attributes) in rows().items()}
    assert said["event.porch_front_event"] == set(EVENT_FIELDS) - {"event_type"}
    assert said["sensor.porch_front_caption"] == set(CAPTION_FIELDS)


def test_its_settings_are_read(tmp_path):
    least = '[board]\nid = "porch"\nbundle = "x"\n[[cameras]]\nname = "front"\nsource = "mqtt"\n'
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    password = tmp_path / "password"
    password.write_text("secret")
    (tmp_path / "board.toml").write_text(least + block)
    config = load_toml(tmp_path / "board.toml", RuntimeConfig)
    assert config.homeassistant == HomeAssistantConfig()
    assert config.near_broker is not None
    assert config.near_broker.host == "homeassistant.lan"


def test_its_commands_work_and_name_the_boards_topic(tmp_path):
    (command,) = (line.strip() for line in PAGE.splitlines() if line.strip().startswith("aiflow broker config"))
    words = command.replace("site-home", str(tmp_path)).replace("--make-tls broker.lan ", "").split()[1:]
    assert main(words) == 0
    assert (tmp_path / "passwords" / "hass").exists()
    named = re.findall(r"-t (\S+/\S+)", PAGE)
    assert set(named) == {topics.discovery("homeassistant", "home", "porch")}


def test_its_bounds_and_links_are_true():
    assert f"every {PERIOD_S:g} s" in " ".join(PAGE.split())
    assert f"{MAX_SIDE} pixels a side and {MAX_IMAGE >> 10} KiB" in " ".join(PAGE.split())
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
