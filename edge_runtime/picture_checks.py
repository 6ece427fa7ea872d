"""Checks foreign pictures without decoding them, so that none costs much more than an ordinary picture of its size.

Some pictures are small to send and expensive to decode. The checks read the structure of a file, refuse what ordinary
encoders do not write, and pass on only the parts that make up the picture. They know nothing of where it comes from.
The size is read on the way. A second reader of it, such as imagesize, may find another header than the decoder does.
Each format's function names the attacks that it stops.

What decoding costs after the checks, in CPU time per megapixel on one core of a cloud server (Xeon, OpenCV 5.0;
`python -m tests.fuzz.picture_cost`): a usual JPEG 8 to 50 ms, a usual WebP 50 ms; the most expensive picture found
that is accepted 170 ms, and it has 16 MB per megapixel. With 256 KB, the largest request, and 4 megapixels, the most
that a server decodes: 50 ms in all. Memory: 15 MB per megapixel.
"""

import re
import struct
from collections import Counter
from typing import TYPE_CHECKING

from edge_runtime.decoder_stderr import DECODER_STDERR
from edge_runtime.errors import AiflowError

if TYPE_CHECKING:
    import numpy as np

MAX_PICTURE_BYTES = 32 << 20  # a JPEG of 24 megapixels at the best quality has about 20 MB
MAX_PICTURE_PIXELS = 50_000_000  # 150 MB once decoded
MAX_PARTS = 16_384  # segments or chunks of one file; a PNG of 32 MB in chunks of 8 KB has 4,096
MAX_SCANS = 10  # of a progressive JPEG, per colour component; libjpeg's own encoder writes at most 6

# JPEG markers (ITU-T T.81, table B.1). Arithmetic coding, lossless and hierarchical pictures and DNL, a height that
# follows the first scan, are refused: cameras do not write them.
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2  # kinds of frame
HUFFMAN_TABLES, QUANTISATION_TABLES, RESTART_INTERVAL, COMMENT = 0xC4, 0xDB, 0xDD, 0xFE
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
FRAMES = {BASELINE, EXTENDED, PROGRESSIVE}
SEGMENTS = FRAMES | {HUFFMAN_TABLES, QUANTISATION_TABLES, RESTART_INTERVAL, COMMENT, START_OF_SCAN, *range(0xE0, 0xF0)}
# A scan's data ends at the next marker. FF 00 is a data byte; if restarts are on, FF D0 to FF D7 are part of the data.
END_OF_SCAN = re.compile(rb"\xff[^\x00]")
END_OF_RESTARTING_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


class PictureError(AiflowError, ValueError):
    """Bytes that are no picture we can decode, or one that is too expensive to try."""


def decode_picture(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> "np.ndarray":
    """A JPEG, PNG or WebP to uint8 RGB [H, W, 3], turned upright as its EXIF data says. Raises PictureError."""
    width, height, checked = check_picture(data, max_pixels)
    import cv2  # here, since the live page only checks pictures, and then needs 30 MB less

    pixels = _decode(checked, cv2.IMREAD_COLOR)
    if pixels.shape[:2] not in ((height, width), (width, height)):  # EXIF may turn it by 90 degrees
        raise PictureError(
            f"picture claims {width} x {height} pixels and has {pixels.shape[1]} x {pixels.shape[0]}: it is damaged"
        )
    return pixels


def decode_small(data: bytes, least_height: int) -> "np.ndarray":
    """The same in grey, uint8 [h, w], reduced by up to 8, but to no fewer lines than these. Raises PictureError.

    Of a JPEG it takes a third of the time: the details that are left out are not computed.
    """
    width, height, checked = check_picture(data)
    import cv2

    lines = min(width, height)  # EXIF may turn it
    flags = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}
    fitting = [flag for factor, flag in flags.items() if lines >= factor * least_height]
    return _decode(checked, fitting[0] if fitting else cv2.IMREAD_GRAYSCALE)


def _decode(data: bytes, flag: int) -> "np.ndarray":
    """RGB or grey, as OpenCV's flag says."""
    import cv2
    import numpy as np

    try:
        with DECODER_STDERR.silenced():
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if pixels is None:
            raise PictureError(f"{len(data)} bytes starting {data[:4].hex()} are not a complete picture: send it again")
        return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)  # in place
    except cv2.error as error:
        raise PictureError(f"picture cannot be decoded: {error.msg}") from error


def check_picture(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> tuple[int, int, bytes]:
    """Width and height that a JPEG, PNG or WebP claims, and the bytes that are safe to decode. Raises PictureError.

    The size is the stored one, before EXIF turns the picture.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise PictureError(f"picture has {len(data)} bytes, at most {MAX_PICTURE_BYTES} are read: send a smaller one")
    try:
        if data[:8] == PNG_START:
            return _check_png(data, max_pixels)
        if data[:3] == JPEG_START:
            return _check_jpeg(data, max_pixels)
        if _starts_as_webp(data):
            return _check_webp(data, max_pixels)
    except (struct.error, IndexError) as error:
        raise PictureError("picture ends within its header: was it cut?") from error
    raise PictureError(f"{data[:4].hex()!r} does not start a JPEG, PNG or WebP: convert the picture")


def starts_as_picture(data: bytes) -> bool:
    """Whether its first bytes are those of a JPEG, PNG or WebP."""
    return data.startswith((JPEG_START, PNG_START)) or _starts_as_webp(data)


def _starts_as_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise PictureError(f"picture claims {width} x {height} pixels: it is damaged")
    if width * height > max_pixels:
        raise PictureError(
            f"picture claims {width} x {height} pixels, at most {max_pixels} are decoded: send a smaller one"
        )


def _check_jpeg(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Walks all markers as libjpeg's jdmarker.c does, but refuses the bytes between segments that libjpeg skips.

    Attacks: thousands of scans, each of which passes over the whole picture; bytes that a lenient and a strict reader
    take for different markers, so that the size that is checked is not the size that is decoded.
    """
    width = height = 0
    components = b""
    max_scans, scans = 1, Counter[int]()
    end_of_scan = END_OF_SCAN
    at = 2
    for _ in range(MAX_PARTS):
        if data[at] != 0xFF:
            raise PictureError(f"no JPEG marker at byte {at}: the picture is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == END_OF_IMAGE and scans:
            return width, height, data
        if marker not in SEGMENTS or (marker in FRAMES and components):
            raise PictureError(f"JPEG marker {marker:02x} at byte {at} is not expected there: convert the picture")
        length = struct.unpack_from(">H", data, at + 2)[0]
        segment = data[at + 4 : at + 2 + length]
        if len(segment) != length - 2:
            raise PictureError(f"JPEG segment {marker:02x} at byte {at} is cut or has no length: send it again")
        at += 2 + length
        if marker in FRAMES:
            width, height, components = _read_frame(segment)
            _check_size(width, height, max_pixels)
            max_scans = MAX_SCANS if marker == PROGRESSIVE else 1
        elif marker == RESTART_INTERVAL:
            end_of_scan = END_OF_RESTARTING_SCAN if any(segment) else END_OF_SCAN
        elif marker == START_OF_SCAN:
            scans.update(_read_scan(segment, components))
            if max(scans.values()) > max_scans:
                raise PictureError(
                    f"JPEG with over {max_scans} scans per component costs too much: save it as baseline"
                )
            end = end_of_scan.search(data, at)
            if end is None:  # OpenCV 4.10 would fill the missing rows with grey
                raise PictureError("JPEG without an end marker: was it cut?")
            at = end.start()
    raise PictureError(f"JPEG with more than {MAX_PARTS} segments: convert the picture")


def _read_frame(segment: bytes) -> tuple[int, int, bytes]:
    """Width, height and the components' ids (T.81, B.2.2)."""
    bits, height, width, count = struct.unpack_from(">BHHB", segment)
    if bits != 8 or count not in (1, 3, 4) or len(segment) != 6 + 3 * count:
        raise PictureError(f"JPEG of {bits} bits and {count} components, want 8 and 1, 3 or 4: convert the picture")
    return width, height, segment[6::3]


def _read_scan(segment: bytes, components: bytes) -> bytes:
    """The ids of a scan's components (T.81, B.2.3), all of which the frame has named."""
    scanned = segment[1 : 1 + 2 * segment[0] : 2]
    if not scanned or len(segment) != 4 + 2 * len(scanned) or not set(scanned) <= set(components):
        raise PictureError("JPEG scan of components that its frame does not name: the picture is damaged")
    return scanned


def _check_png(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Passes on the chunks that make up the picture, and the EXIF data, which has its orientation.

    Attacks: a chunk that claims gigabytes, which OpenCV allocates before it reads (95 bytes took 2 GB); profiles and
    texts that inflate a thousandfold; animations. OpenCV uses no colour profile and no gamma, so dropping them changes
    no pixel.
    """
    width = height = 0
    kept = [data[:8]]
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) != 12 + length:
            raise PictureError(f"PNG chunk at byte {at} claims {length} bytes and is cut: send the picture again")
        if (kind == b"IHDR") != (at == 8):
            raise PictureError(f"PNG chunk {kind!r} at byte {at}: want IHDR first, and only there")
        if at == 8:
            width, height = struct.unpack_from(">II", chunk, 8)
            _check_size(width, height, max_pixels)
        if kind in PNG_KEPT:
            kept.append(chunk)
        elif not kind[0] & 0x20:  # upper case: the picture cannot be shown without this chunk (PNG 3rd ed., 5.4)
            raise PictureError(f"PNG chunk {kind!r} is not known: convert the picture")
        if kind == b"IEND":
            return width, height, b"".join(kept)
        at += 12 + length
    raise PictureError(f"PNG with more than {MAX_PARTS} chunks: convert the picture")


def _check_webp(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Passes on the lossy frame, and the EXIF data, which has its orientation (RFC 9649).

    Attacks: a lossless frame, or an alpha channel, which is coded like one, may define 65,536 sets of Huffman codes in
    3 bytes each, for which libwebp allocates 5 KB each (258 KB and 0.9 megapixels took 300 MB). Only decoding tells how
    many there are, so lossless frames are refused and alpha is dropped. Animations; a frame unlike its canvas.
    """
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise PictureError(f"WebP claims {end} bytes and has {len(data)}: was it cut?")
    canvas = frame = exif = b""
    at = 12
    for _ in range(MAX_PARTS):
        if at >= end:
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        chunk = data[at : at + 8 + length]
        if len(chunk) != 8 + length:
            raise PictureError(f"WebP chunk at byte {at} claims {length} bytes and is cut: send the picture again")
        at += 8 + length + length % 2
        if kind in (b"VP8L", b"ANIM", b"ANMF") or (kind == b"VP8 " and frame):
            raise PictureError("WebP is lossless or animated: send a lossy one, a JPEG or a PNG")
        if kind == b"VP8X":
            canvas = chunk[12:18]  # width and height, less 1, in 3 bytes each
        elif kind == b"VP8 ":
            frame = chunk + bytes(length % 2)
        elif kind == b"EXIF":
            exif = chunk + bytes(length % 2)
    else:
        raise PictureError(f"WebP with more than {MAX_PARTS} chunks: convert the picture")
    width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", frame, 14))
    _check_size(width, height, max_pixels)
    size = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    if canvas not in (b"", size):
        raise PictureError(f"WebP frame of {width} x {height} pixels does not fill its canvas: convert the picture")
    if exif:
        frame = struct.pack("<4sII", b"VP8X", 10, 8) + size + frame + exif  # flag 8: has EXIF data
    return width, height, b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame
