"""Thermal state from the files of a board's kernel, in a folder."""

import pytest

from edge_runtime.planning.thermal import ThermalReader, ThermalState


@pytest.fixture
def board(tmp_path):
    """Writes a file of /sys."""

    def write(name: str, text: str | bytes) -> None:
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def read(tmp_path) -> ThermalState:
    return ThermalReader(tmp_path).read(0.0)


def test_a_board_that_says_nothing_is_unknown(tmp_path):
    assert read(tmp_path) == ThermalState(None, None)


def test_the_hottest_zone_counts(tmp_path, board):
    board("class/thermal/thermal_zone0/temp", "48312\n")
    board("class/thermal/thermal_zone1/temp", "61050\n")
    assert read(tmp_path).temperature_c == pytest.approx(61.05)


def test_a_jetsons_constant_zone_and_a_sleeping_sensor_do_not_count(tmp_path, board):
    board("class/thermal/thermal_zone0/type", "CPU-therm\n")
    board("class/thermal/thermal_zone0/temp", "40500\n")
    board("class/thermal/thermal_zone1/type", "PMIC-Die\n")
    board("class/thermal/thermal_zone1/temp", "100000\n")
    board("class/thermal/thermal_zone2/temp", "-256000\n")
    assert read(tmp_path).temperature_c == 40.5


@pytest.mark.parametrize("soc", ["soc/soc", "soc@107c000000/soc@107c000000"])
@pytest.mark.parametrize(
    ("flags", "throttled"),
    [("0", False), ("50000", False), ("0x50000", False), ("1", False), ("50005", True), ("2", True), ("80008", True)],
)
def test_a_raspberry_pis_flags_tell_of_now_not_of_the_past(tmp_path, board, flags, throttled, soc):
    board(f"devices/platform/{soc}:firmware/get_throttled", flags + "\n")
    assert read(tmp_path).throttled is throttled


def test_a_processor_that_is_held_down_is_throttled_and_a_fan_that_turns_is_not(tmp_path, board):
    board("class/thermal/cooling_device0/type", "pwm-fan\n")
    board("class/thermal/cooling_device0/cur_state", "3\n")
    assert read(tmp_path).throttled is None
    board("class/thermal/cooling_device1/type", "thermal-cpufreq-0\n")
    board("class/thermal/cooling_device1/cur_state", "0\n")
    assert read(tmp_path).throttled is False
    board("class/thermal/cooling_device1/cur_state", "2\n")
    assert read(tmp_path).throttled is True


@pytest.mark.parametrize("rubbish", ["", "hot", "9" * 65, b"\xff\xfe", "1e9", "nan"])
def test_rubbish_is_unknown(tmp_path, board, rubbish):
    board("class/thermal/thermal_zone0/temp", rubbish)
    board("devices/platform/soc/soc:firmware/get_throttled", rubbish if rubbish != "1e9" else "zz")
    assert read(tmp_path) == ThermalState(None, None)


def test_a_folder_in_a_files_place_is_unknown(tmp_path):
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").mkdir(parents=True)
    assert read(tmp_path) == ThermalState(None, None)


def test_it_reads_at_most_every_few_seconds(tmp_path, board):
    reader = ThermalReader(tmp_path, period_s=5.0)
    board("class/thermal/thermal_zone0/temp", "50000")
    assert reader.read(100.0).temperature_c == 50.0
    board("class/thermal/thermal_zone0/temp", "70000")
    assert reader.read(104.9).temperature_c == 50.0
    assert reader.read(105.0).temperature_c == 70.0
