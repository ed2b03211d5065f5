"""Files in object storage, as paths: s3:// and gs://, through fsspec.

A `UrlPath` is a path whose file operations go to the storage. It can stand for a file or folder wherever this package
uses pathlib. Readers and codecs need files on a disk, so a file is copied into the temporary folder while it is read
(`on_disk`), and a result is made there and uploaded when it is complete (`staged`). The storage's own packages are
imported when the first URL is used. Torch-free.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import re
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError

if sys.platform == "win32":
    from pathlib import WindowsPath as _Base
else:
    from pathlib import PosixPath as _Base

# Storage that shows a file only when it is complete, and what to install for it.
SCHEMES = {"s3": "bsdiff-rt[s3]", "gs": "gcsfs"}
HEAD_BYTES = 1040  # what the formats look at to recognise a file
_HEADS = 1 << 14  # kept in memory
_SEPARATORS = set("/\\:" if os.name == "nt" else "/")
_SUFFIX = 16  # characters; no format's suffix has more
_AT_ONCE = 64  # heads that are read at the same time
logger = logging.getLogger(__name__)

T = TypeVar("T")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)

# What the packages raise that is no OSError, by type, and what to do.
_CAUSES = {
    "NoCredentialsError": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "incomplete credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "DefaultCredentialsError": "no credentials: set GOOGLE_APPLICATION_CREDENTIALS",
    "EndpointConnectionError": "the storage does not answer: check the network and AWS_ENDPOINT_URL",
    "ConnectTimeoutError": "the storage does not answer: check the network and AWS_ENDPOINT_URL",
}


class UrlPath(_Base):
    """A file or folder in object storage. Its text is the URL.

    Every operation raises OSError with a sentence in `strerror` if the storage refuses it or does not answer.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, colon, rest = super().__str__().replace("\\", "/").partition(":/")
        return f"{scheme}://{rest}" if colon and scheme in SCHEMES else f"{scheme}{colon}{rest}"

    def is_file(self) -> bool:
        """Return whether this is a file."""
        return self._find_kind() == "file"

    def is_dir(self) -> bool:
        """Return whether this is a folder: a bucket, or the beginning of some file's path."""
        return self._find_kind() == "directory"

    def exists(self) -> bool:
        """Return whether this is a file or a folder."""
        return self._find_kind() is not None

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing. A folder is there as soon as it holds a file."""

    def open(self, *_: Any, **__: Any) -> Any:
        """Open the file to read its bytes, which are read at once."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Return the file's content."""
        with explain(self):
            return bytes(self._system().cat_file(str(self)))

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """Return the file's text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Write the file. It appears when it is complete."""
        with explain(self):
            self._system().pipe_file(str(self), bytes(data))
        return len(data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        with explain(self):
            self._system().rm_file(str(self))

    def rename(self, target: str | os.PathLike[str]) -> UrlPath:
        """Copy the file to another place, and then remove it here."""
        with explain(self):
            self._system().cp_file(str(self), str(target))
        self.unlink()
        return UrlPath(to_path(os.fspath(target)))

    def _find_kind(self) -> str | None:
        try:
            with explain(self):
                return str(self._system().info(str(self))["type"])
        except FileNotFoundError:
            return None

    def _system(self) -> Any:
        return _open_system(self.parts[0].removesuffix(":"))


def parse_path(words: str) -> Path:
    """Return the path that a user's words mean: a path, or a URL that begins with s3://, gs:// or file://.

    Raises:
        SettingsError: a URL of another kind, or of another machine's file, or its package is not installed.
    """
    found = _URL.fullmatch(words)
    if found is None or os.path.lexists(words):
        return Path(words)
    scheme = found[1].lower()
    if scheme == "file":
        path = words[len("file:") :]
        if path.startswith("//") and not path.startswith("///"):
            raise SettingsError(f"{words}: names another machine. Write file:///folder, or the path alone.")
        return Path(unquote(path[2:] if path.startswith("///") else path))
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in (*SCHEMES, "file"))
        raise SettingsError(f"{words}: URLs of this kind cannot be used. Use a path or one of {known}.")
    _open_system(scheme)
    return to_path(words)


def to_path(text: str | Path) -> Path:
    """Return the path with this text: a `UrlPath` for s3:// and gs://, else a path on a disk.

    pathlib drops one of a URL's slashes; such a path is understood, too.
    """
    found = None if isinstance(text, UrlPath) else _URL.fullmatch(str(text))
    if found is None or found[1].lower() not in SCHEMES or os.path.lexists(text):
        return Path(text) if isinstance(text, str) else text
    return UrlPath(f"{found[1].lower()}:", *filter(None, found[2].split("/")))


def is_url(path: object) -> bool:
    """Return whether a path leads to object storage."""
    return isinstance(path, UrlPath)


def is_file(path: Path) -> bool:
    """Return whether a path leads to a file. On a disk, what cannot be asked for is none.

    Raises:
        SettingsError: the storage does not say.
    """
    return os.path.isfile(path) if not isinstance(path, UrlPath) else _ask(path, path.is_file)


def is_dir(path: Path) -> bool:
    """Return whether a path leads to a folder. On a disk, what cannot be asked for is none.

    Raises:
        SettingsError: the storage does not say.
    """
    return os.path.isdir(path) if not isinstance(path, UrlPath) else _ask(path, path.is_dir)


def lexists(path: Path) -> bool:
    """Return whether something is in this place, be it a link that leads nowhere.

    Raises:
        SettingsError: the storage does not say.
    """
    return os.path.lexists(path) if not isinstance(path, UrlPath) else _ask(path, path.exists)


def resolve(path: Path) -> str:
    """Return the path with links resolved; a URL as it is."""
    return str(path) if is_url(path) else os.path.realpath(path)


def walk(top: Path, onerror: Callable[[OSError], object]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder of the storage with the names of its folders and files, as os.walk does.

    The caller may remove folders from the list that it is given. Names that no path can hold are left out, with a
    warning.

    Args:
        top: a `UrlPath`.
        onerror: called with what the storage refuses.
    """
    assert isinstance(top, UrlPath)
    try:
        with explain(top):
            found = top._system().ls(str(top), detail=True)
    except OSError as error:
        onerror(error)
        return
    folders: list[str] = []
    names: list[str] = []
    odd = 0
    for one in found:
        name, is_folder = _strip_folder(one["name"], top), one["type"] == "directory"
        name = name.removesuffix("/") if is_folder else name
        if name in ("", ".", "..") or set(name) & _SEPARATORS:  # results might be written outside the output folder
            odd += is_folder or name != ""  # a file without a name is only the storage's mark of a folder
        else:
            (folders if is_folder else names).append(name)
    if odd:
        logger.warning(
            "%s: left out %d names that no path can hold: empty, of dots, or with separators. Rename them.", top, odd
        )
    yield top, folders, names
    for folder in folders:
        yield from walk(top / folder, onerror)


def list_below(folder: Path) -> set[str]:
    """Return the path, relative to a folder of the storage, of every file below it.

    Raises:
        SettingsError: the storage refuses to list it.
    """
    assert isinstance(folder, UrlPath)

    def find() -> list[str]:
        try:
            with explain(folder):
                return list(folder._system().find(str(folder)))
        except FileNotFoundError:
            return []

    # While the first file is being written, s3fs may name the folder itself.
    return {_strip_folder(name, folder) for name in _ask(folder, find) if name.lstrip("/") != _drop_scheme(folder)}


def _strip_folder(name: str, folder: UrlPath) -> str:
    """Return what follows a folder's path in a name that the storage's package gave."""
    return name.lstrip("/").removeprefix(f"{_drop_scheme(folder)}/")


def _drop_scheme(path: UrlPath) -> str:
    return str(path).partition("://")[2]


@contextmanager
def on_disk(path: Path, at_most: int | None = None) -> Iterator[Path]:
    """Yield a file on a disk with the content and the name of `path`: itself, or a copy for the time being.

    Args:
        path: the file.
        at_most: bytes; a larger file of the storage is not copied.

    Raises:
        InputRefused: it has more bytes.
        InputFailed: the storage does not give it.
    """
    if not isinstance(path, UrlPath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bsdiff-rt-") as folder:
        copy = Path(folder, path.name)
        try:
            with explain(path):
                if at_most is not None and (size := path._system().info(str(path))["size"]) > at_most:
                    raise InputRefused(f"the file has {size >> 20} MB; at most {at_most >> 20} MB are processed")
                path._system().get_file(str(path), str(copy))
        except OSError as error:
            raise InputFailed(f"cannot be read: {error.strerror or type(error).__name__}") from error
        yield copy


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield where to write a file of this name: its place, or one on a disk from which it is uploaded at the end.

    Raises:
        OSError: it cannot be uploaded. What was in its place is as it was.
    """
    if not isinstance(path, UrlPath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bsdiff-rt-") as folder:
        copy = Path(folder, path.name)
        yield copy
        with explain(path):
            path._system().put_file(str(copy), str(path))


@contextmanager
def head_on_disk(path: Path) -> Iterator[Path]:
    """Yield a file on a disk that begins as `path` does and has its name: itself, or a copy of the first bytes.

    A file that the storage does not give is empty here. Its reader says why later.
    """
    if not isinstance(path, UrlPath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bsdiff-rt-") as folder:
        copy = Path(folder, f"head{path.suffix[:_SUFFIX]}")
        copy.write_bytes(_HEADS_READ.get(path) or b"")
        yield copy


def read_heads_ahead(files: Iterable[Path]) -> Iterator[Path]:
    """Yield files unchanged. The first bytes of those in the storage are read many at a time before."""
    files = iter(files)
    while group := list(islice(files, _AT_ONCE)):
        _HEADS_READ.read([file for file in group if isinstance(file, UrlPath)])
        yield from group


class _Heads:
    """The first bytes of files, the last ones that were asked for."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: UrlPath) -> bytes:
        if str(path) not in self._known:
            self.read([path])
        return self._known.get(str(path), b"")

    def read(self, paths: list[UrlPath]) -> None:
        if not paths:
            return
        names = [str(path) for path in paths]
        try:
            with explain(paths[0]):
                heads = paths[0]._system().cat_ranges(names, 0, HEAD_BYTES, on_error="return")
        except OSError:
            return
        with self._lock:
            # An empty file has no first byte, and some storage calls this an error.
            self._known |= {
                name: head if isinstance(head, bytes) else b"" for name, head in zip(names, heads, strict=True)
            }
            while len(self._known) > _HEADS:
                self._known.popitem(last=False)


_HEADS_READ = _Heads()


def _ask(path: UrlPath, question: Callable[[], T]) -> T:
    try:
        return question()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}.") from error


@contextmanager
def explain(path: UrlPath) -> Iterator[None]:
    """Turn what the storage's package raises into an OSError that says what to do, without quoting the package.

    Raises:
        OSError: in place of another exception, or of one without a sentence.
    """
    try:
        yield
    except (SettingsError, InputRefused):
        raise
    except FileNotFoundError as error:
        reason = "no such bucket" if "bucket does not exist" in str(error) else "no such file or folder"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error
    except PermissionError as error:
        reason = "access denied: check the credentials and what the bucket allows them"
        raise PermissionError(errno.EACCES, reason, str(path)) from error
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or type(error).__name__, str(path)) from error
    except Exception as error:
        names = [one.__name__ for one in type(error).__mro__]
        reason = next((_CAUSES[name] for name in names if name in _CAUSES), f"{names[0]} of the storage's package")
        raise OSError(errno.EIO, reason, str(path)) from error


@cache
def _open_system(scheme: str) -> Any:
    """Return fsspec's file system of a kind of URL.

    Raises:
        SettingsError: its package is not installed.
    """
    try:
        fsspec = importlib.import_module("fsspec")
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise SettingsError(f"{scheme}:// needs a package that is not installed. Install {SCHEMES[scheme]}.") from error
