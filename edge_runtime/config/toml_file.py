"""A TOML file as checked values, and its mistakes in the words of somebody who reads the file.

Knows no key but the table that tells a board's file from a server's: the types say what is wanted. An unknown key is an
error that suggests the nearest known one.
"""

import json
import os.path
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec.inspect import (
    BoolType,
    DictType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    UnionType,
    VarTupleType,
)

from edge_runtime.bounded_file import read_bounded
from edge_runtime.config.camera_source import PASSWORD_KEYS
from edge_runtime.errors import ConfigError

MAX_CONFIG_BYTES = 256 * 1024
MAX_SHOWN = 64  # characters of a refused value in a message
# Types in words, for a person.
WORDS: dict[Any, str] = {
    IntType: "a whole number",
    FloatType: "a number",
    BoolType: "true or false",
    StrType: "text in quotes",
    VarTupleType: "a list",
    StructType: "a table",
}
FileOf = Literal["board", "server"]  # whose file it is, and the table that such a file must have
OTHERS: dict[FileOf, tuple[FileOf, str]] = {"board": ("server", "aiflow serve"), "server": ("board", "aiflow run")}
T = TypeVar("T")


def load_toml(path: Path, kind: type[T], of: FileOf | None = None) -> T:
    """Reads a TOML file and checks all of it. A value `~/...` starts at the home directory. Raises ConfigError.

    of: whose file is wanted; the error then says if this is the other's.
    """
    return convert(path, read_toml(path), kind, of)


def convert(path: Path, data: Any, kind: type[T], of: FileOf | None = None) -> T:
    """The tables of a file as values; the path is for messages, `of` as for `load_toml`. Raises ConfigError."""
    if of and isinstance(data, dict) and of not in data:
        other, command = OTHERS[of]
        if other in data:
            raise ConfigError(f"{path}: this is a {other}'s configuration, for `{command}`: name a {of}'s")
    try:
        return msgspec.convert(data, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, data, msgspec.inspect.type_info(kind))}") from error


def read_toml(path: Path) -> Any:
    """The tables of a file as dictionaries, `~/` already replaced. Raises ConfigError."""
    try:
        text = read_bounded(path, MAX_CONFIG_BYTES).decode("utf-8-sig")  # Windows editors write a byte order mark
        return _expanded(msgspec.toml.decode(text), path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a configuration file that can be read") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # What the parser says of porch, 192.168.1.5 and True.
        is_value = "Invalid value" in str(error) or "end of document after a statement" in str(error)
        hint = ': text wants quotes, as in id = "porch"; true and false have small letters' if is_value else ""
        raise ConfigError(f"{path}: not TOML: {error}{hint}") from error


def _expanded(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(inner, path) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, path) for inner in value]
    if isinstance(value, str) and "\0" in value:  # opening such a path is a ValueError
        raise ConfigError(f"{path}: a text has \\u0000, a zero byte, which no path and no name can have: remove it")
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _explain(error: msgspec.ValidationError, data: Any, info: Any) -> str:
    """Names the key, its value and its rule, as a reader of the TOML file knows them."""
    parts = re.fullmatch(r"(?s)(.*?)(?: - at `\$\.([^`]*)`)?", str(error))
    message, name = parts.groups("") if parts else (str(error), "")
    root, (found, info) = info, _at(name, data, info)
    where = f" (in {name})" if name else ""
    if isinstance(error.__cause__, ConfigError):  # from a __post_init__ of ours
        return f"{error.__cause__}{where}"
    if missing := re.search("missing required field `(.*)`", message):
        return f"required key `{missing[1]}` is missing{where}"
    if unknown := re.search("(?s)unknown field `(.*)`", message):
        known = [field.encode_name for field in getattr(info, "fields", ())]
        import difflib  # here, as most boards need not load it

        nearest, tables = difflib.get_close_matches(unknown[1], known, 1), _tables_with(unknown[1], root)
        elsewhere = f"it is a key of {' or '.join(tables)}; " if tables else ""
        hint = f"did you mean {nearest[0]}?" if nearest else f"{elsewhere}known keys: {', '.join(known)}"
        return f"unknown key `{json.dumps(unknown[1][:MAX_SHOWN])[1:-1]}`{where}: {hint}"
    table = re.sub(r"\[[0-9]+\]", "", name)  # a header of TOML has no numbers
    if isinstance(found, dict) and isinstance(info, VarTupleType):
        many = table.rpartition(".")[2]
        return f"[{table}] is a single table: write [[{table}]] with double brackets, once for each of the {many}"
    if isinstance(found, list) and isinstance(info, StructType):
        return f"[[{table}]] is a list of tables: write [{table}] with single brackets, once"
    return f"{name} = {_shown(found)}, want {_rule(info)}"


def _shown(value: Any) -> str:
    """As JSON, without what may be a login: in a text, all before an @, and what follows a word for a password."""
    shown = re.sub(r'"([a-z]+://)?(?:[^"\\]|\\.)*@', r'"\1...@', json.dumps(value, default=str))
    words = "|".join(sorted(PASSWORD_KEYS))
    return re.sub(rf'(?i)\b({words})=(?:[^"\\&]|\\.)*', r"\1=...", shown)[:MAX_SHOWN]


def _at(path: str, data: Any, info: Any) -> tuple[Any, Any]:
    """The value and the type at a path such as `cameras[0].motion`, as far as it leads: a key may contain anything."""
    for step in re.findall(r"\w+", path):
        if isinstance(info, VarTupleType) and step.isdecimal() and int(step) < len(data):
            data, info = data[int(step)], info.item_type
        elif isinstance(info, StructType) and step in data and step in info.cls.__struct_fields__:
            data, info = data[step], next(field.type for field in info.fields if field.encode_name == step)
        else:
            break
        if isinstance(info, DictType) and isinstance(data, dict) and isinstance(info.value_type, StructType):
            info = info.value_type  # msgspec does not say under which name
            data = next((table for table in data.values() if _is_wrong(table, info)), data)
        if isinstance(info, UnionType):  # an optional key
            info = next(option for option in info.types if not isinstance(option, NoneType))
    return data, info


def _tables_with(key: str, info: StructType) -> list[str]:
    """The headers of the tables that know a key, such as [board] and [[cameras]]."""
    headers = []
    for field in info.fields:
        kinds = field.type.types if isinstance(field.type, UnionType) else (field.type,)
        for kind in kinds:
            table, header = (kind.item_type, "[[{}]]") if isinstance(kind, VarTupleType) else (kind, "[{}]")
            if isinstance(table, StructType) and key in [inner.encode_name for inner in table.fields]:
                headers.append(header.format(field.encode_name))
    return headers


def _is_wrong(table: Any, info: StructType) -> bool:
    try:
        msgspec.convert(table, info.cls, str_keys=True)
    except msgspec.ValidationError:
        return True
    return False


def _rule(info: Any) -> str:
    """Which values a key takes, in words."""
    if isinstance(info, Metadata) and info.extra_json_schema:
        return str(info.extra_json_schema["description"])
    if isinstance(info, LiteralType):
        return " or ".join(f'"{word}"' for word in info.values)
    low, high = getattr(info, "ge", None), getattr(info, "le", None)
    bounds = f" from {low} to {high}" if low is not None else f" above {info.gt}, to {high}" if high is not None else ""
    for limit, words in (("min_length", "at least"), ("max_length", "at most")):
        if (length := getattr(info, limit, None)) is not None:
            bounds += f", {words} {length} long"
    return WORDS.get(type(info), "another value") + bounds
