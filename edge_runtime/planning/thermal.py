"""How hot the board is and whether it is throttled, from the kernel's files; what a board does not tell is None.

Reads a few small files at most every few seconds. Temperatures: the kernel's thermal zones (Documentation/ABI/testing/
sysfs-class-thermal), on a Raspberry Pi, a Jetson and a PC alike. Throttling: the Raspberry Pi firmware's flags, or a
thermal cooling device that holds the processor's frequency down, as on a Jetson.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path

MAX_BYTES = 64  # of one such file; a longer one is none of these
MAX_ZONES = 64
# Bits of the firmware's get_throttled: 1 frequency capped, 2 throttled, 3 soft temperature limit. Bit 0, a low voltage,
# slows nothing by itself, and bits 16 to 19 tell of the past. raspberrypi.com/documentation/computers/os.html
THROTTLED_NOW = 0b1110
PLAUSIBLE_C = -55.0, 150.0  # sensors that are off answer with 0 kelvin, or far above


@dataclass(frozen=True, slots=True)
class Vitals:
    """Of a board; None: it does not say."""

    temperature_c: float | None = None  # of the hottest zone
    throttled: bool | None = None  # right now


class VitalsReader:
    """Reads when asked, but not more often than every period_s; in between the last values stand."""

    def __init__(self, root: Path = Path("/"), period_s: float = 5.0) -> None:
        self._thermal = root / "sys/class/thermal"
        self._platform = root / "sys/devices/platform"
        self._period_s = period_s
        self._read_at = -inf
        self._last = Vitals()

    def read(self, now: float) -> Vitals:
        """now: seconds of any clock that does not step back. Raises nothing."""
        if now - self._read_at >= self._period_s:
            self._read_at, self._last = now, Vitals(self._temperature(), self._throttled())
        return self._last

    def _temperature(self) -> float | None:
        zones = self._folders(self._thermal, "thermal_zone*")
        # A Jetson's PMIC zone says 100 °C for ever.
        read = [_number(zone / "temp") for zone in zones if "pmic" not in (_text(zone / "type") or "").lower()]
        celsius = [milli / 1e3 for milli in read if milli is not None]
        return max((c for c in celsius if PLAUSIBLE_C[0] < c < PLAUSIBLE_C[1]), default=None)

    def _throttled(self) -> bool | None:
        for firmware in self._folders(self._platform, "soc*/soc*:firmware"):  # soc@107c000000 on a Raspberry Pi 5
            if (flags := _number(firmware / "get_throttled", base=16)) is not None:
                return bool(flags & THROTTLED_NOW)
        states = [
            _number(device / "cur_state")
            for device in self._folders(self._thermal, "cooling_device*")
            if "cpufreq" in (_text(device / "type") or "")
        ]
        known = [state for state in states if state is not None]
        return any(known) if known else None

    def _folders(self, parent: Path, pattern: str) -> list[Path]:
        try:
            return sorted(parent.glob(pattern))[:MAX_ZONES]
        except OSError:
            return []


def _text(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError:  # absent, or a sensor that is asleep
        return None
    return data.decode("ascii", "replace").strip() if len(data) <= MAX_BYTES else None


def _number(path: Path, base: int = 10) -> int | None:
    """As the kernel writes it; the firmware's flags are hexadecimal, with 0x or without."""
    try:
        return int(_text(path) or "", base)
    except ValueError:
        return None
