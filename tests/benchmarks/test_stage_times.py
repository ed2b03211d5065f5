"""Times of the stages of a worker: every stage is there, and a watched run loses nothing."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import stages


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_stage_is_timed_and_a_run_is_watched(small, monkeypatch, capsys):
    monkeypatch.setattr(stages, "SIDE_PX", 200)
    options = ["--images", "1", "--run", "3", "--bundle", str(small.folder), "--runner", "eager"]
    monkeypatch.setattr(sys, "argv", ["stages", *options])
    stages.main()
    found = json.loads(capsys.readouterr().out)
    kinds = [f"write {kind}" for kind in ("dicom", "dicom-j2k", "png")]
    assert list(found["stages"]) == ["decode", "view", "network", "detail", *kinds]
    assert all(0 < times["median_s"] <= times["p95_s"] for times in found["stages"].values())
    assert found["run"]["counts"] == {"ok": 3}
    assert 0 < found["run"]["memory_mb"]["settled"] <= found["run"]["memory_mb"]["peak"]
