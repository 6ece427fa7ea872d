"""A vLLM server for tests: what ChatServer says, with vLLM's fields for drafts and image tokens, honest or lying.

Its model knows words: a token is a word with the space before it. It writes the words of `say` one after the other,
whatever came before. Fields: ChatCompletionRequest and ChatCompletionResponse in vLLM's
vllm/entrypoints/openai/chat_completion/protocol.py; for image tokens its documentation, "Multimodal Inputs".
"""

import base64
import io
import json
import re
from typing import Any, Literal
from zlib import crc32

from testbed.chat_server import REQUEST, Asked, ChatServer, closed_object, completion, usage

TEXT = "A man opens a door of the house."  # what it says of each picture, unless `say` is set
IMAGE_TOKENS, WIDTH = 4, 24  # of its model: tokens of a picture, and numbers in each


def template(image_tokens: int) -> list[int]:
    """Tokens of the chat template and of the picture."""
    return [7, 7, *[5] * image_tokens, 8, 9]


TEMPLATE = template(IMAGE_TOKENS)
# A tensor in base64. vLLM also takes an object of more tensors, and null for an earlier one with the same `uuid`.
EMBEDS_PART = closed_object(
    "type image_embeds",
    type={"const": "image_embeds"},
    image_embeds={"type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$"},
    uuid={"type": "string"},
)
VLLM_REQUEST: dict[str, Any] = REQUEST | {
    "properties": {
        **REQUEST["properties"],
        "continue_final_message": {"const": True},
        "add_generation_prompt": {"type": "boolean"},
        "prompt_logprobs": {"type": "integer", "minimum": 0},
        "return_token_ids": {"type": "boolean"},
    },
    "$defs": {"part": {"oneOf": [*REQUEST["$defs"]["part"]["oneOf"], EMBEDS_PART]}},
    # vLLM refuses the first together with the second, whose default is true; the last message is the assistant's.
    "dependentSchemas": {
        "continue_final_message": {
            "required": ["add_generation_prompt"],
            "properties": {"add_generation_prompt": {"const": False}},
        }
    },
}

Lie = Literal[
    "no_ids",  # also not without a draft
    "no_logprobs",
    "fewer_logprobs",  # than tokens
    "no_ranks",
    "other_words",  # the end of the prompt is not the draft
    "short_prompt",  # the draft alone, without its first word
    "all_right",  # accepts every draft
    "all_wrong",  # and none
    "odd_logprobs",
]


class VllmServer(ChatServer):
    """Its attributes may be changed at any time."""

    request_schema = VLLM_REQUEST
    lie: Lie | None = None  # what it says wrongly of a draft
    recut = False  # it reads the beginning of a text as other tokens
    takes_embeds = True  # it was started with --enable-mm-embeds
    ignores_embeds = False  # it leaves out parts that it does not know
    image_tokens, width = IMAGE_TOKENS, WIDTH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.models[0]["root"] = "hub/tiny"  # what it has loaded
        self.say = lambda _: TEXT

    def content_of(self, image: dict[str, Any]) -> bytes:
        """The picture, or the file of the image tokens."""
        if image["type"] != "image_embeds":
            return super().content_of(image)
        if not self.takes_embeds:
            raise ValueError("You must set `--enable-mm-embeds` to input `image_embeds`")
        tensor = embeds_of(image)
        if tensor.ndim != 3 or len(tensor) != 1 or tensor.shape[2] != self.width or not tensor.is_floating_point():
            raise ValueError(f"image_embeds {tensor.dtype} {list(tensor.shape)}, want [1, tokens, {self.width}]")
        return base64.b64decode(image["image_embeds"])

    def template_of(self, asked: Asked) -> list[int]:
        """The beginning of its prompt."""
        image = next(message for message in asked.body["messages"] if message["role"] == "user")["content"][-1]
        if image["type"] != "image_embeds":
            return template(self.image_tokens)
        return template(0 if self.ignores_embeds else embeds_of(image).shape[1])

    def respond(self, asked: Asked, counts: dict[str, Any] | None) -> bytes:
        body, own, first = asked.body, words(self.say(asked)), self.template_of(asked)
        begun = words(body["messages"][-1]["content"]) if body.get("continue_final_message") else []
        rest = own[len(begun) :]
        written = rest[: body["max_tokens"]]
        ended = len(written) < body["max_tokens"] or written == rest == []
        counts = counts and usage(len(first) + len(begun), len(written) + ended)
        said = json.loads(completion("".join(written), counts))
        said["choices"][0]["finish_reason"] = "stop" if ended else "length"
        if body.get("return_token_ids"):
            tokens = [token_of(word) + self.recut * ("prompt_logprobs" not in body) for word in begun]
            said["prompt_token_ids"] = first + tokens
            said["choices"][0]["token_ids"] = [token_of(word) for word in written]
        if "prompt_logprobs" in body:
            said["prompt_logprobs"] = [None, *({str(token): logprob("<x>", 1)} for token in first[1:])]
            said["prompt_logprobs"] += [position(word, own, n) for n, word in enumerate(begun)]
        if self.lie and (begun or self.lie == "no_ids"):
            tell(said, self.lie, len(begun))
        return json.dumps(said).encode()


def embeds_of(image: dict[str, Any]) -> Any:
    """The tensor of a part with image tokens, as vLLM reads it."""
    import torch

    return torch.load(io.BytesIO(base64.b64decode(image["image_embeds"], validate=True)), weights_only=True)


def words(text: str) -> list[str]:
    return re.findall(r" *[^ ]+", text)


def token_of(word: str) -> int:
    return 100 + crc32(word.encode()) % 100_000


def logprob(word: str, rank: int) -> dict[str, Any]:
    return {"logprob": -0.5 * rank, "rank": rank, "decoded_token": word}


def position(word: str, own: list[str], n: int) -> dict[str, Any]:
    """The token itself and the likeliest one: the same, or two."""
    best = own[n] if n < len(own) else "<end>"
    likeliest = {str(token_of(best)): logprob(best, 1)}
    return likeliest if word == best else {str(token_of(word)): logprob(word, 17)} | likeliest


def tell(said: dict[str, Any], lie: Lie, draft_words: int) -> None:
    """Makes an honest response to a draft of so many words a lie."""
    positions = said.get("prompt_logprobs", [])
    drafted = [entry for position in positions[-draft_words:] for entry in position.values()] if positions else []
    if lie == "no_ids":
        said.pop("prompt_token_ids", None)
    elif lie == "no_logprobs":
        said["prompt_logprobs"] = None
    elif lie == "odd_logprobs":
        said["prompt_logprobs"] = [{"x": "y"}] * len(positions)
    elif lie == "fewer_logprobs":
        positions[1:2] = []
    elif lie == "short_prompt":
        said["prompt_token_ids"] = said["prompt_token_ids"][-1:]
        positions[:-1] = []
    for entry in drafted:
        if lie == "no_ranks":
            entry["rank"] = None
        elif lie == "other_words":
            entry["decoded_token"] = " other"
        elif lie in ("all_right", "all_wrong"):
            entry["rank"] = 1 if lie == "all_right" else 2
