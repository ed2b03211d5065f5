"""Find the files of a folder that have arrived completely. Torch-free."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bsdiff_rt.folder.search import logger, resolve_path

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


class Watcher:
    """Looks into a folder again and again, and names each file once it has stopped changing.

    Args:
        folder: the folder to watch, with everything below it.
        output: a folder that is left out, because results appear there.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self._folder, self._excluded = folder, resolve_path(output)
        self._seen: dict[Path, Stamp] = {}
        self._named: dict[Path, Stamp] = {}

    def poll(self) -> set[Path]:
        """Return the files that have kept size and time since the last call, and were not named before as they are.

        A file is named again when it has changed. A folder that cannot be read, such as a network drive that is away,
        counts as empty.
        """
        before, self._seen = self._seen, self._list()
        self._named = {path: stamp for path, stamp in self._named.items() if path in self._seen}
        ready = {
            path: stamp for path, stamp in self._seen.items() if before.get(path) == stamp != self._named.get(path)
        }
        self._named |= ready
        return set(ready)

    def forget(self, files: set[Path]) -> None:
        """Name these files again at the next call."""
        for path in files:
            self._named.pop(path, None)

    def _list(self) -> dict[Path, Stamp]:
        found: dict[Path, Stamp] = {}
        for here, folders, names in os.walk(self._folder):
            folders[:] = [each for each in folders if resolve_path(Path(here, each)) != self._excluded]
            for path in (Path(here, name) for name in names):
                try:
                    status = path.stat()
                except OSError:  # gone since it was listed, or a link to nowhere
                    continue
                found[path] = status.st_size, status.st_mtime_ns
        return found


class Once(logging.Filter):
    """Let each message pass once. A folder that is searched every few seconds has the same to say every time."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record has a new message."""
        message = record.getMessage()
        known = message in self._said
        self._said.add(message)
        return not known


@contextmanager
def say_once() -> Iterator[None]:
    """Let the search of folders say each message once, until the block ends."""
    once = Once()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
