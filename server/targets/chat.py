"""Chat completions as values: what is asked, and what a response says. No calls, no clock.

API: https://platform.openai.com/docs/api-reference/chat/create
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.http_call import CallError
from edge_runtime.wire.envelope import MAX_TEXT
from server.prompts import Prompt
from server.targets.prompted import objection, words
from server.targets.target import PictureJob

Message = dict[str, Any]
Read = TypeVar("Read")


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: Any = None


# More than any model reads at once. One absurd count would close the budget of the day.
MAX_COUNT = 10_000_000
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class TokenCounts(Struct):
    """As the other server counts them."""

    prompt_tokens: Count
    completion_tokens: Count


class _PredictionCounts(Struct):
    accepted_prediction_tokens: Count = 0
    rejected_prediction_tokens: Count = 0


class _UsageDetails(Struct):
    completion_tokens_details: _PredictionCounts


class Completion(Struct):
    """The part of a response that is read. Fields of the type Any were not checked."""

    choices: Annotated[tuple[_Choice, ...], Meta(min_length=1)]
    usage: Any = None
    prompt_token_ids: Any = None  # vLLM, with return_token_ids
    prompt_logprobs: Any = None  # vLLM, with prompt_logprobs

    @property
    def text(self) -> str:
        """With the space around it, which belongs to a text that is continued."""
        return self.choices[0].message.content or ""

    @property
    def ends_here(self) -> bool:
        """The model had nothing to write after what it was given."""
        return not self.text and self.choices[0].finish_reason == "stop"

    @property
    def is_cut(self) -> bool:
        """The model had more to write than max_tokens."""
        return bool(self.choices[0].finish_reason == "length")

    @property
    def counts(self) -> TokenCounts | None:
        """None: not counted, or not soundly."""
        counts = _convert(self.usage, TokenCounts)
        # With zeros, answers would cost nothing.
        is_sound = counts and counts.prompt_tokens and (counts.completion_tokens or not self.text)
        return counts if is_sound else None

    @property
    def why_uncounted(self) -> str:
        """Why there are no `counts`, in a few fixed sentences."""
        if self.usage is None:
            return "the response has no usage"
        if _convert(self.usage, TokenCounts):
            return "its usage says 0 tokens"
        return f"its usage is not two counts of 0 to {MAX_COUNT} tokens"

    @property
    def prediction(self) -> tuple[int, int]:
        """Tokens of the prediction: accepted, rejected. Both 0 if the other server does not say."""
        details = _convert(self.usage, _UsageDetails)
        counts = details.completion_tokens_details if details else _PredictionCounts()
        return counts.accepted_prediction_tokens, counts.rejected_prediction_tokens


def messages(prompt: Prompt, job: PictureJob) -> list[Message]:
    """The prompt and the pictures, the job's last. If it has image tokens, they take the place of its picture."""
    last = _image(job.media_type, job.picture)
    if job.image_tokens is not None:
        last = {"type": "image_embeds", "image_embeds": job.image_tokens}
    pictures = [*(_image(earlier.media_type, earlier.picture) for earlier in job.earlier), last]
    content: list[Message] = [{"type": "text", "text": words(prompt, job)}, *pictures]
    asked: list[Message] = [{"role": "user", "content": content}]
    return [{"role": "system", "content": prompt.system}, *asked] if prompt.system else asked


def _image(media_type: str, picture: bytes) -> Message:
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{base64.b64encode(picture).decode()}"}}


def repair(asked: Sequence[Message], answer: str, wrong: str) -> list[Message]:
    """The same, and what is wrong with the answer."""
    return [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": objection(wrong)}]


def body(model: str, asked: Sequence[Message], prompt: Prompt, max_tokens: int, **more: Any) -> bytes:
    """Of a request, JSON. With a schema, servers that can will write nothing that breaks it. more: of its fields."""
    request = {"model": model, "messages": asked, "max_tokens": max_tokens, "temperature": 0, **more}
    if schema := prompt.schema:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": schema.name, "schema": schema.schema},
        }
    return msgspec.json.encode(request)


def read(response: bytes, may_be_empty: bool = False) -> Completion:
    """A chat completion. may_be_empty: it continues a text, which may be complete. Raises CallError."""
    try:
        completion = msgspec.json.decode(response, type=Completion)
        text = completion.text
        text.encode()  # JSON can hold halves of characters, which no reply can
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        kind = "HTML" if response.lstrip()[:1] == b"<" else f"{len(response)} bytes"
        raise CallError("no_answer", f"the response is no chat completion but {kind}: is the address right?") from error
    if not may_be_empty and not text.strip():
        raise CallError("no_answer", "the model wrote no text: does it think longer than max_tokens?")
    return completion


def fitted(text: str) -> str:
    """A text as long as a reply may have it, cut between two words: it has been paid for."""
    if len(text) <= MAX_TEXT:
        return text
    head, around = text[:MAX_TEXT], text[MAX_TEXT - 1 : MAX_TEXT + 1]
    is_between_words = any(character.isspace() for character in around)
    return head.rstrip() if is_between_words else head.rsplit(maxsplit=1)[0]


def _convert(value: Any, wanted: type[Read]) -> Read | None:
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        return None
