"""The kernels that TensorRT for RTX compiles when a plan first runs on a GPU, kept for the next start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import platformdirs

from bsdiff_rt.errors import EngineError
from bsdiff_rt.files import file_sha256, write_atomically
from bsdiff_rt.runners.tensorrt_library import Library

logger = logging.getLogger(__name__)


def locate_kernels(plan: Path) -> Path:
    """Return the file of the kernels compiled for a plan. It goes by the plan's content.

    It lies in the user's cache, not beside the plan: an engine's files are fixed by its hashes, and kernels are native
    code, which must come from a folder that nobody else may write to.
    """
    folder = platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "kernels"
    return folder / f"{file_sha256(plan)[:32]}.kernels"


class KernelCache:
    """The kernels of one plan. TensorRT for RTX checks by itself that they fit this GPU and driver.

    Args:
        library: TensorRT for RTX.
        engine: the deserialised plan.
        path: the file of its kernels (`locate_kernels`).

    Raises:
        EngineError: the library gives or takes no cache.
    """

    def __init__(self, library: Library, engine: Any, path: Path) -> None:
        self._library, self._engine, self._path = library, engine, path
        self._config = library.make("runtime configuration", engine.create_runtime_config)
        strategy = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config.set_execution_context_allocation_strategy(strategy)
        self._cache = library.make("runtime cache", self._config.create_runtime_cache)
        self._known = path.read_bytes() if path.is_file() else b""
        if self._known and not self._cache.deserialize(self._known):
            logger.warning("%s does not accept the kernels %s%s", library, path, library.logger.take_errors())
            self._known = b""
        if not self._config.set_runtime_cache(self._cache):
            raise EngineError(f"{library} takes no runtime cache{library.logger.take_errors()}")

    def make_context(self) -> Any:
        """Return an execution context that takes kernels from here, and leaves here those that it compiles."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Keep the kernels, if there are new ones. A file that cannot be written costs the next start some seconds."""
        serialised = self._cache.serialize()
        content = b"" if serialised is None else bytes(memoryview(serialised))
        if content in (b"", self._known):
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, content)
        except OSError as error:
            logger.warning("%s: cannot be written (%s). It is compiled again at the next start.", self._path, error)
