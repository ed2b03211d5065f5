"""Contract tests: the TensorRT runner uses only what NVIDIA's Python bindings declare, in 10.x and in 11.x.

mypy checks the runner's source against declarations read from the real bindings (bindings.py): a class, method,
property, keyword or flag that is not there is an error. Nothing here builds or runs a network, and nothing here says
that TensorRT works; the tests marked `tensorrt` do, where it is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorrt_contract.bindings import declarations, environment, version

ROOT = Path(__file__).parents[2]
SOURCES = ("tensorrt_library.py", "tensorrt_builder.py", "tensorrt.py")
RECORDED = next(Path(__file__).parent.glob("declarations-10.*.txt"))  # two majors cannot be installed side by side
# Left out: the bindings take tuples for Dims and any buffer for bytes, which their declarations do not say.
NOT_COUNTED = ("arg-type", "override", "assignment")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment in which the installed bindings can be imported, and a folder."""
    try:
        release = importlib.metadata.version("tensorrt-cu13-bindings")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed (extra dev, Linux x86-64)")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the empty libraries that the bindings need")
    folder = tmp_path_factory.mktemp("bindings")
    return environment(folder, int(release.split(".")[0])), folder


def bind(source: str) -> str:
    """Let a source use the declarations of `tensorrt` where it uses the library that it is given."""
    source = re.sub(r"\n +trt = (self\._)?library\.trt(?=\n)", "", source)
    source = re.sub(r"(self\._)?library\.trt\b", "trt", source).replace(
        "def make_monitor(trt: Any, ", "def make_monitor("
    )
    source = source.replace("make_monitor(trt, ", "make_monitor(")
    return source.replace("\nimport torch\n", "\nimport tensorrt as trt\nimport torch\n", 1)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs mypy on the runner's source, changed as asked, against declarations; returns its findings."""
    work = tmp_path_factory.mktemp("check")
    runs: list[str] = []

    def run(text: str, old: str = "", new: str = "") -> list[str]:
        stub = work / "tensorrt" / "__init__.pyi"
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(text)
        package = work / "bsdiff_rt" / "runners"
        package.mkdir(parents=True, exist_ok=True)
        sources = {name: bind((ROOT / "bsdiff_rt/runners" / name).read_text()) for name in SOURCES}
        assert not old or sum(source.count(old) for source in sources.values()) == 1, f"{old} is not there once"
        for name, source in sources.items():
            (package / name).write_text(source.replace(old, new) if old else source)
        runs.append(old)
        for path in work.rglob("*.py*"):  # mypy takes a file of the same size and second for the same file
            if "cache" not in path.parts:
                os.utime(path, (len(runs), len(runs)))
        command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--check-untyped-defs"]
        command += ["--ignore-missing-imports"]  # all but tensorrt, which is given
        command += [word for code in NOT_COUNTED for word in ("--disable-error-code", code)]
        command += ["--explicit-package-bases", "--namespace-packages", "--cache-dir", str(work / "cache")]
        done = subprocess.run(
            [*command, "tensorrt/__init__.pyi", *(f"bsdiff_rt/runners/{name}" for name in SOURCES)],
            cwd=work,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        assert not done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    return run


def test_the_runner_against_10(check):
    assert check(RECORDED.read_text()) == []


@pytest.fixture(scope="module")
def declarations_11(installed):
    return declarations(*installed)


def test_the_runner_against_11(check, installed, declarations_11):
    assert version(installed[0]).startswith("11.")
    assert check(declarations_11) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("ignore_mismatch=False", "ignore=False", 'Unexpected keyword argument "ignore"'),
        ("trt.Runtime(library.logger)", "trt.Runner(library.logger)", 'has no attribute "Runner"'),
        ("device_memory_size_v2", "device_memory_size_v3", '"ICudaEngine" has no attribute "device_memory_size_v3"'),
        ("context.infer_shapes()", "context.infer_shape()", '"IExecutionContext" has no attribute "infer_shape"'),
        ("create_execution_context(strategy)", "create_execution_context(how=strategy)", "Unexpected keyword argument"),
        ("execute_async_v3(stream)", "execute_async_v3(stream, 0)", 'Too many arguments for "execute_async_v3"'),
    ],
)
def test_a_misspelt_use_is_found(check, old, new, found):
    (finding,) = check(RECORDED.read_text(), old, new)
    assert found in finding


def test_what_11_removed_is_found(check, declarations_11):
    """The two majors are told apart: the size without _v2 is gone in 11."""
    change = ("device_memory_size_v2", "device_memory_size")
    assert check(RECORDED.read_text(), *change) == []
    (finding,) = check(declarations_11, *change)
    assert '"ICudaEngine" has no attribute "device_memory_size"' in finding


@pytest.mark.skipif(find_spec("tensorrt_libs") is not None, reason="TensorRT itself is installed and would answer")
def test_with_the_real_classes(installed):
    """Logger and monitor are accepted as subclasses, and a constructor that fails raises what `make` expects."""
    code = """
import logging, sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners import tensorrt, tensorrt_builder as builder
from bsdiff_rt.runners.tensorrt_library import TENSORRT
trt = TENSORRT.trt
heard = []
monitor = builder.make_monitor(trt, "denoiser", lambda phase, share: heard.append((phase, share)))
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Building", None, 2)
assert monitor.step_complete("Building", 0) is True
assert heard == [("denoiser: Building", 0.0), ("denoiser: Building", 0.5)], heard
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
for severity in trt.ILogger.Severity.__members__.values():
    TENSORRT.logger.log(severity, "hello")
assert TENSORRT.logger.take_errors() == "; TensorRT says: hello; hello"
for what, create in (("builder", trt.Builder), ("runtime", trt.Runtime)):
    try:
        TENSORRT.make(what, lambda: create(TENSORRT.logger))
        raise SystemExit("an empty library made a " + what)
    except EngineError as error:
        print(error)
print(tensorrt.list_versions())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=installed[0], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    levels = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("TensorRT: hello")]
    assert levels == ["ERROR", "ERROR", "WARNING", "DEBUG", "DEBUG"]
    for what in ("builder", "runtime"):
        assert re.search(rf"TensorRT 11[\d.]+ gives no {what}: TypeError: ", done.stdout)
    assert re.search(r"'tensorrt': '11[\d.]+'", done.stdout)


def test_without_the_package():
    code = """
import sys
sys.modules["tensorrt"] = None
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners import tensorrt
try:
    tensorrt.list_versions()
except EngineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert re.match(
        r"TensorRT cannot be imported \(ModuleNotFoundError: .+\)\. Install it: pip install 'bsdiff-rt\[tensorrt\]'",
        done.stdout,
    ), done.stderr
