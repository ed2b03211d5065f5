"""The command line of the export: every refusal is one line that says what to do."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import NO_ENHANCER, PRESETS, SamplerSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from export import __main__ as command
from export.speed import Speed, measure_speed

SCHEDULE = {"name": "cosine", "train_steps": 1000, "beta_start": 0.0015, "beta_end": 0.0205, "objective": "x0"}
GOOD = {"preset": "tiny", "step": 1, "size": 64, "averaged": {}, "schedule": SCHEDULE}


def save(folder, denoiser, enhancer=None):
    torch.save(denoiser, folder / "denoiser.pt")
    torch.save(enhancer or GOOD, folder / "enhancer.pt")


def catch_arguments(monkeypatch):
    """Return the list that the arguments of each `write_bundle` go into, instead of being written."""
    given = []
    monkeypatch.setattr(command, "write_bundle", lambda *arguments, **_: given.append(arguments))
    monkeypatch.setattr(command, "describe_bundle", lambda *_: None)
    return given


@pytest.mark.parametrize(
    ("denoiser", "enhancer", "message"),
    [
        ({"preset": "demo"}, {}, "denoiser is demo, enhancer is tiny"),
        ({"preset": "giant"}, {"preset": "giant"}, "preset 'giant' is not one of"),
        ({"schedule": None}, {}, "has no schedule"),
        ({}, {"size": 32}, "denoiser is for 64 px, enhancer for 32 px"),
        ({"averaged": {}}, {}, "the weights do not fit preset tiny of this version. Train them again"),
        ({"schedule": {"kind": "linear"}}, {}, "the weights do not fit preset tiny of this version"),
        (
            {},
            {"stage_one": "0" * 64},
            "trained on another stage 1 .* or leave it off with --no-enhance",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, denoiser, enhancer, message):
    save(tmp_path, GOOD | denoiser, GOOD | enhancer)
    with pytest.raises(SettingsError, match=message):
        command.export_checkpoints(tmp_path, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "FileNotFoundError"), ("{", "JSONDecodeError"), ("[1]", "it must hold a JSON object")]
)
def test_provenance_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        command.read_provenance(path)


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="preset 'giant': choose one of paper, demo, tiny"):
        command.export_random("giant", tmp_path / "bundle")


def test_main_turns_an_error_into_one_line_and_its_exit_code(tmp_path, monkeypatch, capsys):
    """A first word that is no command is the folder of checkpoints."""
    for arguments in ([str(tmp_path), "-o", str(tmp_path / "b")], ["-o", str(tmp_path / "b"), str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["export", *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert stop.value.code == 2
        assert "denoiser.pt: no such checkpoint" in capsys.readouterr().err


def test_the_training_datas_clahe_goes_into_the_bundle(tmp_path, monkeypatch):
    preset = PRESETS["tiny"]
    networks = Denoiser(preset.denoiser).state_dict(), Enhancer(preset.enhancer).state_dict()
    save(tmp_path, *(GOOD | {"averaged": dict(state)} for state in networks))
    given = catch_arguments(monkeypatch)
    command.export_checkpoints(tmp_path, tmp_path / "bundle", clahe=2.5)
    command.export_checkpoints(tmp_path, tmp_path / "bundle")
    first, second = (GOOD | {"averaged": dict(state), "trained_on": ["b", "c"]} for state in networks)
    save(tmp_path, first | {"clahe": 2.0}, second | {"trained_on": ["a", "b"]})
    command.export_checkpoints(tmp_path, tmp_path / "bundle")
    command.export_checkpoints(tmp_path, tmp_path / "bundle", clahe=2.0)
    written = [arguments[-1] for arguments in given]
    assert [options.preprocessing.clahe_clip_limit for options in written] == [2.5, 0.0, 2.0, 2.0]
    assert [options.training.get("trained_on") for options in written] == [None, None, *[["a", "b", "c"]] * 2]
    with pytest.raises(SettingsError, match="--clahe 0: the model was trained on 2"):
        command.export_checkpoints(tmp_path, tmp_path / "bundle", clahe=0.0)


def test_a_bundle_without_stage_2(tmp_path, monkeypatch):
    given = catch_arguments(monkeypatch)
    demo = Denoiser(PRESETS["demo"].denoiser).state_dict()
    torch.save(GOOD | {"preset": "demo", "averaged": dict(demo)}, tmp_path / "denoiser.pt")
    tiny = Denoiser(PRESETS["tiny"].denoiser).state_dict()  # its own stage 2 does not begin as the identity
    for enhance in (False, None):
        command.export_checkpoints(tmp_path, tmp_path / "bundle", enhance=enhance)
    torch.save(GOOD | {"averaged": dict(tiny)}, tmp_path / "denoiser.pt")
    command.export_checkpoints(tmp_path, tmp_path / "bundle")
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for (_, preset, _, _, enhancer, options), name in zip(given, ("demo", "demo", "tiny"), strict=True):
        torch.testing.assert_close(enhancer.eval()(x), x)  # as good as none
        assert (preset.name, preset.enhancer) == (name, NO_ENHANCER)
        assert (options.training["enhancer_steps"], options.enhance) == (0, False)
    with pytest.raises(SettingsError, match=r"enhancer\.pt: no such checkpoint"):
        command.export_checkpoints(tmp_path, tmp_path / "bundle", enhance=True)


def test_a_size_that_the_networks_cannot_halve(tmp_path):
    with pytest.raises(SettingsError, match="size 65 px: the tiny networks take multiples of 2 px"):
        command.export_random("tiny", tmp_path / "bundle", 65)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("objective", "sampler", "mirror"),
    [("x0", ("ddim", 3), True), ("v", ("ddim", 3), True), ("eps", ("ddpm", 1000), False)],
)
def test_defaults_follow_the_objective(tmp_path, monkeypatch, objective, sampler, mirror):
    given = catch_arguments(monkeypatch)
    preset = PRESETS["tiny"]
    networks = Denoiser(preset.denoiser).state_dict(), Enhancer(preset.enhancer).state_dict()
    schedule = {"schedule": SCHEDULE | {"objective": objective}}
    save(tmp_path, *(GOOD | {"averaged": dict(state)} | schedule for state in networks))
    command.export_checkpoints(tmp_path, tmp_path / "bundle")
    command.export_checkpoints(tmp_path, tmp_path / "bundle", sampler="dpmpp-2m", steps=7, mirror=not mirror)
    default, explicit = (arguments[-1] for arguments in given)
    assert (default.sampler, default.mirror) == (SamplerSettings(*sampler), mirror)
    assert (explicit.sampler, explicit.mirror) == (SamplerSettings("dpmpp-2m", 7), not mirror)
    assert default.licence == "unstated"


def test_the_speed_of_a_bundle(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    speed = measure_speed(tiny_bundle, manifest)
    assert speed.steps == manifest.sampler.steps
    assert speed.image_s == pytest.approx(speed.steps * speed.step_s + speed.enhance_s)
    assert 0 < speed.step_s < 10


def test_the_speed_in_words():
    assert str(Speed(0.1, 3, 0.05, 2)) == (
        "about 0.7 s per image with ONNX Runtime on this machine: 3 steps of 0.1 s, stage 2 in 0.05 s, "
        "2 passes (the image and its mirror image)"
    )
    assert str(Speed(0.1, 1, 0.0, 1)) == "about 0.1 s per image with ONNX Runtime on this machine: 1 step of 0.1 s"


@pytest.mark.slow
def test_random_weights_make_a_bundle(tmp_path):
    command.export_random("tiny", tmp_path / "bundle", 64, enhance=False, objective="x0", sampler="ddim", steps=2)
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.manifest.schedule.objective, bundle.manifest.sampler) == ("x0", SamplerSettings("ddim", 2))
    assert json.loads(bundle.manifest.to_json())["name"] == "tiny-random"
    assert not bundle.manifest.enhance
    assert 0 < bundle.manifest.agreement["denoiser"] < 1e-4


def test_only_the_graphs(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "write_bundle", lambda folder, *_, **__: shutil.copytree(tiny_bundle, folder))
    graphs = tmp_path / "graphs"
    command.export_random("tiny", graphs, 64, enhance=False, onnx_only=True, precision="fp16")
    assert {path.name for path in graphs.iterdir()} == {"denoiser.onnx", "enhancer.onnx", "step.onnx", "rows.csv"}
    types = {tensor.data_type for tensor in onnx.load(graphs / "denoiser.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert np.loadtxt(graphs / "rows.csv", delimiter=",", skiprows=1).shape == (3, 7)
    assert capsys.readouterr().out.count("wrote ") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onnx_only": True, "overwrite": True}, "--onnx-only replaces no files"),
        ({"precision": "bf16"}, "--precision bf16: a bundle holds fp32"),
    ],
)
def test_options_of_the_graphs_that_contradict(tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        command.export_random("tiny", tmp_path / "out", 64, **options)
    assert not (tmp_path / "out").exists()
