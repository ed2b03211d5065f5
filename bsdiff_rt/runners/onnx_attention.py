"""Rewrite the attention of an exported graph in the form that a backend knows.

The bundle's graphs contain attention as MatMul, Softmax, MatMul, as TensorRT's fusions expect it. But they transpose
the keys in three steps, and older ones the result in another order than TensorRT looks for (`simplify_attention`).

ONNX Runtime's CPU kernels run the graph literally: at 16,384 tokens the scores take 1 GiB, which is written and read
three times. Its operator `com.microsoft.MultiHeadAttention` computes the same block by block in the processor's cache
(`fuse_attention`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

DOMAIN = "com.microsoft"


def fuse_attention(graph: Path) -> ModelProto:
    """Return a graph with every single-head attention fused. External data stays outside.

    Squeeze(Softmax((s Q) (s K)^T) V) is replaced, with Q, K and V unsqueezed to one head. Attention of any other form
    stays as it is.

    Args:
        graph: path of a graph of `python -m export`.

    Returns:
        The changed model. Its weights are relative to the folder of `graph`.
    """
    model = onnx.load(graph, load_external_data=False)
    nodes = model.graph.node
    made_by = {name: node for node in nodes for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    replaced: dict[str, NodeProto] = {}
    for squeeze in nodes:
        found = _find_attention(squeeze, made_by)
        if found is None:
            continue
        query, key, value, scale = found
        factor = float(np.asarray(numpy_helper.to_array(constants[scale])).item()) ** 2  # once on Q, once on K
        replaced[squeeze.output[0]] = helper.make_node(
            "MultiHeadAttention", [query, key, value], list(squeeze.output), domain=DOMAIN, num_heads=1, scale=factor
        )
    _replace(model, replaced)
    if replaced and DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def simplify_attention(model: ModelProto) -> None:
    """Rewrite every attention so that TensorRT recognises it, in place. The result stays the same.

    Without fused attention TensorRT stores the score of every pair of pixels: gigabytes, and seconds for each image.
    """
    _transpose_keys(model)
    _move_channels_last(model)


def _transpose_keys(model: ModelProto) -> None:
    """Let every attention transpose its keys with one Transpose.

    The exporter writes Reshape, Transpose, Reshape to shapes that are computed while the graph runs.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    replaced: dict[str, NodeProto] = {}
    for softmax in model.graph.node:
        scores = _find_source(made_by, softmax.input[0], "MatMul") if softmax.op_type == "Softmax" else None
        scaled = _find_source(made_by, scores.input[1], "Mul") if scores is not None else None
        if scaled is None:
            continue
        turned = scaled.input[0]
        key = _find_source(made_by, turned, "Reshape", "Transpose", "Reshape", "Unsqueeze")
        if key is not None:
            replaced[turned] = helper.make_node("Transpose", list(key.output), [turned], perm=[0, 1, 3, 2])
    _replace(model, replaced)


def _move_channels_last(model: ModelProto) -> None:
    """Let every attention separate rows and columns before it moves the channels, as networks/blocks.py does.

    Bundles of earlier versions have Transpose and Reshape to [-1, C, H, W] behind Squeeze. They get Reshape to
    [-1, H, W, C] and Transpose.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    replaced: dict[str, NodeProto] = {}
    for image in model.graph.node:
        squeeze = _find_source(made_by, image.output[0], "Reshape", "Transpose", "Squeeze")
        softmax = _find_source(made_by, squeeze.input[0], "MatMul", "Softmax") if squeeze is not None else None
        if squeeze is None or softmax is None or image.input[1] not in constants:
            continue
        batch, *size = numpy_helper.to_array(constants[image.input[1]]).tolist()
        if len(size) != 3:
            continue
        rows = f"{image.output[0]}.rows"
        channels, height, width = size
        shape = np.array([batch, height, width, channels], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(shape, f"{rows}.shape"))
        replaced[image.input[0]] = helper.make_node(
            "Reshape", [squeeze.output[0], f"{rows}.shape"], [image.input[0]], name=rows
        )
        replaced[image.output[0]] = helper.make_node(
            "Transpose", [image.input[0]], list(image.output), name=f"{rows}.transpose", perm=[0, 3, 1, 2]
        )
    _replace(model, replaced)
    # The shapes that the file states for the tensors between them no longer hold.
    stated = [value for value in model.graph.value_info if value.name not in replaced]
    del model.graph.value_info[:]
    model.graph.value_info.extend(stated)


def _find_attention(squeeze: NodeProto, made_by: dict[str, NodeProto]) -> tuple[str, str, str, str] | None:
    """Return the names of Q, K, V (each [B, S, C]) and of the scale s of the attention that ends at a node.

    None if no attention ends there.
    """
    source = partial(_find_source, made_by)
    weighted = source(squeeze.input[0], "MatMul") if squeeze.op_type == "Squeeze" else None
    softmax = source(weighted.input[0], "Softmax") if weighted is not None else None
    scores = source(softmax.input[0], "MatMul") if softmax is not None else None
    if weighted is None or softmax is None or scores is None:
        return None
    if [helper.get_attribute_value(attribute) for attribute in softmax.attribute] != [-1]:  # its axis
        return None
    value = source(weighted.input[1], "Unsqueeze")
    scaled_query, scaled_key = source(scores.input[0], "Mul"), source(scores.input[1], "Mul")
    query = source(scores.input[0], "Mul", "Unsqueeze")
    key = source(scores.input[1], "Mul", "Reshape", "Transpose", "Reshape", "Unsqueeze")
    if value is None or query is None or key is None or scaled_query is None or scaled_key is None:
        return None
    if scaled_query.input[1] != scaled_key.input[1]:
        return None
    return query.input[0], key.input[0], value.input[0], scaled_query.input[1]


def _find_source(made_by: dict[str, NodeProto], name: str, *kinds: str) -> NodeProto | None:
    """Follow first inputs up from the tensor `name`, and return the last node if all nodes are of the given kinds."""
    node: NodeProto | None = None
    for kind in kinds:
        node = made_by.get(name)
        if node is None or node.op_type != kind:
            return None
        name = node.input[0]
    return node


def _replace(model: ModelProto, replaced: dict[str, NodeProto]) -> None:
    """Replace the nodes with the same first output, and drop nodes that nothing depends on any more."""
    graph = model.graph
    nodes = [replaced.get(node.output[0], node) for node in graph.node]
    kept = _list_needed(nodes, {out.name for out in graph.output})
    used = {name for node in kept for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, still in ((graph.node, kept), (graph.initializer, weights)):
        del field[:]
        field.extend(still)


def _list_needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Return the nodes that something depends on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
