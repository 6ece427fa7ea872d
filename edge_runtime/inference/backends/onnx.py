"""Networks in onnxruntime."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_runtime.inference.backends import BackendError

# Since 1.29 importing onnxruntime on Linux is enough to start its telemetry; only this, and only before, prevents it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

CPU_INFO = Path("/proc/cpuinfo")


class OnnxModel:
    """A network from an .onnx file; its metadata may name the scale and zero point of its first output."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_cpu_mem_arena = False  # an arena keeps the most that it ever held
        options.log_severity_level = 3
        # Waiting threads would burn a core of a board that has other things to do.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if sums_saturate(platform.machine(), CPU_INFO.read_text() if CPU_INFO.is_file() else ""):
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            notes = self._session.get_modelmeta().custom_metadata_map
            self.scale, self.zero_point = float(notes.get("scale", 1.0)), int(notes.get("zero_point", 0))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise BackendError(f"{path} does not load in onnxruntime: {error}; install the bundle again") from error
        self._names = [entry.name for entry in self._session.get_inputs()]

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """See Model.run."""
        try:
            outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        except Exception as error:
            raise BackendError(f"the network refused its input: {error}") from error
        return outputs


def sums_saturate(machine: str, cpu_info: str) -> bool:
    """Whether this CPU's 8-bit products overflow the 16 bits that their sums have: x86 without VNNI.

    onnxruntime then has an exact path. It must be asked for, and only there: with VNNI it takes twice the time.
    Source: onnxruntime's documentation, "Quantize ONNX models", when and why to try U8U8.
    """
    return machine in ("x86_64", "AMD64") and "vnni" not in cpu_info
