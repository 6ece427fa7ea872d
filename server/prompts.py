"""Named prompts: in which words a server asks another model about a picture, and in which form it wants the answer.

A request names a prompt. The words stay on the server, so a board can neither send nor read them, and they cost no
bytes on the link. A prompt belongs to one camera if it has a context: what is normal there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from edge_runtime.config import PROMPT_NAME
from edge_runtime.errors import ConfigError
from server.answer_schema import AnswerSchema

MAX_PROMPTS = 64  # with `door`; the status has their names, and a board reads no more
# Good for a camera at a door.
QUESTION = (
    "This picture is from a fixed camera at a door. Say in one short sentence what can be seen: people, animals, "
    "vehicles, parcels, and what they do. If there are none, say that nothing happens. Do not guess what is not "
    "visible."
)
MAX_FRAMES = 8  # pictures in one question
DEFAULT = "door"  # the prompt that every server has

Words = Annotated[str, Meta(max_length=16_384)]


class PromptConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """[prompts.NAME]: with the defaults alone, it is the prompt `door`."""

    question: Annotated[str, Meta(min_length=1, max_length=16_384)] = QUESTION
    system: Words = ""  # the system message; empty: none, since some models know none
    context: Words = ""  # what is normal in the camera's pictures
    language: Annotated[str, Meta(max_length=64)] = ""  # of the texts, such as "German"; empty: the model's choice
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None  # longest answer; None: the target's own
    frames: Annotated[int, Meta(ge=1, le=MAX_FRAMES)] = 1  # the camera's last pictures in one question
    schema: dict[str, Any] | str | None = None  # JSON Schema, or a file with it; None: the answer is a text


@dataclass(frozen=True, slots=True)
class Prompt:
    """The question about each picture, and its settings."""

    system: str  # empty: no system message
    text: str  # beside the picture
    max_tokens: int | None = None  # longest answer; None: the target's own limit
    schema: AnswerSchema | None = None  # None: the answer is a text
    frames: int = 1  # pictures of the camera, at most: this one and the last ones before it


def read_prompts(configured: Mapping[str, PromptConfig]) -> dict[str, Prompt]:
    """By name, `door` included. Raises ConfigError for a name or a schema that is none."""
    tables = {DEFAULT: PromptConfig()} | dict(configured)
    if len(tables) > MAX_PROMPTS:
        raise ConfigError(f"{len(tables)} prompts with `{DEFAULT}`, want at most {MAX_PROMPTS} tables [prompts.NAME]")
    for name in configured:
        if not re.fullmatch(PROMPT_NAME, name):
            raise ConfigError(
                f'prompts: {name[:64]!r} is no name: want 1 to 32 of the characters A-Z, a-z, 0-9, _ and -, not "none"'
            )
    return {name: _prompt(name, config) for name, config in tables.items()}


def check_usual(name: str, prompts: Mapping[str, Prompt], table: str) -> None:
    """Raises ConfigError if the prompt for requests that name none is not there. table: the one that names it."""
    if name not in prompts:
        raise ConfigError(
            f'prompt = "{name}" in {table} is none of the prompts {", ".join(sorted(prompts))}: '
            f"write a table [prompts.{name}], or name one of them"
        )


def _prompt(name: str, config: PromptConfig) -> Prompt:
    schema = None if config.schema is None else AnswerSchema(name, config.schema)
    parts = [config.question]
    if config.context:
        parts.append(f"What is normal in this camera's pictures: {config.context}")
    if config.language:
        parts.append(f"Write in this language: {config.language}.")
    if schema:  # also in words: some servers ignore response_format
        written = msgspec.json.encode(schema.schema).decode()
        parts.append(f"Answer with one JSON object that matches this JSON Schema, and with nothing else: {written}")
    return Prompt(config.system, "\n\n".join(parts), config.max_tokens, schema, config.frames)
