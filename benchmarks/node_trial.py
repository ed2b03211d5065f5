"""Try a DICOM node: X-rays in, an archive that goes down and comes back, SIGKILL at random, each result once.

    python -m benchmarks.node_trial --images 200 --kills 10
    python -m benchmarks.node_trial --images 200 --speed

A modality sends X-rays and repeats what was not answered, as modalities do. The archive is one of pynetdicom that
counts what it gets, or Orthanc (`--orthanc`). After the trial each result must be there once, with the pixels that
`infer` gives. `--speed` kills nothing, and measures the node against `infer` on the same files.

Orthanc listens at every address of the machine. So with `--orthanc`, run this where there is no network but loopback:

    unshare --map-root-user --net sh -c "ip link set lo up; python -m benchmarks.node_trial --orthanc"
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydicom import Dataset, dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when pynetdicom is imported
    StudyRootQueryRetrieveInformationModelFind,
)

from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.node import sending
from bsdiff_rt.node.journal import Journal
from bsdiff_rt.node.receiving import IMAGE_CLASSES
from bsdiff_rt.node.serving import JOURNAL, Node
from bsdiff_rt.node.settings import Destination, NodeSettings

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "phantom10000003_cxr.dcm"
HOST, ARCHIVE, NODE, MODALITY = "127.0.0.1", "ARCHIVE", "BSDIFF", "MODALITY"
FORKS = multiprocessing.get_context("forkserver")  # torch is imported once for all starts of the node
FORKS.set_forkserver_preload(["bsdiff_rt.node.serving", "bsdiff_rt.runners.eager"])


@dataclass(frozen=True)
class Trial:
    """What a trial was asked for."""

    images: int
    kills: int
    bundle: str
    runner: str
    seed: int
    orthanc: bool


class Archive(Protocol):
    """Where results arrive."""

    port: int

    def start(self) -> None:
        """Go up."""

    def stop(self) -> None:
        """Go down. What arrived is kept."""

    def count(self) -> int:
        """Return how many objects are there."""

    def list_results(self) -> Iterator[tuple[Dataset, int]]:
        """Yield every object and how often it was stored."""


class CountingArchive:
    """An archive of pynetdicom that counts how often it gets each object, and when."""

    def __init__(self) -> None:
        self.port = find_port()
        self.times: Counter[str] = Counter()
        self.arrived: dict[str, float] = {}  # by the UID of the source
        self._stored: dict[str, bytes] = {}
        self._ae = AE(ae_title=ARCHIVE)
        for kind in (*IMAGE_CLASSES, StudyRootQueryRetrieveInformationModelFind):
            self._ae.add_supported_context(kind)

    def start(self) -> None:
        """Go up."""
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)]
        self._ae.start_server((HOST, self.port), block=False, evt_handlers=handlers)

    def stop(self) -> None:
        """Go down. What arrived is kept."""
        self._ae.shutdown()

    def _store(self, event: evt.Event) -> int:
        now, dataset = time.monotonic(), event.dataset
        uid = str(dataset.SOPInstanceUID)
        self.arrived[str(dataset.SourceImageSequence[0].ReferencedSOPInstanceUID)] = now
        self._stored[uid] = event.encoded_dataset()
        self.times[uid] += 1
        return 0

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset]]:
        if event.identifier.SOPInstanceUID in self._stored:
            found = Dataset()
            found.QueryRetrieveLevel, found.SOPInstanceUID = "IMAGE", event.identifier.SOPInstanceUID
            yield 0xFF00, found

    def count(self) -> int:
        """Return how many objects are there."""
        return len(self._stored)

    def list_results(self) -> Iterator[tuple[Dataset, int]]:
        """Yield every object and how often it was stored."""
        for uid, content in self._stored.items():
            yield dcmread(BytesIO(content)), self.times[uid]


class Orthanc:
    """Orthanc in its own folder.

    Args:
        folder: for its database and its configuration.
        node_port: where it reports on storage commitment.

    Raises:
        RuntimeError: other machines could reach it.
    """

    def __init__(self, folder: Path, node_port: int) -> None:
        if [name for _, name in socket.if_nameindex() if name != "lo"]:
            raise RuntimeError("Orthanc would listen at every address. See the first lines of this file.")
        self.port, self._http_port = find_port(), find_port()
        folder.mkdir()
        self._configuration = folder / "orthanc.json"
        content = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": self._http_port,
            "DicomPort": self.port,
            "DicomAet": ARCHIVE,
            "RemoteAccessAllowed": False,
            "DicomModalities": {"node": [NODE, HOST, node_port]},  # who may ask by C-FIND
            "Plugins": [],
        }
        self._configuration.write_text(json.dumps(content))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Go up."""
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        with (self._configuration.parent / "log").open("ab") as log:
            self._process = subprocess.Popen([program, str(self._configuration)], stdout=log, stderr=log)
        wait_for(lambda: answers(self.port) and answers(self._http_port), 60)

    def stop(self) -> None:
        """Go down. What arrived is kept."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:  # it waits for associations that stay open
            self._process.kill()
            self._process.wait()

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{HOST}:{self._http_port}{path}", timeout=60) as answer:
            return bytes(answer.read())

    def count(self) -> int:
        """Return how many objects are there; 0 while it is down."""
        try:
            return int(json.loads(self._get("/statistics"))["CountInstances"])
        except urllib.error.URLError:
            return 0

    def list_results(self) -> Iterator[tuple[Dataset, int]]:
        """Yield every object and how often it was stored."""
        changes = json.loads(self._get("/changes?limit=1000000"))["Changes"]
        times = Counter(change["ID"] for change in changes if change["ChangeType"] == "NewInstance")
        for number in json.loads(self._get("/instances")):
            yield dcmread(BytesIO(self._get(f"/instances/{number}/file"))), times[number]


class Modality(threading.Thread):
    """Sends X-rays one after another, and repeats each one until it is answered with success.

    Attributes:
        answered: time of each answer by the X-ray's UID, s of the monotonic clock.
        begun: time of each first try.
        tries: number of all tries.
    """

    def __init__(self, paths: list[Path], port: int, before: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(daemon=True)
        self._datasets, self._port, self._before = [dcmread(path) for path in paths], port, before
        self.answered: dict[str, float] = {}
        self.begun: dict[str, float] = {}
        self.tries = 0

    def run(self) -> None:
        """Send everything."""
        ae = AE(ae_title=MODALITY)
        for context in {(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID) for dataset in self._datasets}:
            ae.add_requested_context(*context)
        association = None
        for number, dataset in enumerate(self._datasets):
            self._before(number)
            uid = str(dataset.SOPInstanceUID)
            self.begun[uid] = time.monotonic()
            while uid not in self.answered:
                if association is None or not association.is_established:
                    association = ae.associate(HOST, self._port, ae_title=NODE)
                try:
                    self.tries += 1
                    if association.is_established and association.send_c_store(dataset).get("Status") == 0:
                        self.answered[uid] = time.monotonic()
                        continue
                except RuntimeError:  # the association ended
                    pass
                time.sleep(0.2)
        if association is not None and association.is_established:
            association.release()


def find_port() -> int:
    """Return a TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Return whether somebody listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: it does not become true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {seconds:.0f} s")
        time.sleep(0.05)


def make_x_rays(folder: Path, count: int, seed: int) -> list[Path]:
    """Write copies of the example X-ray with UIDs and noise of their own, four to a study."""
    folder.mkdir()
    example, paths = dcmread(EXAMPLE), []
    stored = example.pixel_array
    generator = np.random.default_rng(seed)
    for number in range(count):
        noisy = stored + generator.integers(0, 4, stored.shape)
        example.PixelData = np.clip(noisy, 0, 2**example.BitsStored - 1).astype(stored.dtype).tobytes()
        example.StudyInstanceUID = f"2.25.{seed + 1}.{number // 4}"
        example.SeriesInstanceUID = f"2.25.{seed + 1}.{number // 4}.1"
        example.SOPInstanceUID = f"2.25.{seed + 1}.{number // 4}.1.{number}"
        example.file_meta.MediaStorageSOPInstanceUID = example.SOPInstanceUID
        paths.append(folder / f"{number:05d}.dcm")
        example.save_as(paths[-1])
    return paths


def make_inference(asked: Trial, output: Path) -> Inference:
    """Return a run with the settings of the trial."""
    settings = InferSettings(
        output=output, bundle=asked.bundle, runner=asked.runner, device="cpu", threads=1, format="dicom"
    )
    return Inference(settings)


def serve(asked: Trial, folder: Path, archive_port: int, port: int) -> None:
    """Run a node until it is killed."""
    vars(sending)["LONGEST_PAUSE_S"] = 2.0  # the archive is down for seconds here
    vars(sending)["ASK_AGAIN_S"] = 10.0  # and reports come at once, or were lost by a kill
    destination = Destination(ARCHIVE, HOST, archive_port)
    settings = NodeSettings(folder=folder, destinations=(destination,), port=port, http_port=None)
    with ExitStack() as stack:
        node = Node(settings, make_inference(asked, settings.results))
        node.start(stack)
        while True:
            node.watch(1.0)


class NodeProcess:
    """A node in a process of its own, started again after each kill."""

    def __init__(self, asked: Trial, folder: Path, archive_port: int, port: int) -> None:
        self.port = port
        self._arguments = (asked, folder, archive_port, self.port)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = FORKS.Process(target=serve, args=self._arguments, daemon=True)
        self._process.start()
        wait_for(lambda: answers(self.port) or not self._process.is_alive(), 300)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.join()

    def read_processor_s(self) -> float:
        """Return the processor time that it has taken, s."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_memory(self) -> int:
        """Return the bytes of memory that it has (resident set size)."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def run_infer(asked: Trial, paths: list[Path], output: Path) -> tuple[dict[str, bytes], float, float]:
    """Process the files as `infer` does.

    Returns:
        The pixels of each result by its UID; the seconds it took; the seconds of processor time.
    """
    inference = make_inference(asked, output)
    begin, spent = time.monotonic(), time.process_time()
    report = inference.run(inference.find_tasks([paths[0].parent]))
    seconds, spent = time.monotonic() - begin, time.process_time() - spent
    results = [dcmread(output / str(entry.output)) for entry in report.files]
    return {str(result.SOPInstanceUID): result.PixelData for result in results}, seconds, spent


def judge(archive: Archive, expected: dict[str, bytes]) -> dict[str, int]:
    """Return how many results arrived once, more often, with other pixels, unexpectedly, or not at all."""
    counts: Counter[str] = Counter(dict.fromkeys(("once", "more often", "other pixels", "unexpected", "missing"), 0))
    seen = set()
    for result, times in archive.list_results():
        uid = str(result.SOPInstanceUID)
        seen.add(uid)
        counts["once" if times == 1 else "more often"] += 1
        counts["unexpected"] += uid not in expected
        counts["other pixels"] += uid in expected and result.PixelData != expected[uid]
    counts["missing"] = len(expected.keys() - seen)
    return dict(counts)


def try_kills(asked: Trial, folder: Path) -> dict[str, object]:
    """Send X-rays while the node is killed and the archive goes down once. Return what was counted."""
    paths = make_x_rays(folder / "in", asked.images, asked.seed)
    expected, infer_s, _ = run_infer(asked, paths, folder / "infer")
    port = find_port()
    archive: Archive = Orthanc(folder / "orthanc", port) if asked.orthanc else CountingArchive()
    chance = random.Random(asked.seed)
    begin = time.monotonic()
    archive.start()
    node = NodeProcess(asked, folder / "node", archive.port, port)
    # The images arrive over half of the time that they take, so that kills meet all parts of the node.
    pause = infer_s / asked.images / 2
    modality = Modality(paths, node.port, before=lambda _: time.sleep(chance.uniform(0, 2 * pause)))
    modality.start()
    try:
        wait_for(lambda: archive.count() >= asked.images // 4, 3600)
        archive.stop()
        for kill in range(asked.kills):
            if kill == asked.kills // 2:
                archive.start()
            time.sleep(chance.uniform(0, 1.2 * infer_s / asked.kills))
            node.kill()
            node.start()
        wait_for(lambda: archive.count() >= asked.images, 3600)
        modality.join()
        time.sleep(5)  # what should not come would come now
        seconds = round(time.monotonic() - begin, 1)
        outcome = judge(archive, expected)
        commitments = wait_for_commitments(folder / "node" / JOURNAL, 60)
    finally:
        node.kill()
        archive.stop()
    faulty = outcome["once"] != asked.images or any(outcome[key] for key in outcome if key != "once")
    sent = {"images": asked.images, "kills": asked.kills, "c_store_requests": modality.tries, "seconds": seconds}
    return {**sent, "results": outcome, "commitments": commitments, "faulty": faulty}


def wait_for_commitments(path: Path, seconds: float) -> dict[str, int]:
    """Return the number of results by state of their storage commitment, when no request is open or time is up."""
    journal, deadline = Journal(path), time.monotonic() + seconds
    try:
        while (counts := journal.count_commitments())["wanted"] + counts["asked"] and time.monotonic() < deadline:
            time.sleep(0.5)
        return counts
    finally:
        journal.close()


def try_speed(asked: Trial, folder: Path) -> dict[str, object]:
    """Measure images per minute against `infer`, the time from C-STORE to the result, and memory."""
    paths = make_x_rays(folder / "in", asked.images, asked.seed)
    archive = CountingArchive()
    archive.start()
    node = NodeProcess(asked, folder / "node", archive.port, find_port())
    single = paths[: max(10, asked.images // 5)]
    alone = Modality(single, node.port, before=lambda number: wait_for(lambda: archive.count() >= number, 600))
    try:
        alone.start()  # each one when the result of the one before has arrived
        alone.join()
        wait_for(lambda: archive.count() >= len(single), 600)
        waits = [archive.arrived[uid] - alone.begun[uid] for uid in alone.begun]
        memory = [node.read_memory()]
        begin, done, spent = time.monotonic(), archive.count(), node.read_processor_s()
        together = Modality(paths[done:], node.port)
        together.start()
        for share in range(1, 11):
            goal = done + (asked.images - done) * share // 10
            wait_for(lambda goal=goal: archive.count() >= goal, 7200)  # type: ignore[misc]
            memory.append(node.read_memory())
        node_s, spent = time.monotonic() - begin, node.read_processor_s() - spent
    finally:
        node.kill()
        archive.stop()
    for path in single:
        path.unlink()
    expected, infer_s, infer_spent = run_infer(asked, paths[done:], folder / "infer")
    return {
        "images": len(expected),
        "node_images_per_minute": round(60 * len(expected) / node_s, 1),
        "infer_images_per_minute": round(60 * len(expected) / infer_s, 1),
        "node_processor_s_per_image": round(spent / len(expected), 3),
        "infer_processor_s_per_image": round(infer_spent / len(expected), 3),
        "single_images": len(waits),
        "c_store_to_archive_s": {
            "median": round(statistics.median(waits), 2),
            "p95": round(statistics.quantiles(waits, n=20)[-1], 2),
        },
        "memory_mb": [round(size / 1e6) for size in memory],
    }


def main() -> None:
    """Read the arguments, run a trial and print what it counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="X-rays to send (default: 200)")
    parser.add_argument("--kills", type=int, default=10, help="kills of the node (default: 10)")
    parser.add_argument("--bundle", default="demo", help="model (default: demo)")
    parser.add_argument("--runner", default="auto", help="runner (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of the X-rays and the times of the kills (default: 0)")
    parser.add_argument("--orthanc", action="store_true", help="send to Orthanc")
    parser.add_argument("--speed", action="store_true", help="kill nothing; measure against infer")
    given = parser.parse_args()
    asked = Trial(given.images, given.kills, given.bundle, given.runner, given.seed, given.orthanc)
    with tempfile.TemporaryDirectory() as name:
        found = (try_speed if given.speed else try_kills)(asked, Path(name))
    print(json.dumps(found, indent=1))
    raise SystemExit(bool(found.get("faulty")))


if __name__ == "__main__":
    main()
