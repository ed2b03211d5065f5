"""Files to process and a runner to process them with, for the tests of everything above the networks."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from synthetic import chest, dataset, save, stored
from torch import nn

from bsdiff_rt.bench.networks import fill_randomly
from bsdiff_rt.runners.base import Runner

SHAPE = (160, 144)  # larger than the tiny networks' 64 px, not square, and no icon (search.ICON_PX)


def randomise(network: nn.Module, seed: int) -> None:
    """Fill every parameter, the zero-initialised too, with noise that keeps activations near 1."""
    fill_randomly(network, torch.Generator().manual_seed(seed))


def png(path: Path, bits: int = 8, seed: int = 0, shape: tuple[int, int] = SHAPE) -> Path:
    """A drawn chest X-ray as PNG: 8 bits, or 9 to 16 bits in 16; every depth's largest value occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.rint(chest(*shape, seed) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    values[0, 0] = 2**bits - 1
    path.write_bytes(cv2.imencode(".png", values)[1].tobytes())
    return path


def dicom(path: Path, bits: int = 12, seed: int = 0, **elements: Any) -> Path:
    """A drawn chest X-ray as DICOM, computed radiography; its header holds synthetic.SECRETS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = {"SOPInstanceUID": f"1.2.826.0.1.3680043.8.498.4711.3.{seed}"}
    return save(path, dataset(stored(chest(*SHAPE, seed), bits), bits, **uid | elements))


def pixels(path: Path) -> NDArray[Any]:
    """The stored values of a PNG."""
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert values is not None, f"{path} is no picture"
    return values


def report_of(folder: Path) -> dict[str, Any]:
    """report.json of an output folder."""
    return json.loads((folder / "report.json").read_text())


def fates(folder: Path) -> dict[str, str]:
    """Status by input file name, from report.json; one entry per name."""
    files = report_of(folder)["files"]
    found = {Path(entry["input"]).name: entry["status"] for entry in files}
    assert len(found) == len(files), files
    return found


def tree(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def put_channels_first(model: Any) -> int:
    """Move the channels before rows and columns are separated, as bundles did before. Return how many were changed."""
    import onnx
    from onnx import helper

    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for turn in [node for node in model.graph.node if node.op_type == "Transpose"]:
        split = made_by.get(turn.input[0])
        if split is None or split.op_type != "Reshape" or made_by[split.input[0]].op_type != "Squeeze":
            continue
        batch, height, width, channels = onnx.numpy_helper.to_array(constants[split.input[1]]).tolist()
        shape = np.array([batch, channels, height, width], np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(shape, f"old {turn.output[0]}"))
        result, between = turn.output[0], split.output[0]
        split.CopyFrom(helper.make_node("Transpose", [split.input[0]], [between], perm=[0, 2, 1]))
        turn.CopyFrom(helper.make_node("Reshape", [between, f"old {result}"], [result], allowzero=1))
        count += 1
    del model.graph.value_info[:]
    return count


class ToyRunner(Runner):
    """A pixelwise stand-in for both networks: milliseconds to build, the same bits at every batch size.

    The denoiser (x0) returns 0.7 cxr + 0.2 tanh(x_t), the enhancer 0.9 x. Each call is counted first, and `before` is
    then asked with the number of enhancer calls so far; what it raises is what the runner raises. `after` may change
    the enhancer's output in place.
    """

    name = "toy"

    def __init__(self, image_size: int) -> None:
        super().__init__(device=torch.device("cpu"), precision="fp32", batch_range=(1, None), image_size=image_size)
        self.denoised = self.enhanced = 0
        self.batches: list[int] = []
        self.before: Callable[[int], None] = lambda _: None
        self.after: Callable[[int, torch.Tensor], None] = lambda _, __: None
        self.closed = False

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        self.denoised += 1
        torch.add(0.7 * cxr, torch.tanh(x_t), alpha=0.2, out=out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.enhanced += 1
        self.batches.append(len(x))
        self.before(self.enhanced)
        torch.mul(x, 0.9, out=out)
        self.after(self.enhanced, out)

    def close(self) -> None:
        self.closed = True


def mode(path: Path) -> int:
    """Who may do what with a file or folder, as chmod takes it."""
    return stat.S_IMODE(path.stat().st_mode)


def toy_command(size: int, arguments: list[str]) -> str:
    """Return the code of a program that runs `bsdiff-rt` with a toy runner, as a process of its own."""
    return f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from helpers import ToyRunner
from bsdiff_rt import cli
from bsdiff_rt.folder import pipeline
pipeline.load_runner_for = lambda bundle, settings: (
    pipeline.choose(pipeline.request_runner(bundle, settings)), ToyRunner({size}))
sys.argv = ["bsdiff-rt", *{arguments!r}]
cli.main()
"""
