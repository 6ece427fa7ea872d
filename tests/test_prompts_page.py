"""docs/prompts.md: its files work as they stand, and its lists and bounds are those of the code."""

import json
import re
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from edge_runtime.config import RuntimeConfig, convert
from edge_runtime.wire import Event, decode_event, decode_object, encode_event
from edge_runtime.wire.json_object import MAX_DEPTH, MAX_OBJECT, MAX_VALUES
from server.answer_schema import ASSERTIONS, MAX_SCHEMA, WITH_LIST, WITH_NAMES, WITH_ONE
from server.config import Config
from server.prompts import MAX_FRAMES, PromptConfig, read_prompts
from server.targets.recent_pictures import MAX_AGE_S, MAX_BOARD_BYTES, MAX_BYTES, MAX_CAMERAS
from tests.pages import says

PAGE = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text()
SERVER, BOARD, FRAMES, JSON_SERVER = (
    msgspec.toml.decode(file) for file in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
)


def test_its_files_work_as_they_stand_and_know_each_others_prompt() -> None:
    servers = [convert(Path("server.toml"), file, Config) for file in (SERVER, JSON_SERVER)]
    for server in servers:
        server.check_target()
    drive, front = convert(Path("board.toml"), BOARD, RuntimeConfig).cameras
    assert drive.prompt in read_prompts(servers[0].prompts)
    assert front.prompt is None


def test_its_bounds_of_pictures_are_those_of_the_code() -> None:
    (prompt,) = (msgspec.convert(table, PromptConfig) for table in FRAMES["prompts"].values())
    assert prompt.frames == 3
    assert says(PAGE, "`frames`", 1, MAX_FRAMES)
    assert says(PAGE, f"{MAX_BYTES >> 20} MiB", "server")
    assert says(PAGE, f"{MAX_BOARD_BYTES >> 20} MiB", MAX_CAMERAS, "board", "cameras")
    assert (MAX_FRAMES, says(PAGE, "eight", "pictures", "camera")) == (8, True)
    assert (MAX_AGE_S, says(PAGE, "ten", "minutes", "pictures")) == (600.0, True)


def test_its_event_is_what_its_schema_makes_of_its_text() -> None:
    (shown,) = (json.loads(example) for example in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    schema = read_prompts(convert(Path("server.toml"), JSON_SERVER, Config).prompts)["door"].schema
    assert schema is not None
    assert shown["object"] == decode_object(schema.object_in(shown["text"]))
    captured = datetime(2026, 3, 1, tzinfo=timezone.utc)
    event = Event(type="update", frame="0", camera="front", captured=captured, **shown)
    assert decode_event(encode_event(event)) == event


def test_its_lists_and_bounds_are_those_of_the_code() -> None:
    listed = set(re.findall(r"`(\$?\w+)`", PAGE.split("**What a schema may have.**")[1].split("**What an object")[0]))
    keywords = ASSERTIONS | WITH_ONE | WITH_LIST | WITH_NAMES
    assert keywords == listed - {"$ref", "$defs", "description", "object"}
    assert says(PAGE, MAX_SCHEMA, "bytes")
    for page in (PAGE, (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()):
        assert says(page, MAX_OBJECT, "bytes", MAX_DEPTH, "objects", "lists", MAX_VALUES, "values")
