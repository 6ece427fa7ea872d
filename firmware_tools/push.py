"""Sends a signed bundle to a board: offers it until the board answers, and sends what the board asks for."""

import queue
import time
from collections.abc import Callable
from typing import NoReturn

from edge_runtime.errors import AiflowError
from edge_runtime.firmware.signature import SignatureError, claimed
from edge_runtime.inference.bundle import MANIFEST, Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttSettings, Publish, State
from edge_runtime.wire import EnvelopeError, topics
from edge_runtime.wire.update import CHUNK_BYTES, VERSION, Chunk, UpdateState, decode_update_state, encode_chunk
from testbed.statuses import StatusFields, read_status

# Without a word of the board for this time, the offer is repeated. 64 KB take as long at 17 kbit/s.
SILENT_S = 30.0
FIRST_WORD_S = 10.0  # a board that can take bundles answers an offer sooner: after this time, say what may be wrong
OFFLINE = "the board is offline: waiting for it"


class Push:
    """One bundle for one board."""

    def __init__(self, bundle: Bundle, signature: bytes, site: str, board: str, tell: Callable[[str], None]) -> None:
        """tell: gets a line for each step. Raises SignatureError for a signature that is not of this bundle."""
        self._bundle, self._signature, self._statement = bundle, signature, claimed(signature)
        if self._statement.id != bundle.id.hex():
            raise SignatureError(f"{bundle.path}: the signature is of another manifest: sign the bundle again")
        self._offer, self._chunk = topics.bundle_offer(site, board), topics.bundle_chunk(site, board)
        self._state, self._status = topics.bundle_state(site, board), topics.status(site, board)
        self._names = {record.sha256: name for name, record in bundle.manifest.files.items()}
        self._names[self._statement.manifest] = MANIFEST
        self._checked: set[str] = set()  # names of files that were compared with their hashes
        self._tell, self._told = tell, ""
        self._has_word = False  # the board has said something about this bundle
        self._is_due = True  # an offer, when the broker is there
        self.sent = 0  # bytes of files

    def run(self, settings: MqttSettings, timeout_s: float) -> None:
        """Until the board keeps the bundle, or has it and asks its users.

        Raises AiflowError if the board refuses it, or does not end within timeout_s.
        """
        arrived: queue.Queue[Message] = queue.Queue()
        start, last = time.monotonic(), StatusFields()
        subscriptions = [(self._state, 1), (self._status, 1)]
        offer = Publish(self._offer, self._signature)
        client = MqttClient(
            settings,
            subscriptions=subscriptions,
            on_message=arrived.put,
            birth=lambda: [offer] * self._is_due,  # not one more for each time that the broker is away
        )
        with client:
            is_done, hint_at = False, start + FIRST_WORD_S
            while not is_done:
                now = time.monotonic()
                if (left_s := start + timeout_s - now) <= 0:
                    self._fail(f"not done within {timeout_s:g} s: {self._why_not_done(client, settings, last)}")
                if now >= hint_at and not self._has_word:
                    self._say(self._why_not_done(client, settings, last))
                try:
                    wait_s = SILENT_S if self._has_word else FIRST_WORD_S
                    message = arrived.get(timeout=min(wait_s, left_s))
                except queue.Empty:
                    self._is_due = True
                    if client.state is State.ONLINE:
                        client.send(offer)
                    continue
                if message.topic == self._state:
                    is_done = self._heard(message.payload, client)
                    continue
                before, last = last, read_status(message.payload)
                if last.state != "online":
                    self._say(OFFLINE)
                elif last != before and not message.retained:  # it has started or connected, perhaps in the middle
                    hint_at = time.monotonic() + FIRST_WORD_S
                    client.send(offer)

    def _heard(self, payload: bytes, client: MqttClient) -> bool:
        """True: the board needs the sender no more."""
        try:
            state = decode_update_state(payload)
        except EnvelopeError:
            return False  # not a state: any account with rights to this topic can publish anything
        if state.bundle not in ("", self._statement.id):
            return False  # about another sender's
        self._has_word, self._is_due = True, False
        if state.state == "refused":
            self._fail(f"the board refuses it: {state.why}")
        if state.state == "wants":
            self._say(f"{state.received} of {state.total} bytes are there")
            self._send(state, client)
        else:
            self._say(
                {
                    "waiting": "all bytes are there, the bundle waits until a user of the board installs it",
                    "testing": "all bytes are there, the board tests the bundle",
                    "installed": "the bundle is installed, the board starts again",
                    "trial": "the bundle runs on trial: it needs some frames",
                    "kept": "the board runs the bundle, and keeps it",
                }[state.state]
            )
        return state.state in ("kept", "waiting")

    def _send(self, wanted: UpdateState, client: MqttClient) -> None:
        """The bytes that a board asks for. A file that this bundle does not have is somebody's mistake."""
        if (name := self._names.get(wanted.file)) is None:
            return
        path = self._bundle.path / name
        if name != MANIFEST and name not in self._checked:
            self._bundle.file(name)
            self._checked.add(name)
        with path.open("rb") as file:
            file.seek(wanted.offset)
            data = file.read(wanted.bytes)
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            chunk = Chunk(VERSION, bytes.fromhex(wanted.file), wanted.offset + start, piece)
            client.publish(self._chunk, encode_chunk(chunk))
            self.sent += len(piece)

    def _why_not_done(self, client: MqttClient, settings: MqttSettings, status: StatusFields) -> str:
        if client.state in (State.CONNECTING, State.BACKOFF):
            return f"no connection to {settings.host}:{settings.port}: {client.reason}"
        if self._has_word:
            return f"last word: {self._told}"
        if status.state == "online":
            return "the board is online, but does not answer: does it have [updates] with a trust_file?"
        if status.state:
            return OFFLINE
        return "no word from this board yet: does it run, with this id, does it have [updates] with a trust_file?"

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)

    def _fail(self, why: str) -> NoReturn:
        raise AiflowError(f"bundle {self._statement.name} version {self._statement.version}: {why}")
