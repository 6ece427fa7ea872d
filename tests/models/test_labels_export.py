import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from edge_runtime.inference.backends import SUFFIXES
from tests import exports

each_backend = pytest.mark.parametrize("suffix", SUFFIXES.values())


def logits(directory, suffix, pictures):
    """What the exported networks make of pictures, [B, classes]."""
    head, labels = (exports.loaded(directory, f"{name}{suffix}") for name in ("head", "labels"))
    codes = np.stack([labels.run(head.run(picture[None])[1])[0].ravel() for picture in pictures])
    return (codes.astype(np.float32) - labels.zero_point) * labels.scale


@each_backend
def test_8_bits_change_the_logits_little(tmp_path, suffix):
    pictures = exports.pictures(12, seed=3)
    with torch.inference_mode():
        exact = exports.float_logits(pictures).numpy()
    found = logits(tmp_path, suffix, pictures.numpy())
    assert exact.std() > 0.3
    assert np.abs(found - exact).max() < 0.3


def test_both_runtimes_agree(tmp_path):
    pictures = exports.pictures(6, seed=4).numpy()
    onnx_logits, litert_logits = (logits(tmp_path, suffix, pictures) for suffix in SUFFIXES.values())
    assert np.abs(onnx_logits - litert_logits).max() < 0.1


def test_logits_have_room_for_photos_that_show_a_class_more_clearly():
    logits = exports.int8_networks()["labels"].activations[-1]
    with torch.inference_mode():
        exact = exports.float_logits(exports.pictures(4, seed=2))
    assert (255 - logits.zero_point) * logits.scale > 1.4 * float(exact.max())


def test_onnxruntime_runs_the_labels_in_integers(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exports.files()["labels.onnx"], options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert operators == {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "Transpose"}


def test_the_litert_labels_hold_integers_only():
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(exports.files()["labels.tflite"]))
    types = {tensor.type for tensor in model.subgraphs[0].tensors}
    assert types == {schema.TensorType.UINT8, schema.TensorType.INT8, schema.TensorType.INT32}
