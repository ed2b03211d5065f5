"""Graphs in fp16 and bf16: what stays float32, that types fit, and that fp16 computes the same within its digits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.onnx_precision import reduce_precision
from bsdiff_rt.runners.registry import load_runner

SIZE = 64
NETWORKS = ("denoiser", "enhancer")
FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
KIND = {"fp16": FLOAT16, "bf16": BFLOAT16}
# Of the largest output. fp16 rounds each result by up to 2**-11 (0.0005); some 60 of them in a row add up to about
# sqrt(60) times that. Seen: 0.0013 in the denoiser, 0.003 in the enhancer.
TOLERANCE = 1e-2
# Operators whose float inputs must all have one type, and give it to their result.
ONE_TYPE = ("Add", "Concat", "Conv", "Gemm", "InstanceNormalization", "MatMul", "Mul")


@pytest.fixture(scope="module")
def convert(tiny_bundle, tmp_path_factory):
    """Converts one of the tiny networks, once for each way; gives the file."""
    work = tmp_path_factory.mktemp("reduced")

    def convert(network, precision, softmax_fp32=False):
        path = work / f"{network}-{precision}-{softmax_fp32}.onnx"
        if not path.exists():
            reduce_precision(tiny_bundle / f"{network}.onnx", path, precision, softmax_fp32=softmax_fp32)
        return path

    return convert


def inferred(path):
    """The graph, and the type of each of its tensors as ONNX finds it."""
    model = onnx.load(path)
    if BFLOAT16 in {tensor.data_type for tensor in model.graph.initializer}:
        # Conv takes bf16 from operator set 22 on; those of both networks are otherwise the same in 18 and 22.
        model.opset_import[0].version = 22
    onnx.checker.check_model(model, full_check=True)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    return model.graph, kinds


def maker(graph, name):
    return next(node for node in graph.node if name in node.output)


def readers(graph, name):
    return [node for node in graph.node if name in node.input]


# --- the bundle's graphs: what the conversion and TensorRT count on ---


@pytest.fixture(params=NETWORKS)
def exported(request, tiny_bundle):
    return onnx.load(tiny_bundle / f"{request.param}.onnx").graph


def test_queries_and_keys_are_scaled_before_their_product(exported):
    """A scale after the product may keep TensorRT from seeing attention, and lets fp16 scores overflow."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.initializer}
    softmaxes = [node for node in exported.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 4  # one per attention
    for softmax in softmaxes:
        assert {attribute.name: attribute.i for attribute in softmax.attribute} == {"axis": -1}
        product = maker(exported, softmax.input[0])
        assert product.op_type == "MatMul"
        for side in product.input:
            scaled = maker(exported, side)
            assert scaled.op_type == "Mul"
            (scale,) = (constants[name] for name in scaled.input if name in constants)
            assert scale.item() == pytest.approx(16**-0.25)  # both by the root of 1 / sqrt(channels)
        assert [node.op_type for node in readers(exported, softmax.output[0])] == ["MatMul"]


def test_convolutions_have_one_group_and_resizing_is_nearest(exported):
    seen = Counter()
    for node in exported.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv":
            assert attributes["group"] == 1
            assert attributes["dilations"] == [1, 1]
        if node.op_type == "Resize":
            assert attributes["mode"] == b"nearest"
            assert attributes["coordinate_transformation_mode"] == b"asymmetric"
            assert attributes["nearest_mode"] == b"floor"
            assert attributes["antialias"] == 0
        seen[node.op_type] += 1
    assert seen["Conv"] > 10
    assert seen["Resize"] == 1


def test_no_integer_reaches_a_backend(exported):
    """Every input and output is float32: no binding depends on how a backend treats int64."""
    values = [*exported.input, *exported.output]
    assert {value.type.tensor_type.elem_type for value in values} == {FLOAT}


# --- the converted graphs ---


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("softmax_fp32", [False, True])
def test_types_meet_only_in_casts(convert, network, precision, softmax_fp32):
    graph, kinds = inferred(convert(network, precision, softmax_fp32))
    seen = Counter()
    for node in graph.node:
        floats = {kinds[name] for name in (*node.input, *node.output) if kinds.get(name) in (FLOAT, FLOAT16, BFLOAT16)}
        if node.op_type in ONE_TYPE and floats:
            assert len(floats) == 1, node.name
        if node.op_type == "Cast":
            assert floats == {FLOAT, KIND[precision]}, f"{node.name} changes nothing"
        seen[node.op_type] += 1
    assert seen["Cast"] > 10
    assert seen["Conv"] > 10


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_and_outputs_stay(convert, tiny_bundle, network, precision):
    before, after = onnx.load(tiny_bundle / f"{network}.onnx"), onnx.load(convert(network, precision))
    described = [
        [(value.name, value.type.SerializeToString()) for value in (*model.graph.input, *model.graph.output)]
        for model in (before, after)
    ]
    assert described[0] == described[1]
    assert {entry.version for entry in after.opset_import} == {18}


@pytest.mark.parametrize("softmax_fp32", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_computed_in_float32(convert, tiny_bundle, precision, softmax_fp32):
    graph, kinds = inferred(convert("denoiser", precision, softmax_fp32))
    computed = Counter(node.op_type for node in graph.node if node.op_type != "Cast" and kinds[node.output[0]] == FLOAT)
    whole = Counter(node.op_type for node in graph.node)
    assert whole["InstanceNormalization"] == 21
    expected = {"InstanceNormalization": 21, "Unsqueeze": 1, "Mul": 1, "Cos": 1, "Sin": 1, "Concat": 1, "Gemm": 1}
    if precision == "bf16":
        expected["Resize"] = 1
    if softmax_fp32:
        expected["Softmax"] = 4
    assert computed == expected
    (first_linear,) = (node for node in graph.node if "time_embed.0.weight" in node.input)
    assert maker(graph, first_linear.input[0]).op_type == "Concat"  # the sinusoids, with no Cast between
    kept = [tensor for tensor in graph.initializer if tensor.data_type == FLOAT]
    assert {"time_embed.0.weight", "time_embed.0.bias"} <= {tensor.name for tensor in kept}
    assert all(tensor.dims[0] <= 4 for tensor in kept if len(tensor.dims) == 1 and "time" not in tensor.name)
    assert sum(len(tensor.dims) > 1 for tensor in kept) == 1  # of the matrices and kernels, that one only


def test_a_softmax_in_float32_is_cast_at_its_edges_alone(convert):
    """Its input up, its result down, the products in fp16: what TensorRT reads as one fused kernel."""
    graph, kinds = inferred(convert("denoiser", "fp16", True))
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        up, (down,) = maker(graph, softmax.input[0]), readers(graph, softmax.output[0])
        assert (up.op_type, down.op_type) == ("Cast", "Cast")
        (attended,) = readers(graph, down.output[0])
        assert maker(graph, up.input[0]).op_type == attended.op_type == "MatMul"
        assert kinds[up.input[0]] == kinds[attended.output[0]] == FLOAT16


def test_attention_alone(tiny_bundle, tmp_path):
    """Both products and the softmax in fp16, everything else in float32."""
    reduce_precision(tiny_bundle / "enhancer.onnx", tmp_path / "out.onnx", "fp16", attention_only=True)
    graph, kinds = inferred(tmp_path / "out.onnx")
    half = Counter(node.op_type for node in graph.node if node.op_type != "Cast" and kinds[node.output[0]] == FLOAT16)
    count = sum(node.op_type == "Softmax" for node in graph.node)
    assert half == {"MatMul": 2 * count, "Softmax": count}
    assert count > 1
    assert FLOAT16 not in {tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_are_rounded_to_the_nearest(convert, tiny_bundle, network, precision):
    stored = onnx.load(tiny_bundle / f"{network}.onnx").graph.initializer
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
    model = onnx.load(convert(network, precision), load_external_data=False)
    changed = 0
    for tensor in model.graph.initializer:
        assert tensor.data_location != TensorProto.EXTERNAL  # one file
        expected = before[tensor.name.removesuffix(f".{precision}")]
        actual = numpy_helper.to_array(tensor)
        assert list(tensor.dims) == list(expected.shape)
        if tensor.data_type == FLOAT16:
            np.testing.assert_array_equal(actual, expected.astype(np.float16))
        elif tensor.data_type == BFLOAT16:
            np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=2.0**-8)
            assert not np.array_equal(actual.astype(np.float32), expected) or expected.size < 8
        else:
            np.testing.assert_array_equal(actual, expected)
        changed += tensor.data_type == KIND[precision]
    assert changed > 40


@pytest.mark.parametrize("softmax_fp32", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_fp16_computes_the_same(convert, tiny_bundle, network, softmax_fp32):
    """ONNX Runtime on the CPU against eager fp32; it has few fp16 kernels there and casts for the others."""
    generator = torch.Generator().manual_seed(3)
    x_t, cxr = torch.randn(2, 3, 1, SIZE, SIZE, generator=generator)
    cxr, t, expected = cxr.clamp(-1, 1), torch.tensor([0.0, 500.0, 999.0]), torch.empty_like(x_t)
    with load_runner(open_bundle(tiny_bundle), "eager", torch.device("cpu")) as eager:
        if network == "denoiser":
            eager.denoise(x_t, cxr, t, expected)
        else:
            eager.enhance(cxr, expected)
    inputs = {"x_t": x_t, "cxr": cxr, "t": t} if network == "denoiser" else {"x": cxr}
    session = onnxruntime.InferenceSession(convert(network, "fp16", softmax_fp32), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert actual.dtype == np.float32
    difference = np.abs(actual - expected.numpy()).max() / expected.abs().max().item()
    assert 1e-5 < difference < TOLERANCE  # equal to the last digit would mean that nothing was converted


# --- what it refuses ---


@pytest.mark.parametrize(("value", "precision"), [(65520.0, "fp16"), (-1e6, "fp16"), (float("nan"), "bf16")])
def test_a_weight_that_the_precision_cannot_hold(bundle_copy, tmp_path, value, precision):
    """65520 is the first number that fp16 rounds to infinity."""
    path = bundle_copy / "denoiser.safetensors"
    weights = load_file(path)
    weights["middle_block.resnet_1.conv1.weight"][3, 2, 1, 1] = value
    save_file(weights, path)
    largest = {"fp16": "6.55e+04", "bf16": "3.39e+38"}[precision]
    message = (
        rf"weight middle_block\.resnet_1\.conv1\.weight holds a value beyond {precision}, .* {re.escape(largest)}\."
    )
    with pytest.raises(EngineError, match=message):
        reduce_precision(bundle_copy / "denoiser.onnx", tmp_path / "out.onnx", precision)
    assert not (tmp_path / "out.onnx").exists()


def test_the_largest_number_of_fp16(bundle_copy, tmp_path):
    path = bundle_copy / "denoiser.safetensors"
    weights = load_file(path)
    weights["middle_block.resnet_1.conv1.weight"][3, 2, 1, 1] = 65519.0
    save_file(weights, path)
    reduce_precision(bundle_copy / "denoiser.onnx", tmp_path / "out.onnx", "fp16")


@pytest.mark.parametrize("change", ["graph", "weights", "content"])
def test_a_graph_that_cannot_be_read(bundle_copy, tmp_path, change):
    graph = bundle_copy / "enhancer.onnx"
    if change == "content":
        graph.write_bytes(b"no graph")
    else:
        graph.with_suffix(".onnx" if change == "graph" else ".safetensors").unlink()
    with pytest.raises(EngineError, match=r"enhancer\.onnx: cannot be read as an ONNX graph with its weights \(\w+\)"):
        reduce_precision(graph, tmp_path / "out.onnx", "fp16")


# --- graphs made here ---


def save(path: Path, nodes, outputs) -> Path:
    """A graph on x [1, 4, 6, 6] with constants k [4, 4, 1, 1] and w [4]."""
    generator = np.random.default_rng(0)
    constants = {"k": generator.standard_normal((4, 4, 1, 1), np.float32), "w": np.float32([0.5, 1, 2, 3])}
    values = [helper.make_tensor_value_info(name, FLOAT, [1, 4, 6, 6]) for name in ("x", *outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_operator_without_a_rule(tmp_path):
    path = save(tmp_path / "g.onnx", [helper.make_node("Erf", ["x"], ["out"])], ["out"])
    with pytest.raises(EngineError, match=r"g\.onnx: operator Erf has no rule for bf16\. Use precision fp32"):
        reduce_precision(path, tmp_path / "out.onnx", "bf16")


def test_a_weight_in_both_types_and_an_output_that_is_read_again(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "k", "w"], ["middle"]),
        helper.make_node("InstanceNormalization", ["middle", "w", "w"], ["normed"]),
        helper.make_node("Conv", ["normed", "k"], ["first"]),
        helper.make_node("Sigmoid", ["first"], ["second"]),
    ]
    path = save(tmp_path / "g.onnx", nodes, ["first", "second"])
    reduce_precision(path, tmp_path / "out.onnx", "fp16")
    graph, kinds = inferred(tmp_path / "out.onnx")
    assert {name: kinds[name] for name in ("w", "w.fp16", "k.fp16")} == {
        "w": FLOAT,
        "w.fp16": FLOAT16,
        "k.fp16": FLOAT16,
    }
    assert sorted(tensor.name for tensor in graph.initializer) == ["k.fp16", "w", "w.fp16"]
    assert [node.op_type for node in graph.node].count("Cast") == 5  # x, around the norm, two outputs
    x = np.random.default_rng(1).standard_normal((1, 4, 6, 6), np.float32)
    results = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for file in (path, tmp_path / "out.onnx")
    ]
    for before, after in zip(*results, strict=True):
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before, atol=0.02)  # a few roundings of numbers up to 10


def test_the_residual_is_added_in_float32(tmp_path):
    """A network that adds its input at the end puts out that picture: in fp16 it would lose digits it came with."""
    nodes = [
        helper.make_node("Conv", ["x", "k", "w"], ["middle"]),
        helper.make_node("Add", ["middle", "middle"], ["twice"]),
        helper.make_node("Add", ["x", "twice"], ["out"]),
    ]
    reduce_precision(save(tmp_path / "g.onnx", nodes, ["out"]), tmp_path / "out.onnx", "fp16")
    graph, kinds = inferred(tmp_path / "out.onnx")
    assert list(maker(graph, "out").input) == ["x", "twice.fp32"]
    assert kinds["twice"] == FLOAT16
