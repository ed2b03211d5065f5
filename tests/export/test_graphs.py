"""Exported graphs: weights exist once, in the safetensors file, and nothing of the exporting machine is in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from bsdiff_rt.errors import BundleError
from export.graphs import OPSET, SMALL_BYTES, read_tensors, share_weights

NETWORKS = ("denoiser", "enhancer")


@pytest.fixture(params=NETWORKS)
def graph(request, tiny_bundle):
    """Path of a graph; the weights lie beside it."""
    return tiny_bundle / f"{request.param}.onnx"


def model_of(graph: Path) -> onnx.ModelProto:
    return onnx.load(graph, load_external_data=False)


def external(tensor):
    return {entry.key: entry.value for entry in tensor.external_data}


def test_opset(graph):
    model = model_of(graph)
    assert OPSET == 18
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert model.ir_version <= 10  # what the oldest ONNX Runtime of pyproject.toml reads
    onnx.checker.check_model(str(graph), full_check=True)


def test_inputs_and_outputs(graph):
    def shapes(values):
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
        }

    model = model_of(graph)
    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    batch = outputs["out"][0]
    assert isinstance(batch, str)  # a name, not a number: the batch axis is dynamic
    image = [batch, 1, 64, 64]
    assert inputs == ({"x_t": image, "cxr": image, "t": [batch]} if graph.stem == "denoiser" else {"x": image})
    assert outputs == {"out": image}
    assert {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]} == {
        TensorProto.FLOAT
    }


def test_weights_exist_once(graph):
    """Every large initialiser is a range of the safetensors file, and holds the bytes of a weight there."""
    weights = graph.with_suffix(".safetensors")
    content = weights.read_bytes()
    ranges = {(offset, len(data)): (name, shape) for name, _, shape, offset, data in read_tensors(weights)}
    used, inline_bytes = set(), 0
    model = model_of(graph).graph
    constants = [attribute.t for node in model.node for attribute in node.attribute if attribute.HasField("t")]
    for tensor in [*model.initializer, *constants]:
        if tensor.data_location != TensorProto.EXTERNAL:
            size = numpy_helper.to_array(tensor).nbytes
            assert size < SMALL_BYTES, tensor.name
            inline_bytes += size
            continue
        assert not tensor.raw_data
        assert not tensor.float_data
        place = external(tensor)
        assert place["location"] == weights.name
        offset, length = int(place["offset"]), int(place["length"])
        assert offset + length <= len(content)
        assert np.prod(tensor.dims) * 4 == length
        name, shape = ranges[offset, length]
        assert sorted(tensor.dims) == sorted(shape) or np.prod(tensor.dims) == np.prod(shape), name
        used.add(name)
    stored = load_file(weights)
    # Equal weights share one range (two norms of ones, say), so what is not referred to must have a twin that is.
    for name in set(stored) - used:
        assert any(torch.equal(stored[name], stored[twin]) for twin in used if stored[twin].shape == stored[name].shape)
    assert sum(tensor.numel() * 4 for tensor in stored.values()) > 100_000
    assert inline_bytes < 4000
    assert graph.stat().st_size < 150_000  # nodes and their names: not more with wider networks


def test_external_data_gives_the_networks_weights(graph):
    """As a runtime sees them, after loading: each initialiser equals a weight, or its transpose."""
    stored = load_file(graph.with_suffix(".safetensors"))
    known = {weight.numpy().tobytes() for weight in stored.values()}
    checked = 0
    for tensor in onnx.load(graph).graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes >= SMALL_BYTES:
            assert array.tobytes() in known, tensor.name
            checked += 1
    assert checked > 10


def test_no_trace_of_the_exporting_machine(graph):
    content = graph.read_bytes()
    root = Path(__file__).parents[2]
    for trace in (str(root), str(Path.home()) + "/", "site-packages", ".py", "/tmp/", "forward(", "stack_trace"):
        assert trace.encode() not in content, trace
    model = model_of(graph)
    assert not model.metadata_props
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not model.functions


def test_the_safetensors_file_is_the_state_dict(tiny_bundle):
    names = set(load_file(tiny_bundle / "denoiser.safetensors"))
    assert "conv_in.weight" in names
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in names)


def test_queries_keys_and_values_are_one_product(graph):
    """Three products for each attention: the projections, the scores, the weighted values."""
    kinds = [node.op_type for node in model_of(graph).graph.node]
    attentions = kinds.count("Softmax")
    assert attentions > 1
    assert kinds.count("Split") == attentions
    assert kinds.count("MatMul") == 3 * attentions


def test_the_time_embedding_passes_its_activation_once(tiny_bundle):
    """Each residual block has two more, around its convolutions."""
    kinds = [node.op_type for node in model_of(tiny_bundle / "denoiser.onnx").graph.node]
    blocks = kinds.count("Gemm") - 2  # each projects the time embedding, which is made by two layers
    assert blocks == 8
    assert kinds.count("Sigmoid") == 2 * blocks + 1 + 2  # before the output; in the embedding and behind it


# --- share_weights on a graph made here ---


def make(initialisers, tmp_path, weights):
    """A model of Identity nodes on the given arrays, and a safetensors file with the given weights."""
    save_file({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "w.safetensors")
    tensors = [numpy_helper.from_array(array, name) for name, array in initialisers.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name} out"]) for name in initialisers]
    outputs = [
        helper.make_tensor_value_info(f"{name} out", TensorProto.FLOAT, array.shape)
        for name, array in initialisers.items()
    ]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model, path):
    import onnxruntime

    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})


def test_renamed_reshaped_and_transposed_weights_are_shared(tmp_path):
    a = np.arange(96, dtype=np.float32).reshape(8, 12)
    b = np.arange(200, dtype=np.float32) + 0.5
    small = np.ones(3, np.float32)
    initialisers = {
        "as it is": a,
        "other shape": a.reshape(2, 4, 12),
        "transposed": np.ascontiguousarray(a.T),
        "b": b,
        "small": small,
    }
    model = make(initialisers, tmp_path, {"first": a, "second": b})
    share_weights(model, tmp_path / "w.safetensors")
    inline = [tensor.name for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    assert inline == ["small"]
    assert [node.op_type for node in model.graph.node].count("Transpose") == 1
    for found, expected in zip(run(model, tmp_path / "m.onnx"), initialisers.values(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_joined_weights_are_made_of_the_stored_ones(tmp_path):
    rng = np.random.default_rng(0)
    stored = {
        f"block.to_{letter}.{kind}": rng.standard_normal(shape).astype(np.float32)
        for letter in "qkv"
        for kind, shape in (("weight", (8, 8)), ("bias", (64,)))
    }
    weight, bias = (
        np.concatenate([stored[f"block.to_{letter}.{kind}"] for letter in "qkv"]) for kind in ("weight", "bias")
    )
    initialisers = {"for a product": np.ascontiguousarray(weight.T), "as it is": weight, "bias": bias}
    model = make(initialisers, tmp_path, stored)
    share_weights(model, tmp_path / "w.safetensors")
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    assert len(model.graph.initializer) == 9
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Concat"), kinds.count("Transpose")) == (3, 1)
    for found, expected in zip(run(model, tmp_path / "m.onnx"), initialisers.values(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_constant_that_is_no_weight(tmp_path):
    model = make({"table": np.ones(SMALL_BYTES // 4, np.float32)}, tmp_path, {"first": np.zeros(4, np.float32)})
    with pytest.raises(
        BundleError, match=rf"graph constant table \({SMALL_BYTES} bytes\) is no weight of w\.safetensors"
    ):
        share_weights(model, tmp_path / "w.safetensors")


def test_tensors_of(tmp_path):
    weights = {"a": torch.rand(3, 5), "b": torch.rand(7)}
    save_file(weights, tmp_path / "w.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "w.safetensors").read_bytes()
    found = {name: (shape, offset, data) for name, _, shape, offset, data in read_tensors(tmp_path / "w.safetensors")}
    assert set(found) == {"a", "b"}
    for name, (shape, offset, data) in found.items():
        assert shape == list(weights[name].shape)
        assert data == weights[name].numpy().tobytes() == content[offset : offset + len(data)]


def test_weights_of_another_precision(tmp_path):
    save_file({"a": torch.rand(3).half()}, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match=r"w\.safetensors: a is F16, bundles hold F32"):
        list(read_tensors(tmp_path / "w.safetensors"))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\x80\x3f")
    ((_, dtype, _, _, data),) = read_tensors(tmp_path / "w.safetensors")
    assert np.frombuffer(data, dtype).tolist() == [1.0]
