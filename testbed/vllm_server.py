"""A vLLM server for tests: what ChatServer says, with vLLM's fields for verifying a draft, honest or lying.

Its model knows words: a token is a word with the space before it. It writes the words of `say` one after the other,
whatever came before. Fields: ChatCompletionRequest and ChatCompletionResponse in vLLM's
vllm/entrypoints/openai/chat_completion/protocol.py.
"""

import json
import re
from typing import Any, Literal
from zlib import crc32

from testbed.chat_server import REQUEST, Asked, ChatServer, completion, usage

TEMPLATE = [7, 7, 8, 9]  # tokens of the chat template and of the picture
VLLM_REQUEST: dict[str, Any] = REQUEST | {
    "properties": {
        **REQUEST["properties"],
        "continue_final_message": {"const": True},
        "add_generation_prompt": {"type": "boolean"},
        "prompt_logprobs": {"type": "integer", "minimum": 0},
        "return_token_ids": {"type": "boolean"},
    },
    # vLLM refuses the first together with the second, whose default is true; the last message is the assistant's.
    "dependentSchemas": {
        "continue_final_message": {
            "required": ["add_generation_prompt"],
            "properties": {"add_generation_prompt": {"const": False}},
        }
    },
}

Lie = Literal[
    "no_ids",
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
    """lie: what it says wrongly of a draft; None: nothing. recut: it reads the beginning of a text as other tokens."""

    request_schema = VLLM_REQUEST
    lie: Lie | None = None
    recut = False

    def respond(self, asked: Asked, counts: dict[str, Any] | None) -> bytes:
        body, own = asked.body, words(self.say(asked))
        begun = words(body["messages"][-1]["content"]) if body.get("continue_final_message") else []
        rest = own[len(begun) :]
        written = rest[: body["max_tokens"]]
        ended = len(written) < body["max_tokens"] or written == rest == []
        counts = counts and usage(len(TEMPLATE) + len(begun), len(written) + ended)
        said = json.loads(completion("".join(written), counts))
        said["choices"][0]["finish_reason"] = "stop" if ended else "length"
        if body.get("return_token_ids"):
            tokens = [token_of(word) + self.recut * ("prompt_logprobs" not in body) for word in begun]
            said["prompt_token_ids"] = TEMPLATE + tokens
            said["choices"][0]["token_ids"] = [token_of(word) for word in written]
        if "prompt_logprobs" in body:
            said["prompt_logprobs"] = [None, *({str(token): logprob("<x>", 1)} for token in TEMPLATE[1:])]
            said["prompt_logprobs"] += [position(word, own, n) for n, word in enumerate(begun)]
        if begun and self.lie:
            tell(said, self.lie, len(begun))
        return json.dumps(said).encode()


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
        del said["prompt_token_ids"]
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
