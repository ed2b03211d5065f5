"""What is told while a run goes on."""

from __future__ import annotations

import sys

from bsdiff_rt.folder.progress import FileProgress
from bsdiff_rt.folder.report import FileEntry


class Gone:
    """A stderr that nobody reads any more."""

    def isatty(self):
        return False

    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


def test_whoever_listened_and_is_gone_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    with FileProgress(1, quiet=False) as progress:
        progress.on_file(FileEntry("a.png", None, "failed", "damaged"))
