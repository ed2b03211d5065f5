"""The parts of a step: what is timed is what the network computes."""

from __future__ import annotations

import torch
from helpers import randomise

from benchmarks import step_parts
from bsdiff_rt.config import PRESETS
from bsdiff_rt.networks.blocks import ResBlock
from bsdiff_rt.networks.unet import Denoiser


def test_the_embedding_is_the_networks(monkeypatch):
    denoiser = Denoiser(PRESETS["tiny"].denoiser).eval()
    randomise(denoiser, 0)
    seen = []
    for block in denoiser.modules():
        if isinstance(block, ResBlock):
            block.time_emb_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    image, t = torch.zeros(1, 1, 32, 32), torch.full((1,), 7.0)
    with torch.no_grad():
        denoiser(image, image, t)
        expected, seen = seen, []
        found = step_parts.embed_time(denoiser, t)
    order = [next(place for place, other in enumerate(found) if torch.equal(other, one)) for one in expected]
    assert sorted(order) == list(range(8))


def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(step_parts, "read_load", lambda: 9.0)
    step_parts.main(["tiny"], 32, 1)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("tiny: a step takes ")
    assert lines[-1].startswith("arithmetic of the loop behind the denoiser: ")
    assert [line.split(":")[1] for line in lines[1:-1]] == [" queries, keys and values of 256 x 16"]
    assert "busy" in printed.err


def test_shares_are_shares():
    denoiser = Denoiser(PRESETS["tiny"].denoiser).eval()
    seconds, share = step_parts.measure_embedding(denoiser, 32, 2)
    assert seconds > 0
    assert 0 < share < 1
    assert step_parts.measure_projections(denoiser, 32, 2)["256 x 16"] > 0
