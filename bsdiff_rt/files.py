"""Files and folders that are whole or not there, and what names their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bsdiff_rt.urls import is_url, staged

_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_PART = ".bsdiff-rt-part-"  # how the name of a file begins that is being written


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    if is_url(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file so that it is either absent (or the old one) or complete, whatever interrupts.

    Args:
        path: the file.
        content: what it holds.
        durable: return only when it is on the disk, so that it survives a power failure, too.

    Raises:
        OSError: the folder does not exist, is full or not writable.
    """
    with open_atomically(path) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Windows cannot do this with a folder, and some network drives not at all. Nothing happens then. Object storage
    answers an upload when it has the file.

    Raises:
        OSError: the disk has an error.
    """
    if is_url(path):
        return
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if is_folder:  # one that may be written but not read
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write it in parts. It is put into place at the end, complete; after an error it is as it was.

    Raises:
        OSError: the folder does not exist, is full or not writable.
    """
    if is_url(path):
        with staged(path) as copy, copy.open("wb") as file:
            yield file
        return
    part = path.parent / f"{_PART}{secrets.token_hex(8)}"
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:  # also KeyboardInterrupt: leave no part behind
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove the half-written files that a killed process left below a folder. Nobody else may be writing there."""
    for here, _, names in os.walk(folder):
        for name in names:
            if name.startswith(_PART):
                with suppress(OSError):
                    os.unlink(os.path.join(here, name))


def put_in_place(made: Path, target: Path, aside: Path) -> None:
    """Rename the folder `made` to `target`; a folder that is there is moved to `aside` first, and back if that fails.

    All three on one disk.

    Raises:
        OSError: it cannot be renamed; `target` is as it was.
    """
    try:
        if target.exists():
            target.rename(aside)
        made.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or its lists and objects are nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest_json(content: object) -> str:
    """Return the SHA-256, 64 hex digits, of a JSON value with its keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
