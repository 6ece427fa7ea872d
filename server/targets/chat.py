"""Chat completions as values: what is asked, and what a response says. No calls, no clock.

API: https://platform.openai.com/docs/api-reference/chat/create
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from edge_runtime.http_call import CallError
from edge_runtime.wire.envelope import MAX_TEXT, UInt32
from server.prompts import Prompt
from server.targets.target import PictureJob

Message = dict[str, Any]


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    message: _Message


class _Completion(Struct):
    choices: Annotated[tuple[_Choice, ...], Meta(min_length=1)]
    usage: Any = None


class TokenCounts(Struct):
    """As the other server counts them."""

    prompt_tokens: UInt32
    completion_tokens: UInt32


def messages(prompt: Prompt, job: PictureJob) -> list[Message]:
    """The prompt and the picture."""
    picture = f"data:{job.media_type};base64,{base64.b64encode(job.picture).decode()}"
    content = [{"type": "text", "text": prompt.text}, {"type": "image_url", "image_url": {"url": picture}}]
    asked: list[Message] = [{"role": "user", "content": content}]
    return [{"role": "system", "content": prompt.system}, *asked] if prompt.system else asked


def repair(asked: Sequence[Message], answer: str, wrong: str) -> list[Message]:
    """The same, and what is wrong with the answer."""
    again = f"This is not what was asked for: {wrong}. Answer again, with the whole corrected JSON object alone."
    return [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]


def body(model: str, asked: Sequence[Message], prompt: Prompt, max_tokens: int) -> bytes:
    """Of a request, JSON. With a schema, servers that can will write nothing that breaks it."""
    request = {"model": model, "messages": asked, "max_tokens": max_tokens, "temperature": 0}
    if schema := prompt.schema:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": schema.name, "schema": schema.schema},
        }
    return msgspec.json.encode(request)


def read(response: bytes) -> tuple[str, TokenCounts | None]:
    """The text of a chat completion, and its tokens if they were counted. Raises CallError."""
    try:
        completion = msgspec.json.decode(response, type=_Completion)
        text = (completion.choices[0].message.content or "").strip()
        text.encode()  # JSON can hold halves of characters, which no reply can
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        kind = "HTML" if response.lstrip()[:1] == b"<" else f"{len(response)} bytes"
        raise CallError("no_answer", f"the response is no chat completion but {kind}: is the address right?") from error
    if not text:
        raise CallError("no_answer", "the model wrote no text: does it think longer than max_tokens?")
    if len(text) > MAX_TEXT:
        raise CallError("no_answer", f"a text of {len(text)} characters, at most {MAX_TEXT}: lower max_tokens")
    try:
        counts = msgspec.convert(completion.usage, TokenCounts)
    except msgspec.ValidationError:
        return text, None
    return text, counts
