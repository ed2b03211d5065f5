"""What every test may use: the tiny model bundle, exported once, and the command line run inside this process."""

from __future__ import annotations

import builtins
import errno
import io
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from filelock import FileLock
from helpers import ToyRunner, randomise
from stand_in import StandIn, build, change, install_stand_in, timed
from stand_in import write_bundle as stand_in_bundle

from bsdiff_rt import cli as command_line
from bsdiff_rt import urls
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import PRESETS, EngineOptions, InferSettings, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.engines.select import Choice
from bsdiff_rt.folder import pipeline
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.urls import UrlPath

SIZE_PX, STEPS = 64, 3
OUR_LOGGERS = ("bsdiff_rt", "train", "export", "benchmarks")


# What `--quick` leaves out: tests that export a bundle or compile an engine, and folders that take long or run servers.
SLOW_FIXTURES = {"tiny_bundle", "tiny_engine"}
SLOW_FOLDERS = ("train", "export", "benchmarks", "engines", "examples", "node", "tensorrt_contract")
# Tests of other packages than bsdiff_rt, whose coverage is measured. Measuring doubles the time of Python code.
UNMEASURED_FOLDERS = ("train", "export", "benchmarks", "examples")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make quick`."""
    parser.addoption("--quick", action="store_true", help="run the fast tests only")


def is_slow(item: pytest.Item) -> bool:
    """Return whether `--quick` leaves a test out."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    needs = set(getattr(item, "fixturenames", ()))
    return folder in SLOW_FOLDERS or bool(needs & SLOW_FIXTURES) or item.get_closest_marker("slow") is not None


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return tests so that no worker waits for what another makes: one builds the engine, the next do without."""
    needs = [set(getattr(item, "fixturenames", ())) for item in items]
    engine = [item for item, names in zip(items, needs, strict=True) if "tiny_engine" in names]
    bundle = [item for item, names in zip(items, needs, strict=True) if names & SLOW_FIXTURES == {"tiny_bundle"}]
    neither = [item for item, names in zip(items, needs, strict=True) if not names & SLOW_FIXTURES]
    return [*engine[:1], *neither, *bundle, *engine[1:]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why. With `--quick`, keep the fast tests only."""
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if is_slow(item)])
        items[:] = [item for item in items if not is_slow(item)]
    items[:] = in_order(items)
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "tensorrt": None if find_spec("tensorrt") else "the package tensorrt is not installed",
    }
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in UNMEASURED_FOLDERS:
            item.add_marker(pytest.mark.no_cover)
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once and read by every worker of a run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny_bundle(shared: Path) -> Path:
    """Folder of a bundle with the `tiny` networks, seeded random weights, 64 px, x0, ddim in 3 steps. Do not change it.

    Exported once for all workers: the exporter takes 10 to 20 seconds, whatever the network's size.
    """
    from export.bundle import BundleOptions, write_bundle

    preset = PRESETS["tiny"]
    denoiser, enhancer = Denoiser(preset.denoiser), Enhancer(preset.enhancer)
    randomise(denoiser, 1)
    randomise(enhancer, 2)
    folder = shared / "bundle" / "tiny"
    options = BundleOptions("tiny", SamplerSettings("ddim", STEPS), Preprocessing(SIZE_PX), training={"data": "none"})
    with FileLock(shared / "bundle.lock"):
        if not folder.is_dir():
            write_bundle(folder, preset, Schedule(objective="x0"), denoiser, enhancer, options)
    return folder


@pytest.fixture(scope="session", autouse=True)
def without_tracing() -> Iterator[None]:
    """Do not measure the coverage of torch's exporters and compiler: it would double their minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for where in ("torch.onnx.export", "torch.export.export", "torch._inductor.aoti_compile_and_package"):
            module, _, name = where.rpartition(".")
            function = getattr(import_module(module), name)

            def untraced(*args: Any, _function: Callable[..., Any] = function, **options: Any) -> Any:
                tracer = sys.gettrace()
                sys.settrace(None)
                try:
                    return _function(*args, **options)
                finally:
                    sys.settrace(tracer)

            patch.setattr(import_module(module), name, untraced)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache directory, and so the place engines are looked for, is an empty folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path, shared: Path) -> Path:
    """Folder of an `aoti` engine of the tiny bundle: fp32, batch 1 to 3, for this processor. Do not change it.

    Built once for all workers: the compiler takes half a minute, and minutes on a busy machine. The code around the
    kernels is not optimised.
    """
    from torch._inductor import config

    from bsdiff_rt.engines.build import build_engine

    options, output = EngineOptions("aoti", "fp32", (1, 3)), shared / "engine" / "tiny"
    with FileLock(shared / "engine.lock"), config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        if not output.is_dir():
            build_engine(open_bundle(tiny_bundle), options, torch.device("cpu"), output, lambda *_: None)
    return output


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A bundle of tiny networks at 16 px, without graphs."""
    return stand_in_bundle(tmp_path / "small")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """What builds and loads engines in this test."""
    return install_stand_in(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines are kept, not made yet."""
    from bsdiff_rt.engines.cache import locate_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    return locate_cache()


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of what `small` is, to be copied."""
    bundle = stand_in_bundle(tmp_path_factory.mktemp("bundle") / "small")
    with pytest.MonkeyPatch.context() as patch:
        install_stand_in(patch)
        return build(bundle, tmp_path_factory.mktemp("engine") / "engine")


@pytest.fixture
def built(built_once: Path, small: Bundle, stand_in: StandIn, cache: Path) -> Path:
    """An engine of the small bundle, in the cache; it was twice as fast as onnxruntime."""
    stand_in.bundle = small
    folder = Path(shutil.copytree(built_once, cache / "engine"))
    change(folder, speed=timed(2.0))
    return folder


@pytest.fixture
def in_cache(tiny_engine: Path, cache: Path) -> Path:
    """The tiny engine, where `auto` finds it; it was twice as fast as onnxruntime."""
    cache.mkdir(parents=True)
    folder = Path(shutil.copytree(tiny_engine, cache / "tiny"))
    change(folder, speed=timed(2.0))
    return folder


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be changed."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle copy"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every call that is timed is done, and takes what the list says next (1 s when it is empty)."""
    seconds: list[float] = []

    def fake(call: Callable[[], object], device: torch.device) -> float:
        call()
        return seconds.pop(0) if seconds else 1.0

    for module in ("bench.trial", "runners.timing"):
        monkeypatch.setattr(f"bsdiff_rt.{module}.time_call", fake)
    return seconds


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyRunner:
    """Return a runner of formulas. Commands run it in place of the bundle's networks; other tests pass it on."""
    runner = ToyRunner(SIZE_PX)

    def load(bundle: Bundle, settings: InferSettings) -> tuple[Choice, ToyRunner]:
        return pipeline.choose(pipeline.request_runner(bundle, settings)), runner

    monkeypatch.setattr(pipeline, "load_runner_for", load)
    return runner


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error (without the times of its lines)."""

    code: int
    out: str
    err: str


@contextmanager
def put_back() -> Iterator[None]:
    """Put back what a command changes for its whole process: log levels, the last word on errors, signals."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in OUR_LOGGERS)]
    levels, hook = [logger.level for logger in loggers], sys.excepthook
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        sys.excepthook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_stays_changed() -> Iterator[None]:
    """Every test leaves the process as it was, whatever command it ran."""
    with put_back():
        yield


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[UrlPath]:
    """An empty bucket in fsspec's storage in memory, memory://bucket, which stands for those that need a network."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setitem(urls.SCHEMES, "memory", "fsspec")
    MemoryFileSystem.store.clear()
    urls._HEADS_READ = urls._Heads()
    yield UrlPath("memory:", "bucket")
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Moto's S3 server on a free port of this machine, with an empty bucket; as environment variables."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    urls._open_system.cache_clear()
    urlopen(Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()  # what others left
    urls.to_path("s3://archive")._system().mkdir("archive")
    yield environment
    patch.undo()
    server.stop()
    urls._open_system.cache_clear()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `bsdiff-rt` with the given arguments through its real entry point; what that changes is put back."""

    def run(*arguments: object) -> Outcome:
        handlers = logging.getLogger().handlers[:]
        monkeypatch.setattr(sys, "argv", ["bsdiff-rt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")  # no line broken within a sentence
        capsys.readouterr()
        with put_back():
            try:
                command_line.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                logging.getLogger().handlers[:] = handlers
        out, err = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in capsys.readouterr())
        return Outcome(code, out, re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", err, flags=re.MULTILINE))

    return run


@pytest.fixture
def infer(cli: Callable[..., Outcome], tiny_bundle: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `bsdiff-rt infer` on `tmp_path`/in into `tmp_path`/out with the tiny bundle, and further arguments."""

    def run(*arguments: object) -> Outcome:
        return cli("infer", tmp_path / "in", "-o", tmp_path / "out", "--bundle", tiny_bundle, *arguments)

    return run


@pytest.fixture
def unreadable(monkeypatch):
    """Return a function that lets a file be read by nobody. Tests may run as root, who may read all files."""
    files = set()
    open_file = io.open

    def refuse(file, *args, **kwargs):
        if not isinstance(file, int) and Path(file) in files:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    return files.add
