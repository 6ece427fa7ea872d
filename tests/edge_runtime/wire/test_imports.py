"""wire runs where nothing but numpy and msgspec is installed."""

import subprocess
import sys


def test_wire_loads_without_any_model_network_or_camera_library():
    code = (
        "import sys, edge_runtime.wire, edge_runtime.wire.bitstream\n"
        "print(*{m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "msgspec"} <= set(loaded)
    assert not {"torch", "cv2", "paho", "onnxruntime", "ai_edge_litert", "server", "models"} & set(loaded)
