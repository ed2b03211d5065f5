"""Time each stage of a worker on full-size X-rays, and watch the memory and the processors of a long run.

    python -m benchmarks.stages --images 20 --steps 1 --run 1000

The X-ray is a made one: an example enlarged to 2000 x 2000 px, 14 bits, as DICOM in JPEG 2000 lossless. `--run N` then
processes N copies as `infer` does, and samples memory and processor time after each file (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import JPEG2000Lossless, generate_uid

from benchmarks.kill_trials import EXAMPLES
from bsdiff_rt import formats
from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.imaging.one_image import Prepared
from bsdiff_rt.model import Model, load_runner_for, resolve_settings

SIDE_PX, BITS = 2000, 14

T = TypeVar("T")


def make_x_ray(path: Path) -> None:
    """Write the X-ray that everything is measured on."""
    dataset = pydicom.dcmread(EXAMPLES / "phantom10000003_cxr.dcm")
    pixels = dataset.pixel_array.astype(np.float32)
    enlarged = cv2.resize(pixels / pixels.max(), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 4, enlarged.shape)  # as a detector has, so that it compresses as one's
    values = np.clip(enlarged * (2**BITS - 1) + noise, 0, 2**BITS - 1).astype(np.uint16)
    dataset.Rows = dataset.Columns = SIDE_PX
    dataset.BitsStored, dataset.HighBit, dataset.BitsAllocated = BITS, BITS - 1, 16
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["bsdiff-rt benchmarks.stages"])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for name in ("WindowCenter", "WindowWidth"):
        if name in dataset:
            del dataset[name]
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path)


def run_network(model: Model, prepared: Prepared, digest: bytes) -> NDArray[np.float32]:
    """Return the model's outputs for one X-ray, [P, S, S]."""
    return np.array([take()[0] for take in model.order([(prepared, digest)])])


def time_stages(path: Path, settings: InferSettings, images: int) -> dict[str, dict[str, float]]:
    """Return median and 95th percentile of the seconds of each stage, one after the other in one thread."""
    inference = Inference(settings)
    choice, runner = load_runner_for(inference.bundle, inference.settings)
    resolved = resolve_settings(settings, inference.bundle.manifest)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        started = time.perf_counter()
        result = call(*arguments, **options)
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    with Model(inference.bundle, runner, resolved, choice) as model:
        for number in range(images + 1):
            if number == 1:
                seconds.clear()  # the first image warms up
            radiograph = timed("decode", formats.read, path)
            prepared = timed("view", model.prepare, radiograph.cxr)
            passes = timed("network", run_network, model, prepared, radiograph.pixel_digest)
            picture = timed("detail", model.finish, prepared, passes).soft_tissue
            for kind in ("dicom", "dicom-j2k", "png"):
                how = {"like": radiograph, "kind": kind, "derivation": model.describe(prepared)}
                timed(f"write {kind}", formats.write, settings.output / f"result.{kind}", picture, **how)
    return {
        name: {"median_s": round(statistics.median(values), 4), "p95_s": round(float(np.percentile(values, 95)), 4)}
        for name, values in seconds.items()
    }


def watch_run(source: Path, settings: InferSettings, count: int) -> dict[str, Any]:
    """Process copies of one X-ray. Return memory at image 100 and at the end, and how busy the processors were."""
    inputs = settings.output.parent / "in"
    inputs.mkdir()
    for number in range(count):
        os.link(source, inputs / f"{number:05d}.dcm")
    sizes: list[int] = []
    pages = Path("/proc/self/statm")

    def note(_: object) -> None:
        sizes.append(int(pages.read_text().split()[1]) * resource.getpagesize())

    inference = Inference(settings)
    tasks = inference.find_tasks([inputs])
    wall, cpu = time.monotonic(), time.process_time()
    report = inference.run(tasks, note)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    settled = sizes[min(100, len(sizes) // 2) :]
    memory = {"settled": settled[0], "end": sizes[-1], "peak": max(sizes)}
    return {
        "counts": dict(report.counts()),
        "seconds": round(wall, 1),
        "cpu_busy_of_one_core": round(cpu / wall, 3),
        "memory_mb": {name: round(size / 1e6) for name, size in memory.items()},
        "memory_from_settled": [round(min(settled) / settled[0] - 1, 3), round(max(settled) / settled[0] - 1, 3)],
    }


def main() -> None:
    """Read the options, measure, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="images for the time of each stage")
    parser.add_argument("--run", type=int, default=0, help="images of the run that is watched")
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "x.dcm", Path(folder) / "out"
        output.mkdir()
        make_x_ray(source)
        asked = {"bundle": arguments.bundle, "runner": arguments.runner, "steps": arguments.steps}
        settings = InferSettings(output=output, threads=arguments.threads, **asked)
        found: dict[str, Any] = {"input_bytes": source.stat().st_size, "threads": arguments.threads}
        if arguments.images:
            found["stages"] = time_stages(source, settings, arguments.images)
        if arguments.run:
            settings = replace(settings, output=Path(folder) / "run")
            found["run"] = watch_run(source, settings, arguments.run)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
