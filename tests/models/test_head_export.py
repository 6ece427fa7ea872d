from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from edge_runtime.inference.backends import SUFFIXES
from edge_runtime.inference.head import Head
from models.backbone import FROZEN_CHANNELS, same_padding
from models.export.litert_graph import write_litert
from models.export.onnx_graph import write_onnx
from models.export.quantise import Activation, Int8Add, Int8Conv, Int8Network, quantise
from tests import exports

WRITERS = {".onnx": write_onnx, ".tflite": write_litert}


def symbols(directory: Path, suffix: str, pictures: np.ndarray) -> np.ndarray:
    head = Head(exports.loaded(directory, f"head{suffix}"))
    return np.stack([head.symbols(picture) for picture in pictures])


def test_both_runtimes_send_the_same_symbols(tmp_path):
    pictures = exports.pictures(6, seed=3).numpy()
    onnx_symbols, litert_symbols = (symbols(tmp_path, suffix, pictures) for suffix in SUFFIXES.values())
    assert onnx_symbols.std() > 0.5
    assert (onnx_symbols == litert_symbols).mean() >= 0.99
    assert np.abs(onnx_symbols.astype(int) - litert_symbols).max() <= 1


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_the_map_for_the_labels_is_that_of_the_float_backbone(tmp_path, suffix):
    pictures, network = exports.pictures(6, seed=3), exports.int8_networks()["head"]
    activation = network.activations[network.outputs["backbone_map"]]
    head = Head(exports.loaded(tmp_path, f"head{suffix}"))
    codes = np.stack([head.latent(picture).backbone_map for picture in pictures.numpy()])
    assert (codes.shape, codes.dtype) == ((6, 14, 14, FROZEN_CHANNELS), np.uint8)
    with torch.inference_mode():
        exact = exports.backbone().frozen(pictures).permute(0, 2, 3, 1).numpy()
    error = (codes.astype(np.float32) - activation.zero_point) * activation.scale - exact
    assert np.sqrt((error**2).mean()) < 0.1 * exact.std()


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_a_head_without_the_map_sends_the_same_symbols(tmp_path, suffix):
    network, (picture,) = exports.int8_networks()["head"], exports.pictures(1, seed=3).numpy()
    latent_alone = WRITERS[suffix](replace(network, outputs={"latent": len(network.layers)}))
    old = Head(exports.loaded(tmp_path, f"old{suffix}", latent_alone))
    assert old.latent(picture).backbone_map is None
    assert np.array_equal(old.symbols(picture), symbols(tmp_path, suffix, picture[None])[0])


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_8_bits_change_few_symbols(tmp_path, suffix):
    pictures = exports.pictures(6, seed=3)
    with torch.inference_mode():
        exact = exports.head()(pictures).round().numpy()
    found = symbols(tmp_path, suffix, pictures.numpy())
    assert (found == exact).mean() >= 0.9
    assert np.abs(found - exact).max() <= 2


def test_onnxruntime_runs_the_head_in_integers(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exports.files()["head.onnx"], options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert operators == {"QLinearConv", "QLinearAdd", "Transpose"}


def test_the_onnx_head_holds_floats_as_scales_only():
    constants = onnx.load_from_string(exports.files()["head.onnx"]).graph.initializer
    floats = {c.name.rsplit(".")[-1] for c in constants if c.data_type == onnx.TensorProto.FLOAT}
    assert floats == {"scale", "weight_scales", "units"}


def test_the_litert_head_holds_integers_only():
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(exports.files()["head.tflite"]))
    types = {tensor.type for tensor in model.subgraphs[0].tensors}
    assert types == {schema.TensorType.UINT8, schema.TensorType.INT8, schema.TensorType.INT32}


def test_the_same_head_gives_the_same_bytes():
    first, again = (quantise(exports.head(), exports.pictures(4, seed=2)) for _ in range(2))
    for write in WRITERS.values():
        assert write(again) == write(first)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_latent_is_resolved_to_a_sixteenth_of_a_symbol(tmp_path, suffix):
    head = exports.int8_networks()["head"]
    assert head.codes_per_symbol >= 16
    model = exports.loaded(tmp_path, f"head{suffix}")
    assert model.scale == head.activations[-1].scale


def test_a_channel_whose_weights_are_nearly_zero_keeps_its_bias():
    head = exports.Head().eval()
    with torch.no_grad():
        bias = head.stem.bias
        assert bias is not None
        head.stem.weight[0] = 1e-12
        bias[0] = 5.0
    conv = quantise(head, exports.pictures(2, seed=4)).layers[0]
    assert isinstance(conv, Int8Conv)
    assert conv.bias[0] * float(conv.weight_scales[0]) / 128 == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 3), (3, 2, 1), (3, 2, 3), (5, 2, 3), (1, 1, 1)])
def test_borders_are_padded_as_by_tensorflow(tmp_path, suffix, size, kernel, stride, groups):
    rng = np.random.default_rng(size * 10 + kernel)
    weight = rng.integers(-127, 128, (3, 3 // groups, kernel, kernel), dtype=np.int8)
    scales = np.array([0.01, 0.02, 0.03], np.float32)
    layer = Int8Conv(0, weight, scales, rng.integers(-9, 9, 3, dtype=np.int32), stride, groups)
    outputs = -(-size // stride)
    target = Activation((outputs, outputs, 3), 0.25, 120)
    activations = (Activation((size, size, 3), 1 / 128, 127), target)
    head = Int8Network(activations, (layer,), "pixels", {"latent": 1})
    pixels = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    model = exports.loaded(tmp_path, f"one{suffix}", WRITERS[suffix](head))
    found = model.run(pixels)[0][0].astype(int) - model.zero_point
    padded = np.pad(pixels[0].astype(int) - 127, [same_padding(size, kernel, stride)] * 2 + [(0, 0)])
    exact = np.empty((3, outputs, outputs))
    for channel, row, column in np.ndindex(exact.shape):
        window = padded[row * stride :, column * stride :][:kernel, :kernel]
        window = window[..., channel : channel + 1] if groups > 1 else window
        total = (window * weight[channel].transpose(1, 2, 0)).sum() + layer.bias[channel]
        exact[channel, row, column] = total * scales[channel] / 128 / 0.25
    assert np.abs(found - exact.clip(-120, 135)).max() <= 0.51


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_sum_saturates_like_the_relu6_before_it(tmp_path, suffix):
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3) * 5
    activations = (Activation((4, 4, 3), 1 / 128, 127), Activation((4, 4, 3), 1 / 128, 0))
    network = Int8Network(activations, (Int8Add(0, 0),), "pixels", {"latent": 1})
    model = exports.loaded(tmp_path, f"sum{suffix}", WRITERS[suffix](network))
    found = model.run(pixels)[0].astype(int) - model.zero_point
    exact = (2 * (pixels.astype(int) - 127)).clip(0, 255).transpose(0, 3, 1, 2)
    assert np.abs(found - exact).max() <= 1
    assert found.min() == 0
