"""Measure how long `infer` waits until its results are on the disk.

    python -m benchmarks.flush_cost FOLDER --images 100

FOLDER must be new. It lies on the drive that is measured. Results of 512 x 512 px are written there as `infer` does it,
and each flush is timed. The model is left out: it takes the same time with and without flushing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from bsdiff_rt import formats
from bsdiff_rt.files import flush_to_disk
from bsdiff_rt.formats.raster import write_png

EXAMPLE = Path(__file__).parents[1] / "examples" / "phantom10000001_cxr.png"


def measure(folder: Path, images: int) -> dict[str, float]:
    """Return the time of writing and of flushing one result and its folder, median and 95th percentile, ms."""
    folder.mkdir()
    cxr = formats.read(EXAMPLE).cxr
    written, flushed = [], []
    for number in range(images):
        path = folder / f"{number}.png"
        begin = time.perf_counter()
        write_png(path, cxr, 16)
        between = time.perf_counter()
        for one in (path, folder):
            flush_to_disk(one)
        written.append(1000 * (between - begin))
        flushed.append(1000 * (time.perf_counter() - between))
    return {
        "images": images,
        "write_ms": round(statistics.median(written), 2),
        "flush_ms": round(statistics.median(flushed), 2),
        "flush_ms_p95": round(statistics.quantiles(flushed, n=20)[-1], 2),
    }


def main() -> None:
    """Read the arguments and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder on the drive to measure")
    parser.add_argument("--images", type=int, default=100, help="results to write (default: 100)")
    given = parser.parse_args()
    print(json.dumps(measure(given.folder, given.images), indent=1))


if __name__ == "__main__":
    main()
