"""Writing a bundle: only what agrees with eager, whole, and never over something that is no bundle.

The graphs are the session's; only what is around the exporter (10 to 20 seconds a call) is run here again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from helpers import randomise

from bsdiff_rt.bundle import FILES, MANIFEST, open_bundle
from bsdiff_rt.config import PRESETS, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.engines.parity import TOLERANCES
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import EagerRunner
from export import bundle as module
from export.bundle import BundleOptions, check_agreement, write_bundle

TOLERANCE = TOLERANCES["fp32"].call
PRESET = PRESETS["tiny"]
OPTIONS = BundleOptions(
    "again",
    SamplerSettings("ddim", 5),
    Preprocessing(64),
    enhance=False,
    mirror=True,
)


def networks(*seeds):
    pair = Denoiser(PRESET.denoiser), Enhancer(PRESET.enhancer)
    for network, seed in zip(pair, seeds, strict=True):
        randomise(network, seed)
    return pair


@pytest.fixture
def write(tiny_bundle, tmp_path, monkeypatch):
    """write_bundle into tmp_path/new with the session's graphs; seeds 1 and 2 are the weights in them."""
    monkeypatch.setattr(
        module,
        "export_graph",
        lambda network, inputs, weights, graph: [
            shutil.copy(tiny_bundle / path.name, path) for path in (weights, graph)
        ],
    )

    def do(*seeds, options=OPTIONS, folder=tmp_path / "new", pair=None, overwrite=False):
        pair = pair or networks(*(seeds or (1, 2)))
        return write_bundle(folder, PRESET, Schedule(objective="x0"), *pair, options, overwrite=overwrite)

    return do


def test_a_bundle_that_opens(write, tmp_path):
    manifest = write()
    bundle = open_bundle(tmp_path / "new")
    assert bundle.manifest == manifest
    assert {path.name for path in bundle.folder.iterdir()} == {*FILES, MANIFEST}
    assert (manifest.name, manifest.preset) == ("again", "tiny")
    assert manifest.sampler == SamplerSettings("ddim", 5)
    assert (manifest.enhance, manifest.mirror) == (False, True)
    assert manifest.files == {name: file_sha256(tmp_path / "new" / name) for name in FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # no work folder left


def test_the_manifest_has_the_same_bytes_on_windows(write, tmp_path, monkeypatch):
    plain = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: plain(path, text, newline="\r\n"))
    manifest = write()
    assert (tmp_path / "new" / MANIFEST).read_bytes() == manifest.to_json().encode()


def test_everybody_may_read_it(write, tmp_path):
    write()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o644}


def test_agreement_is_recorded(tiny_bundle):
    agreement = open_bundle(tiny_bundle).manifest.agreement
    assert agreement["tolerance"] == TOLERANCE
    # Not zero: a graph that returned the same zeros as an untrained network would agree, too.
    assert 0 < agreement["denoiser"] < TOLERANCE
    assert 0 < agreement["enhancer"] < TOLERANCE


@pytest.mark.parametrize(("seeds", "which"), [((9, 2), "denoiser, t = 0, batch 1"), ((1, 9), "enhancer, batch 1")])
def test_graphs_that_disagree_with_eager_are_not_written(write, tmp_path, seeds, which):
    with pytest.raises(BundleError, match=rf"^ONNX Runtime differs from eager\. {which}: .* No bundle was written"):
        write(*seeds)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_networks_that_return_no_numbers_are_not_written(write, tmp_path, value):
    pair = networks(1, 2)
    with torch.no_grad():
        next(pair[0].conv_in.parameters()).fill_(value)
    with pytest.raises(BundleError, match=r"ONNX Runtime differs from eager\. denoiser, t = 0"):
        write(pair=pair)
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_was_there_stays_when_the_new_one_is_refused(write, tmp_path):
    write()
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(SettingsError, match=r"new: holds a bundle\. Choose another folder, or give --overwrite"):
        write()
    with pytest.raises(BundleError):
        write(9, 2, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_a_bundle_is_replaced_by_a_bundle(write, tmp_path):
    write()
    (tmp_path / "new" / "model card.md").write_text("mine")
    write(options=dataclasses.replace(OPTIONS, name="newer"), overwrite=True)
    assert open_bundle(tmp_path / "new").manifest.name == "newer"
    assert (tmp_path / "new" / "model card.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("number", [1, 2])
def test_an_interruption_leaves_the_old_bundle_or_the_new_one(write, tmp_path, monkeypatch, number):
    write()
    before = open_bundle(tmp_path / "new").sha256
    renamed = []
    real = Path.rename

    def rename(path, target):
        if path.is_dir():
            renamed.append(path)
            if len(renamed) == number:
                raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(options=dataclasses.replace(OPTIONS, name="newer"), overwrite=True)
    assert open_bundle(tmp_path / "new").sha256 == before


def test_an_empty_folder_is_taken(write, tmp_path):
    (tmp_path / "new").mkdir()
    write()
    assert open_bundle(tmp_path / "new")


def test_parents_are_made(write, tmp_path):
    write(folder=tmp_path / "a" / "b")
    assert open_bundle(tmp_path / "a" / "b")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_touched(write, tmp_path, kind):
    mine = tmp_path / "new" / "thesis.txt" if kind == "folder" else tmp_path / "new"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SettingsError, match=r"new: exists and is not a bundle\. Choose a new or an empty folder"):
        write()
    assert mine.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (2 if kind == "folder" else 1)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_default_that_could_not_be_run(write, tmp_path, steps):
    options = dataclasses.replace(OPTIONS, sampler=SamplerSettings("ddim", steps))
    with pytest.raises(SettingsError, match=f"{steps} sampling steps requested"):
        write(options=options)
    assert not list(tmp_path.iterdir())


def test_networks_leave_as_they_came(write):
    """In evaluation mode, not in another precision or on another device: they may still be trained on."""
    pair = networks(1, 2)
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in pair]
    write(pair=pair)
    for network, state in zip(pair, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_no_secret_of_the_machine_in_the_manifest(write, tmp_path):
    write()
    text = (tmp_path / "new" / MANIFEST).read_text()
    assert "/" not in json.dumps({key: value for key, value in json.loads(text).items() if key != "training"})


class Off(EagerRunner):
    """Eager, but wrong at one timestep and batch."""

    def denoise(self, x_t, cxr, t, out):
        super().denoise(x_t, cxr, t, out)
        if len(x_t) == 2 and t[0] == 999:
            out[1, 0, 3, 5] += 2 * TOLERANCE * out.abs().max()


def test_every_timestep_and_batch_is_compared():
    pair = networks(1, 2)
    cpu, schedule = torch.device("cpu"), Schedule(objective="x0")
    eager = EagerRunner(*pair, 64, cpu)
    assert check_agreement(eager, eager, schedule) == {"denoiser": 0.0, "enhancer": 0.0, "tolerance": TOLERANCE}
    with pytest.raises(BundleError, match="denoiser, t = 999, batch 2"):
        check_agreement(eager, Off(*pair, 64, cpu), schedule)
