"""Timing how long results take to be on the disk."""

from __future__ import annotations

from benchmarks.flush_cost import measure


def test_every_result_is_written_and_timed(tmp_path):
    found = measure(tmp_path / "new", 5)
    assert len(list((tmp_path / "new").iterdir())) == found["images"] == 5
    assert 0 <= found["flush_ms"] <= found["flush_ms_p95"]
    assert found["write_ms"] > 0
