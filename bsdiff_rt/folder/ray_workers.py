"""Do the files of a run in many processes, on one machine or a cluster, through Ray Data: `infer --ray`.

Each worker is a Ray actor that holds one loaded model and does its files as a run without Ray does (worker.py). The
files travel as a Ray Dataset of small groups. Ray hands a group to a worker that has room, and once more if the worker
dies. Entries come back to this process, which alone writes the report.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.engines.select import choose
from bsdiff_rt.errors import EngineError, SettingsError, one_line
from bsdiff_rt.folder.earlier import Finished
from bsdiff_rt.folder.reading import make_not_done
from bsdiff_rt.folder.report import FileEntry, Report
from bsdiff_rt.folder.tasks import Task
from bsdiff_rt.folder.worker import LocalWorker, begin_report
from bsdiff_rt.model import load_runner_for, request_runner
from bsdiff_rt.runners.devices import resolve_device

logger = logging.getLogger(__name__)

LOCAL = "local"  # the address that stands for: start Ray on this machine, and stop it with the run
AUTO = "auto"  # the cluster that this machine belongs to
CONNECT_S = 10  # within which a cluster must take a connection
CORES = 4  # of a worker without a GPU, unless `threads` says otherwise
LARGEST_GROUP = 32  # files that are done again if their worker dies
GROUPS_PER_WORKER = 8  # at least, so that no worker waits long for the last one
TRIES = 5  # workers that may die while they do a file, before it fails
STORE_BYTES = 256 << 20  # memory of a local Ray for groups and entries

_ITEM, _BUSY = "item", "busy_s"  # columns of the dataset


@dataclass(frozen=True)
class Share:
    """What each worker gets.

    Attributes:
        workers: number of workers.
        cpus, gpus: of each.
    """

    workers: int
    cpus: int
    gpus: int


class RayWorkers:
    """The workers of a run; a context manager.

    Args:
        settings: the run's settings, resolved.
        report: the run's report, without files, as this machine would begin it.
        address: of a running Ray cluster; `LOCAL` starts Ray here.

    Attributes:
        report: see `worker.Worker`.

    Raises:
        SettingsError: Ray is not installed, or the cluster cannot be reached.
        EngineError: a worker cannot load the model.
    """

    def __init__(self, settings: InferSettings, report: Report, address: str) -> None:
        if find_spec("ray") is None or find_spec("pyarrow") is None:
            raise SettingsError("Ray is not installed. Install bsdiff-rt[ray].", setting="ray")
        if settings.device.startswith("cuda:"):
            raise SettingsError(f"{settings.device}: Ray chooses the GPU. Use cuda or auto.", setting="device")
        self.report, self._settings, self._address = report, settings, address
        self.busy_s = 0.0

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGTERM)
        _start(self._address)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray takes it, and would end the run without its report
        import ray
        from ray.data import DataContext

        try:
            DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            self._share = find_share(self._settings, ray.nodes())
            device = "cuda" if self._share.gpus else "cpu"
            self._settings = replace(self._settings, threads=self._settings.threads or self._share.cpus, device=device)
            logger.info("%d workers of %s", self._share.workers, _describe(self._share))
            if self._address != LOCAL:  # the machine that gives the orders may have other runners
                identify = ray.remote(num_cpus=self._share.cpus, num_gpus=self._share.gpus)(_identify)
                ours, self.report = self.report, ray.get(identify.remote(self._settings))
                self.report.preview, self.report.page = ours.preview, ours.page
            self.report.environment["workers"] = self._share.workers
            self._census = ray.remote(num_cpus=0)(_Census).remote()
        except BaseException as error:
            ray.shutdown()
            if isinstance(error, ray.exceptions.RayError):
                raise EngineError(f"no worker could be started ({_find_cause(error)}).") from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        import ray

        ray.shutdown()

    def do(self, tasks: Iterable[Task], before: Finished, add: Callable[[FileEntry], None]) -> None:
        """Take every file to its end; see `worker.Worker.do`. All files are listed before the first one is done.

        Ray replaces a worker that dies, and hands its group to another one.

        Raises:
            EngineError: a worker cannot load the model, or the cluster is gone.
        """
        import ray

        groups = _make_groups(tasks, before, self._share.workers)
        if not groups:
            return
        actor = {"settings": self._settings, "folder": Path.cwd(), "decisive": self.report.settings}
        entries = ray.data.from_arrow(groups).map_batches(
            _Actor,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self._share.workers, max_tasks_in_flight_per_actor=2),
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            fn_constructor_kwargs=actor | {"census": self._census},
        )
        try:
            for group in entries.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                self.busy_s += sum(group[_BUSY].to_pylist()) / self._share.workers
                for item in group[_ITEM].to_pylist():
                    entry: FileEntry = pickle.loads(item)
                    for warning in entry.warnings if entry.status == "ok" else ():
                        logger.warning("%s: %s", entry.input, warning)
                    add(entry)
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"the workers ended ({_find_cause(error)}). Finished files are complete; the same command goes on."
            ) from error
        finally:
            self._count_deaths()

    def _count_deaths(self) -> None:
        """Note in the report how many workers died and were replaced."""
        import ray

        try:
            started = ray.get(self._census.count.remote(), timeout=10)
        except ray.exceptions.RayError:
            return
        if replaced := max(0, started - self._share.workers):
            self.report.workers_replaced = replaced
            logger.warning("%d workers died and were replaced. Their images were done again.", replaced)


def find_share(settings: InferSettings, nodes: list[dict[str, Any]]) -> Share:
    """Return how many workers fit into a cluster: one for each GPU, or one for each set of CPU cores.

    Args:
        settings: `device` and `threads` count.
        nodes: what `ray.nodes()` returns.

    Raises:
        SettingsError: there is no GPU, or no machine has this many cores.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(one.get("GPU", 0)) for one in resources)
    if gpus and settings.device != "cpu":
        return Share(gpus, 1, 1)
    if settings.device == "cuda":
        raise SettingsError("Ray has no GPU. Use cpu or auto.", setting="device")
    most = max((int(one.get("CPU", 0)) for one in resources), default=0)
    cores = settings.threads or min(CORES, most)
    workers = sum(int(one.get("CPU", 0)) // cores for one in resources) if cores else 0
    if not workers:
        raise SettingsError(f"{cores} cores for each worker, but Ray's largest machine has {most}.", setting="threads")
    return Share(workers, cores, 0)


class _Census:
    """Counts how often workers were started, and how many died over each group or file: begun, but not ended."""

    def __init__(self) -> None:
        self._started = 0
        self._unfinished: Counter[str] = Counter()

    def enter(self) -> None:
        """Count one start."""
        self._started += 1

    def count(self) -> int:
        """Return the number of starts."""
        return self._started

    def begin(self, name: str) -> int:
        """Note a begin. Return how many workers died over it before."""
        self._unfinished[name] += 1
        return self._unfinished[name] - 1

    def end(self, name: str) -> None:
        """Note that what was begun has ended."""
        self._unfinished[name] -= 1


class _Actor:
    """One worker: a loaded model in a process of its own.

    Args:
        settings: the run's settings, resolved.
        folder: the working directory of the run. Relative paths start there.
        decisive: what decides the pixels, as in the run's report.
        census: counts this start.
    """

    def __init__(self, settings: InferSettings, folder: Path, decisive: dict[str, Any], census: Any) -> None:
        import ray

        self._census = census
        ray.get(census.enter.remote())
        os.chdir(folder)
        bundle = open_bundle(settings.bundle)
        choice, runner = load_runner_for(bundle, settings)
        report = begin_report(bundle, settings, str(runner.device), choice)
        if report.settings != decisive:
            raise EngineError(
                f"a worker would use the runner {report.settings['runner']} ({report.settings['precision']}), the run "
                f"{decisive['runner']} ({decisive['precision']}). Name the runner and the precision."
            )
        self._worker = LocalWorker(bundle, settings, report, runner, choice).__enter__()

    def __call__(self, group: Any) -> Any:
        """Do a group of files: pickled tasks in, pickled entries out."""
        import pyarrow as pa

        items = [pickle.loads(item) for item in group[_ITEM].to_pylist()]
        tasks, before = [task for task, _ in items], {str(task.output): entry for task, entry in items if entry}
        done: list[bytes] = []

        def add(entry: FileEntry) -> None:
            done.append(pickle.dumps(entry))

        busy_s = self._worker.busy_s
        if self._begin(group_name := f"group {tasks[0].input}") == 0:
            self._worker.do(tasks, before, add)
        else:  # a worker died over it: one by one, so that a file that kills workers is found
            for task in tasks:
                if (died := self._begin(file_name := f"file {task.input}")) < TRIES:
                    self._worker.do([task], before, add)
                    self._end(file_name)
                else:
                    reason = f"{died} workers died while they processed it"
                    add(make_not_done(task, "failed", reason, time.monotonic(), None))
        self._end(group_name)
        spent = [self._worker.busy_s - busy_s] + [0.0] * (len(done) - 1)
        return pa.table({_ITEM: pa.array(done, pa.binary()), _BUSY: pa.array(spent, pa.float64())})

    def _begin(self, name: str) -> int:
        import ray

        return int(ray.get(self._census.begin.remote(name)))

    def _end(self, name: str) -> None:
        self._census.end.remote(name)


def _start(address: str) -> None:
    """Connect to a Ray cluster, or start Ray on this machine, reachable from nowhere else.

    Raises:
        SettingsError: there is no cluster at this address.
    """
    # Both are read when Ray is imported. Nothing about a run leaves the machine or the cluster.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == LOCAL:
        # Despite its name: on Linux, too, all of Ray's servers then listen on 127.0.0.1 alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Workers import what this process imports, from wherever that is.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    if address == LOCAL:
        os.environ["PYTHONPATH"] = path
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            **quiet,
        )
        with suppress(OSError):  # whoever reads it could run programs as this user, and Ray lets everybody read it
            (Path.home() / ".ray" / "auth_token").chmod(0o600)
        return
    if address != AUTO:
        _check_that_somebody_listens(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if address == AUTO and isinstance(error, ConnectionError):
            message = "this machine belongs to no Ray cluster. Name HOST:PORT of one, or start one with ray start."
            raise SettingsError(message, setting="ray") from error
        raise SettingsError(
            f"{address}: no Ray cluster answers ({one_line(error)}). If it asks for a token, set RAY_AUTH_MODE=token.",
            setting="ray",
        ) from error


def _check_that_somebody_listens(address: str) -> None:
    """Check that an address takes connections. Ray itself tries for minutes, and then ends the process.

    Raises:
        SettingsError: it does not.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SettingsError(
            f"{address}: no Ray cluster answers ({reason}). Check the address, and that ray start --head ran there.",
            setting="ray",
        ) from error


def _identify(settings: InferSettings) -> Report:
    """Return the report that a worker would begin."""
    bundle = open_bundle(settings.bundle)
    chosen = choose(request_runner(bundle, settings))
    return begin_report(bundle, settings, str(resolve_device(settings.device)), chosen)


def _make_groups(tasks: Iterable[Task], before: Finished, workers: int) -> list[Any]:
    """Return the tasks as groups for the dataset: pickled, each with what an earlier run finished of it."""
    import pyarrow as pa

    items = [pickle.dumps((task, before.get(str(task.output)))) for task in tasks]
    size = min(LARGEST_GROUP, max(1, math.ceil(len(items) / (workers * GROUPS_PER_WORKER))))
    return [pa.table({_ITEM: pa.array(part, pa.binary())}) for part in _split(items, size)]


def _split(items: list[bytes], size: int) -> Iterator[list[bytes]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _describe(share: Share) -> str:
    return "one GPU" if share.gpus else f"{share.cpus} CPU core{'s' if share.cpus > 1 else ''}"


def _find_cause(error: BaseException) -> str:
    """Return one line about what a worker raised: ours as it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EngineError | SettingsError):
            return str(cause)
        following = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(following, BaseException) or following is cause:
            break
        cause = following
    # Ray's messages are whole tracebacks. Their last line says what was raised.
    lines = [line for line in str(cause or error).splitlines() if re.search(r"\w", line)]
    return " ".join(lines[-1].split()) if lines else one_line(error)
