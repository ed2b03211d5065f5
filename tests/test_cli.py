"""The command line: exit codes, what goes to which stream, options that are refused, inputs that are bad."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import dicom, fates, png, report_of, tree
from pydicom.uid import CTImageStorage
from synthetic import SECRETS, chest

from bsdiff_rt import __version__, bundle
from bsdiff_rt import cli as command_line
from bsdiff_rt.folder import progress as module
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.runners import devices

OPTIONS = {
    "infer": ("--output", "--sampler", "--samples", "--runner", "--dry-run"),
    "build-engine": ("--runner", "--precision", "--batch", "--output", "--device", "--json"),
    "bench": ("--bundle", "--runner", "--batch", "--steps", "--json", "--json-file", "--plot"),
    "evaluate": ("--cxr", "--json"),
    "info": ("--json",),
}
INTERRUPTED = (
    "bsdiff-rt: interrupted. Finished files are complete; the same command (without --overwrite) goes on with the rest"
)
GROUPS = {
    "Input and output": "INPUT --output --format --preview --html --send --overwrite --any-view --dry-run",
    "Model": "--bundle --sampler --steps --seed --samples --enhance --mirror --probe --detail --raw-view",
    "Speed": "--runner --device --precision --batch --threads --ray",
    "Run": "--fail-on --quiet --verbose --json --help",
}
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def lines(text):
    return text.strip().splitlines()


# --- help and version ---


@pytest.mark.parametrize("command", OPTIONS)
def test_help_shows_every_option_with_its_default(cli, command):
    shown = cli(command, "--help")
    assert shown.code == 0
    assert shown.err == ""
    for option in OPTIONS[command]:
        assert option in shown.out


def test_infer_has_28_options_in_four_groups_each_with_its_default(cli):
    text = cli("infer", "--help").out
    titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert titles == list(GROUPS)
    sections = dict(zip(titles, re.split(r"^\w[\w ]*:$", text, flags=re.MULTILINE)[1:], strict=True))
    options = 0
    for title, section in sections.items():
        entries = re.split(r"\n  (?=[-I])", section)[1:]
        names = [re.search(r"--[a-z0-9-]+|INPUT", entry).group() for entry in entries]
        assert names == GROUPS[title].split()
        for name, entry in zip(names, entries, strict=True):
            options += name not in ("INPUT", "--help")
            assert "[default:" in entry or "[required]" in entry or name == "--help", entry
    assert options == 28
    words = " ".join(text.split())
    for default in ("demo", "auto", "0", "1;", "full", "refused", "(off)", "(the bundle's)", "(all processors)"):
        assert f"[default: {default}" in words, default


def test_version(cli):
    assert cli("--version").out == f"bsdiff-rt {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("infer",), ("infer", "x"), ("infer", "-o", "x")])
def test_what_is_no_command(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*arguments).code == 2
    assert not tree(tmp_path)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("infer", "--help"), ("info", "--help")])
def test_answers_come_from_the_installed_command_too(arguments):
    done = subprocess.run(
        [sys.executable, "-c", "from bsdiff_rt.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


# --- infer: streams, --json, --dry-run ---


def test_infer(infer, tmp_path):
    """With the real networks, from PNG and DICOM."""
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "sub" / "b.dcm")
    done = infer()
    assert done.code == 0
    summary = r"wrote 2 images, refused 0, failed 0 \(\d+\.\d\d images/s\)\. Results and report\.json: .*/out\n"
    assert re.fullmatch(summary, done.out)
    assert "runner onnxruntime" in done.err
    assert tree(tmp_path / "out") == {"a.png", "sub/b.dcm", "report.json"}
    again = infer()
    summary = "wrote 0 images, skipped 2 finished before, refused 0, failed 0. Results and report.json: "
    assert (again.code, again.out) == (0, f"{summary}{tmp_path / 'out'}\n")


def test_json_is_the_report(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"text")
    done = infer("--json")
    assert done.code == 3
    assert json.loads(done.out) == report_of(tmp_path / "out")


def test_quiet_prints_only_what_is_wrong_and_what_was_asked_for(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    done = infer("--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    (tmp_path / "in" / "b.png").write_bytes(b"text")
    done = infer("-q")
    assert (done.code, done.out) == (3, "")
    (line,) = lines(done.err)
    assert line.startswith(f"refused: {tmp_path / 'in' / 'b.png'}: not a")
    assert json.loads(infer("-q", "--json").out) == report_of(tmp_path / "out")
    assert [line.partition(":")[0] for line in lines(infer("-q", "--dry-run").out)] == ["would skip", "would refuse"]


def test_verbose_shows_why_a_batch_failed(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")

    def before(_):
        raise RuntimeError("no room")

    toy.before = before
    quiet, verbose = infer(), infer("-v")
    assert (quiet.code, verbose.code) == (3, 3)
    assert "Traceback" not in quiet.err
    assert "Traceback" in verbose.err
    assert "no room" in quiet.err


def test_nothing_found(infer, toy, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "scan.npy").write_bytes(b"")
    for options in ((), ("--fail-on", "failed"), ("--dry-run",)):
        done = infer(*options)
        assert (done.code, done.out) == (2, "")
        assert lines(done.err)[-1] == (
            f"bsdiff-rt: {tmp_path / 'in'}: no chest X-ray found. Images are DICOM, PNG, JPEG or TIFF files."
        )
        assert "left out files of kinds not read here (1 .npy)" in done.err
        assert not (tmp_path / "out").exists()
    done = infer("--fail-on", "never")
    summary = f"wrote 0 images, refused 0, failed 0. Results and report.json: {tmp_path / 'out'}\n"
    assert (done.code, done.out) == (0, summary)
    assert report_of(tmp_path / "out")["files"] == []


@pytest.mark.parametrize(("fail_on", "codes"), [("refused", (3, 3)), ("failed", (0, 3)), ("never", (0, 0))])
def test_which_outcomes_fail_the_command(infer, toy, tmp_path, fail_on, codes):
    """A nightly job is not red for a lateral view, if it says so."""
    png(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"text")
    assert infer("--fail-on", fail_on, "--dry-run").code == codes[0]
    done = infer("--fail-on", fail_on)
    assert done.code == codes[0]
    assert done.out.startswith("wrote 1 image, refused 1, failed 0 (")
    (tmp_path / "in" / "c.png").write_bytes(b"")
    assert infer("--fail-on", fail_on).code == codes[1]


def test_a_refused_view_names_the_option_that_accepts_it(infer, toy, tmp_path):
    hint = "--any-view processes lateral views and other body parts, too."
    dicom(tmp_path / "in" / "a.dcm", ViewPosition="LL")
    for more in ((), ("--dry-run",)):
        assert lines(infer(*more).err).count(hint) == 1
    assert hint not in infer("-q").err
    assert hint not in infer("--any-view").err


def test_dry_run_writes_nothing(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "b")
    (tmp_path / "in" / "c.png").write_bytes(b"text")
    before = tree(tmp_path)
    done = infer("--dry-run")
    assert done.code == 3
    assert [line.replace(str(tmp_path), "") for line in lines(done.out)] == [
        "would write: /in/a.png -> a.png",
        "would write: /in/b -> b.dcm",
        "would refuse: /in/c.png: not a PNG, JPEG or TIFF file",
    ]
    assert tree(tmp_path) == before
    assert toy.denoised == 0
    listed = json.loads(infer("--dry-run", "--json").out)
    assert [entry["status"] for entry in listed] == ["ok", "ok", "refused"]
    assert tree(tmp_path) == before
    (tmp_path / "in" / "c.png").unlink()
    infer()
    finished = infer("--dry-run")
    assert finished.code == 0
    assert [line.partition(":")[0] for line in lines(finished.out)] == ["would skip", "would skip"]


def test_a_name_that_is_no_text(infer, toy, tmp_path):
    """File names are bytes; one that is not UTF-8 must not stop the others."""
    png(tmp_path / "in" / "a.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff\xfe.png"))
    (tmp_path / "in" / os.fsdecode(b"\xfd.png")).write_bytes(b"text")
    assert infer("--dry-run").code == 3
    assert infer().code == 3
    assert json.loads(infer("--json").out)["files"]
    assert {entry["status"] for entry in report_of(tmp_path / "out")["files"]} == {"skipped", "refused"}


def test_progress_in_a_log(infer, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    printed = [line for line in lines(infer("--batch", 1).err) if "files" in line]
    assert [line.partition(",")[0] for line in printed] == [f"{n} of 3 files" for n in (1, 2, 3)]
    assert all("images/s" in line and "s left" in line for line in printed)
    again = [line for line in lines(infer().err) if "files" in line]
    assert again == [f"{n} of 3 files, 0 s left" for n in (1, 2, 3)]
    assert "files" not in infer("--quiet", "--overwrite").err


def test_progress_on_a_terminal(infer, toy, tmp_path, monkeypatch):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "[red]b.png").write_bytes(b"text")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = infer()
    assert done.code == 3
    assert "2/2" in done.err
    assert "[red]b.png: not a PNG, JPEG or TIFF file" in done.err  # brackets are no markup
    assert "2/2" not in infer("--quiet").err


# --- infer: options ---


def test_deep_features_in_every_third_step(infer, tiny_bundle, tmp_path):
    """`auto` takes the one runner that can reuse them. A runner that cannot is refused."""
    png(tmp_path / "in" / "a.png")
    given = ("--bundle", tiny_bundle, "--sampler", "ddim")
    assert infer(*given, "--steps", "20").code == 0
    exact = (tmp_path / "out" / "a.png").read_bytes()
    assert infer(*given, "--steps", "20:3").code == 0  # another setting: the file is made again
    settings = report_of(tmp_path / "out")["settings"]
    assert (settings["steps"], settings["cache_every"], settings["runner"]) == (20, 3, "eager")
    assert (tmp_path / "out" / "a.png").read_bytes() != exact
    refused = infer(*given, "--steps", "20:3", "--runner", "onnxruntime")
    assert refused.code == 4
    assert "runner onnxruntime cannot reuse deep features. Use runner eager, or compute every step." in refused.err


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "release"])
@pytest.mark.parametrize("steps", [1, 4])
def test_samplers_and_steps(infer, toy, tmp_path, sampler, steps):
    png(tmp_path / "in" / "a.png")
    assert infer("--sampler", sampler, "--steps", steps).code == 0
    settings = report_of(tmp_path / "out")["settings"]
    assert (settings["sampler"], settings["steps"]) == (sampler, steps)
    assert toy.denoised == steps


def test_threads(infer, tmp_path, monkeypatch):
    """With the real networks: the number is set when they are loaded."""
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "_threads", None)  # put back afterwards
    png(tmp_path / "in" / "a.png")
    assert infer("--threads", 1, "-n", 1).code == 0
    assert (devices.count_threads(), torch.get_num_threads()) == (1, 1)
    torch.set_num_threads(before)


def test_every_option_arrives(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    options = "--runner eager --device cpu --precision fp32 --sampler ddpm -n 2 --seed 9 --samples 2 --batch 3"
    more = "--threads 1 --no-enhance --mirror --detail model --raw-view --format png --preview --overwrite --any-view"
    assert infer(*options.split(), *more.split()).code == 0
    settings = report_of(tmp_path / "out")["settings"]
    assert settings == {
        "sampler": "ddpm",
        "steps": 2,
        "seed": 9,
        "samples": 2,
        "enhance": False,
        "mirror": True,
        "detail": "model",
        "raw_view": True,
        "format": "png",
        "runner": settings["runner"],
        "precision": "fp32",
    }
    assert toy.enhanced == 0
    assert (tmp_path / "out" / "preview.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sampler euler", "Invalid value for '--sampler': 'euler' is not one of 'ddpm', "),
        ("--steps 0", "0 sampling steps requested"),
        ("--steps 1001", "--steps: 1001 sampling steps"),
        ("--steps many", "Invalid value for '--steps'"),
        ("--steps 50:", "Invalid value for '--steps': '50:' is not N or N:M, such as 50 or 1000:3"),
        ("--steps 19:2", "--steps: deep features can be reused from 20 steps on, not with 19 steps"),
        ("--steps 50:0", "--steps: deep features every 0 steps do not fit a sampler of 50 steps. Give 1 to 50."),
        ("--seed -1", "--seed: -1 is out of range"),
        ("--seed 1.5", "Invalid value for '--seed'"),
        ("--batch 0", "'0' is not auto or a whole number above 0"),
        ("--batch -3", "'-3' is not auto or a whole number above 0"),
        ("--batch two", "'two' is not auto"),
        ("--batch ²", "'²' is not auto"),
        ("--device gpu", "bsdiff-rt: --device: 'gpu' is not a device"),
        ("--device cuda:99", "CUDA devices"),
        ("--threads 0", "Invalid value for '--threads'"),
        ("--fail-on lateral", "Invalid value for '--fail-on'"),
        ("--detail best", "Invalid value for '--detail'"),
        ("--format jpeg", "Invalid value for '--format'"),
        ("--precision fp8", "Invalid value for '--precision'"),
        ("--unknown", "No such option: --unknown"),
    ],
)
def test_options_that_are_refused(infer, toy, tmp_path, options, message):
    png(tmp_path / "in" / "a.png")
    refused = infer(*options.split())
    assert refused.code == 2
    assert message in refused.err
    assert refused.out == ""
    assert "Traceback" not in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["--runner tensorrt", "--runner aoti", "--precision fp16"])
def test_a_runner_that_cannot_be_used(infer, tmp_path, options):
    png(tmp_path / "in" / "a.png")
    refused = infer(*options.split())
    assert refused.code == 4
    assert refused.err.startswith("bsdiff-rt: ")
    assert options.split()[1] in refused.err
    assert len(lines(refused.err)) == 1
    assert not (tmp_path / "out").exists()


# --- infer: what is refused as a whole ---


@pytest.mark.parametrize("name", ["denoiser.onnx", "enhancer.safetensors"])
def test_a_bundle_with_one_byte_changed(cli, bundle_copy, tmp_path, name):
    png(tmp_path / "in" / "a.png")
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    refused = cli("infer", tmp_path / "in", "-o", tmp_path / "out", "--bundle", bundle_copy)
    assert refused.code == 4
    (line,) = lines(refused.err)
    assert line.startswith(f"bsdiff-rt: {bundle_copy / name}: SHA-256 is ")
    assert not (tmp_path / "out").exists()


def test_no_such_bundle(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "BUNDLES", tmp_path)
    png(tmp_path / "in" / "a.png")
    refused = cli("infer", tmp_path / "in", "-o", tmp_path / "out")
    assert refused.code == 4
    assert lines(refused.err) == [
        "bsdiff-rt: no bundle 'demo': neither a folder nor a bundle of the package (none). "
        "`python -m export` makes one."
    ]


def test_an_output_folder_that_cannot_be_written(cli, toy, tiny_bundle, tmp_path):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("mine")
    refused = cli("infer", tmp_path / "in", "-o", tmp_path / "file" / "out", "--bundle", tiny_bundle)
    assert refused.code == 2
    (line,) = lines(refused.err)
    assert line.startswith(f"bsdiff-rt: --output: {tmp_path / 'file' / 'out'}: cannot be written (")


# --- infer: bad inputs ---


def truncated(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def colour(path: Path) -> Path:
    picture = np.stack([np.rint(chest(160, 144, seed) * 255).astype(np.uint8) for seed in range(3)], axis=2)
    picture[20:40, 20:40] = (10, 60, 200)
    path.write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    return path


def black(path: Path) -> Path:
    path.write_bytes(cv2.imencode(".png", np.zeros((160, 144), np.uint8))[1].tobytes())
    return path


def text(path: Path) -> Path:
    path.write_text("SECRET^ÄNNE was here\n")
    return path


def link_to_nothing(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


BAD = {
    "truncated 1.png": (lambda path: truncated(png(path)), "failed", "truncated"),
    "truncated 2.dcm": (lambda path: truncated(dicom(path)), "failed", ""),
    "header cut off.dcm": (lambda path: truncated(dicom(path), 0.02), "failed", ""),
    "pixels left out.dcm": (lambda path: dicom(path, PixelData=None), "failed", "no pixel data"),
    "ct.dcm": (lambda path: dicom(path, SOPClassUID=CTImageStorage, Modality="CT"), "refused", "CT"),
    "lateral.dcm": (lambda path: dicom(path, ViewPosition="LL"), "refused", "not a frontal view"),
    "photo.jpg": (colour, "refused", "a colour picture"),
    "small 1.png": (lambda path: png(path, shape=(20, 140)), "refused", "20 x 140 px"),
    "small 2.dcm": (lambda path: dicom(path, Rows=20, Columns=20), "failed", "more pixels than one frame"),
    "black.png": (black, "refused", "every pixel shows the same grey"),
    "text 1.dcm": (text, "refused", "not a DICOM file"),
    "text 2.ima": (text, "refused", "not a DICOM file"),
    "text 3.png": (text, "refused", "not a PNG, JPEG or TIFF file"),
    "empty 1.png": (lambda path: path.write_bytes(b""), "failed", "empty"),
    "empty 2.dcm": (lambda path: path.write_bytes(b""), "failed", "empty"),
    "link.png": (link_to_nothing, "refused", "the link leads to no file"),
}


def test_bad_inputs_are_told_and_the_rest_is_done(infer, cli, toy, tiny_bundle, tmp_path):
    good = ["a.png", "z.dcm"]
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "z.dcm")
    for name, (make, _, _) in BAD.items():
        make(tmp_path / "in" / name)
    done = infer("-v", "--batch", 2)
    assert done.code == 3
    assert fates(tmp_path / "out") == dict.fromkeys(good, "ok") | {name: status for name, (_, status, _) in BAD.items()}
    entries = {Path(entry["input"]).name: entry for entry in report_of(tmp_path / "out")["files"]}
    for name, (_, status, reason) in BAD.items():
        entry = entries[name]
        assert reason in entry["reason"], name
        assert entry["reason"], name
        assert "\n" not in entry["reason"], name
        assert (entry["output"], entry["sha256"]) == (None, None)
        assert f"{status}: {entry['input']}: {entry['reason']}" in lines(done.err)
    assert tree(tmp_path / "out") == {*good, "report.json"}
    said = done.out + done.err + (tmp_path / "out" / "report.json").read_text()
    assert not [secret for secret in SECRETS if secret in said.replace(str(tmp_path), "")]
    assert "Traceback" not in said
    assert "Warning" not in said


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--fail-on", "never")])
def test_a_missing_input_ends_the_run(cli, toy, tiny_bundle, tmp_path, options):
    good = png(tmp_path / "a.png")
    done = cli("infer", tmp_path / "absent", good, "-o", tmp_path / "out", "--bundle", tiny_bundle, *options)
    assert (done.code, done.out) == (2, "")
    assert lines(done.err) == [f"bsdiff-rt: {tmp_path / 'absent'}: no such file or folder."]
    assert not (tmp_path / "out").exists()


def test_the_input_folder_as_output_gets_no_report(cli, toy, tiny_bundle, tmp_path):
    png(tmp_path / "in" / "a.png")
    done = cli("infer", tmp_path / "in", "-o", tmp_path / "in", "--bundle", tiny_bundle)
    assert done.code == 2
    assert "this is the output folder, too. Choose another output folder." in done.err
    assert tree(tmp_path / "in") == {"a.png"}


def test_a_name_that_is_too_long_for_its_result_is_one_failed_file(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / ("x" * 254))
    done = infer("--dry-run")
    assert (done.code, [line.partition(":")[0] for line in lines(done.out)]) == (3, ["would write", "would fail"])
    done = infer()
    assert done.code == 3
    assert fates(tmp_path / "out") == {"a.png": "ok", "x" * 254: "failed"}
    assert "the name of its result would have 258 characters or bytes, and 255 are possible here" in done.err


def test_a_folder_of_two_patients_with_the_same_names(cli, toy, tiny_bundle, tmp_path):
    for seed, patient in enumerate(("patientA", "patientB")):
        dicom(tmp_path / "same" / patient / "IM0001.dcm", seed=seed)
    two = (tmp_path / "same" / "patientA", tmp_path / "same" / "patientB")
    done = cli("infer", *two, "-o", tmp_path / "out", "--bundle", tiny_bundle)
    assert done.code == 3
    assert f"Name the folder that holds both ({tmp_path / 'same'}), or choose another output folder." in done.err
    assert cli("infer", tmp_path / "same", "-o", tmp_path / "out2", "--bundle", tiny_bundle).code == 0
    assert tree(tmp_path / "out2") == {"patientA/IM0001.dcm", "patientB/IM0001.dcm", "report.json"}


def test_a_folder_named_like_a_picture(infer, toy, tmp_path):
    png(tmp_path / "in" / "x.png" / "a.png")
    assert infer().code == 0
    assert tree(tmp_path / "out") == {"x.png/a.png", "report.json"}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # from writing what this test reads
def test_secrets_stay_out_of_the_log_when_all_is_well(infer, toy, tmp_path):
    dicom(tmp_path / "in" / "a.dcm", StudyDate="not a date SECRET", PatientName="SECRET^" + "X" * 80)
    done = infer("-v")
    assert done.code == 0
    said = done.out + done.err + (tmp_path / "out" / "report.json").read_text()
    assert not [secret for secret in SECRETS if secret in said.replace(str(tmp_path), "")]


# --- what a shell may do ---


@pytest.mark.parametrize("arguments", [("infer", "", "-o", "x"), ("infer", "a.png", "-o", ""), ("info", "--json=")])
def test_an_empty_argument_is_not_the_current_folder(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    png(tmp_path / "a.png")
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "an empty argument would mean the current folder. Is a variable of a script not set?" in done.err


def test_a_folder_may_end_in_an_equals_sign(cli, tmp_path):
    png(tmp_path / "a.png")
    done = cli("infer", tmp_path / "a.png", f"--output={tmp_path / 'run='}", "--dry-run")
    assert (done.code, "an empty argument" in done.err) == (0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_closed_stream_ends_nothing(tiny_bundle, tmp_path, closed):
    png(tmp_path / "a.png")
    program = f"{sys.executable} -c 'from bsdiff_rt.cli import main; main()'"
    command = f"{program} infer {tmp_path / 'a.png'} -o {tmp_path / 'out'} --bundle {tiny_bundle} --steps 1 {closed}"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert fates(tmp_path / "out") == {"a.png": "ok"}


def run_shell(command):
    """Run `bsdiff-rt ...` in a shell; returns exit code, stdout and stderr."""
    program = f"{sys.executable} -c 'import sys; sys.argv[0] = \"bsdiff-rt\"; from bsdiff_rt.cli import main; main()'"
    text = command.replace("bsdiff-rt", program)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", text], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", ["", "--json"])
def test_a_full_disk_behind_stdout_is_one_sentence(tiny_bundle, tmp_path, options):
    png(tmp_path / "a.png")
    command = f"bsdiff-rt infer {tmp_path / 'a.png'} -o {tmp_path / 'out'} --bundle {tiny_bundle} -n 1 {options}"
    code, _, err = run_shell(f"{command} > /dev/full")
    assert code == 1
    assert lines(err)[-1] == (
        "bsdiff-rt: standard output cannot be written (No space left on device). Files that were written are complete."
    )
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert fates(tmp_path / "out") == {"a.png": "ok"}
    assert report_of(tmp_path / "out")["ended"]


def test_a_reader_that_leaves_early_ends_nothing(tiny_bundle, tmp_path):
    """`2>&1 | head -1`: the results are written, and nothing is said about it."""
    for seed in range(2):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    (tmp_path / "in" / "b.png").write_bytes(b"text")
    command = f"bsdiff-rt infer {tmp_path / 'in'} -o {tmp_path / 'out'} --bundle {tiny_bundle} -n 1 --fail-on failed"
    code, out, err = run_shell(f"{command} 2>&1 | head -1")
    assert (code, err, len(lines(out))) == (0, "", 1)
    assert fates(tmp_path / "out") == {"0.png": "ok", "1.png": "ok", "b.png": "refused"}
    code, out, err = run_shell("bsdiff-rt info | head -1")
    assert (code, err, out) == (0, "", "versions\n")


def test_lines_in_a_log_carry_a_time(tiny_bundle, tmp_path):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"text")
    _, _, err = run_shell(f"bsdiff-rt infer {tmp_path / 'in'} -o {tmp_path / 'out'} --bundle {tiny_bundle} -n 1")
    assert any("refused: " in line for line in lines(err))
    assert all(re.match(TIME, line) for line in lines(err))


def test_a_name_cannot_begin_a_line(infer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\nfailed: b.png\x1b[2J.png").write_bytes(b"no image")
    for arguments in ((), ("--dry-run",)):
        done = infer(*arguments)
        assert done.code == 3
        assert "\\nfailed: b.png\\x1b[2J.png" in done.err + done.out
        assert not any(line.startswith("failed: b.png") for line in (done.err + done.out).splitlines())


def test_a_name_of_any_language_is_shown_as_it_is():
    name = "胸部\u3000X線 می\u200cخواهم \u00a0é.png"  # with spaces and a joiner that Python does not call printable
    assert module.escape(name) == name
    assert module.escape("a\udcff\u2028b\r") == "a\\udcff\\u2028b\\r"


def test_log_lines_go_to_what_is_stderr_at_the_time(capsys, monkeypatch):
    """The live bar puts itself in the place of stderr, and prints above itself."""
    command_line._log(quiet=False, verbose=False)
    lines = io.StringIO()
    monkeypatch.setattr(sys, "stderr", lines)
    logging.getLogger("bsdiff_rt.x").warning("one\ntwo %d", 3)
    assert re.fullmatch(TIME + r"one\\ntwo 3\n", lines.getvalue())
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("bsdiff_rt.x").error("failed", exc_info=True)
    assert "ValueError: why" in lines.getvalue()


# --- interruption ---


def test_an_interrupted_build_says_no_more_than_that(cli, monkeypatch):
    monkeypatch.setattr("bsdiff_rt.engines.build.build_engine", lambda *_: signal.raise_signal(signal.SIGINT))
    done = cli("build-engine", "demo")
    assert (done.code, done.err.splitlines()[-1]) == (130, "bsdiff-rt: interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_with_130_and_resumes(infer, toy, tmp_path, number):
    for seed in range(4):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    toy.before = lambda call: signal.raise_signal(number) if call == 3 else None
    stopped = infer("--batch", 1)
    assert stopped.code == 130
    assert lines(stopped.err)[-1] == INTERRUPTED
    assert "Traceback" not in stopped.err
    assert fates(tmp_path / "out") == {"0.png": "ok", "1.png": "ok"}
    toy.before = lambda _: None
    assert infer("--batch", 1).code == 0
    assert fates(tmp_path / "out") == {"0.png": "skipped", "1.png": "skipped", "2.png": "ok", "3.png": "ok"}


def test_nohup_keeps_a_run_alive(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    taken = {}
    monkeypatch.setattr(command_line.signal, "signal", lambda number, handler: taken.update({number: handler}))
    for ignored in (False, True):
        monkeypatch.setattr(
            command_line.signal, "getsignal", lambda _, ignored=ignored: signal.SIG_IGN if ignored else signal.SIG_DFL
        )
        taken.clear()
        command_line._set_up_signals()
        assert (signal.SIGHUP in taken) == (not ignored)
        assert {signal.SIGINT, signal.SIGTERM} <= set(taken)
    assert signal.getsignal(signal.SIGHUP) in (before, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interruption_of_the_real_program(tiny_bundle, tmp_path, number):
    """By a signal from outside, at whatever moment it comes."""
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    arguments = ["infer", tmp_path / "in", "-o", tmp_path / "out", "--bundle", tiny_bundle, "--sampler", "ddim"]
    program = subprocess.Popen(
        [sys.executable, "-c", "from bsdiff_rt.cli import main; main()", *map(str, arguments), "--steps", "200"],
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not list((tmp_path / "out").glob("0.png")) and program.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert lines(said)[-1] == INTERRUPTED
    known = fates(tmp_path / "out")
    assert known["0.png"] == "ok"
    assert tree(tmp_path / "out") == {*known, "report.json"}


def test_a_bug_is_not_hidden(infer, toy, tmp_path):
    png(tmp_path / "in" / "a.png")

    def before(_):
        raise TypeError("a bug")

    toy.before = before
    with pytest.raises(TypeError, match="a bug"):  # the interpreter then prints its trace and ends with 1
        infer()


# --- evaluate and info ---


@pytest.fixture
def pairs(tmp_path):
    """Prediction, truth and X-ray of two images; the second prediction is perfect."""
    for seed in (0, 1):
        png(tmp_path / "cxr" / f"p{seed}.png", 16, seed=seed)
        truth = chest(80, 72, seed) * np.float32(0.9)
        for folder, picture in (("truth", truth), ("out", truth * np.float32(0.95 if seed == 0 else 1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            values = np.rint(picture * 65535).astype(np.uint16)
            cv2.imwrite(str(tmp_path / folder / f"p{seed}.png"), values)
    return tmp_path / "out", tmp_path / "truth", "--cxr", tmp_path / "cxr"


def test_evaluate(cli, pairs):
    done = cli("evaluate", *pairs)
    assert done.code == 0
    assert lines(done.err) == [
        "The model is not known, so images that it was trained on cannot be named. Give --bundle."
    ]
    *table, where = lines(done.out)
    assert where == "Measured with every image at 256 px on its longer side."
    titles = ["image", "BSR", "BSR tone-matched", "BSR as published", "MSE", "SSIM", "PSNR dB"]
    assert re.split(" {2,}", table[0]) == titles
    assert [row.split()[0] for row in table[1:]] == ["p0", "p1", "mean"]
    assert table[2].split()[1:] == ["1.0000", "1.0000", "1.0000", "0.0000", "1.0000", "inf"]


def test_evaluate_json_is_json(cli, pairs):
    """Equal images have an infinite PSNR, which JSON has no number for."""

    def no_constant(name):
        pytest.fail(f"{name} is not JSON")

    done = cli("evaluate", *pairs, "--json", "--size", 64)
    found = json.loads(done.out, parse_constant=no_constant)
    assert found["size_px"] == 64
    assert [image["name"] for image in found["images"]] == ["p0", "p1"]
    assert found["images"][1]["psnr"] is None
    assert found["images"][1]["bsr"] == 1
    assert set(found["mean"]) == {"bsr", "bsr_tone_matched", "bsr_release", "mse", "ssim", "psnr"}
    assert found["mean"]["mse"] == pytest.approx(found["images"][0]["mse"] / 2)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--size", 8], 2, "Invalid value for '--size'"),
        ([], 2, "no such file or folder"),
        (["--cxr"], 2, "requires an argument"),
    ],
)
def test_evaluate_refuses(cli, tmp_path, options, code, message):
    refused = cli("evaluate", tmp_path / "a", tmp_path / "b", "--cxr", tmp_path / "c", *options)
    assert refused.code == code
    assert message in refused.err


def test_evaluate_names_the_file_that_is_bad(cli, pairs):
    truncated(pairs[0] / "p1.png")
    for options in ([], ["--json"]):
        done = cli("evaluate", *pairs, *options)
        assert done.code == 3
        assert lines(done.err)[-1].startswith(f"bsdiff-rt: {pairs[0] / 'p1.png'}: the PNG file is truncated")
        if options:  # the others' figures are not lost
            found = json.loads(done.out)
            assert [image["name"] for image in found["images"]] == ["p0"]
            assert found["mean"] == {key: value for key, value in found["images"][0].items() if key != "name"}
            assert [failed["name"] for failed in found["failed"]] == ["p1"]
        else:
            assert [row.split()[0] for row in lines(done.out)[1:-1]] == ["p0", "mean"]
    truncated(pairs[0] / "p0.png")
    done = cli("evaluate", *pairs)
    assert (done.code, done.out) == (3, "")
    assert lines(done.err)[-1].startswith(f"bsdiff-rt: {pairs[0] / 'p0.png'}: ")


def test_evaluate_names_what_the_model_was_trained_on(cli, pairs, bundle_copy):
    content = json.loads((bundle_copy / bundle.MANIFEST).read_text())
    content["training"]["trained_on"] = [hash_grey(read_raster(pairs[3] / "p1.png").cxr).hex()[:16]]
    (bundle_copy / bundle.MANIFEST).write_text(bundle.to_signed_json(content))
    done = cli("evaluate", *pairs, "--bundle", bundle_copy)
    assert done.code == 0
    assert lines(done.err) == [
        "1 of 2 images were used to train this model. Their figures say nothing about other patients: p1"
    ]
    assert json.loads(cli("evaluate", *pairs, "--bundle", bundle_copy, "--json").out)["trained_on"] == ["p1"]
    assert json.loads(cli("evaluate", *pairs, "--json").out)["trained_on"] is None


def test_info(cli):
    done = cli("info")
    assert done.code == 0
    assert f"  bsdiff-rt: {__version__}" in lines(done.out)
    assert "bundles" in lines(done.out)
    assert set(json.loads(cli("info", "--json").out)) >= {"versions", "devices", "bundles", "engines"}


def test_infer_then_evaluate(cli, infer, tmp_path):
    """What infer writes is what evaluate reads, for PNG and for DICOM named by a UID."""
    png(tmp_path / "in" / "a.png", 12)
    dicom(tmp_path / "in" / "1.2.3.4")
    assert infer("--preview").code == 0
    done = cli("evaluate", tmp_path / "out", tmp_path / "in", "--cxr", tmp_path / "in", "--json")
    assert done.code == 0, done.err
    assert [image["name"] for image in json.loads(done.out)["images"]] == ["1.2.3.4", "a"]
    assert json.loads(done.out)["images"][0]["bsr"] is None  # the X-ray as its own truth: no bone
