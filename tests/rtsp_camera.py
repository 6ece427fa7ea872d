"""A network camera that speaks RTSP and sends H.264, as most do: it can stop sending, hang, or refuse."""

import re
import socketserver
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

# 40 frames of 64 x 64 pixels, frame n of shade 6n + 16, with B-frames, so that a decoder holds frames back. Made with
# ffmpeg -f lavfi -i color=gray:size=64x64:rate=10,geq=lum=6*N+16:cb=128:cr=128 -frames:v 40 -c:v libx264 -crf 30
#     -x264-params keyint=20:bframes=2:b-pyramid=none:scenecut=0 -bsf:v filter_units=remove_types=6 ramp.h264
VIDEO = Path(__file__).parent / "edge_runtime/capture/ramp.h264"
SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track\r\n"
)


class RtspCamera:
    """Open while `with` lasts."""

    def __init__(
        self, answer: str = "200 OK", hangs: bool = False, fps: float = 10, challenge: str = "", port: int = 0
    ) -> None:
        """answer: to DESCRIBE; hangs: takes connections and says nothing; challenge: to a DESCRIBE without a login."""
        self.stalls = threading.Event()  # sends nothing while set, and keeps its connections open
        self.sent_at: list[float] = []  # of each frame, time.monotonic(); sent in the order of decoding
        self.asked: list[str] = []  # requests, without their headers
        self.logins: list[str] = []  # headers with which clients answered the challenge
        self.connected, self.playing = threading.Semaphore(0), threading.Event()
        self._silent = threading.Event()
        self._closed = threading.Event()
        camera = self

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                camera.connected.release()
                if hangs:
                    camera._closed.wait()
                with suppress(OSError):
                    while request := self._request():
                        method, number = request.split(" ", 1)[0], re.findall(r"CSeq: (\d+)", request)[0]
                        camera.asked.append(request.splitlines()[0])
                        status, headers, body = "200 OK", "Session: 1\r\n", ""
                        if method == "DESCRIBE" and challenge and "Authorization: " not in request:
                            status, headers = "401 Unauthorized", f"WWW-Authenticate: {challenge}\r\n"
                        elif method == "DESCRIBE":
                            camera.logins += re.findall(r"Authorization: (.*?)\r", request)
                            status, body = answer, SDP if answer.startswith("200") else ""
                            headers = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
                        elif method == "SETUP":
                            headers += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
                        self.wfile.write(f"RTSP/1.0 {status}\r\nCSeq: {number}\r\n{headers}\r\n{body}".encode())
                        if method == "PLAY":
                            self._play()
                            return

            def _request(self) -> str:
                lines = iter(lambda: self.rfile.readline().decode(), "")
                request = ""
                for line in lines:
                    request += line
                    if not line.strip():
                        break
                return request

            def _play(self) -> None:
                """RFC 6184: one NAL unit per packet, the last one of a frame marked."""
                number = 0
                camera.playing.set()
                while not camera._closed.wait(1 / fps):
                    if camera.stalls.is_set():
                        camera._silent.set()
                        continue
                    count = len(camera.sent_at)
                    camera.sent_at.append(time.monotonic())
                    units = FRAMES[count % len(FRAMES)]
                    for unit in units:
                        marker = 0x80 if unit is units[-1] else 0
                        header = struct.pack(">BBHII", 0x80, marker | 96, number & 0xFFFF, count * 9000, 1)
                        self.wfile.write(struct.pack(">cBH", b"$", 0, 12 + len(unit)) + header + unit)
                        number += 1

        socketserver.ThreadingTCPServer.daemon_threads = True
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", port), Connection)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"rtsp://127.0.0.1:{self._server.server_address[1]}/camera"

    def wait_silent(self) -> None:
        """Until the last frame has been sent after `stalls` was set."""
        self._silent.wait()

    def latest_sending(self, mean: float) -> float:
        """When the frame whose pixels have this mean has been sent at the latest, if each has been sent once.

        A frame is sent before its successor, or, if it is a B-frame, before its predecessor's successor.
        """
        return self.sent_at[min(len(self.sent_at) - 1, max(0, round(mean * 219 / 255 / 6)) + 1)]

    def __enter__(self) -> "RtspCamera":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _frames(stream: bytes) -> list[list[bytes]]:
    """The NAL units of each frame: parameter sets go with the slice that follows them."""
    frames: list[list[bytes]] = [[]]
    for unit in re.split(b"\0?\0\0\1", stream)[1:]:
        frames[-1].append(unit)
        if unit[0] & 31 in (1, 5):  # a slice; each frame has one
            frames.append([])
    return frames[:-1]


FRAMES = _frames(VIDEO.read_bytes())
