"""Write ONNX graphs whose weights are the bytes of the safetensors file beside them, so that weights exist once."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from bsdiff_rt.errors import BundleError

# The newest operator set that TensorRT 10.3 to 11 reads in full; ONNX Runtime's CPU kernels are faster with its
# decomposed attention than with the fused operator of opset 23 (docs/design.md, Export).
OPSET = 18
SMALL_BYTES = 256  # constants below this stay in the graph: shapes, scales, a few frequencies


def export_graph(network: nn.Module, inputs: dict[str, torch.Tensor], weights: Path, graph: Path) -> None:
    """Write a network's weights as safetensors and its graph as ONNX, with the output `out`.

    Args:
        network: in evaluation mode, fp32, on the CPU.
        inputs: example inputs by name, in the order of `forward`. The first axis of each is the batch, which is
            dynamic.
        weights: the safetensors file to write.
        graph: the ONNX file to write, in the same folder.

    Raises:
        BundleError: a weight of the graph is not one of the network's, so it cannot be shared.
    """
    parameters = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(parameters, weights)
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            network,
            # Clones: one tensor under two names would be traced as one input.
            tuple(tensor.clone() for tensor in inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["out"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    share_weights(model, weights)
    model.metadata_props.clear()
    for node in model.graph.node:  # paths and stack traces of the exporting machine
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.save(model, graph)
    onnx.checker.check_model(str(graph))


def share_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Make every large initialiser of `model` external data inside the safetensors file `weights`.

    The exporter renames, reshapes and transposes weights. The bytes tell which is which. A transposed weight becomes a
    Transpose node on the shared bytes, which every runtime folds when it loads the graph.

    Raises:
        BundleError: an initialiser is no weight of the file.
    """
    by_bytes: dict[bytes, tuple[int, list[int]]] = {}
    by_transpose: dict[bytes, tuple[str, int, list[int]]] = {}
    for name, dtype, shape, offset, data in read_tensors(weights):
        by_bytes.setdefault(data, (offset, shape))
        if len(shape) == 2:
            flipped = np.frombuffer(data, dtype).reshape(shape).T
            by_transpose.setdefault(np.ascontiguousarray(flipped).tobytes(), (name, offset, shape))
    added: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        data = numpy_helper.to_array(tensor).tobytes()
        if data in by_bytes:
            _point(tensor, weights.name, by_bytes[data][0], len(data))
        elif data in by_transpose:
            name, offset, shape = by_transpose[data]
            result = tensor.name
            tensor.name = f"{result}.stored"
            tensor.dims[:] = shape
            _point(tensor, weights.name, offset, len(data))
            added.append(helper.make_node("Transpose", [tensor.name], [result], perm=[1, 0], name=f"{name}.transpose"))
        elif len(data) >= SMALL_BYTES:
            raise BundleError(f"graph constant {tensor.name} ({len(data)} bytes) is no weight of {weights.name}")
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def read_tensors(weights: Path) -> Iterator[tuple[str, np.dtype[np.float32], list[int], int, bytes]]:
    """Yield name, dtype, shape, offset in the file and bytes of every tensor of a safetensors file (fp32 only)."""
    content = weights.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + header_bytes])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise BundleError(f"{weights.name}: {name} is {entry['dtype']}, bundles hold F32")
        first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
        yield name, np.dtype("<f4"), entry["shape"], first, content[first:last]


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its warnings about packages that are not used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
