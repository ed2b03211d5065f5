"""Convert a bundle's fp32 ONNX graph to fp16 or bf16. The precision is written into the types of the graph.

TensorRT (in strongly typed networks) and ONNX Runtime take the precision from the graph and convert nothing themselves.
So there is a Cast wherever two types meet. Inputs and outputs stay float32. These parts stay float32, too:

- InstanceNormalization, the statistics of each group norm: it sums up to a million activations.
- The time embedding up to its first Linear: the angles reach 999 rad, where neighbouring fp16 numbers differ by 0.5.
- The sum that forms the output of a network with a residual: it is the picture itself, in [-1, 1].
- The softmax of attention, if requested: a sum over 16,384 pixels has few digits in fp16. TensorRT from 11.3 fuses
  attention with Casts around its softmax. It does not fuse it with Casts around the two products as well.
- Resize in bf16: TensorRT has no bf16 kernel for it. Nearest neighbour only copies values, so nothing is lost.

The operator set stays 18. Its Conv does not list bf16, which ONNX allows from operator set 22 on, but TensorRT takes
the type from the tensors. ONNX Runtime has no bf16 convolution in either operator set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.onnx_attention import simplify_attention

ReducedPrecision = Literal["fp16", "bf16"]

CONVERSION = 3  # increased with every change of the conversion; recorded with every engine
TIME_INPUT = "t"
_TYPES = {"fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16)}
_SUFFIX: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# Every operator of both networks. Each computes its result in the type of its inputs, or moves data. The precision of a
# further operator must be considered before it is added.
_OPERATORS = (
    *("Add", "Concat", "Conv", "Cos", "Gemm", "InstanceNormalization", "MatMul", "Mul", "Reshape", "Resize", "Shape"),
    *("Sigmoid", "Sin", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
_FP32_INPUTS = {"Resize": (1, 2)}  # region and scales are float32 for every type of image


def reduce_precision(
    graph: Path,
    destination: Path,
    precision: ReducedPrecision,
    *,
    softmax_fp32: bool = False,
    attention_only: bool = False,
) -> None:
    """Convert a graph to another precision, and write it in one file with its weights.

    Args:
        graph: an fp32 graph of a bundle, with its weights beside it.
        destination: the file to write, below 2 GiB. Larger networks need external data.
        precision: of weights and activations.
        softmax_fp32: whether the softmax of attention is computed in float32.
        attention_only: whether everything but the attention stays float32. In float32 no fused attention exists.

    Raises:
        EngineError: the graph cannot be read, it has an operator that this conversion does not know, or a weight is
            beyond the range of the precision.
    """
    try:
        model = onnx.load(graph)
        simplify_attention(model)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except Exception as error:  # protobuf, onnx and the file system share no base class
        raise EngineError(
            f"{graph}: cannot be read as an ONNX graph with its weights ({type(error).__name__})"
        ) from error
    for node in model.graph.node:
        if node.op_type not in _OPERATORS or node.domain not in ("", "ai.onnx"):
            raise EngineError(f"{graph}: operator {node.op_type} has no rule for {precision}. Use precision fp32.")
    nodes = list(model.graph.node)
    kept = _choose_fp32(nodes, {output.name for output in model.graph.output}, precision, softmax_fp32)
    if attention_only:
        kept = [
            position for position in range(len(nodes)) if position not in _find_attention(nodes) or position in kept
        ]
    _Conversion(model, precision, set(kept)).run()
    onnx.save(model, destination)


def _choose_fp32(
    nodes: list[NodeProto], outputs: set[str], precision: ReducedPrecision, softmax_fp32: bool
) -> list[int]:
    """Return the positions of the nodes that compute in float32."""
    found: list[int] = []
    timed = {TIME_INPUT}
    for position, node in enumerate(nodes):
        if node.op_type == "InstanceNormalization" or (node.op_type == "Resize" and precision == "bf16"):
            found.append(position)
        if node.op_type == "Add" and outputs & set(node.output):
            found.append(position)
        if timed & set(node.input):
            found.append(position)
            if node.op_type not in ("Gemm", "MatMul"):
                timed |= set(node.output)
        if node.op_type == "Softmax" and softmax_fp32:
            found.append(position)
    return found


def _find_attention(nodes: list[NodeProto]) -> set[int]:
    """Return the positions of the softmax and of both products of every attention."""
    made_by = {name: position for position, node in enumerate(nodes) for name in node.output}
    found = set()
    for position, node in enumerate(nodes):
        if node.op_type == "Softmax":
            found |= {made_by[node.input[0]], position}
            found |= {other for other, reader in enumerate(nodes) if node.output[0] in reader.input}
    return found


class _Conversion:
    """Conversion of one graph. `run` rewrites `model` in place.

    Args:
        model: after shape inference.
        precision: the new one.
        fp32_nodes: positions of the nodes that stay float32.
    """

    def __init__(self, model: ModelProto, precision: ReducedPrecision, fp32_nodes: set[int]) -> None:
        self._graph: GraphProto = model.graph
        self._precision = precision
        self._type, self._torch_type = _TYPES[precision]
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._floats = {name for name, kind in _element_types(model.graph) if kind == TensorProto.FLOAT}
        # Type of each float tensor, as far as nodes have been converted.
        self._now: dict[str, int] = dict.fromkeys(self._floats, TensorProto.FLOAT)
        self._fp32_nodes = fp32_nodes
        self._nodes: list[NodeProto] = []
        self._converted: dict[str, TensorProto | None] = {}  # name to weight, or None for the result of a Cast

    def run(self) -> None:
        """Rewrite the graph node by node, in its order."""
        nodes = list(self._graph.node)
        for position, node in enumerate(nodes):
            self._convert(node, TensorProto.FLOAT if position in self._fp32_nodes else self._type)
        for output in self._graph.output:
            self._restore_output(output.name)
        used = {name for node in self._nodes for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        kept += [tensor for tensor in self._converted.values() if tensor is not None]
        for field in (self._graph.node, self._graph.initializer, self._graph.value_info):
            del field[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend(kept)

    def _convert(self, node: NodeProto, kind: int) -> None:
        """Append `node` after its float inputs have been converted to type `kind`."""
        for index, name in enumerate(node.input):
            if name in self._floats and node.op_type != "Shape":
                needed = TensorProto.FLOAT if index in _FP32_INPUTS.get(node.op_type, ()) else kind
                node.input[index] = self._convert_tensor(name, needed)
        self._now |= dict.fromkeys(self._floats & set(node.output), kind)
        self._nodes.append(node)

    def _convert_tensor(self, name: str, kind: int) -> str:
        """Return the tensor `name` in type `kind`: itself, a converted weight or the result of a Cast."""
        if self._now[name] == kind:
            return name
        result = f"{name}.{_SUFFIX[kind]}"
        if result not in self._converted:
            if name in self._weights:
                self._converted[result] = self._round_weight(self._weights[name], result)
            else:
                self._converted[result] = None
                self._nodes.append(helper.make_node("Cast", [name], [result], to=kind, name=f"{result}.cast"))
        return result

    def _round_weight(self, tensor: TensorProto, name: str) -> TensorProto:
        """Return `tensor` rounded to the new type, to nearest even."""
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(self._torch_type)
        if not values.isfinite().all():
            raise EngineError(
                f"weight {tensor.name} holds a value beyond {self._precision}, whose largest is "
                f"{torch.finfo(self._torch_type).max:.4g}. Use another precision."
            )
        return helper.make_tensor(name, self._type, tensor.dims, values.view(torch.int16).numpy().tobytes(), raw=True)

    def _restore_output(self, name: str) -> None:
        """Make the graph's output `name` float32 again, under its name."""
        if self._now[name] == TensorProto.FLOAT:
            return
        inside = f"{name}.{_SUFFIX[self._now[name]]}"
        for node in self._nodes:
            for names in (node.input, node.output):
                for index in (index for index, other in enumerate(names) if other == name):
                    names[index] = inside
        self._nodes.append(helper.make_node("Cast", [inside], [name], to=TensorProto.FLOAT, name=f"{name}.cast"))


def _element_types(graph: GraphProto) -> Iterator[tuple[str, int]]:
    """Yield name and element type of every tensor of a graph after shape inference."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
