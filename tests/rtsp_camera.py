"""A network camera that speaks RTSP and sends H.264, as most do.

It can stop sending, hang, refuse, drop its connection in the middle of a packet, and change the size of its pictures.
"""

import re
import socketserver
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import cv2

from edge_runtime.capture import Frame

# 40 frames of 64 x 64 pixels, frame n of shade 6n + 16, with B-frames, so that a decoder holds frames back. Made with
# ffmpeg -f lavfi -i color=gray:size=64x64:rate=10,geq=lum=6*N+16:cb=128:cr=128 -frames:v 40 -c:v libx264 -crf 30
#     -x264-params keyint=20:bframes=2:b-pyramid=none:scenecut=0 -bsf:v filter_units=remove_types=6 ramp.h264
VIDEO = Path(__file__).parent / "edge_runtime/capture/ramp.h264"
LARGER_VIDEO = VIDEO.with_name("ramp-96x80.h264")  # the same of 96 x 80 pixels
OPENCV = tuple(map(int, cv2.__version__.split(".")[:2]))  # before 4.12, packets do not carry their time of arrival
TOLERANCE_S = 0.1  # the time of a frame's arrival is known to about the interval of two frames
KEY_FRAMES = 20  # frames from one to the next
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
        self.answer = answer
        self.drops = threading.Event()  # drops its connection and clears this
        self.is_large = threading.Event()  # sends larger pictures while set, from the next key frame on
        self.changed = threading.Event()  # set when the size of the pictures has changed
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
                            status, body = camera.answer, SDP if camera.answer.startswith("200") else ""
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
                number, frames = 0, LARGER_FRAMES if camera.is_large.is_set() else FRAMES
                camera.playing.set()
                while not camera._closed.wait(1 / fps):
                    if camera.stalls.is_set():
                        camera._silent.set()
                        continue
                    count = len(camera.sent_at)
                    wanted = LARGER_FRAMES if camera.is_large.is_set() else FRAMES
                    if count % KEY_FRAMES == 0 and frames is not wanted:
                        frames = wanted
                        camera.changed.set()
                    camera.sent_at.append(time.monotonic())
                    units = frames[count % len(frames)]
                    for unit in units:
                        marker = 0x80 if unit is units[-1] else 0
                        header = struct.pack(">BBHII", 0x80, marker | 96, number & 0xFFFF, count * 9000, 1)
                        packet = struct.pack(">cBH", b"$", 0, 12 + len(unit)) + header + unit
                        if camera.drops.is_set():
                            camera.drops.clear()
                            self.wfile.write(packet[: len(packet) // 2])
                            return
                        self.wfile.write(packet)
                        number += 1
                    camera.sent_at[-1] = time.monotonic()  # a busy machine may have stopped this thread before

        socketserver.ThreadingTCPServer.daemon_threads = True
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", port), Connection)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"rtsp://127.0.0.1:{self._server.server_address[1]}/camera"

    def wait_silent(self) -> None:
        """Until the last frame has been sent after `stalls` was set."""
        self._silent.wait()

    def lateness_s(self, frame: Frame) -> float:
        """How much later a frame that was taken just now says to be captured than it can have been."""
        return frame.captured - self.latest_sending(float(frame.pixels.mean()), time.monotonic())

    def latest_sending(self, mean: float, before: float) -> float:
        """When a frame whose pixels have this mean has been sent at the latest before this time, time.monotonic().

        In the order of sending it is at most two places earlier than in that of showing, and at most one place later.
        """
        number = len(FRAMES) - 1 if mean > 254 else round(mean * 219 / 255 / 6)
        sendings = enumerate(self.sent_at)
        return max(at for count, at in sendings if at <= before and (count - number + 2) % len(FRAMES) <= 3)

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


FRAMES, LARGER_FRAMES = _frames(VIDEO.read_bytes()), _frames(LARGER_VIDEO.read_bytes())
