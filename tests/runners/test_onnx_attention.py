"""Fused attention: all of it, the same numbers, and nothing that only looks like it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import put_channels_first
from onnx import helper

from bsdiff_rt.runners.onnx_attention import DOMAIN, fuse_attention, simplify_attention

PARTS = ("denoiser", "enhancer")


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def run(model, folder, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )[0]


def inputs_of(part):
    rng = np.random.default_rng(0)
    x, cxr = rng.uniform(-1, 1, (2, 3, 1, 64, 64)).astype(np.float32)
    return {"x": x} if part == "enhancer" else {"x_t": x, "cxr": cxr, "t": np.array([0, 500, 999], np.float32)}


@pytest.mark.parametrize("part", PARTS)
def test_every_attention_is_fused_and_the_numbers_stay(part, tiny_bundle):
    plain = onnx.load(tiny_bundle / f"{part}.onnx", load_external_data=False)
    fused = fuse_attention(tiny_bundle / f"{part}.onnx")
    assert kinds(plain)["Softmax"] > 1
    assert kinds(fused)["MultiHeadAttention"] == kinds(plain)["Softmax"]
    assert kinds(fused)["Softmax"] == 0
    assert kinds(plain)["Conv"] == kinds(fused)["Conv"]
    expected = run(plain, tiny_bundle, inputs_of(part))
    # The same products in another order of summation.
    np.testing.assert_allclose(
        run(fused, tiny_bundle, inputs_of(part)), expected, rtol=0, atol=2e-5 * abs(expected).max()
    )


def test_nothing_that_is_not_needed_is_left(tiny_bundle):
    fused = fuse_attention(tiny_bundle / "denoiser.onnx")
    used = {name for node in fused.graph.node for name in node.input} | {o.name for o in fused.graph.output}
    assert all(used.intersection(node.output) for node in fused.graph.node)
    assert all(tensor.name in used for tensor in fused.graph.initializer)


@pytest.mark.parametrize("part", PARTS)
def test_keys_are_turned_in_one_step_to_the_same_bits(part, tiny_bundle):
    plain = onnx.load(tiny_bundle / f"{part}.onnx", load_external_data=False)
    turned = onnx.load(tiny_bundle / f"{part}.onnx", load_external_data=False)
    simplify_attention(turned)
    made_by = {name: node for node in turned.graph.node for name in node.output}
    softmaxes = [node for node in turned.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) > 1
    for softmax in softmaxes:
        node = made_by[softmax.input[0]]  # the product, then its second factor upwards
        for kind in ("Mul", "Transpose", "Unsqueeze"):
            node = made_by[node.input[1 if node.op_type == "MatMul" else 0]]
            assert node.op_type == kind
    assert kinds(plain)["Reshape"] - kinds(turned)["Reshape"] == 2 * len(softmaxes)
    used = {name for node in turned.graph.node for name in node.input} | {o.name for o in turned.graph.output}
    assert all(used.intersection(node.output) for node in turned.graph.node)
    assert all(tensor.name in used for tensor in turned.graph.initializer)
    np.testing.assert_array_equal(*(run(model, tiny_bundle, inputs_of(part)) for model in (plain, turned)))


@pytest.mark.parametrize("part", PARTS)
def test_results_are_arranged_as_in_new_bundles(part, tiny_bundle):
    """TensorRT recognises attention only if rows and columns are separated before the channels move."""
    plain, old = (onnx.load(tiny_bundle / f"{part}.onnx", load_external_data=False) for _ in range(2))
    assert put_channels_first(old) == kinds(plain)["Softmax"] > 1
    mended = onnx.ModelProto()
    mended.CopyFrom(old)
    simplify_attention(mended)
    for model in (plain, mended):
        used = {name: node for node in model.graph.node for name in node.input}
        for squeeze in (node for node in model.graph.node if node.op_type == "Squeeze"):
            split = used[squeeze.output[0]]
            assert (split.op_type, used[split.output[0]].op_type) == ("Reshape", "Transpose")
    onnx.shape_inference.infer_shapes(mended, strict_mode=True)
    expected, *found = (run(model, tiny_bundle, inputs_of(part)) for model in (plain, old, mended))
    for each in found:  # ONNX Runtime fuses transposes with products, and sums in another order
        np.testing.assert_allclose(each, expected, rtol=0, atol=1e-5 * abs(expected).max())


def changed(bundle, tmp_path, change):
    """The denoiser's graph with `change` made to the node that makes the first attention's scores."""
    model = onnx.load(bundle / "denoiser.onnx", load_external_data=False)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    made_by = {name: node for node in model.graph.node for name in node.output}
    change(model, made_by, softmax)
    onnx.save(model, tmp_path / "denoiser.onnx")
    return tmp_path / "denoiser.onnx", model


def bias_the_scores(model, made_by, softmax):
    place = list(model.graph.node).index(softmax)
    model.graph.node.insert(place, helper.make_node("Tanh", [softmax.input[0]], ["bent"]))
    softmax.input[0] = "bent"


def scale_only_the_query(model, made_by, softmax):
    key = made_by[made_by[softmax.input[0]].input[1]]
    twice = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "another scale")
    model.graph.initializer.append(twice)
    key.input[1] = "another scale"


def normalise_another_axis(model, made_by, softmax):
    softmax.attribute[0].i = 2


@pytest.mark.parametrize("change", [bias_the_scores, scale_only_the_query, normalise_another_axis])
def test_what_is_no_such_attention_stays_as_it_is(tiny_bundle, tmp_path, change):
    path, plain = changed(tiny_bundle, tmp_path, change)
    fused = fuse_attention(path)
    assert kinds(fused)["Softmax"] == 1
    expected = run(plain, tiny_bundle, inputs_of("denoiser"))
    found = run(fused, tiny_bundle, inputs_of("denoiser"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * abs(expected).max())


def test_a_graph_without_attention_is_unchanged(tmp_path):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["out"])], "g", [value], [out]))
    onnx.save(model, tmp_path / "g.onnx")
    fused = fuse_attention(tmp_path / "g.onnx")
    assert kinds(fused) == {"Relu": 1}
    simplify_attention(model)
    assert kinds(model) == {"Relu": 1}
    assert DOMAIN not in {entry.domain for entry in fused.opset_import}
