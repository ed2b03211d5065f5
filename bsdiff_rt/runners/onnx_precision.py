"""A bundle's fp32 ONNX graph in fp16 or bf16, with the precision written into the types of the graph.

Backends that take precision from the graph (TensorRT in strongly typed networks, ONNX Runtime) convert nothing by
themselves: wherever two types meet there is a Cast. Inputs and outputs stay float32. What else stays float32, and why:

- InstanceNormalization, the statistics of each group norm: sums over up to a million activations.
- The time embedding up to and with its first Linear: the angles reach 999 rad, where fp16 is spaced 0.5.
- The sum that makes the output of a network with a residual: it is the picture itself, on a scale of [-1, 1].
- Attention from the scaled query and key to its result, if asked for: TensorRT 11.3 reads Casts around attention as a
  fused fp16 kernel with fp32 sums; before 11.3, the same Casts keep it from fusing attention at all.
- Resize in bf16: TensorRT has no bf16 kernel for it. Nearest neighbour only copies, so nothing is lost.

The operator set stays 18. Its Conv names no bf16, which ONNX admits from operator set 22 on; TensorRT takes the type
from the tensors. ONNX Runtime has no bf16 convolution in either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.onnx_attention import transpose_keys

ReducedPrecision = Literal["fp16", "bf16"]

CONVERSION = 2  # raised with every change of what is converted; recorded with every engine
TIME_INPUT = "t"
_TYPES = {"fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16)}
_SUFFIX: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# Every operator of both networks; each computes its result in the type of its inputs, or moves data. Another one would
# need a thought about its precision.
_OPERATORS = (
    *("Add", "Concat", "Conv", "Cos", "Gemm", "InstanceNormalization", "MatMul", "Mul", "Reshape", "Resize", "Shape"),
    *("Sigmoid", "Sin", "Slice", "Softmax", "Squeeze", "Transpose", "Unsqueeze"),
)
_FP32_INPUTS = {"Resize": (1, 2)}  # region and scales: float32 whatever the image's type


def reduce_precision(graph: Path, destination: Path, precision: ReducedPrecision, *, attention_fp32: bool) -> None:
    """Write the graph at `graph` in another precision to `destination`, in one file with its weights.

    Args:
        graph: an fp32 graph of a bundle, its weights beside it.
        destination: the file to write, below 2 GiB; larger networks need external data.
        precision: of weights and activations.
        attention_fp32: whether attention's products and softmax are computed in float32.

    Raises:
        EngineError: the graph cannot be read, has an operator or a type this conversion does not know, or a weight
            that the precision cannot hold.
    """
    try:
        model = onnx.load(graph)
        transpose_keys(model)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except Exception as error:  # protobuf, onnx and the file system share no base class
        raise EngineError(
            f"{graph}: cannot be read as an ONNX graph with its weights ({type(error).__name__})"
        ) from error
    for node in model.graph.node:
        if node.op_type not in _OPERATORS or node.domain not in ("", "ai.onnx"):
            raise EngineError(f"{graph}: operator {node.op_type} has no rule for {precision}; use --precision fp32")
    _Conversion(model, precision, attention_fp32).run()
    onnx.save(model, destination)


class _Conversion:
    """One graph on its way from fp32 to `precision`; `run` rewrites `model` in place."""

    def __init__(self, model: ModelProto, precision: ReducedPrecision, attention_fp32: bool) -> None:
        self._graph: GraphProto = model.graph
        self._precision = precision
        self._type, self._torch_type = _TYPES[precision]
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._floats = {name for name, kind in _element_types(model.graph) if kind == TensorProto.FLOAT}
        # Type of each float tensor, as far as the walk has come.
        self._now: dict[str, int] = dict.fromkeys(self._floats, TensorProto.FLOAT)
        self._fp32_nodes = set(self._choose(attention_fp32))
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

    def _choose(self, attention_fp32: bool) -> Iterator[int]:
        """Positions of the nodes that compute in float32."""
        nodes = list(self._graph.node)
        made_by = {name: position for position, node in enumerate(nodes) for name in node.output}
        outputs = {output.name for output in self._graph.output}
        timed = {TIME_INPUT}
        for position, node in enumerate(nodes):
            if node.op_type == "InstanceNormalization" or (node.op_type == "Resize" and self._precision == "bf16"):
                yield position
            if node.op_type == "Add" and outputs & set(node.output):
                yield position
            if timed & set(node.input):
                yield position
                if node.op_type not in ("Gemm", "MatMul"):
                    timed |= set(node.output)
            if node.op_type == "Softmax" and attention_fp32:
                scores = made_by[node.input[0]]
                yield from (position, scores)
                yield from (
                    at for at in map(made_by.get, nodes[scores].input) if at is not None and nodes[at].op_type == "Mul"
                )
                yield from (other for other, reader in enumerate(nodes) if node.output[0] in reader.input)

    def _convert(self, node: NodeProto, kind: int) -> None:
        """Append `node`, its float inputs brought to type `kind` first."""
        for index, name in enumerate(node.input):
            if name in self._floats and node.op_type != "Shape":
                needed = TensorProto.FLOAT if index in _FP32_INPUTS.get(node.op_type, ()) else kind
                node.input[index] = self._as(name, needed)
        self._now |= dict.fromkeys(self._floats & set(node.output), kind)
        self._nodes.append(node)

    def _as(self, name: str, kind: int) -> str:
        """The tensor `name` in type `kind`: itself, a converted weight or the result of a Cast, made once."""
        if self._now[name] == kind:
            return name
        result = f"{name}.{_SUFFIX[kind]}"
        if result not in self._converted:
            if name in self._weights:
                self._converted[result] = self._weight(self._weights[name], result)
            else:
                self._converted[result] = None
                self._nodes.append(helper.make_node("Cast", [name], [result], to=kind, name=f"{result}.cast"))
        return result

    def _weight(self, tensor: TensorProto, name: str) -> TensorProto:
        """`tensor` rounded to the new type, to the nearest and to even in between."""
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(self._torch_type)
        if not values.isfinite().all():
            raise EngineError(
                f"weight {tensor.name} holds a value beyond {self._precision}, whose largest is "
                f"{torch.finfo(self._torch_type).max:.4g}; use another --precision"
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
    """Name and element type of every tensor of a graph after shape inference."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
