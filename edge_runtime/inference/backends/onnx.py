"""Networks in onnxruntime."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, ProviderError, cache_folder

# Since 1.29, importing onnxruntime on Linux starts its telemetry. Only this variable, set before, prevents it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

# One arena for all networks, since they run one after the other. It grows by what is asked for, not to powers of two.
ARENA = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
onnxruntime.create_and_register_allocator(
    onnxruntime.OrtMemoryInfo("Cpu", ARENA, 0, onnxruntime.OrtMemType.DEFAULT),
    onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1}),
)

CPU_INFO = Path("/proc/cpuinfo")
# The key of a tensor's external data (onnx.proto, TensorProto.external_data). onnxruntime would read such a file even
# for a model that it gets as bytes. The networks of our export never contain the word.
EXTERNAL = b"location"
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxModel:
    """A network from the content of an .onnx file; its metadata may name scale and zero point of its first output."""

    def __init__(self, data: bytes, threads: int, providers: Sequence[str] = ()) -> None:
        """providers: keys of PROVIDERS, tried for each operation in this order, the CPU last. Raises BackendError."""
        if EXTERNAL in data:
            raise BackendError("it takes weights from other files, which no manifest lists: export it as one file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Shapes are fixed, so the arena keeps its first size. Without it the heap grows by 10 MB in 100 frames.
        options.enable_cpu_mem_arena = True
        options.enable_mem_pattern = False  # one more block per network, 1.5 MB in all, and no faster here
        options.log_severity_level = 3
        if not providers:
            options.add_session_config_entry("session.use_env_allocators", "1")  # the arena above
        # Waiting threads would use a core that the board needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if sums_saturate(platform.machine(), CPU_INFO.read_text() if CPU_INFO.is_file() else ""):
            options.add_session_config_entry("session.x64quantprecision", "1")
        wanted = [PROVIDERS[name] for name in providers]
        folder = str(cache_folder())  # TensorRT keeps compiled networks there, and makes no folders above it
        engines = {"trt_engine_cache_enable": True, "trt_engine_cache_path": folder}
        given = [(name, engines if name == PROVIDERS["tensorrt"] else {}) for name in wanted]
        if missing := set(wanted) - set(onnxruntime.get_available_providers()):
            raise ProviderError(
                f"this onnxruntime has no {' or '.join(sorted(missing))}: install the wheel that has it"
            )
        try:
            if "tensorrt" in providers:
                os.makedirs(folder, exist_ok=True)
            self._session = onnxruntime.InferenceSession(data, options, providers=[*given, "CPUExecutionProvider"])
            if not providers:  # with providers it loads the network anew, on the CPU, when one of them fails
                self._session._model_bytes = None  # it would keep the file's content as long as the session
            notes = self._session.get_modelmeta().custom_metadata_map
            self.scale, self.zero_point = float(notes.get("scale", 1.0)), int(notes.get("zero_point", 0))
            if not -128 <= self.zero_point <= 255:
                raise ValueError(f"zero point {self.zero_point}, want -128 to 255")
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise BackendError(f"onnxruntime refuses it: {error}") from error
        if missing := set(wanted) - set(self._session.get_providers()):  # onnxruntime only logs it
            raise ProviderError(
                f"{' or '.join(sorted(missing))} does not load: look for its libraries (CUDA, TensorRT)"
            )
        self._names = [entry.name for entry in self._session.get_inputs()]

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        try:
            outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        except Exception as error:
            raise BackendError(f"the network refused its input: {error}") from error
        return outputs


def sums_saturate(machine: str, cpu_info: str) -> bool:
    """Whether sums of 8-bit products overflow their 16 bits on this CPU: x86 without VNNI.

    onnxruntime has an exact path for it, which must be requested. Only there: with VNNI it would take twice the time.
    Source: onnxruntime's documentation, "Quantize ONNX models", when and why to try U8U8.
    """
    return machine in ("x86_64", "AMD64") and "vnni" not in cpu_info
