"""Both ends of a DICOM node for its tests: senders of X-rays, an archive that counts, and the node's own process."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import ToyRunner
from pydicom import Dataset, dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification
from stand_in import SIZE

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.node import sending
from bsdiff_rt.node.receiving import IMAGE_CLASSES
from bsdiff_rt.node.serving import Node
from bsdiff_rt.node.settings import Destination, NodeSettings

HOST = "127.0.0.1"
ARCHIVE = "ARCHIVE"


class Archive:
    """A PACS that keeps what it is sent, counts how often, and answers C-FIND if it `answers`.

    With `hangs_up`, it ends the association of who asks, as Orthanc does.

    `before` and `after` are called with the SOP Instance UID around the answer; `status` is what it answers.
    """

    def __init__(self, port: int = 0, *, answers: bool = True, ssl_context: Any = None) -> None:
        self.stored: dict[str, Dataset] = {}
        self.times: Counter[str] = Counter()
        self.questions = 0
        self.hangs_up = False
        self.status = 0
        self.port, self._answers, self._context = port, answers, ssl_context
        self._ae: AE | None = None

    def __enter__(self) -> Archive:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._ae = AE(ae_title=ARCHIVE)
        for image_class in IMAGE_CLASSES:
            self._ae.add_supported_context(image_class)
        if self._answers:
            self._ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        server = self._ae.start_server(
            (HOST, self.port), block=False, ssl_context=self._context,
            evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)],
        )  # fmt: skip
        self.port = server.server_address[1]

    def stop(self) -> None:
        if self._ae is not None:
            self._ae.shutdown()
            self._ae = None

    def _store(self, event: evt.Event) -> int:
        if self.status:
            return self.status
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        self.times[dataset.SOPInstanceUID] += 1
        self.stored[dataset.SOPInstanceUID] = dataset
        return 0

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.questions += 1
        if self.hangs_up:
            event.assoc.abort()
            return
        wanted = event.identifier.SOPInstanceUID
        if wanted in self.stored:
            found = Dataset()
            found.QueryRetrieveLevel, found.SOPInstanceUID = "IMAGE", wanted
            yield 0xFF00, found


def send(port: int, *paths: Path, aet: str = "XRAY", tls_args: Any = None) -> list[int | None]:
    """Send files in one association. Return the statuses, None for no answer; [] if the association is rejected."""
    ae = AE(ae_title=aet)
    for path in paths:
        header = dcmread(path, stop_before_pixels=True)
        ae.add_requested_context(header.SOPClassUID, header.file_meta.TransferSyntaxUID)
    if not paths:
        ae.add_requested_context(Verification)
    association = ae.associate(HOST, port, ae_title="BSDIFF", tls_args=tls_args)
    if not association.is_established:
        return []
    statuses: list[int | None] = []
    try:
        if not paths:
            return [association.send_c_echo().get("Status")]
        for path in paths:
            try:
                statuses.append(association.send_c_store(dcmread(path)).get("Status"))
            except RuntimeError:  # aborted before
                statuses.append(None)
    finally:
        if association.is_established:
            association.release()
    return statuses


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return the first true value of a condition that is asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return value


@contextmanager
def run_node(folder: Path, bundle: Bundle, archive: Archive, **settings: Any) -> Iterator[Node]:
    """Run a node in this process."""
    destinations = settings.pop("destinations", (Destination(ARCHIVE, HOST, archive.port),))
    runner = settings.pop("runner", None) or ToyRunner(SIZE)
    asked = NodeSettings(folder=folder, destinations=destinations, **{"port": 0, "http_port": 0} | settings)
    inference = Inference(InferSettings(output=asked.results, bundle=str(bundle.folder), format="dicom"), runner)
    with ExitStack() as stack:
        node = Node(asked, inference)
        node.start(stack)
        yield node


def free_port() -> int:
    """Return a TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# Torch and the others are imported once for all nodes. Windows cannot fork, and its tests start no such process.
FORKS = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    FORKS.set_forkserver_preload(["nodes"])


def _kill_at(place: str, when: str) -> None:
    """SIGKILL this process `before` or `after` the first call of a method, `module:Class.method`."""
    module, _, names = place.partition(":")
    owner_name, name = names.split(".")
    owner = getattr(importlib.import_module(f"bsdiff_rt.node.{module}"), owner_name)
    real = getattr(owner, name)

    def kill(*arguments: Any, **options: Any) -> None:
        if when == "after":
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, kill)


def _serve(folder: Path, bundle: Path, destination: Destination, port: int, kill_at: tuple[str, str] | None) -> None:
    sending.FIRST_PAUSE_S = sending.LONGEST_PAUSE_S = 0.2
    if kill_at is not None:
        _kill_at(*kill_at)
    settings = NodeSettings(folder=folder, destinations=(destination,), port=port, http_port=None)
    inference = Inference(
        InferSettings(output=settings.results, bundle=str(bundle), format="dicom", threads=1), ToyRunner(SIZE)
    )
    with ExitStack() as stack:
        node = Node(settings, inference)
        node.start(stack)
        while True:
            node.watch(1.0)


class NodeProcess:
    """A node in a process of its own, which can be killed.

    Args:
        folder: of the node.
        bundle: model.
        destination: where results go.
        port: where it listens.
        kill_at: a method, `module:Class.method`, and `before` or `after`: the process ends by SIGKILL there.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        destination: Destination,
        port: int,
        kill_at: tuple[str, str] | None = None,
    ) -> None:
        self.port = port
        arguments = (folder, bundle.folder, destination, port, kill_at)
        self.process = FORKS.Process(target=_serve, args=arguments, daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            self.process.start()

    def __enter__(self) -> NodeProcess:
        try:
            wait_for(lambda: listens(self.port) or not self.process.is_alive(), 120)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float = 60) -> int | None:
        """Wait for its end, and return its exit code; minus the number of a signal."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.join()


def listens(port: int) -> bool:
    """Return whether somebody listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
