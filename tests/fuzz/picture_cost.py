"""What decoding costs: usual pictures, and the most expensive ones that the picture checks accept.

    python -m tests.fuzz.picture_cost

One line per picture: its name, bytes, CPU milliseconds per megapixel and mebibytes of memory per megapixel.
"""

import io
import multiprocessing
import re
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from edge_runtime.picture_checks import MAX_SCANS, decode_picture

SIDE = 1000  # pixels
PROGRESSIVE = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
FULL_COLOUR = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
# The tables that a scan needs, its header and its data.
SCANS = re.compile(rb"(?:\xff[\xc4\xdd]..[^\xff]*)*\xff\xda[^\xff]*(?:\xff[\x00\xd0-\xd7][^\xff]*)*", re.DOTALL)


def scans(jpeg: bytes) -> list[bytes]:
    """The scans of a JPEG, each with the tables before it."""
    return SCANS.findall(jpeg[jpeg.index(b"\xff\xc2") :])


def components(scan: bytes) -> bytes:
    """The ids of a scan's components."""
    at = scan.index(b"\xff\xda") + 4
    return scan[at + 1 : at + 1 + 2 * scan[at] : 2]


def repeated(jpeg: bytes, times: int, which: slice = slice(None)) -> bytes:
    """A progressive JPEG whose last scans are repeated, until each component is in `times` of them."""
    start = jpeg[: jpeg.index(scans(jpeg)[0])]
    chosen = scans(jpeg)[which]
    counts = Counter(c for scan in chosen for c in components(scan))
    last = {components(scan): scan for scan in sorted(chosen, key=len) if len(components(scan)) == 1}
    for component, scan in last.items():
        chosen += [scan] * (times - counts[component[0]])
    return start + b"".join(chosen) + b"\xff\xd9"


def pictures() -> dict[str, bytes]:
    """Encoded pictures by name."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    soft = cv2.GaussianBlur(noise, (0, 0), 2)

    def jpeg(pixels: np.ndarray, *options: int) -> bytes:
        return cv2.imencode(".jpg", pixels, options)[1].tobytes()

    def with_pillow(pixels: np.ndarray, mode: str, **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, **options)
        return file.getvalue()

    progressive = jpeg(noise, *PROGRESSIVE, *FULL_COLOUR)
    return {
        "usual JPEG, soft": jpeg(soft),
        "usual JPEG, noise": jpeg(noise),
        "usual progressive JPEG, soft": jpeg(soft, *PROGRESSIVE),
        "usual progressive JPEG, noise": progressive,
        "usual PNG, noise": cv2.imencode(".png", noise)[1].tobytes(),
        "usual WebP, noise": cv2.imencode(".webp", noise, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes(),
        "worst: JPEG, a restart per block": jpeg(noise, *FULL_COLOUR, cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
        "worst: JPEG, most scans, noise": repeated(progressive, MAX_SCANS),
        "worst: JPEG, most scans, best quality": repeated(
            jpeg(noise, *PROGRESSIVE, *FULL_COLOUR, cv2.IMWRITE_JPEG_QUALITY, 100), MAX_SCANS
        ),
        "worst: JPEG, most scans, soft": repeated(jpeg(soft, *PROGRESSIVE, *FULL_COLOUR), MAX_SCANS),
        "worst: JPEG, most scans, flat": repeated(jpeg(soft // 64 * 64, *PROGRESSIVE, *FULL_COLOUR), MAX_SCANS),
        "worst: JPEG, most scans, CMYK": repeated(
            with_pillow(noise, "CMYK", format="JPEG", progressive=True, quality=100), MAX_SCANS
        ),
        "worst: JPEG, first scans only": repeated(progressive, 1, slice(1)),
        "worst: PNG, 16 bits": cv2.imencode(".png", noise.astype(np.uint16) * 257)[1].tobytes(),
        "worst: WebP, best quality": cv2.imencode(".webp", noise, [cv2.IMWRITE_WEBP_QUALITY, 100])[1].tobytes(),
    }


def peak_mebibytes() -> float:
    """The most memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(name: str, data: bytes) -> None:
    """Prints the line of one picture."""
    before, start = peak_mebibytes(), time.process_time()
    decode_picture(data)
    megapixels = SIDE * SIDE / 1e6
    milliseconds, mebibytes = 1e3 * (time.process_time() - start), peak_mebibytes() - before
    print(f"{name:40} {len(data):9} {milliseconds / megapixels:7.1f} {mebibytes / megapixels:7.1f}")


def main() -> None:
    context = multiprocessing.get_context("spawn")  # a process per picture: the peak of its memory is its own
    for name, data in pictures().items():
        process = context.Process(target=measure, args=(name, data))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
