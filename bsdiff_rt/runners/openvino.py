"""Runner `openvino`: the bundle's ONNX graphs in OpenVINO, on a CPU or an Intel GPU.

Nothing needs to be built. An engine holds the graphs as OpenVINO compiled them, and proof that they agree with eager.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import openvino as ov
import platformdirs
import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.networks.blocks import sinusoidal_embedding
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import count_threads

logger = logging.getLogger(__name__)

DENOISER, ENHANCER = "denoiser.blob", "enhancer.blob"  # files of an engine
# OpenVINO's name of the device: CPU (the default), GPU, GPU.1. The buffers lie in the processor's memory in any case,
# so this is not a torch device.
DEVICE_VARIABLE = "BSDIFF_RT_OPENVINO_DEVICE"
# What each precision is called as a hint, and as a capability of a device.
HINTS: dict[Precision, tuple[str, str]] = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16")}


@cache
def get_core() -> ov.Core:
    """Return OpenVINO's core, one for the process.

    Each core replaces the stack that the calling thread handles signals on, and puts the earlier one back when it ends.
    Two cores that do not end in reverse order leave a stack that is freed, and the next signal kills the process.
    """
    return ov.Core()


class OpenVinoRunner(Runner):
    """Run both networks as compiled OpenVINO models. The caller's buffers are used where they lie.

    In bf16 and fp16 the sinusoids of the time embedding are computed in float32, and the enhancer, which runs once per
    image, stays fp32.

    Args:
        denoiser: x_t, cxr, t -> out. In bf16 and fp16 `t` is the sinusoids, [B, number].
        enhancer: x -> out.
        image_size: side of the square images, in px.
        precision: of the denoiser: fp32, bf16 or fp16.
        batch_range: smallest and largest batch; None for any.
    """

    name = "openvino"

    def __init__(
        self,
        denoiser: ov.CompiledModel,
        enhancer: ov.CompiledModel,
        image_size: int,
        *,
        precision: Precision = "fp32",
        batch_range: tuple[int, int | None] = (1, None),
    ) -> None:
        super().__init__(
            device=torch.device("cpu"), precision=precision, batch_range=batch_range, image_size=image_size
        )
        time = denoiser.input("t").get_partial_shape()
        self._time_features = time[1].get_length() if len(time) == 2 else 0
        self._denoiser, self._enhancer = denoiser.create_infer_request(), enhancer.create_infer_request()

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)
        time = sinusoidal_embedding(t, self._time_features) if self._time_features else t
        _run(self._denoiser, {"x_t": x_t, "cxr": cxr, "t": time, "out": out})

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        _run(self._enhancer, {"x": x, "out": out})


def load_bundle(
    bundle: Bundle, device: torch.device, precision: Precision, threads: int | None = None
) -> OpenVinoRunner:
    """Load a bundle. A compiled model is kept in the cache (`locate_model_cache`), so that the next start is faster.

    Args:
        bundle: the model.
        device: the CPU, where the buffers lie.
        precision: fp32, bf16 or fp16.
        threads: processor threads; None takes `devices.count_threads()`.

    Raises:
        EngineError: OpenVINO cannot load a graph, lacks the device, or the device lacks the precision.
    """
    cache = locate_model_cache()
    options: dict[str, object] = {"CACHE_DIR": str(cache)}
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:  # a service user without a home, for example
        logger.info("%s cannot be made (%s): OpenVINO compiles anew at each start", cache, error.strerror)
        options = {}
    denoiser, enhancer = compile_bundle(bundle, precision, options, threads=threads)
    return OpenVinoRunner(denoiser, enhancer, bundle.manifest.preprocessing.size, precision=precision)


def compile_bundle(
    bundle: Bundle,
    precision: Precision,
    options: dict[str, object],
    batch: tuple[int, int | None] = (1, None),
    threads: int | None = None,
) -> tuple[ov.CompiledModel, ov.CompiledModel]:
    """Compile denoiser and enhancer.

    Args:
        bundle: the model.
        precision: of the denoiser. The enhancer is in fp32.
        options: further options of OpenVINO.
        batch: smallest and largest batch; None for any.
        threads: processor threads; None takes `devices.count_threads()`.

    Raises:
        EngineError: OpenVINO cannot load a graph, lacks the device, or the device lacks the precision.
    """
    core, device = get_core(), choose_device()
    _check_device(core, device, precision)
    logger.info("OpenVINO computes on %s (%s)", device, core.get_property(device, "FULL_DEVICE_NAME"))
    compiled = []
    for file, each in (("denoiser.onnx", precision), ("enhancer.onnx", "fp32")):
        graph = bundle.file(file)
        try:
            model = core.read_model(graph)
            if file == "denoiser.onnx" and precision != "fp32":
                _cut_time_embedding(model)
            _set_batch(model, batch)
            compiled.append(core.compile_model(model, device, _list_options(device, each, threads) | options))
        except Exception as error:
            raise _describe(graph, error) from error
    return compiled[0], compiled[1]


def load_engine(
    folder: Path,
    *,
    device: torch.device,
    precision: Precision,
    batch_range: tuple[int, int],
    image_size: int,
) -> OpenVinoRunner:
    """Load an engine whose identity and files were checked.

    Raises:
        EngineError: OpenVINO cannot load it.
    """
    denoiser, enhancer = _import(folder / DENOISER, precision), _import(folder / ENHANCER, "fp32")
    return OpenVinoRunner(denoiser, enhancer, image_size, precision=precision, batch_range=batch_range)


def list_versions() -> dict[str, str]:
    """Return what an engine is tied to: OpenVINO, and the device that it computes on."""
    device = choose_device()
    return {"openvino": ov.get_version(), "openvino device": str(get_core().get_property(device, "FULL_DEVICE_NAME"))}


def find_problem(device: torch.device) -> str | None:
    """Return why OpenVINO cannot be used here: it lacks the device that the user chose. None if it can."""
    chosen, known = choose_device(), get_core().available_devices
    if chosen in known or f"{chosen}.0" in known:
        return None
    return f"OpenVINO has no device {chosen} here, only {', '.join(known)}. Change {DEVICE_VARIABLE}"


def choose_device() -> str:
    """Return the name of the OpenVINO device to use: that in the environment variable, or CPU."""
    return os.environ.get(DEVICE_VARIABLE) or "CPU"


def locate_model_cache() -> Path:
    """Return the folder of compiled models. OpenVINO replaces a file there that no longer fits."""
    return platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "openvino"


def _check_device(core: ov.Core, device: str, precision: Precision) -> None:
    """Raise EngineError unless the device is here and computes in the precision."""
    if problem := find_problem(torch.device("cpu")):
        raise EngineError(problem)
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if HINTS[precision][1] not in capabilities:
        able = [name for name, (_, capability) in HINTS.items() if capability in capabilities]
        raise EngineError(f"OpenVINO computes in {' or '.join(able)} on this {device}, not in {precision}")


def _list_options(device: str, precision: Precision, threads: int | None) -> dict[str, object]:
    """Return OpenVINO's options for one network."""
    options: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": HINTS[precision][0],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if device == "CPU":
        # Left alone it binds its threads to processors, where they meet those of other programs.
        options |= {"INFERENCE_NUM_THREADS": threads or count_threads(), "ENABLE_CPU_PINNING": False}
    return options


def _import(file: Path, precision: Precision) -> ov.CompiledModel:
    device = choose_device()
    try:
        return get_core().import_model(file.read_bytes(), device, _list_options(device, precision, None))
    except Exception as error:
        raise _describe(file, error) from error


def _set_batch(model: ov.Model, batch: tuple[int, int | None]) -> None:
    """Fix the range of the first axis of every input."""
    first, last = batch
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        shape[0] = first if first == last else ov.Dimension(first, -1 if last is None else last)
        shapes[port] = shape
    model.reshape(shapes)


def _describe(graph: Path, error: Exception) -> EngineError:
    return EngineError(f"{graph}: OpenVINO {ov.get_version()} cannot load it: {one_line(error)}")


def _cut_time_embedding(model: ov.Model) -> None:
    """Let a denoiser take the sinusoids of the time embedding in place of the timesteps.

    In bf16 and fp16 OpenVINO would round the angles, which reach 999 rad. Neighbouring timesteps would become the same.

    Args:
        model: the denoiser, changed in place. Its input `t` becomes [B, number] float32.
    """
    old = model.input("t").get_node()
    node = old
    while node.get_type_name() != "Concat":  # of cosines and sines
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    shape = node.get_output_partial_shape(0)
    new = ov.op.Parameter(ov.Type.f32, shape)
    new.output(0).set_names({"t"})
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
    model.remove_parameter(old)
    model.add_parameters([new])
    model.validate_nodes_and_infer_types()


def _run(request: ov.InferRequest, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        request.set_tensor(name, ov.Tensor(buffer.numpy(), shared_memory=True))
    request.infer()
