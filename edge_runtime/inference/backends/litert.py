"""Networks in LiteRT, or in its predecessor tflite-runtime if a board has only that."""

from importlib.util import find_spec
from typing import Any

import numpy.typing as npt

from edge_runtime.inference.backends import BackendError

if find_spec("ai_edge_litert"):
    from ai_edge_litert.interpreter import Interpreter
else:
    from tflite_runtime.interpreter import Interpreter


class LiteRtModel:
    """A network from the content of a .tflite file; scale and zero point are those of its first output tensor."""

    def __init__(self, data: bytes, threads: int) -> None:
        """Raises BackendError."""
        try:
            self._interpreter = Interpreter(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"LiteRT refuses it: {error}") from error
        self._inputs = [entry["index"] for entry in self._interpreter.get_input_details()]
        outputs = self._interpreter.get_output_details()
        self._outputs = [entry["index"] for entry in outputs]
        scale, self.zero_point = outputs[0]["quantization"]
        self.scale = float(scale) or 1.0

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        try:
            for index, value in zip(self._inputs, inputs, strict=True):
                self._interpreter.set_tensor(index, value)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"the network refused its input: {error}") from error
        return [self._interpreter.get_tensor(index) for index in self._outputs]
