"""A server with OpenAI's chat completions that behaves as told: slow, failing, cutting off, limiting, lying.

A fake on real sockets for tests and benchmarks. It refuses every request that breaks the published schema of the API
(`REQUEST`), remembers each request and bills each answer, so that a test can ask what was paid for.
"""

import base64
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, get_args

MAX_REQUEST = 1 << 20  # bytes
PROMPT_TOKENS, COMPLETION_TOKENS = 300, 20  # that each answer is billed for


def closed_object(required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object without other fields, so that one with a typing error is found."""
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": properties,
    }


# What a client may send, as far as aiflow uses it: the request body of "Create chat completion" in OpenAI's API
# reference (https://platform.openai.com/docs/api-reference/chat/create), whose other fields are optional.
JSON_SCHEMA = closed_object(
    "name schema",
    name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    schema={"$ref": "https://json-schema.org/draft/2020-12/schema"},
)
PARTS = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/part"}}
MESSAGE = closed_object(
    "role content",
    role={"enum": ["system", "user", "assistant"]},
    content={"oneOf": [{"type": "string"}, PARTS]},
)
TEXT_PART = closed_object("type text", type={"const": "text"}, text={"type": "string"})
IMAGE_PART = closed_object(
    "type image_url",
    type={"const": "image_url"},
    image_url=closed_object(
        "url",
        url={"type": "string", "pattern": "^data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}$"},
        detail={"enum": ["auto", "low", "high"]},
    ),
)
REQUEST: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **closed_object(
        "model messages",
        model={"type": "string", "minLength": 1},
        max_tokens={"type": "integer", "minimum": 1},
        temperature={"type": "number", "minimum": 0, "maximum": 2},
        prediction=closed_object("type content", type={"const": "content"}, content={"type": "string"}),
        response_format=closed_object("type json_schema", type={"const": "json_schema"}, json_schema=JSON_SCHEMA),
        messages={"type": "array", "minItems": 1, "items": MESSAGE},
    ),
    "$defs": {"part": {"oneOf": [TEXT_PART, IMAGE_PART]}},
}

Behaviour = Literal[
    "answer",
    "no_usage",  # an answer without token counts
    "stall",  # says nothing until the server ends
    "drip",  # a byte of the header now and then, until the server ends
    "drip_body",  # the same in a body without a length
    "error_500",
    "error_503",
    "error_400",
    "error_401",
    "limit",  # 429 with Retry-After: `retry_after`
    "limit_silently",  # 429 without it
    "redirect",
    "reset",  # closes the connection without a word
    "cut",  # ends inside the body
    "promise_more",  # Content-Length is larger than the body
    "promise_less",  # and smaller
    "chunk_lie",  # a chunk that is no number long
    "endless",  # a body without an end
    "large",  # a body of 10 MB
    "html",
    "no_json",
    "no_utf8",
    "no_choices",
    "no_text",
    "long_text",  # 100,000 characters
    "odd_usage",  # token counts below zero
]
BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)


@dataclass(frozen=True)
class Asked:
    """One request that reached the server."""

    pictures: tuple[bytes, ...]
    prompt: str  # beside them
    body: dict[str, Any]
    headers: dict[str, str]  # names in lower case
    behaviour: Behaviour

    @property
    def picture(self) -> bytes:
        """The last one."""
        return self.pictures[-1]


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1 while its `with` block runs. Its attributes may be changed at any time.

    Needs jsonschema, of the extra `test`.
    """

    request_schema = REQUEST
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, behave: Callable[[int], Behaviour] = lambda _: "answer", certificate: tuple[Path, Path] | None = None
    ) -> None:
        """behave: what to do with the n-th request, from 0 on. certificate: it and its key, for https."""
        from jsonschema import Draft202012Validator

        super().__init__(("127.0.0.1", 0), _Handler)
        self._scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self._scheme = "https"
        self._schema = Draft202012Validator(self.request_schema)
        self.behave, self.retry_after = behave, "1"
        self.say: Callable[[Asked], str] = lambda asked: text_of(asked.picture)  # the text of an answer
        self.finish_reason = "stop"  # of an answer
        self.is_down = False  # a proxy in front of it says 503
        self.key: str | None = None  # requests with another one are refused; None: any
        # An answer to "List models": https://platform.openai.com/docs/api-reference/models/list
        self.models: list[dict[str, Any]] = [{"id": "fake", "object": "model", "created": 1, "owned_by": "fake"}]
        self.objections: list[str] = []  # what was wrong with requests that broke the schema
        self.refused: list[str] = []  # why it did not take other requests
        self.asked: list[Asked] = []
        self.billed: Counter[str] = Counter()  # answers that were sent whole, by the text of the answer
        self.hold = threading.Event()  # an "answer" waits for it; set at first
        self.hold.set()
        self.arrived = threading.Semaphore(0)  # released for each request
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="chat-server")

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.hold.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """The client went away, as it may."""

    def take(self, body: bytes, headers: dict[str, str]) -> "Asked | None":
        """A request that arrived; None: it is refused."""
        try:
            read = json.loads(body)
            found = [error.message for error in self._schema.iter_errors(read)]
        except ValueError as error:
            found = [str(error)]
        with self._lock:
            self.objections += found
            if found:
                return None
            text, *images = next(message["content"] for message in read["messages"] if message["role"] == "user")
            try:
                pictures = tuple(self.content_of(image) for image in images)
            except ValueError as error:
                self.refused.append(str(error))
                return None
            asked = Asked(pictures, text["text"], read, headers, self.behave(len(self.asked)))
            self.asked.append(asked)
            return asked

    def content_of(self, image: dict[str, Any]) -> bytes:
        """The picture in a part of a message. Raises ValueError."""
        return base64.b64decode(image["image_url"]["url"].partition(",")[2], validate=True)

    def respond(self, asked: Asked, usage: dict[str, Any] | None) -> bytes:
        """The body of an answer."""
        return completion(self.say(asked), usage, self.finish_reason)

    def bill(self, text: str) -> None:
        """An answer is sent."""
        with self._lock:
            self.billed[text] += 1


def text_of(picture: bytes) -> str:
    """What the server says of a picture: another text for each."""
    return f"picture {sha256(picture).hexdigest()[:16]}"


def completion(text: str | None, usage: dict[str, Any] | None, finish_reason: str = "stop") -> bytes:
    """The body of a response as the API reference has it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    found: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
    }
    return json.dumps(found | ({"usage": usage} if usage else {})).encode()


def usage(prompt: int = PROMPT_TOKENS, written: int = COMPLETION_TOKENS) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_: object) -> None:
        """Nothing: tests look at what the server remembers."""

    def do_GET(self) -> None:
        self.close_connection = True
        if self.server.is_down:
            return self._error(503)
        if self.path != "/v1/models":
            return self._error(404)
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._error(401)
        return self._send(json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self) -> None:
        length = min(int(self.headers["Content-Length"]), MAX_REQUEST)
        body = self.rfile.read(length)
        self.close_connection = True
        if len(body) < length:
            return None  # the client went away before it had sent its request, as a stopping server does
        if self.server.is_down:
            return self._error(503)
        if self.path != "/v1/chat/completions":
            return self._error(404)
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._error(401)
        asked = self.server.take(body, {name.lower(): value for name, value in self.headers.items()})
        self.server.arrived.release()
        if asked is None:
            return self._error(400)
        return self._behave(asked)

    def _behave(self, asked: Asked) -> None:
        text, behaviour = self.server.say(asked), asked.behaviour
        if behaviour in ("answer", "no_usage", "odd_usage"):
            self.server.hold.wait()
            self.server.bill(text)
            counts = {"answer": usage(), "no_usage": None, "odd_usage": usage(-1)}[behaviour]
            self._send(self.server.respond(asked, counts))
        elif behaviour == "stall":
            self.server.ended.wait()
        elif behaviour in ("drip", "drip_body"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"\r\n\r\n" * (behaviour == "drip_body"))
            while not self.server.ended.wait(0.05):
                self.wfile.write(b"z")
        elif behaviour.startswith("error_"):
            self._error(int(behaviour[-3:]))
        elif behaviour == "limit":
            self._error(429, {"Retry-After": self.server.retry_after})
        elif behaviour == "limit_silently":
            self._error(429)
        elif behaviour == "redirect":
            self._error(302, {"Location": "http://127.0.0.1:9/elsewhere"})
        elif behaviour in ("endless", "large"):
            self._stream(None if behaviour == "endless" else 10_000_000)
        elif behaviour != "reset":
            self._broken(behaviour, completion(text, usage()))

    def _broken(self, behaviour: str, whole: bytes) -> None:
        """A response that ends early, lies about its length, or is none."""
        if behaviour == "chunk_lie":
            self._head({"Transfer-Encoding": "chunked"})
            self.wfile.write(b"-5\r\n" + whole)
        elif behaviour in ("cut", "promise_more", "promise_less"):
            lie = {"cut": len(whole), "promise_more": len(whole) + 9, "promise_less": 20}[behaviour]
            self._head({"Content-Length": str(lie)})
            self.wfile.write(whole[: len(whole) // 2] if behaviour == "cut" else whole)
        else:
            bodies = {
                "html": b"<!doctype html><title>It works!</title>",
                "no_json": b'{"choices": [',
                "no_utf8": whole.replace(b"picture", b"\xff\xfe"),
                "no_choices": b'{"choices": []}',
                "no_text": completion(None, usage()),
                "long_text": completion("x" * 100_000, usage()),
            }
            self._send(bodies[behaviour])

    def _stream(self, size: int | None) -> None:
        """So many bytes, or bytes until the client goes away."""
        self._head({})
        chunk, sent = b" " * 65_536, 0
        while (size is None or sent < size) and not self.server.ended.is_set():
            self.wfile.write(chunk)
            sent += len(chunk)

    def _send(self, body: bytes) -> None:
        self._head({"Content-Length": str(len(body)), "Content-Type": "application/json"})
        self.wfile.write(body)

    def _head(self, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _error(self, status: int, headers: dict[str, str] | None = None) -> None:
        key = self.headers["Authorization"]  # some servers quote it
        body = json.dumps({"error": {"message": f"status {status} for {key}", "type": "error"}}).encode()
        self._head({"Content-Length": str(len(body)), **(headers or {})}, status)
        self.wfile.write(body)
