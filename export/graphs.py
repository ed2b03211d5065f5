"""Write ONNX graphs whose weights are the bytes of the safetensors file beside them, so that weights exist once."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from bsdiff_rt.errors import BundleError
from bsdiff_rt.networks.blocks import join_projections

# The newest operator set that TensorRT 10.3 to 11 reads in full; ONNX Runtime's CPU kernels are faster with its
# decomposed attention than with the fused operator of opset 23 (docs/design.md, Export).
OPSET = 18
SMALL_BYTES = 256  # constants below this stay in the graph: shapes, scales, a few frequencies


def export_graph(network: nn.Module, inputs: dict[str, torch.Tensor], weights: Path, graph: Path) -> None:
    """Write a network's weights as safetensors and its graph as ONNX, with the output `out`.

    The graph computes queries, keys and values of each attention in one product. Their weights are stored apart.

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
            join_projections(copy.deepcopy(network)),
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


@dataclass(frozen=True)
class _Stored:
    """One weight of the safetensors file."""

    name: str
    offset: int
    shape: list[int]
    data: NDArray[np.float32]


@dataclass(frozen=True)
class _Source:
    """What a constant of the graph is made of: weights, joined along their first axis, then perhaps transposed."""

    parts: tuple[_Stored, ...]
    transposed: bool = False


def share_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Make every large initialiser of `model` external data inside the safetensors file `weights`.

    The exporter renames, reshapes and transposes weights, and `join_projections` joins three of them. The bytes tell
    which is which. A transposed or joined weight becomes a Transpose or Concat node on the shared bytes, which every
    runtime folds when it loads the graph.

    Raises:
        BundleError: an initialiser is no weight of the file.
    """
    stored = {name: _Stored(name, offset, shape, data) for name, shape, offset, data in _read_arrays(weights)}
    sources: dict[bytes, _Source] = {}  # by digest of the bytes
    for parts in (*((weight,) for weight in stored.values()), *_list_projections(stored)):
        joined = np.concatenate([part.data for part in parts]) if len(parts) > 1 else parts[0].data
        sources.setdefault(_digest(joined), _Source(parts))
        if joined.ndim == 2:
            sources.setdefault(_digest(joined.T), _Source(parts, transposed=True))
    added: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        source = sources.get(_digest(values))
        if source is None:
            if values.nbytes >= SMALL_BYTES:
                raise BundleError(
                    f"graph constant {tensor.name} ({values.nbytes} bytes) is no weight of {weights.name}"
                )
        elif len(source.parts) == 1 and not source.transposed:
            _point(tensor, weights.name, source.parts[0].offset, values.nbytes)
        else:
            added += _rebuild(model.graph, tensor, source, weights.name)
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _digest(values: NDArray[Any]) -> bytes:
    """Return the SHA-256 of an array's bytes, row by row."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()


def _list_projections(stored: dict[str, _Stored]) -> Iterator[tuple[_Stored, ...]]:
    """Yield the weights, and the biases, that `join_projections` joins."""
    for name in stored:
        if ".to_q." in f".{name}":
            yield tuple(stored[name.replace("to_q.", f"to_{letter}.")] for letter in "qkv")


def _rebuild(
    graph: onnx.GraphProto, tensor: onnx.TensorProto, source: _Source, location: str
) -> Iterator[onnx.NodeProto]:
    """Replace an initialiser by its stored weights, and yield the nodes that make it of them."""
    result = tensor.name
    graph.initializer.remove(tensor)
    names = []
    for number, part in enumerate(source.parts):
        names.append(f"{result}.stored" if len(source.parts) == 1 else f"{result}.stored.{number}")
        stored = graph.initializer.add(name=names[-1], data_type=TensorProto.FLOAT, dims=part.shape)
        _point(stored, location, part.offset, part.data.nbytes)
    if len(names) > 1:
        joined = f"{result}.joined" if source.transposed else result
        yield helper.make_node("Concat", names, [joined], axis=0, name=f"{result}.concat")
        names = [joined]
    if source.transposed:
        yield helper.make_node("Transpose", names, [result], perm=[1, 0], name=f"{result}.transpose")


def _read_arrays(weights: Path) -> Iterator[tuple[str, list[int], int, NDArray[np.float32]]]:
    """Yield name, shape, offset in the file and values of every tensor of a safetensors file."""
    for name, dtype, shape, offset, data in read_tensors(weights):
        yield name, shape, offset, np.frombuffer(data, dtype).reshape(shape)


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
