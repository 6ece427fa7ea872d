"""`make arm64`: what it takes for a fault, and what it says of a machine that cannot emulate. The rest needs qemu."""

import subprocess
import sys
from pathlib import Path

import pytest

from testbed.arm64 import EXIT_CANNOT, differences, megabytes

ROOT = Path(__file__).parents[2]


def board(symbols: bytes, pixels: str = "aa", kind: str = "input") -> dict[str, str]:
    return {"picture": f"00-{kind}.png", "pixels": pixels, "symbols": symbols.hex(), "request": "00"}


def test_equal_boards_have_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [board(bytes(1000)), board(bytes(1000), kind="photo")]
    assert differences("onnx", pictures, pictures) == []
    assert "onnx: of 1 pictures (input) equal: pixels 1, symbols 1, request 1; 0 of 1000 symbols differ" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("changed", "is_fault"), [(10, False), (11, True)])
def test_kernels_may_round_differently_and_another_network_is_a_fault(changed: int, is_fault: bool) -> None:
    here, there = [board(bytes(1000))], [board(b"\x01" * changed + bytes(1000 - changed))]
    assert bool(differences("onnx", here, there)) == is_fault


def test_a_photo_may_be_shrunk_differently_and_a_ready_input_may_not() -> None:
    for kind, faults in (("photo", 0), ("input", 1)):
        here, there = [board(bytes(9), "aa", kind)], [board(bytes(9), "bb", kind)]
        assert len(differences("litert", here, there)) == faults


def test_sizes_are_those_of_files_with_the_largest_packages_first(tmp_path: Path) -> None:
    for name, size in (
        ("numpy/a.so", 2),
        ("numpy.libs/b.so", 3),
        ("cv2/c.so", 1),
        ("opencv_python_headless.libs/d", 7),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size * 1_000_000))
    assert megabytes(tmp_path) == "13 MB (cv2 8, numpy 5)"


def test_a_machine_without_an_emulator_is_named_with_a_code_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "testbed.arm64"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, cwd=ROOT, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (EXIT_CANNOT, "")
    assert done.stderr == "make arm64: qemu-aarch64-static is not installed: apt install qemu-user-static mmdebstrap\n"
