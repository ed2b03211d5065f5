"""What differs between TensorRT and TensorRT for RTX. Everything else of both runners is shared.

Only this module imports their Python packages, which are optional and have the same API. The code that uses them keeps
to what TensorRT has from 10.9 to 11:

- strongly typed networks: the precision is in the graph (onnx_precision.py);
- flags by name, because their numbers changed with 11;
- the `_v2` and `_v3` methods.

Most calls return False or None and log a reason instead of raising. So every result is checked, and the reason is taken
from the logger.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

import torch

from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.devices import RTX_CAPABILITIES

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Library:
    """One of the two libraries. It is imported when it is first used.

    Args:
        runner: the name of its runner.
        title: the library's name in messages.
        package: the Python module.
        extra: the extra of this package that installs it.
        fp32_softmax_from: the version from which attention in fp16 with a softmax in float32 is fused. Before, the
            Casts prevent it.
        capabilities: the compute capabilities that it builds for, whatever this machine has; () if it builds for the
            GPU of this machine alone, because it times kernels there.
        compiles_later: whether its kernels are compiled when a plan first runs. They can be kept (`KernelCache`).
    """

    def __init__(
        self,
        *,
        runner: str,
        title: str,
        package: str,
        extra: str,
        fp32_softmax_from: tuple[int, ...],
        capabilities: tuple[str, ...] = (),
        compiles_later: bool = False,
    ) -> None:
        self.runner, self.title, self.package, self.extra = runner, title, package, extra
        self.fp32_softmax_from, self.capabilities = fp32_softmax_from, capabilities
        self.compiles_later = compiles_later

    def __str__(self) -> str:
        """Return the title with the version."""
        return f"{self.title} {self.trt.__version__}"

    @cached_property
    def trt(self) -> Any:
        """The imported Python module."""
        try:
            return import_module(self.package)
        except (ImportError, OSError) as error:  # the package, or one of the libraries it loads
            raise EngineError(
                f"{self.title} cannot be imported ({one_line(error)}). "
                f"Install it: pip install 'bsdiff-rt[{self.extra}]'"
            ) from error

    @cached_property
    def logger(self) -> Any:
        """The library's one logger: it keeps the first one that it gets in a process, and ignores others."""
        return _make_logger(self)

    def list_versions(self) -> dict[str, str]:
        """Return the versions of the libraries that an engine is tied to."""
        return {
            self.runner: self.trt.__version__,
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
        }

    def check_capabilities(self, wanted: tuple[str, ...]) -> None:
        """Raise EngineError unless the library builds for these compute capabilities without their GPU."""
        for capability in wanted:
            if capability not in self.capabilities:
                able = f"for {', '.join(self.capabilities)}" if self.capabilities else "only for this machine's GPU"
                raise EngineError(f"{self.title} does not build for compute capability {capability}. It builds {able}.")

    def set_capabilities(self, config: Any, wanted: tuple[str, ...]) -> None:
        """Tell a builder configuration which compute capabilities to build for; () for this machine's GPU.

        Raises:
            EngineError: the library does not take them.
        """
        names = [f"SM{capability.replace('.', '')}" for capability in wanted] or ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(self.trt.ComputeCapability, name), index):
                raise EngineError(f"{self} does not build for {name}{self.logger.take_errors()}")

    def make(self, what: str, create: Callable[[], T]) -> T:
        """Return what `create` returns. If the library fails, its constructors raise and its methods return None.

        Raises:
            EngineError: the library fails.
        """
        try:
            made = create()
        except (TypeError, RuntimeError) as error:
            raise EngineError(f"{self} gives no {what}: {one_line(error)}{self.logger.take_errors()}") from error
        if made is None:
            raise EngineError(f"{self} gives no {what}{self.logger.take_errors()}")
        return made


def _make_logger(library: Library) -> Any:
    trt = library.trt

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # no types
        """Write the library's messages to our log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=3)
            self._levels = {
                trt.ILogger.INTERNAL_ERROR: logging.ERROR,
                trt.ILogger.ERROR: logging.ERROR,
                trt.ILogger.WARNING: logging.WARNING,
            }

        def log(self, severity: Any, msg: str) -> None:
            """Log a message. The library calls this from any of its threads."""
            level = self._levels.get(severity, logging.DEBUG)
            logger.log(level, "%s: %s", library.title, msg)
            if level == logging.ERROR:
                self._errors.append(" ".join(msg.split())[:200])

        def take_errors(self) -> str:
            """Return the last errors as the end of a sentence, and clear them. "" if there were none."""
            errors, self._errors = self._errors, deque(maxlen=3)
            return f"; {library.title} says: {'; '.join(errors)}" if errors else ""

    return Logger()


TENSORRT = Library(runner="tensorrt", title="TensorRT", package="tensorrt", extra="tensorrt", fp32_softmax_from=(11, 3))
RTX = Library(
    runner="tensorrt-rtx",
    title="TensorRT-RTX",
    package="tensorrt_rtx_bindings",  # the package tensorrt_rtx only passes it on
    extra="tensorrt-rtx",
    fp32_softmax_from=(1, 7),
    capabilities=RTX_CAPABILITIES,
    compiles_later=True,
)
