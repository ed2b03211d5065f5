"""Published checkpoints: read without running anything in them, and giving the published picture.

The files are made here, by torch.save, from the published classes with random weights, in the two published forms.
"""

from __future__ import annotations

import builtins
import collections
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import monai.networks.nets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import randomise
from torch import nn

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import PRESETS, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.published import denoiser_state, enhancer_state
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.registry import load_runner
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table
from export import __main__ as command
from export.published import Note, read_published_weights

with warnings.catch_warnings():
    # monai-generative 0.2.3 uses a torch.cuda.amp name deprecated since torch 2.4.
    warnings.simplefilter("ignore", FutureWarning)
    import generative.networks.nets

TINY = PRESETS["tiny"]
SIZE_PX = 32
# Largest difference of pixels in [-1, 1]. Both compute in float32, with differently ordered sums. Seen: 6e-7 after 20
# steps, 1.1e-5 after 1000. Random networks amplify rounding from step to step, some more than these (seed 2: 2e-4).
TOLERANCE = 1e-4


def unet(package=generative, seed: int = 1) -> nn.Module:
    """The published stage 1 class, or MONAI's, in the tiny shape."""
    config = TINY.denoiser
    widths = {"num_channels" if package is generative else "channels": config.channels}
    network = package.networks.nets.DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=config.res_blocks,
        attention_levels=config.attention,
        num_head_channels=(0, *config.channels[1:]),
        norm_num_groups=config.norm_groups,
        **widths,
    )
    randomise(network, seed)
    return network.eval()


def autoencoder(package=generative, seed: int = 4) -> nn.Module:
    """The published stage 2 class, or MONAI's, in the tiny shape."""
    config = TINY.enhancer
    widths = {"num_channels" if package is generative else "channels": config.channels}
    network = package.networks.nets.AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=config.res_blocks,
        attention_levels=config.attention,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        **widths,
    )
    randomise(network, seed)
    return network.eval()


def training_state(network: nn.Module, averages: nn.Module, raw: nn.Module | None = None) -> dict[str, object]:
    """The published stage 1 dictionary after one optimiser step; `raw` was set aside while the averages were used."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    shadow, collected = ([p.detach().clone() for p in net.parameters()] if net else None for net in (averages, raw))
    ema = {"decay": 0.995, "num_updates": 7, "shadow_params": shadow, "collected_params": collected}
    return {
        "model": collections.OrderedDict(weights),
        "optimizer": optimizer.state_dict(),
        "ema": ema,
        "epoch": 20,
        "loss": np.float64(0.25),  # not in the published dictionary, but people add one
        "device": torch.device("cpu"),
    }


def save(content: object, path: Path, **options) -> Path:
    torch.save(content, path, **options)
    return path


def same(weights: dict[str, torch.Tensor], network: nn.Module) -> bool:
    expected = network.state_dict()
    return list(weights) == list(expected) and all(torch.equal(value, expected[key]) for key, value in weights.items())


@pytest.fixture
def denoiser_file(tmp_path) -> Path:
    network = unet()
    return save(training_state(network, network), tmp_path / "Aug_Final_ctrain.pth")


@pytest.fixture
def enhancer_file(tmp_path) -> Path:
    return save(autoencoder(), tmp_path / "Aug_MONAI_autoencoder.pth")


# --- what is read ---


@pytest.mark.parametrize("package", [generative, monai], ids=["monai-generative", "monai"])
@pytest.mark.parametrize("make", [unet, autoencoder])
def test_a_whole_network_gives_its_state_dict(tmp_path, package, make):
    network = make(package)
    assert same(read_published_weights(save(network, tmp_path / "n.pth")), network)
    assert same(read_published_weights(save(network, tmp_path / "n.pth", pickle_protocol=4)), network)


def test_a_state_dict_and_a_network_under_model(tmp_path):
    network = unet()
    assert same(read_published_weights(save(network.state_dict(), tmp_path / "a.pth")), network)
    assert same(read_published_weights(save({"model": network, "epoch": 3}, tmp_path / "b.pth")), network)


def test_weights_by_choice(tmp_path):
    network, averages, raw = unet(seed=1), unet(seed=2), unet(seed=3)
    path = save(training_state(network, averages, raw), tmp_path / "during.pth")
    assert same(read_published_weights(path), network)
    assert same(read_published_weights(path, "ema"), averages)
    assert same(read_published_weights(path, "raw"), raw)
    path = save(training_state(network, averages), tmp_path / "after.pth")
    assert same(read_published_weights(path, "raw"), network)


def test_only_the_chosen_tensors_are_read(denoiser_file, monkeypatch):
    read = []
    original = zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name, *a: (read.append(name), original(self, name, *a))[1]
    )
    weights = read_published_weights(denoiser_file)
    assert sum("/data/" in name for name in read) == len(weights)
    with zipfile.ZipFile(denoiser_file) as archive:
        assert sum("/data/" in name for name in archive.namelist()) > 3 * len(weights)


def test_parallel_prefixes_are_stripped(tmp_path):
    network = autoencoder()
    parallel = nn.DataParallel(network)
    assert all(key.startswith("module.") for key in parallel.state_dict())
    for content in (parallel, parallel.state_dict()):
        assert same(read_published_weights(save(content, tmp_path / "p.pth")), network)
    partly = {f"module.{key}" if "encoder" in key else key: value for key, value in network.state_dict().items()}
    assert list(read_published_weights(save(partly, tmp_path / "p.pth"))) == list(partly)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_precisions_become_float32(tmp_path, dtype):
    values = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    read = read_published_weights(save({"a": values, "b": values.T, "c": values[1:, 2:]}, tmp_path / "a.pth"))
    for key, expected in (("a", values), ("b", values.T), ("c", values[1:, 2:])):
        assert read[key].dtype == torch.float32
        assert torch.equal(read[key], expected.float())


# --- what is not run ---


class Evil:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo run > '{self.marker}'",)


class EvilModule(nn.Module):
    """The same, dressed as a network."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    __reduce__ = Evil.__reduce__


def network_with(marker: Path) -> nn.Module:
    network = autoencoder()
    network.decoder.blocks[3].note = {"deep": [(1, Evil(marker))]}
    return network


def network_around(marker: Path) -> nn.Module:
    network = autoencoder()
    network.encoder.blocks.append(EvilModule(marker))
    return network


def chain(marker: Path) -> bytes:
    """getattr(__import__("os"), "system")(command): no dangerous name but the two builtins."""
    return (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR"
        b"(S'echo run > " + os.fsencode(marker) + b"'\ntR."
    )


def old_opcode(marker: Path) -> bytes:
    """INST, which names a class and calls it in one."""
    return b"(S'echo run > " + os.fsencode(marker) + b"'\nios\nsystem\n."


def after_a_decoy(marker: Path) -> bytes:
    """A harmless call first, thrown away, then `exec`."""
    return b"ccollections\nOrderedDict\n(tR0c__builtin__\nexec\n(S\"open('" + os.fsencode(marker) + b"','w')\"\ntR."


def archived(path: Path, content: bytes, **members: bytes) -> Path:
    """A checkpoint whose pickle is `content`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


HOSTILE = {
    "reduce": (lambda marker: {"model": {"a": torch.zeros(1)}, "epoch": Evil(marker)}, "system"),
    "module": (EvilModule, "system"),
    "deep": (network_with, "system"),
    "child": (network_around, "system"),
    "getattr": (chain, "builtins.getattr"),
    "inst": (old_opcode, "os.system"),
    "exec": (after_a_decoy, "__builtin__.exec"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_checkpoints_are_refused_and_not_run(tmp_path, name, protocol):
    make, named = HOSTILE[name]
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    content = make(marker)
    if isinstance(content, bytes):
        archived(path, content)
    else:
        save(content, path, pickle_protocol=protocol)
    with pytest.raises(BundleError, match=rf"x\.pth: it names '[\w.]*{named}', which no checkpoint of .* was run"):
        read_published_weights(path)
    assert not marker.exists()
    # The payload works: whoever loads the file with everything allowed runs it.
    if isinstance(content, bytes):
        pickle.loads(content)
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    "full_name",
    [
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.eval",
        "functools.partial",
        "importlib.import_module",
        "torch.load",
        "torch.hub.load",
        "torch._utils._rebuild_tensor_v2.__globals__",
        "torch.storage._load_from_bytes",
        "torch.jit._unpickler.build",
        "numpy.load",
        "monaix.nets",
        "os.monai.nets",
        "__main__.Net",
        "codecs.encode",
        "__torch__.Net",
    ],
)
def test_names_that_are_refused(tmp_path, full_name):
    module, _, name = full_name.rpartition(".")
    path = archived(tmp_path / "x.pth", f"c{module}\n{name}\n.".encode())
    with pytest.raises(BundleError, match=f"it names '{re.escape(module)}.{name}', which no checkpoint"):
        read_published_weights(path)


def test_nothing_named_in_a_checkpoint_is_imported(tmp_path, denoiser_file, enhancer_file, monkeypatch):
    """Not even the published classes: the reader works where monai-generative is not installed."""
    watched = re.compile(r"(generative|monai|einops|numpy|collections|_codecs|torch\.nn)(\.|$)")
    original, imported = builtins.__import__, []

    def watch(name, *rest):
        if watched.match(name):
            imported.append(name)
        return original(name, *rest)

    monai_file = save(autoencoder(monai), tmp_path / "m.pth")
    monkeypatch.setattr(builtins, "__import__", watch)
    for path in (denoiser_file, enhancer_file, monai_file):
        assert read_published_weights(path)
    assert not imported
    pickle.loads(b"cmonai.networks.nets\nAutoencoderKL\n.")  # the watch sees what pickle itself would do
    assert imported == ["monai.networks.nets"]


def test_calling_a_known_name_only_makes_a_note(monkeypatch):
    from export import published

    def read(pickled: bytes):
        return published._NoteTaker(io.BytesIO(pickled)).load()

    note = read(b"ctorch.nn.utils\nclip\n(I1\nI2\ntR}S'state'\nI3\nsb.")
    assert (type(note).__mro__[1], note.name, note.args, note.state) == (
        Note,
        "torch.nn.utils.clip",
        (1, 2),
        {"state": 3},
    )
    with pytest.raises(TypeError):
        read(b"ctorch.nn\nLinear\n(tR(tR.")  # a note cannot be called
    with pytest.raises(TypeError):
        read(b"ctorch.nn\nLinear\n}S'name'\nS'x'\nsb.")  # nor can the class behind it be given a state
    assert read(b"ctorch.nn\nLinear\n.").name == "torch.nn.Linear"


# --- what is no checkpoint ---


def test_no_such_file(tmp_path):
    with pytest.raises(SettingsError, match=r"n\.pth: no such checkpoint"):
        read_published_weights(tmp_path / "n.pth")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "BadZipFile"), (b"text", "BadZipFile"), (pickle.dumps({"a": 1}, 2), "BadZipFile")],
    ids=["empty", "text", "pickle"],
)
def test_files_that_are_no_archive(tmp_path, content, kind):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(BundleError, match=rf"x\.pth: not a checkpoint that can be read \({kind}.*torch 1\.6 or newer"):
        read_published_weights(tmp_path / "x.pth")


def test_the_format_before_torch_1_6(tmp_path):
    save({"a": torch.zeros(1)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(BundleError, match="Load and save an older file again if you trust it"):
        read_published_weights(tmp_path / "x.pth")


def test_a_truncated_file(enhancer_file):
    enhancer_file.write_bytes(enhancer_file.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"not a checkpoint that can be read \(BadZipFile"):
        read_published_weights(enhancer_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "neither a network nor a dictionary"),
        ({"model": 3}, "neither a network nor a dictionary"),
        ({"model": {}}, "it holds no weights"),
        (nn.Sequential(), "it holds no weights"),
        ({"epoch": 3}, "epoch is no tensor"),
        ({"a": np.float64(3)}, "a is no tensor"),
        (
            {"a": torch.zeros(1, dtype=torch.uint8)},
            r"a is stored as torch\.ByteStorage\. Weights must",
        ),
        ({1: torch.zeros(1)}, r"not a checkpoint that can be read \(AttributeError"),
    ],
)
def test_contents_that_are_no_weights(tmp_path, content, message):
    with pytest.raises(BundleError, match=message):
        read_published_weights(save(content, tmp_path / "x.pth"))


def test_averages_that_are_not_there(tmp_path):
    network = unet()
    for content in (network, network.state_dict(), {"model": network.state_dict()}):
        path = save(content, tmp_path / "x.pth")
        with pytest.raises(BundleError, match=r"no averaged weights .* Choose --weights model"):
            read_published_weights(path, "ema")
        assert same(read_published_weights(path, "raw"), network)
    content = training_state(network, network)
    content["ema"]["shadow_params"].pop()
    with pytest.raises(BundleError, match=r"ema holds 143 tensors, model 144\. Choose --weights model"):
        read_published_weights(save(content, tmp_path / "x.pth"), "ema")


def test_a_tensor_larger_than_its_storage(tmp_path):
    """Else as_strided would show memory that belongs to others."""
    path = save({"a": torch.zeros(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickled = members.pop("data.pkl")
    assert pickled.count(b"K\x04\x85") == 1  # the size, (4,)
    archived(path, pickled.replace(b"K\x04\x85", b"K\x05\x85"), **members)
    with pytest.raises(BundleError, match=r"RuntimeError: setStorage: .* out of bounds"):
        read_published_weights(path)


def test_big_endian_numbers(tmp_path):
    path = save({"a": torch.ones(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert members["byteorder"] == b"little"
    archived(path, members.pop("data.pkl"), **members | {"byteorder": b"big"})
    with pytest.raises(BundleError, match="written on a big-endian machine"):
        read_published_weights(path)


# --- the picture ---


def published_picture(network: nn.Module, cxr: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Stage 1 as the published test does it, from its description: x0 takes the place of x_t at every timestep.

    Noise and radiograph are the two channels. At each timestep, last first, the network's output and diffusers'
    scheduler give the predicted x0, clamped to [-1, 1]; its channel 0 and the radiograph are the next two channels.

    Args:
        cxr, noise: [1, 1, H, W].
    """
    scheduler = DDPMScheduler(
        num_train_timesteps=steps, beta_start=0.0015, beta_end=0.0205, beta_schedule="squaredcos_cap_v2"
    )
    scheduler.set_timesteps(steps)
    channels = torch.cat((noise, cxr), dim=1)
    for t in scheduler.timesteps:
        predicted = network(channels, timesteps=t[None])
        x0 = scheduler.step(predicted, t, channels).pred_original_sample
        channels = torch.cat((x0[:, :1], cxr), dim=1)
    return channels[:, :1]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """cxr in [-1, 1] and noise, each [1, 1, SIZE_PX, SIZE_PX]."""
    generator = torch.Generator().manual_seed(3)
    cxr = torch.rand(1, 1, SIZE_PX, SIZE_PX, generator=generator) * 2 - 1
    return cxr, torch.randn(1, 1, SIZE_PX, SIZE_PX, generator=generator)


@torch.no_grad()
def compare(runner: Runner, first: nn.Module, second: nn.Module, steps: int) -> None:
    """Both stages, ours and the published, from the same noise.

    The published stage 2 decodes mu + sigma * noise; compared is the decoded mu. Between the stages the published
    scripts write 8-bit pictures; here both chain in float.
    """
    cxr, noise = inputs()
    expected = published_picture(first, cxr, noise, steps)
    ours = sample(runner, cxr, sampler_table(Schedule("squaredcos_cap_v2", steps), "release", steps), lambda k: noise)
    assert (expected.abs() < 1).float().mean() > 0.1  # most of a picture at the clamp would prove little
    assert (ours - expected).abs().max() < TOLERANCE
    enhanced = torch.empty_like(ours)
    runner.enhance(ours, enhanced)
    expected = second.decode(second.encode(expected)[0])
    assert expected.std() > 0.05
    assert (enhanced - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_published_picture_in_fewer_steps(tmp_path, enhancer_file, weights):
    first = unet()
    other = unet(seed=9)
    path = save(training_state(*((first, other) if weights == "model" else (other, first))), tmp_path / "d.pth")
    denoiser, enhancer = Denoiser(TINY.denoiser), Enhancer(TINY.enhancer)
    denoiser.load_state_dict(denoiser_state(read_published_weights(path, weights), TINY.denoiser))
    enhancer.load_state_dict(enhancer_state(read_published_weights(enhancer_file), TINY.enhancer))
    compare(EagerRunner(denoiser, enhancer, SIZE_PX, torch.device("cpu")), first, autoencoder(), 20)


@pytest.mark.slow
def test_a_bundle_gives_the_published_picture(tmp_path, denoiser_file, enhancer_file, monkeypatch, capsys):
    """Through the command, the bundle on disk and all 1000 steps."""
    arguments = f"published --preset tiny --size {SIZE_PX} --denoiser {denoiser_file} --enhancer {enhancer_file}"
    monkeypatch.setattr("sys.argv", ["export", *arguments.split(), "-o", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert not end.value.code
    assert "wrote bundle bs-diff" in capsys.readouterr().out
    bundle = open_bundle(tmp_path / "b")
    with load_runner(bundle, "onnxruntime", torch.device("cpu")) as runner:
        compare(runner, unet(), autoencoder(), bundle.manifest.sampler.steps)


# --- the command ---


@pytest.fixture
def written(monkeypatch):
    """What the command gave to write_bundle."""
    calls = []

    monkeypatch.setattr(command, "write_bundle", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(command, "describe_bundle", lambda *_: None)
    return calls


def test_what_the_bundle_says(written, tmp_path, denoiser_file, enhancer_file):
    command.export_published(denoiser_file, enhancer_file, tmp_path / "b", preset="tiny")
    ((folder, preset, schedule, denoiser, enhancer, options),) = written
    assert (folder, preset, schedule) == (tmp_path / "b", TINY, Schedule("squaredcos_cap_v2", 1000, objective="eps"))
    assert torch.equal(denoiser.conv_in.weight, unet().conv_in.conv.weight)
    assert torch.equal(enhancer.quant_conv_mu.weight, autoencoder().quant_conv_mu.conv.weight)
    assert options.sampler == SamplerSettings("release", 1000)
    assert options.preprocessing == Preprocessing(size=256, clahe_clip_limit=0.0)
    assert (options.name, options.enhance, options.mirror) == ("bs-diff", True, False)
    assert options.licence == "unstated"
    assert json.loads(json.dumps(options.training)) == {
        "source": "published checkpoints",
        "denoiser": {"file": denoiser_file.name, "sha256": file_sha256(denoiser_file), "weights": "model"},
        "enhancer": {"file": enhancer_file.name, "sha256": file_sha256(enhancer_file)},
    }


def test_every_switch_reaches_the_bundle(written, tmp_path, monkeypatch, enhancer_file):
    path = save(training_state(unet(seed=1), unet(seed=2)), tmp_path / "d.pth")
    arguments = (
        f"published --denoiser {path} --enhancer {enhancer_file} -o {tmp_path / 'b'} --preset tiny --weights ema "
        "--size 64 --clahe 2.5 --name mine --licence MIT"
    )
    monkeypatch.setattr("sys.argv", ["export", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert not end.value.code
    ((_, _, _, denoiser, _, options),) = written
    assert torch.equal(denoiser.conv_in.weight, unet(seed=2).conv_in.conv.weight)
    assert options.preprocessing == Preprocessing(size=64, clahe_clip_limit=2.5)
    assert (options.name, options.licence, options.training["denoiser"]["weights"]) == ("mine", "MIT", "ema")


@pytest.mark.parametrize("preset", ["demo", "giant"])
def test_presets_of_which_nothing_was_published(written, tmp_path, preset):
    with pytest.raises(SettingsError, match=f"preset '{preset}': choose one of paper, tiny"):
        command.export_published(tmp_path / "d.pth", tmp_path / "e.pth", tmp_path / "b", preset=preset)


def test_stages_that_are_swapped(written, tmp_path, denoiser_file, enhancer_file):
    with pytest.raises(BundleError, match="not the weights of the published denoiser"):
        command.export_published(enhancer_file, denoiser_file, tmp_path / "b", preset="tiny")
    with pytest.raises(BundleError, match=r"not the weights of the published denoiser .* check the preset"):
        command.export_published(denoiser_file, enhancer_file, tmp_path / "b")
    assert not written


def test_a_hostile_file_ends_the_command(written, tmp_path, monkeypatch, capsys, enhancer_file):
    path = save(EvilModule(tmp_path / "marker"), tmp_path / "d.pth")
    monkeypatch.setattr(
        "sys.argv", f"export published --denoiser {path} --enhancer {enhancer_file} -o {tmp_path / 'b'}".split()
    )
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 4
    assert "d.pth: it names 'posix.system'" in capsys.readouterr().err
    assert not written
    assert not (tmp_path / "marker").exists()
