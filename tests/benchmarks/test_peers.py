"""The peers' table: rows of the contract, taken in turn, the published network in the bundle's own shape."""

import json

import torch
from typer.testing import CliRunner

from benchmarks.peers import app, interleaved, published_step
from bsdiff_rt.config import PRESETS


def test_rows_follow_the_contract(tiny_bundle, tmp_path):
    path = tmp_path / "p.json"
    arguments = ["--bundle", str(tiny_bundle), "--device", "cpu", "--batch", "2", "--repeats", "2", "--json", str(path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == ["published eager", "eager", "onnxruntime"]
    for row in written["rows"]:
        assert row["batch"] == 2
        assert 0 < row["step_ms"] <= row["step_ms_p95"]
    assert written["rows"][0]["published_over_this"] == 1.0
    assert written["device"].endswith("threads")


def test_steps_are_taken_in_turn_and_the_first_round_is_not_counted():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert "".join(order) == "abababab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_the_published_network_takes_every_presets_shape():
    x = torch.zeros(1, 1, 32, 32)
    for preset in ("tiny", "demo"):
        published_step(PRESETS[preset].denoiser, x, x, torch.zeros(1))()
