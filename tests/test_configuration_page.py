"""docs/CONFIGURATION.md names every key, with its default, its range and its words; its files work as they stand."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from server.config import Config, ServerConfig

PAGE = (Path(__file__).parents[1] / "docs" / "CONFIGURATION.md").read_text()
EXAMPLE = "driveway"  # the page's name for a table that a user names
BUNDLE = "models/zoo/everyday-lite0"
CAMERA = CameraConfig("front", "rtsp://camera.lan/stream")
LEAST = {
    "board": RuntimeConfig(BoardConfig("porch", BUNDLE), (CAMERA,)),
    "server": Config(ServerConfig("attic", BUNDLE)),
}


def file(name: str) -> str:
    """One of the page's two files."""
    return dict(re.findall(r"## (\w+)\.toml\n\n```toml\n(.*?)```", PAGE, re.DOTALL))[name]


def uncommented(text: str) -> str:
    """With everything in it that is left out by default."""
    return re.sub(r"(?m)^#(?=[a-z[])", "", text)


def fields(kind: msgspec.inspect.StructType, path: str = "") -> Iterator[tuple[str, msgspec.inspect.Field, Any]]:
    """Every key below a table: its path, itself, and its type without None."""
    for field in kind.fields:
        types = getattr(field.type, "types", (field.type,))
        inner = next(t for t in types if not isinstance(t, msgspec.inspect.NoneType))
        yield f"{path}{field.name}", field, inner
        element = getattr(inner, "item_type", inner)
        if isinstance(value := getattr(inner, "value_type", None), msgspec.inspect.StructType):
            yield from fields(value, f"{path}{field.name}.{EXAMPLE}.")
        if isinstance(element, msgspec.inspect.StructType):
            yield from fields(element, f"{path}{field.name}.")


def comments(text: str) -> dict[str, str]:
    """What is said of each key on its line."""
    found, table = {}, ""
    for line in uncommented(text).splitlines():
        if header := re.match(r"\[+([a-z_.]+)\]+", line):
            table = header[1]
        elif key := re.match(r"([a-z_]+) = [^#]*(.*)", line):
            found[f"{table}.{key[1]}"] = key[2]
    return found


def value_at(data: Any, path: str) -> Any:
    """Raises KeyError for a key that is not there. Of a list, any table may have it: some keys exclude each other."""
    for name in path.split("."):
        tables = data if isinstance(data, list) else [data]
        data = next((table for table in tables if name in table), {})[name]
    return data


def missing_or_wrong(text: str, kind: type) -> list[str]:
    """Keys that a file with everything in it lacks, or has with another value than the default."""
    data, faults = msgspec.toml.decode(uncommented(text).encode()), []
    for path, field, _ in fields(msgspec.inspect.type_info(kind)):
        try:
            value = value_at(data, path)
        except KeyError:
            faults.append(path)
            continue
        is_table = isinstance(value, dict) or path in ("cameras", "cameras.triggers")
        has_default = field.default is not msgspec.NODEFAULT and field.default is not None
        if has_default and not is_table and msgspec.convert(value, type(field.default)) != field.default:
            faults.append(f"{path} = {value}, default {field.default}")
    return faults


@pytest.mark.parametrize(("name", "kind"), [("board", RuntimeConfig), ("server", Config)])
def test_its_files_are_the_defaults(tmp_path, name, kind):
    (tmp_path / "as.toml").write_text(file(name))
    assert load_toml(tmp_path / "as.toml", kind) == LEAST[name]


@pytest.mark.parametrize(("name", "kind"), [("board", RuntimeConfig), ("server", Config)])
def test_it_names_every_key_with_its_default(tmp_path, name, kind):
    (tmp_path / "all.toml").write_text(uncommented(file(name)))
    load_toml(tmp_path / "all.toml", kind)  # and none that is unknown
    assert missing_or_wrong(file(name), kind) == []


@pytest.mark.parametrize(
    "line", ["jpeg_quality = 75", "frame_alpha = 0.01", "#replay_per_s = 2.0", "may_offload = true"]
)
def test_a_key_that_it_lacked_or_had_wrong_would_be_seen(line):
    text = file("board")
    assert line in text
    key = re.split(r"\W+", line.strip("#"))[0]
    assert [fault.split(".")[-1] for fault in missing_or_wrong(text.replace(line, ""), RuntimeConfig)] == [key]
    wrong = line.replace("true", "false").replace("0.01", "0.5").replace("2.0", "5.0").replace("75", "50")
    assert len(missing_or_wrong(text.replace(line, wrong), RuntimeConfig)) == 1


@pytest.mark.parametrize(("name", "kind"), [("board", RuntimeConfig), ("server", Config)])
def test_it_says_the_range_or_the_words_of_each_key(name, kind):
    said = comments(file(name))
    for path, _, inner in fields(msgspec.inspect.type_info(kind)):
        low, high = getattr(inner, "ge", None), getattr(inner, "le", None)
        if high is not None:
            wanted = f"above {inner.gt}, to {int(high)}" if low is None else f"{low:g} to {int(high)}"
            assert wanted in said[path], path
        for word in getattr(inner, "values", ()):
            assert word in said[path], path


@pytest.mark.parametrize(("name", "kind"), [("board", RuntimeConfig), ("server", Config)])
def test_what_it_shows_as_required_is(tmp_path, name, kind):
    text = uncommented(file(name))
    required = [line for line in text.splitlines() if re.search(r"# required(;|:| in)", line)]
    # Of each file: id, bundle; name and source of a camera, its trigger; the outbox's file; the updates' folder; the
    # folder of kept frames; the metrics' port; the model of another server.
    assert len(required) == {"board": 9, "server": 3}[name]
    for line in required:
        (tmp_path / "cut.toml").write_text(text.replace(f"\n{line}\n", "\n"))
        with pytest.raises(ConfigError, match=f"required key `{line.split()[0]}`"):
            load_toml(tmp_path / "cut.toml", kind)
