"""One whole sampling step as an ONNX graph, so that any runtime can run the loop."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

PREDICTION = "prediction"  # the denoiser's own output


def add_step(model: ModelProto) -> None:
    """Turn a denoiser's graph into one sampling step (`sampling.sampler.step`), in place.

    | | name | shape |
    |---|---|---|
    | input | x_t, x0_previous, cxr, z | [B, 1, H, W] float32 |
    | input | row | [1, 7] float32: t, P, Q, A, B, C, S |
    | output | x_next, x0 | [B, 1, H, W] float32 |

    Args:
        model: inputs x_t, cxr, t, and output out, all float32. Operator set 18.
    """
    graph = model.graph
    _rename(model, "out", PREDICTION)
    image = next(value for value in graph.input if value.name == "x_t").type.tensor_type.shape
    dimensions = [dim.dim_value or dim.dim_param for dim in image.dim]
    columns = ("t", "P", "Q", "A", "B", "C", "S")
    make = helper.make_node
    before = [
        make("Split", ["row"], [f"row.{column}" for column in columns], axis=1, num_outputs=7),
        make("Reshape", ["row.t", "step.one"], ["row.t.flat"]),
        make("Shape", ["x_t"], ["step.batch"], start=0, end=1),
        make("Expand", ["row.t.flat", "step.batch"], ["t"]),
    ]
    after = [
        # x0 = clamp(P x_t + Q prediction, -1, 1) + 0 prediction: an infinity becomes NaN, not a valid white pixel
        make("Mul", ["x_t", "row.P"], ["step.Px"]),
        make("Mul", [PREDICTION, "row.Q"], ["step.Qout"]),
        make("Add", ["step.Px", "step.Qout"], ["step.sum"]),
        make("Clip", ["step.sum", "step.least", "step.most"], ["step.clipped"]),
        make("Mul", [PREDICTION, "step.zero"], ["step.nothing"]),
        make("Add", ["step.clipped", "step.nothing"], ["x0"]),
        # x_next = A x_t + B x0 + C x0_previous + S z
        make("Mul", ["x_t", "row.A"], ["step.Ax"]),
        make("Mul", ["x0", "row.B"], ["step.Bx0"]),
        make("Mul", ["x0_previous", "row.C"], ["step.Cx0"]),
        make("Mul", ["z", "row.S"], ["step.Sz"]),
        make("Sum", ["step.Ax", "step.Bx0", "step.Cx0", "step.Sz"], ["x_next"]),
    ]
    nodes = [*before, *graph.node, *after]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dimensions) for name in ("cxr", "x_t")}
    values |= {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dimensions) for name in ("x0_previous", "z")
    }
    inputs = [*values.values(), helper.make_tensor_value_info("row", TensorProto.FLOAT, [1, len(columns)])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dimensions) for name in ("x_next", "x0")]
    for field, content in ((graph.node, nodes), (graph.input, inputs), (graph.output, outputs)):
        del field[:]
        field.extend(content)
    constants = {"step.least": -1.0, "step.most": 1.0, "step.zero": 0.0}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "step.one"))


def _rename(model: ModelProto, old: str, new: str) -> None:
    """Rename a tensor of a graph."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
