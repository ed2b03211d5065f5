"""The figures of reused deep features: each picture against the exact one of the same noise."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from benchmarks import deep_cache
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.errors import SettingsError


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.GaussianBlur(pixels, (0, 0), 3))
    return tmp_path / "a.png"


def test_rows(image, tiny_bundle, tmp_path, capsys):
    deep_cache.main([image], str(tiny_bundle), None, 32, "ddim", 20, "1,4", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    exact, cached = found["rows"]
    assert (found["sampler"], found["steps"], found["width"], found["size_px"]) == ("ddim", 20, None, 32)
    assert (exact["every"], cached["every"]) == (1, 4)
    assert exact["largest"] == 0.0
    assert 0 < cached["largest"] <= 1
    assert cached["psnr"] < exact["psnr"]
    assert capsys.readouterr().out.count("times as fast") == 2


def test_the_papers_network_of_another_width(tiny_bundle):
    network = deep_cache.make_runner(open_bundle(str(tiny_bundle)), 16)._denoiser
    assert network.config.channels == (16, 32, 64, 128, 192)
    assert network.config.attention == (False, True, True, True, True)
    assert network.conv_out.weight.any()


def test_too_few_steps(image, tiny_bundle):
    with pytest.raises(SettingsError, match="from 20 steps on"):
        deep_cache.main([image], str(tiny_bundle), None, None, "ddim", 10, "2", None)
