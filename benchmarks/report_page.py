"""Measure report.html with many images: time to write, size, and time to open and filter it in Chromium.

    python -m benchmarks.report_page --images 1000

Needs Selenium, Chromium and its driver. The pictures are noise over a gradient: they compress worse than X-rays.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from bsdiff_rt.folder.html import write_page
from bsdiff_rt.folder.report import PAGE, FileEntry, Report
from bsdiff_rt.formats.raster import write_png

SHAPE = (1024, 1024)
FILES = 20  # different files; the page shows each several times
OPENINGS = 3

# Milliseconds until the page can be used, and until a filter has changed what is seen.
OPENED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
FILTERED = """
  const text = document.getElementById("text"), begin = performance.now();
  text.value = arguments[0];
  text.dispatchEvent(new Event("input"));
  document.body.offsetHeight;
  return performance.now() - begin;
"""


def make_run(folder: Path, images: int) -> Report:
    """Write a few pictures, and return the report of a run in which they occur again and again."""
    generator = np.random.default_rng(0)
    entries = []
    for number in range(FILES):
        cxr = np.linspace(0.2, 0.7, SHAPE[1], dtype=np.float32) + generator.normal(0, 0.02, SHAPE).astype(np.float32)
        for name, picture in (("in", cxr), ("out", cxr * np.float32(0.9))):
            (folder / name).mkdir(exist_ok=True)
            write_png(folder / name / f"{number}.png", np.clip(picture, 0, 1), 8)
    for number in range(images):
        entries.append(FileEntry(str(folder / "in" / f"{number % FILES}.png"), f"{number % FILES}.png", "ok"))
    return Report({"name": "none", "sha256": "", "licence": ""}, {"samples": 1}, {}, files=entries)


def measure(folder: Path, images: int) -> dict[str, object]:
    """Write a page and open it. Return sizes in bytes and times in seconds."""
    report = make_run(folder, images)
    begin = time.perf_counter()
    write_page(report, folder / "out")
    written = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    with Chrome(options=options, service=Service(shutil.which("chromedriver") or "")) as browser:
        opened, filtered = [], []
        for _ in range(OPENINGS):
            browser.get((folder / "out" / PAGE).as_uri())
            opened.append(browser.execute_script(OPENED) / 1000)
            filtered += [browser.execute_script(FILTERED, text) / 1000 for text in ("1", "12.", "")]
    return {
        "images": images,
        "page_bytes": (folder / "out" / PAGE).stat().st_size,
        "write_s": round(written, 1),
        "write_peak_bytes": peak,
        "open_s": [round(value, 2) for value in opened],
        "filter_s": [round(value, 3) for value in filtered],
    }


def main() -> None:
    """Read the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="cards of the page (default: 1000)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), asked.images), indent=1))


if __name__ == "__main__":
    main()
