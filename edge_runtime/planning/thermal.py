"""Temperature and throttling of the board, from small files of the kernel.

Temperature: the kernel's thermal zones (Documentation/ABI/testing/sysfs-class-thermal), on a Raspberry Pi, a Jetson and
a PC. Throttling: the flags of the Raspberry Pi firmware, or a thermal cooling device that limits the processor's
frequency, as on a Jetson. psutil reads temperatures too, but not these zones if the board has any hwmon sensor, and no
throttling.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from edge_runtime.bounded_file import read_bounded

MAX_BYTES = 64  # of one such file; a longer one is something else
MAX_ZONES = 64
# Bits of the firmware's get_throttled: 1 frequency capped, 2 throttled, 3 soft temperature limit. Bit 0, low voltage,
# slows nothing by itself, and bits 16 to 19 describe the past. raspberrypi.com/documentation/computers/os.html
THROTTLED_NOW = 0b1110
PLAUSIBLE_C = -55.0, 150.0  # a sensor that is off reports 0 kelvin or a value far above


@dataclass(frozen=True, slots=True)
class ThermalState:
    """None: the board does not report it."""

    temperature_c: float | None = None  # of the hottest zone
    throttled: bool | None = None  # right now


class ThermalReader:
    """Reads at most once per period_s; returns the latest state in between."""

    def __init__(self, root: Path = Path("/"), period_s: float = 5.0) -> None:
        self._thermal = root / "sys/class/thermal"
        self._platform = root / "sys/devices/platform"
        self._period_s = period_s
        self._read_at = -inf
        self._state = ThermalState()

    def read(self, now: float) -> ThermalState:
        """now: seconds of any clock that does not step back. Raises nothing."""
        if now - self._read_at >= self._period_s:
            self._read_at, self._state = now, ThermalState(self._temperature(), self._throttled())
        return self._state

    def numbers(self, now: float) -> dict[str, float]:
        """What the board reports, with the names of reporting/counters.py. now: as in `read`."""
        state = self.read(now)
        reported = {"temperature_celsius": state.temperature_c, "throttled": state.throttled}
        return {name: float(value) for name, value in reported.items() if value is not None}

    def firmware_flags(self) -> int | None:
        """get_throttled of a Raspberry Pi: bits 0 to 3 say what is now, bits 16 to 19 what has been since the start."""
        for firmware in _folders(self._platform, "soc*/soc*:firmware"):  # soc@107c000000 on a Raspberry Pi 5
            if (flags := _number(firmware / "get_throttled", base=16)) is not None:
                return flags
        return None

    def _temperature(self) -> float | None:
        zones = _folders(self._thermal, "thermal_zone*")
        # A Jetson's PMIC zone always reports 100 °C.
        read = [_number(zone / "temp") for zone in zones if "pmic" not in (_text(zone / "type") or "").lower()]
        celsius = [milli / 1e3 for milli in read if milli is not None]
        return max((c for c in celsius if PLAUSIBLE_C[0] < c < PLAUSIBLE_C[1]), default=None)

    def _throttled(self) -> bool | None:
        if (flags := self.firmware_flags()) is not None:
            return bool(flags & THROTTLED_NOW)
        coolers = _folders(self._thermal, "cooling_device*")
        states = [_number(cooler / "cur_state") for cooler in coolers if "cpufreq" in (_text(cooler / "type") or "")]
        known = [state for state in states if state is not None]
        return any(known) if known else None


def _folders(parent: Path, pattern: str) -> list[Path]:
    try:
        return sorted(parent.glob(pattern))[:MAX_ZONES]
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        return read_bounded(path, MAX_BYTES).decode("ascii", "replace").strip()
    except OSError:  # absent, or a sensor that is switched off
        return None


def _number(path: Path, base: int = 10) -> int | None:
    """The firmware writes its flags in hexadecimal, with or without 0x."""
    try:
        return int(_text(path) or "", base)
    except ValueError:
        return None
