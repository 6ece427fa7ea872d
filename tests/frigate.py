"""Frigate for tests: its messages in the shapes of its documentation, and its HTTP interface."""

import json
import queue
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

API = yaml.safe_load((Path(__file__).parent / "frigate-api.yaml").read_text())
TOKEN = "header.claims.signature"
Answer = tuple[int, str, bytes]  # status, content type, body
SUCCESS: Answer = (200, "application/json", b'{"success": true, "message": "Event set"}')


def tracked(event: str, label: str = "person", camera: str = "front_door", age_s: float = 1.0) -> dict[str, Any]:
    """An object as `frigate/events` has it, from the page "MQTT" of Frigate's documentation."""
    start = float(event.partition("-")[0])
    return {
        "id": event,
        "camera": camera,
        "frame_time": start + age_s,
        "snapshot": {
            "frame_time": start + age_s,
            "box": [415, 489, 528, 700],
            "area": 12728,
            "region": [260, 446, 660, 846],
            "score": 0.77546,
            "attributes": [],
        },
        "label": label,
        "sub_label": ["John Smith", 0.79],
        "top_score": 0.958984375,
        "false_positive": False,
        "start_time": start,
        "end_time": None,
        "score": 0.7890625,
        "box": [424, 500, 536, 712],
        "current_zones": ["driveway"],
        "entered_zones": ["yard", "driveway"],
        "thumbnail": None,
        "has_snapshot": True,
        "has_clip": False,
        "stationary": False,
        "attributes": {"face": 0.64},
        "recognized_license_plate": "ABC12345",
    }


def change(kind: str, event: str, label: str = "person", camera: str = "front_door", age_s: float = 1.0) -> bytes:
    """A message on `frigate/events`."""
    now = tracked(event, label, camera, age_s)
    return json.dumps(
        {"type": kind, "before": now, "after": now | {"end_time": 2e9 if kind == "end" else None}}
    ).encode()


def review(item: str, *events: str, severity: str = "alert", camera: str = "front_door") -> bytes:
    """A message on `frigate/reviews`."""
    now = {
        "id": item,
        "camera": camera,
        "start_time": 1718987129.308396,
        "end_time": None,
        "severity": severity,
        "thumb_path": f"/media/frigate/clips/review/thumb-{camera}-{item}.webp",
        "data": {"detections": events, "objects": ["person"], "sub_labels": [], "zones": ["front_yard"], "audio": []},
    }
    return json.dumps({"type": "update", "before": now, "after": now}).encode()


def faults(path: str, body: bytes) -> list[str]:
    """What Frigate's OpenAPI description does not allow in a POST, and fields that it does not know."""
    found = re.fullmatch(r"/api/events/[^/?#]+(/[a-z_]+)", path)
    operation = API["paths"].get(f"/events/{{event_id}}{found[1]}") if found else None
    if operation is None:
        return [f"no such path: {path}"]
    schema = operation["post"]["requestBody"]["content"]["application/json"]["schema"]
    (kind,) = re.findall(r"\w+$", schema["$ref"])
    fields, known = json.loads(body), API["components"]["schemas"][kind]["properties"]
    wrong = Draft202012Validator(schema | {"components": API["components"]}).iter_errors(fields)
    return [error.message for error in wrong] + [f"unknown field {name}" for name in fields.keys() - known.keys()]


class FrigateServer:
    """Frigate's HTTP interface on loopback, open while `with` lasts. `written` has path and body of each success."""

    def __init__(
        self,
        answer: Callable[[str], Answer | None] = lambda path: SUCCESS,
        token: str = "",
        port: int = 0,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        """answer: to a valid request, by its path; None: it never comes. token: that a request must have.

        certificate: it and its key, for https.
        """
        self.written: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.faults: list[str] = []
        self.asked = 0
        self.closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.asked += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                wrong = faults(self.path, body)
                server.faults += wrong
                given = (422, "application/json", json.dumps(wrong).encode()) if wrong else answer(self.path)
                if token and self.headers.get("Authorization") != f"Bearer {token}":
                    given = 401, "application/json", b'{"message": "Unauthorized"}'
                if given is None:
                    server.closed.wait()
                    return
                if given == SUCCESS:
                    server.written.put((self.path, json.loads(body)))
                self.send_response(given[0])
                self.send_header("Content-Type", given[1])
                self.send_header("Content-Length", str(len(given[2])))
                self.end_headers()
                self.wfile.write(given[2])

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.daemon_threads = True
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> "FrigateServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
