import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from edge_runtime.inference.backends import SUFFIXES
from edge_runtime.inference.bundle import BOS
from models.export.draft_export import quantise_draft, write_draft_litert, write_draft_onnx
from models.family import NEVER_EMITTED
from tests import exports

each_backend = pytest.mark.parametrize("suffix", SUFFIXES.values())


@each_backend
def test_8_bits_hardly_ever_change_the_next_token(tmp_path, suffix):
    encoder, step = (exports.loaded(tmp_path, f"{name}{suffix}") for name in ("encoder", "step"))
    draft, rng = exports.draft(), np.random.default_rng(5)
    same = []
    for latent in exports.latents(20, seed=5):
        symbols = latent[None].astype(np.float32)
        tokens = [BOS, *rng.integers(4, exports.VOCABULARY, 9)]
        with torch.inference_mode():
            exact_memory = draft.encode_image(torch.from_numpy(symbols))
            exact_state = draft.first_state(torch.tensor([[1]]), torch.tensor([[0.5]]))
        (memory,) = encoder.run(symbols)
        state = exact_state.numpy()
        assert np.abs(memory - exact_memory.numpy()).max() < 0.1
        for token in tokens:
            with torch.inference_mode():
                exact, exact_state = draft.step(torch.tensor([token]), exact_state, exact_memory)
            logits, state = step.run(np.array([token], np.int32), state, memory)
            assert np.abs(state - exact_state.numpy()).max() < 0.15
            same.append(int(logits.argmax()) == int(exact.argmax()))
            assert logits[0].argmin() in NEVER_EMITTED
    assert np.mean(same) >= 0.98


@each_backend
def test_the_next_token_depends_on_token_state_and_symbols(tmp_path, suffix):
    encoder, step = (exports.loaded(tmp_path, f"{name}{suffix}") for name in ("encoder", "step"))
    token, state = np.array([BOS], np.int32), np.zeros((1, 256), np.float32)
    symbols = np.zeros((1, 64, 7, 7), np.float32)
    base = step.run(token, state, *encoder.run(symbols))[0]
    for other in ((token + 7, state, symbols), (token, state + 0.5, symbols), (token, state, symbols + 1)):
        assert np.abs(step.run(*other[:2], *encoder.run(other[2]))[0] - base).max() > 0.1


def test_onnx_weights_are_8_bits():
    for name in ("encoder.onnx", "step.onnx"):
        constants = onnx.load_from_string(exports.files()[name]).graph.initializer
        matrices = [c for c in constants if len(c.dims) > 1]
        assert matrices
        assert {c.data_type for c in matrices} == {onnx.TensorProto.INT8}


def test_litert_weights_are_8_bits():
    for name in ("encoder.tflite", "step.tflite"):
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(exports.files()[name]))
        constants = [t for t in model.subgraphs[0].tensors if model.buffers[t.buffer].data is not None]
        matrices = [t for t in constants if len(t.shape) > 1]
        assert matrices
        assert {t.type for t in matrices} == {schema.TensorType.INT8}


@pytest.mark.parametrize("write", [write_draft_onnx, write_draft_litert])
def test_the_same_draft_gives_the_same_bytes(write):
    assert write(quantise_draft(exports.draft())) == write(quantise_draft(exports.draft()))
