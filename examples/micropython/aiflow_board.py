"""A board's side of the protocol (docs/protocol.md) for MicroPython: it sends pictures, and writes events.

It has no draft, no features and no outbox, and one open request at a time: the picture that is asked about stays in
memory until its answer. The sections in comments are those of docs/protocol.md. It runs on CPython, too.
"""

import binascii
import json
import os
import struct
import time

MAX_REPLY = 8192  # bytes, for the board's memory: section 4 allows more. JSON takes at most 6 bytes for one of these
MAX_PICTURE = 262144 - 2048  # bytes, section 3: the rest of the request is smaller
MAX_EVENT = 65536  # bytes, section 7
FIRST_WAIT_MS = 4000  # without a reply; then twice as long each time
OK, STALE, BUSY, UNKNOWN_BUNDLE, BAD_REQUEST, FAILED, REFERENCE_LOST = range(7)
TIERS = ("device", "edge", "cloud")
EPOCH_MS = 946684800000 if time.gmtime(0)[0] == 2000 else 0  # a microcontroller counts from the year 2000


class ProtocolError(ValueError):
    """A message breaks a rule of the protocol."""


def unix_ms():
    """The default clock. Set it before the first picture, for example by ntptime."""
    return time.time_ns() // 1000000 + EPOCH_MS


# ---- msgpack, as far as requests and replies need it ----

SIZED = {  # first byte: (kind, bytes of its length)
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
NUMBERS = {  # first byte: format of struct
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def pack(value):
    """None, bool, int >= 0, float, bytes, str, list and dict to msgpack, each in its shortest form."""
    for first, constant in CONSTANTS.items():
        if value is constant:
            return bytes((first,))
    if isinstance(value, int):
        first = 0xCC + (value > 0xFF) + (value > 0xFFFF) + (value > 0xFFFFFFFF)
        return bytes((value,)) if value < 128 else bytes((first,)) + struct.pack(NUMBERS[first], value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, (bytes, bytearray)):
        return _head(len(value), 0xC4) + value
    if isinstance(value, str):
        data = value.encode()
        return _head(len(data), 0xD9, 0xA0, 32) + data
    is_map = isinstance(value, dict)
    parts = [part for item in value.items() for part in item] if is_map else value
    head = _head(len(value), 0xDD, 0x80, 16) if is_map else _head(len(value), 0xDB, 0x90, 16)
    return head + b"".join([pack(part) for part in parts])


def _head(length, long, short=0, below=0):
    """The first bytes of what has a length. long: with a length of 1 byte; short: for lengths below `below`."""
    if length < below:
        return bytes((short | length,))
    least = 2 if below == 16 else 1  # arrays and maps have no length of 1 byte
    size = max(least, 1 if length < 0x100 else 2 if length < 0x10000 else 4)
    return bytes((long + size // 2,)) + length.to_bytes(size, "big")


class _Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ProtocolError("message ends early")
        return self.data[start : self.at]

    def value(self, depth=0):
        first = self.take(1)[0]
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in NUMBERS:
            return struct.unpack(NUMBERS[first], self.take(struct.calcsize(NUMBERS[first])))[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first < 0xC0:
            kind = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
            return self.sized(kind, first & (31 if kind == "str" else 15), depth)
        if first not in SIZED:
            raise ProtocolError(f"msgpack type {first}")
        kind, size = SIZED[first]
        return self.sized(kind, int.from_bytes(self.take(size), "big"), depth)

    def sized(self, kind, length, depth):
        if kind in ("bin", "str"):
            data = self.take(length)
            # MicroPython reads half of a surrogate pair, and would write it into an event that nobody can read.
            if kind == "str" and any(data[i] == 0xED and data[i + 1] > 0x9F for i in range(length - 1)):
                raise ProtocolError("text is not UTF-8")
            return data if kind == "bin" else str(data, "utf-8")
        if depth == 8 or length > len(self.data) - self.at:  # nothing is allocated for what cannot be there
            raise ProtocolError("message is nested too deeply or ends early")
        if kind == "array":
            return [self.value(depth + 1) for _ in range(length)]
        entries = {}
        for _ in range(length):  # no comprehension: MicroPython evaluates its value before its key
            key = self.key()
            entries[key] = self.value(depth + 1)
        return entries

    def key(self):
        key = self.value(8)
        if not isinstance(key, str):
            raise ProtocolError("a key is not a string")
        return key


def unpack(data):
    """One msgpack value. Raises ProtocolError or another ValueError."""
    reader = _Reader(data)
    value = reader.value()
    if reader.at != len(data):
        raise ProtocolError("bytes are left over")
    return value


# ---- section 4: replies ----


def _is_text(value, most):
    return isinstance(value, str) and len(value) <= most


def _is_int(value, most):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_share(value):
    return _is_int(value, 1) or (isinstance(value, float) and 0 <= value <= 1)


def _is_map(value, most, is_good):
    if not isinstance(value, dict) or len(value) > most:
        return False
    return all(_is_text(key, 64) and is_good(item) for key, item in value.items())


def _are_shares(value):
    return _is_map(value, 64, _is_share)


# position, name, default, rule. The other fields are not used here.
FIELDS = (
    (1, "id", None, lambda v: isinstance(v, bytes) and len(v) == 8),
    (2, "status", None, lambda v: _is_int(v, 6)),
    (4, "text", "", lambda v: _is_text(v, 8192)),
    (5, "tier", 1, lambda v: _is_int(v, 2)),
    (6, "server", "", lambda v: _is_text(v, 64)),
    (10, "confidence", None, lambda v: v is None or _is_share(v)),
    (12, "error", "", lambda v: _is_text(v, 1024)),
    (13, "retry_after_ms", None, lambda v: v is None or _is_int(v, 0xFFFFFFFF)),
    (14, "label", None, lambda v: v is None or _is_text(v, 64)),
    (15, "scores", None, lambda v: v is None or _are_shares(v)),
    (16, "final", True, lambda v: isinstance(v, bool)),
    (17, "answers", None, lambda v: v is None or _is_map(v, 16, _are_shares)),
    (18, "unsure", False, lambda v: isinstance(v, bool)),
    (21, "is_cut", False, lambda v: isinstance(v, bool)),
)


def read_reply(data):
    """A reply as a dict of the names in FIELDS. Raises ProtocolError or another ValueError."""
    if len(data) > MAX_REPLY:
        raise ProtocolError(f"reply has {len(data)} bytes")
    array = unpack(data)
    if not isinstance(array, list) or not array or array[0] != 1:
        raise ProtocolError("not a reply of version 1")
    reply = {}
    for position, name, default, is_good in FIELDS:
        reply[name] = array[position] if position < len(array) else default
        if not is_good(reply[name]):
            raise ProtocolError("reply has a bad " + name)
    return reply


# ---- the board ----


class Board:
    """One board. Call `step` often: it waits for the broker alone. After an OSError of the client, `connect` again.

    client: with the methods of umqtt.simple's MQTTClient. clock: unix time in ms.
    """

    def __init__(self, client, site, board, camera="camera", clock=unix_ms):
        self.client, self.camera, self.clock = client, camera, clock
        self.topic = f"aiflow/{site}/{board}/"
        self.boot = binascii.hexlify(os.urandom(4)).decode()
        self.last_id = 0
        self.open = None  # the request that waits for its answer
        self.replies = []  # to it, that `step` has not handled
        self.refused = 0  # messages on the reply's topic that are no replies

    def connect(self):
        """Also after a lost connection. The open request is sent again."""
        self.client.set_last_will(self._topic("up/status"), self._status("offline"), True, 1)
        self.client.set_callback(self._on_message)
        self.client.connect()
        self.client.subscribe(self._topic("down/reply"), 1)
        self.client.publish(self._topic("up/status"), self._status("online"), True, 1)
        if self.open and not self.open["answer"]:
            self.open["send_at"] = self.clock()

    def offload(self, jpeg, budget_ms=20000, options=None):
        """Asks the servers about a picture. An earlier one that still waits ends as lost. Returns the frame's name.

        Raises ProtocolError if the picture is too large.
        """
        if len(jpeg) > MAX_PICTURE:
            raise ProtocolError(f"picture has {len(jpeg)} bytes, want at most {MAX_PICTURE}: make it smaller")
        if self.open:
            self._tell(True, "a newer picture came before the answer")
        now, request_id = self.clock(), self._new_id()
        self.open = {
            "id": request_id, "jpeg": jpeg, "options": options, "captured": now, "deadline": now + budget_ms,
            "send_at": now, "wait": FIRST_WAIT_MS, "busy_wait": 50, "bytes_up": 0,
            "answer": None, "why": "no answer came in time",
        }  # fmt: skip
        self.step()
        return _frame(request_id)

    def step(self):
        """Takes what has arrived, and sends what is due. Returns whether a request waits for its answer."""
        self.client.check_msg()
        while self.replies:
            self._on_reply(self.replies.pop(0))
        asked, now = self.open, self.clock()
        if asked and now >= asked["deadline"]:
            self._tell(True, asked["why"])
        elif asked and now >= asked["send_at"]:
            asked["send_at"] = now + asked["wait"]
            asked["wait"] *= 2
            age_ms, budget_ms = now - asked["captured"], asked["deadline"] - now
            message = pack_request(asked["id"], asked["jpeg"], age_ms, budget_ms, asked["options"])
            asked["bytes_up"] += len(message)
            self.client.publish(self._topic("up/request"), message, False, 1)
        return self.open is not None

    def event(self, kind, frame, captured_ms, fields):
        """Publishes an event of section 7. fields: the optional ones; None, False and empty texts are left out."""
        event = {"version": 1, "type": kind, "frame": frame, "camera": self.camera, "captured": _iso(captured_ms)}
        event.update({name: value for name, value in fields.items() if value not in (None, "") and value is not False})
        payload = json.dumps(event).encode()
        if len(payload) > MAX_EVENT:
            raise ProtocolError(f"event has {len(payload)} bytes")
        self.client.publish(self._topic("up/event"), payload, False, 1)
        self.client.publish(self._topic("up/last"), payload, True, 1)

    def device_event(self, text, label=None, confidence=None):
        """Publishes a text that the board has found by itself, without a server. Returns the frame's name."""
        frame = _frame(self._new_id())
        fields = {"text": text, "label": label, "confidence": confidence, "paradigm": "device"}
        self.event("new", frame, self.clock(), dict(fields, final=True, answered_by={"tier": "device"}))
        return frame

    def _new_id(self):
        """Section 3, An id."""
        self.last_id = max(self.last_id + 1, self.clock() << 16 | int.from_bytes(os.urandom(2), "big"))
        return self.last_id.to_bytes(8, "big")

    def _topic(self, end):
        return (self.topic + end).encode()

    def _status(self, state):
        status = {"state": state, "boot": self.boot}
        if state == "online":
            status.update({"paradigm": "offload", "cameras": {self.camera: "live"}})
        return json.dumps(status).encode()

    def _on_message(self, topic, payload, *_):
        """Only remembers a reply: umqtt also calls this while it waits in `publish`, which cannot be called twice.

        umqtt does not tell whether a message was retained. A reply of yesterday has another id.
        """
        try:
            reply = read_reply(payload)
        except (ValueError, MemoryError):
            self.refused += 1
            return
        if self.open and reply["id"] == self.open["id"] and len(self.replies) < 4:
            self.replies.append(reply)

    def _on_reply(self, reply):
        asked, status = self.open, reply["status"]
        if not asked or reply["id"] != asked["id"] or (asked["answer"] and status != OK):
            return  # it has ended, or has an answer already
        if status == OK:
            answer = {name: reply[name] for name in ("text", "label", "scores", "confidence", "answers", "unsure")}
            answer["cut"] = reply["is_cut"]
            answer["answered_by"] = {"tier": TIERS[reply["tier"]], "server": reply["server"]}
            asked["answer"], asked["send_at"] = answer, asked["deadline"]
            self._tell(reply["final"])
        elif status in (BUSY, UNKNOWN_BUNDLE):  # section 4, Statuses
            after = reply["retry_after_ms"]
            wait = max(1000 if after is None else after, asked["busy_wait"])
            asked["busy_wait"] = min(2 * asked["busy_wait"], 3200)
            asked["send_at"] = self.clock() + wait + wait * os.urandom(1)[0] // 512
        else:
            self._tell(True, reply["error"] or f"status {status}")

    def _tell(self, final, why=""):
        """The event about the open request. With its final event the request ends."""
        asked = self.open
        if final:
            asked["deadline"], asked["why"] = 0, why  # if the event cannot be published, `step` tries again
        after_ms = max(0, self.clock() - asked["captured"])
        fields = {"why": why, "final": final, "paradigm": "offload", "after_ms": after_ms}
        fields.update({"bytes_up": asked["bytes_up"], "jpeg_bytes": len(asked["jpeg"])})
        fields.update(asked["answer"] or {})
        self.event("update" if asked["answer"] else "lost", _frame(asked["id"]), asked["captured"], fields)
        if final:
            self.open = None


def pack_request(request_id, jpeg, age_ms, budget_ms, options=None, bundle=bytes(8)):
    """Section 3: an offload request. It is put together at once, so that the picture is copied once."""
    return b"".join((
        b"\x9b\x01", pack(request_id), pack(bundle), b"\x03", pack(age_ms), pack(budget_ms), b"\x01",
        _head(len(jpeg), 0xC4), jpeg, pack(b""), pack(options), pack(None),
    ))  # fmt: skip


def _frame(request_id):
    return binascii.hexlify(request_id).decode()


def _iso(ms):
    year, month, day, hour, minute, second = time.gmtime((ms - EPOCH_MS) // 1000)[:6]
    return f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}.{ms % 1000:03d}Z"
