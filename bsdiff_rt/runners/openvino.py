"""Runner `openvino`: the bundle's ONNX graphs in OpenVINO, on a CPU or an Intel GPU. Nothing is built beforehand."""

from __future__ import annotations

import logging
import os
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

# OpenVINO's name of the device: CPU (the default), GPU, GPU.1. The buffers lie in the processor's memory in any case,
# so this is not a torch device.
DEVICE_VARIABLE = "BSDIFF_RT_OPENVINO_DEVICE"
# What each precision is called as a hint, and as a capability of a device.
HINTS: dict[Precision, tuple[str, str]] = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16")}


class OpenVinoRunner(Runner):
    """Run both graphs as OpenVINO models. The caller's buffers are used where they lie.

    A compiled model is kept in the cache folder (`locate_model_cache`), so that the next start is faster. In bf16 and
    fp16 the sinusoids of the time embedding are computed in float32, and the enhancer, which runs once per image, stays
    fp32.

    Args:
        denoiser: path of denoiser.onnx: x_t, cxr, t -> out.
        enhancer: path of enhancer.onnx: x -> out.
        image_size: side of the square images, in px.
        threads: processor threads; None takes `devices.count_threads()`.
        precision: fp32, bf16 or fp16.

    Raises:
        EngineError: OpenVINO cannot load a graph, lacks the device, or the device lacks the precision.
    """

    name = "openvino"

    def __init__(
        self,
        denoiser: Path,
        enhancer: Path,
        image_size: int,
        threads: int | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(device=torch.device("cpu"), precision=precision, batch_range=(1, None), image_size=image_size)
        core, device = ov.Core(), choose_device()
        _check_device(core, device, precision)
        logger.info("OpenVINO computes on %s (%s)", device, core.get_property(device, "FULL_DEVICE_NAME"))
        networks = [_read(core, denoiser), _read(core, enhancer)]
        self._time_features = 0 if precision == "fp32" else _cut_time_embedding(networks[0])
        self._denoiser, self._enhancer = (
            _compile(core, network, device, _list_options(device, hint, threads), graph)
            for network, hint, graph in zip(networks, (precision, "fp32"), (denoiser, enhancer), strict=True)
        )

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)
        time = sinusoidal_embedding(t, self._time_features) if self._time_features else t
        _run(self._denoiser, {"x_t": x_t, "cxr": cxr, "t": time, "out": out})

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        _run(self._enhancer, {"x": x, "out": out})


def load_bundle(bundle: Bundle, device: torch.device, precision: Precision) -> OpenVinoRunner:
    """Load a bundle.

    Args:
        bundle: the model.
        device: the CPU, where the buffers lie.
        precision: fp32, bf16 or fp16.

    Raises:
        EngineError: OpenVINO cannot load a graph, lacks the device, or the device lacks the precision.
    """
    return OpenVinoRunner(
        bundle.file("denoiser.onnx"),
        bundle.file("enhancer.onnx"),
        bundle.manifest.preprocessing.size,
        precision=precision,
    )


def find_problem(device: torch.device) -> str | None:
    """Return why OpenVINO cannot be used here: it lacks the device that the user chose. None if it can."""
    chosen, known = choose_device(), ov.Core().available_devices
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
    cache = locate_model_cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    options: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": HINTS[precision][0],
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_DIR": str(cache),
    }
    if device == "CPU":
        # Left alone it binds its threads to processors, where they meet those of other programs.
        options |= {"INFERENCE_NUM_THREADS": threads or count_threads(), "ENABLE_CPU_PINNING": False}
    return options


def _read(core: ov.Core, graph: Path) -> ov.Model:
    try:
        return core.read_model(graph)
    except Exception as error:
        raise _describe(graph, error) from error


def _compile(core: ov.Core, model: ov.Model, device: str, options: dict[str, object], graph: Path) -> ov.InferRequest:
    try:
        return core.compile_model(model, device, options).create_infer_request()
    except Exception as error:
        raise _describe(graph, error) from error


def _describe(graph: Path, error: Exception) -> EngineError:
    return EngineError(f"{graph}: OpenVINO {ov.get_version()} cannot load it: {one_line(error)}")


def _cut_time_embedding(model: ov.Model) -> int:
    """Let a denoiser take the sinusoids of the time embedding in place of the timesteps, and return their number.

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
    return int(shape[1].get_length())


def _run(request: ov.InferRequest, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        request.set_tensor(name, ov.Tensor(buffer.numpy(), shared_memory=True))
    request.infer()
