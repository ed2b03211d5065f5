"""Every error this package raises on purpose, each with the exit code the command line returns for it.

A message says what was wrong, with the value, and what to do about it. It never contains patient data: no DICOM
attribute that names or dates a person is ever formatted into one.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable

_SHOWN_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """Type and text of somebody else's exception in one line of bounded length.

    Only for exceptions that cannot quote a DICOM attribute: those of backends, which see arrays and graphs.
    """
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:_SHOWN_CHARACTERS]


def out_of_memory(error: BaseException) -> bool:
    """Whether a backend failed for want of memory; each says so in its own words, few with a type of their own."""
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
    """Let go of what the frames of a failed call hold, in the exception and in those it came from.

    As long as an exception lives its traceback keeps every local variable, and with them the device memory of whatever
    was half made. Where it was raised is still told.
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
    """An engine or a runner that does not fit this machine, bundle or settings."""

    exit_code = 4


def describe_error(error: BsdiffError) -> str:
    """Return the message of an error for a command line: with the option it is about in front, if it is about one."""
    setting = error.setting if isinstance(error, SettingsError) else None
    return f"--{setting.replace('_', '-')}: {error}" if setting else str(error)


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
