"""Every error this package raises on purpose, each with the exit code the command line returns for it.

A message says what was wrong, with the value, and what to do about it. It never contains patient data: no DICOM
attribute that names or dates a person is ever formatted into one.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec

_SHOWN_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """Return type and text of another package's exception as one line of bounded length.

    Use it only for exceptions that cannot quote a DICOM attribute: those of backends, which see arrays and graphs.
    """
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:_SHOWN_CHARACTERS]


def out_of_memory(error: BaseException) -> bool:
    """Return whether a backend failed because memory ran out. Few have an exception type for it, so the text counts."""
    words = (
        "out of memory",
        "alloc_failed",
        "allocation_failed",
        "not enough memory",
        "failed to allocate memory",
        "can't allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def forget_frames(error: BaseException) -> None:
    """Free the local variables of a failed call, in the exception and in those it came from.

    A traceback keeps every local variable, and with it device memory, as long as the exception lives. The traceback
    still tells where the exception was raised.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


class BsdiffError(Exception):
    """Base class; `exit_code` is what the command line returns when this error ends a command."""

    exit_code = 1


class SettingsError(BsdiffError):
    """An argument or a setting that cannot be used, alone or with the others.

    Args:
        message: what is wrong with which value, and what to do. It names no command line option.
        setting: name of the setting as in `config.InferSettings`, such as "batch". The command line puts the name of
            its option before the message.
    """

    exit_code = 2

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class InputRefused(BsdiffError):
    """A readable file that is not processed, for example one of another modality."""

    exit_code = 3


class InputFailed(BsdiffError):
    """A file that should have worked but is damaged, or a result that is no image."""

    exit_code = 3


class BundleError(BsdiffError):
    """A bundle that is incomplete, altered or of another format."""

    exit_code = 4


class EngineError(BsdiffError):
    """An engine or a runner that does not fit this machine, bundle or settings.

    Args:
        message: what does not fit, and what to do. It names no command line option.
        build: the settings of an engine that would fit, by name: "bundle", "runner" and others. The command line puts
            the command that builds it behind the message.
    """

    exit_code = 4

    def __init__(self, message: str = "", *, build: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.build = build


def describe_error(error: BsdiffError) -> str:
    """Return the message of an error for a command line.

    The option that it is about stands in front, and the command that builds a missing engine behind.
    """
    if isinstance(error, SettingsError) and error.setting:
        return f"{_name_option(error.setting)}: {error}"
    if isinstance(error, EngineError) and error.build:
        options = [f"{_name_option(name)} {value}" for name, value in error.build.items() if name != "bundle"]
        return f"{error} Run: {' '.join(['bsdiff-rt build-engine', error.build['bundle'], *options])}"
    return str(error)


def _name_option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def check_packages(extra: str, *names: str) -> None:
    """End `python -m PACKAGE` with a sentence if packages that it imports are not installed.

    For the first lines of a package. A program that imports it gets Python's own error.

    Args:
        extra: the extra of this project that brings them.
        *names: names as they are imported.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing and sys.argv[0] == "-m":  # while Python looks for what `-m` names
        sys.stderr.write(f"not installed: {', '.join(missing)}. In the clone: pip install --editable '.[{extra}]'\n")
        raise SystemExit(SettingsError.exit_code)


def run_command(app: Callable[[], object]) -> None:
    """Run a command of `python -m`: one of our errors becomes one line on stderr and the process's exit code.

    So does a file or folder that the system does not let us use. A job scheduler's stop (SIGTERM) ends it as an exit
    does: half-made folders are removed.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except BsdiffError as error:
        sys.stderr.write(f"{describe_error(error)}\n")
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.filename is None:  # no file's: a bug, or nobody reads what is printed
            raise
        sys.stderr.write(f"{error.filename}: cannot be used ({error.strerror})\n")
        raise SystemExit(SettingsError.exit_code) from None


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)
