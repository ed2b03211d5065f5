"""A stand-in for the module tensorrt that records what it is asked and fails where it is told to.

It answers as the bindings' documentation and source say TensorRT does: False or None and a message to the logger, no
exception except in constructors, `set_shape` and `infer_shapes`. A "plan" names its tensors; "running" one computes a
sum that shows which buffer was which. It proves what the runner does with TensorRT's answers, nothing about TensorRT.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx

WEIGHTS = {"x_t": 1.0, "cxr": 10.0, "x": 0.5}  # of each input in the fake network's output; t is added as it is


class Recorder:
    """Calls in order, and the names of those that must fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: set[str] = set()
        self.phases = [("Building", None, 2)]
        self.kernels: list[bytes] = []  # those that were given back
        self.logger: Any = None

    def call(self, name: str, *arguments: Any) -> bool:
        """Notes a call; whether it succeeds. A failing one is explained to the logger, as TensorRT does."""
        self.calls.append((name, *arguments))
        if name in self.fails:
            self.logger.log(self.logger.ERROR, f"{name} failed\n  for a reason")
        return name not in self.fails

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of one name."""
        return [arguments for called, *arguments in self.calls if called == name]


def make(version: str = "11.4.0.106") -> tuple[types.ModuleType, Recorder]:
    """The module, and the recorder of everything made from it."""
    recorder = Recorder()
    module = types.ModuleType("tensorrt")
    major = int(version.split(".")[0])

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def __init__(self) -> None:
            assert recorder.logger is None, "a second logger in one process"
            recorder.logger = self

    class IProgressMonitor:
        def __init__(self) -> None:
            self.ready = True

    class Tensor:
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self.name, self.shape = name, shape

    class Network:
        def __init__(self) -> None:
            self.inputs: list[Tensor] = []

        num_inputs = property(lambda self: len(self.inputs))

        def get_input(self, index: int) -> Tensor:
            return self.inputs[index]

    class ParserError:
        def node_operator(self) -> str:
            return "Conv"

        def node_name(self) -> str:
            return "node_3"

        def desc(self) -> str:
            return "not\n  supported"

    class OnnxParser:
        num_errors = 5

        def __init__(self, network: Network, logger: ILogger) -> None:
            if not recorder.call("OnnxParser"):
                raise TypeError("factory function returned nullptr")
            self.network = network

        def parse_from_file(self, model: str) -> bool:
            loaded = onnx.load(model)  # with its weights, which must lie beside it
            for value in loaded.graph.input:
                shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
                self.network.inputs.append(Tensor(value.name, shape))
            return recorder.call("parse_from_file", Path(model), loaded)

        def get_error(self, index: int) -> ParserError:
            assert 0 <= index < self.num_errors
            return ParserError()

    class Profile:
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if not recorder.call("set_shape", input, min, opt, max):
                raise RuntimeError("Shape provided for min is inconsistent")

    class TimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes | None:
            return b"timings" if recorder.call("serialize") else None

    class Config:
        progress_monitor: Any = None

        def set_flag(self, flag: Any) -> None:
            recorder.call("set_flag", flag)

        def clear_flag(self, flag: Any) -> None:
            recorder.call("clear_flag", flag)

        def add_optimization_profile(self, profile: Profile) -> int:
            return 0 if recorder.call("add_optimization_profile") else -1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
            done = recorder.call("create_timing_cache", serialized_timing_cache)
            return TimingCache(serialized_timing_cache) if done else None

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            return recorder.call("set_timing_cache") and cache.content != b"of another GPU"

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            if not recorder.call("Builder", logger):
                raise TypeError("factory function returned nullptr")

        def create_network(self, flags: int) -> Network | None:
            return Network() if recorder.call("create_network", flags) else None

        def create_builder_config(self) -> Config | None:
            return Config() if recorder.call("create_builder_config") else None

        def create_optimization_profile(self) -> Profile | None:
            return Profile() if recorder.call("create_optimization_profile") else None

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            monitor = config.progress_monitor
            assert monitor.ready, "the base class was not initialised"
            recorder.call("options", config.builder_optimization_level, config.max_aux_streams)
            for phase, parent, steps in recorder.phases:
                monitor.phase_start(phase, parent, steps)
                for step in range(steps):
                    recorder.call("step")
                    if not monitor.step_complete(phase, step):
                        return None
                monitor.phase_finish(phase)
            if not recorder.call("build_serialized_network"):
                return None
            return json.dumps([*(tensor.name for tensor in network.inputs), "out"]).encode()

    class Context:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.active_optimization_profile = 0
            self.addresses: dict[str, int] = {}

        def set_device_memory(self, memory: int, size: int) -> None:
            recorder.call("set_device_memory", memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self.active_optimization_profile = profile_index
            return recorder.call("set_optimization_profile_async", self, profile_index, stream_handle)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            return recorder.call("set_input_shape", self, name, shape)

        def infer_shapes(self) -> list[str]:
            if "infer_shapes raises" in recorder.fails:
                recorder.logger.log(recorder.logger.ERROR, "tensor volume exceeds (2^31)-1")
                raise RuntimeError("infer_shapes error code: 1")
            return [] if recorder.call("infer_shapes") else ["x_t", "t"]

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return recorder.call("set_tensor_address", self, name, memory)

        def execute_async_v3(self, stream_handle: int) -> bool:
            if not recorder.call("execute_async_v3", self, stream_handle):
                return False
            inputs = {name: array_at(self.addresses[name], shape) for name, shape in self.shapes.items()}
            total = sum(WEIGHTS[name] * array for name, array in inputs.items() if name != "t")
            if "t" in inputs:
                total = total + inputs["t"][:, None, None, None]
            array_at(self.addresses["out"], total.shape)[:] = total
            return True

    class Engine:
        def __init__(self, names: list[str]) -> None:
            self.names = names
            self.device_memory_size_v2 = 1000 * len(names)

        num_optimization_profiles = 2
        num_io_tensors = property(lambda self: len(self.names))

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return module.DataType.HALF if f"half {name}" in recorder.fails else module.DataType.FLOAT

        def create_execution_context(self, strategy: Any) -> Context | None:
            return Context() if recorder.call("create_execution_context", strategy) else None

        def create_runtime_config(self) -> RuntimeConfig:
            return RuntimeConfig()

    class RuntimeConfig:
        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            recorder.call("set_execution_context_allocation_strategy", strategy)

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            return recorder.call("set_runtime_cache", cache)

    class RuntimeCache:
        def deserialize(self, serialized_cache: bytes) -> bool:
            recorder.kernels.append(serialized_cache)
            return recorder.call("deserialize")

        def serialize(self) -> bytes:
            return b"kernels"

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            if not recorder.call("Runtime", logger):
                raise TypeError("factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            done = recorder.call("deserialize_cuda_engine")
            return Engine(json.loads(serialized_engine)) if done else None

    module.__version__ = version
    named = {
        "Builder": Builder,
        "IBuilderConfig": Config,
        "ICudaEngine": Engine,
        "IExecutionContext": Context,
        "ILogger": ILogger,
        "INetworkDefinition": Network,
        "IOptimizationProfile": Profile,
        "IProgressMonitor": IProgressMonitor,
        "ITensor": Tensor,
        "ITimingCache": TimingCache,
        "OnnxParser": OnnxParser,
        "ParserError": ParserError,
        "Runtime": Runtime,
        "BuilderFlag": enum.Enum("BuilderFlag", ["TF32"]),
        "DataType": enum.Enum("DataType", ["FLOAT", "HALF"]),
        "ExecutionContextAllocationStrategy": enum.Enum("Strategy", ["STATIC", "USER_MANAGED"]),
        # Its number moved from 10 to 11; read from the bindings.
        "NetworkDefinitionCreationFlag": enum.IntEnum("Flag", {"STRONGLY_TYPED": 1 if major == 10 else 0}),
    }
    for name, value in named.items():
        setattr(module, name, value)
    return module, recorder


def array_at(address: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The float32 array at an address, not a copy."""
    count = int(np.prod(shape))
    return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32).reshape(shape)
