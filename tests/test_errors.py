"""What other people's exceptions are taken for, and how a command ends."""

from __future__ import annotations

import signal
import tempfile

import pytest
import torch

from bsdiff_rt.errors import (
    BundleError,
    EngineError,
    SettingsError,
    check_packages,
    describe_error,
    out_of_memory,
    run_command,
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 3"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_out_of_memory(error, expected):
    assert out_of_memory(error) is expected


def test_the_option_of_a_setting_is_named_by_the_command_line_only():
    error = SettingsError("9 is too many. Give 8 or less.", setting="raw_view")
    assert str(error) == "9 is too many. Give 8 or less."
    assert describe_error(error) == "--raw-view: 9 is too many. Give 8 or less."
    assert describe_error(SettingsError("a.png: no such file")) == "a.png: no such file"
    assert describe_error(BundleError("x")) == "x"
    missing = EngineError("no engine. Build one.", build={"bundle": "demo", "runner": "aoti", "batch": "1:8"})
    assert str(missing) == "no engine. Build one."
    assert describe_error(missing) == "no engine. Build one. Run: bsdiff-rt build-engine demo --runner aoti --batch 1:8"


@pytest.fixture
def ended(capsys):
    """Exit code and stderr of a command."""

    def end(command):
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as stop:
                run_command(command)
        finally:
            signal.signal(signal.SIGTERM, before)
        return stop.value.code, capsys.readouterr().err

    return end


def test_our_errors_and_the_systems_are_one_line(ended, tmp_path):
    def refused():
        raise BundleError("no bundle")

    assert ended(refused) == (4, "no bundle\n")
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "folder"
    assert ended(below.mkdir) == (2, f"{below}: cannot be used (Not a directory)\n")


def test_what_is_no_files_error_shows_its_trace():
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_command(broken)


def test_a_job_schedulers_stop_removes_what_is_half_made(ended, tmp_path):
    def stopped():
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)  # to this thread: os.kill may reach another, and end a worker later

    assert ended(stopped) == (143, "")
    assert not list(tmp_path.iterdir())


def test_a_package_that_python_m_needs(monkeypatch, capsys):
    check_packages("train", "numpy", "not_there")  # imported by a program: Python says what is missing
    monkeypatch.setattr("sys.argv", ["-m", "--help"])
    check_packages("train", "numpy")
    with pytest.raises(SystemExit) as stop:
        check_packages("train", "numpy", "not_there")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "not installed: not_there. In the clone: pip install --editable '.[train]'\n"
