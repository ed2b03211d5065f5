"""Opening a bundle: by name, by folder, and every way in which one can be refused, each naming the file or field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import pytest

from bsdiff_rt import bundle as module
from bsdiff_rt.bundle import (
    BUNDLES,
    FILES,
    FORMAT,
    MANIFEST,
    Manifest,
    list_bundles,
    manifest_schema,
    open_bundle,
    to_signed_json,
)
from bsdiff_rt.config import PRESETS, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.errors import BundleError

ABSENT = object()


def edit(folder, path, value):
    """Set (or with ABSENT remove) an element of the manifest, by its keys joined with dots; hashes stay true."""
    content = json.loads((folder / MANIFEST).read_text())
    *parents, last = path.split("/")
    place = content
    for key in parents:
        place = place[key]
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    (folder / MANIFEST).write_text(to_signed_json(content))


@pytest.fixture
def shipped(tiny_bundle, tmp_path, monkeypatch):
    """A place for the package's bundles that holds one, `small`, a folder without manifest and a file."""
    place = tmp_path / "bundles"
    shutil.copytree(tiny_bundle, place / "small")
    (place / "none").mkdir()
    (place / "file").write_text("")
    monkeypatch.setattr(module, "BUNDLES", place)
    return place


def test_open_by_folder(tiny_bundle):
    for name in (tiny_bundle, str(tiny_bundle)):
        bundle = open_bundle(name)
        assert bundle.folder == tiny_bundle
        assert bundle.sha256 == hashlib.sha256((tiny_bundle / MANIFEST).read_bytes()).hexdigest()
        assert bundle.identity == {"name": "tiny", "sha256": bundle.sha256}
        assert bundle.file("denoiser.onnx") == tiny_bundle / "denoiser.onnx"


def test_what_the_manifest_says(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.format == FORMAT
    assert manifest.preset == "tiny"
    assert manifest.denoiser == PRESETS["tiny"].denoiser
    assert manifest.enhancer == PRESETS["tiny"].enhancer
    assert manifest.schedule == Schedule(objective="x0")
    assert manifest.sampler == SamplerSettings("ddim", 3)
    assert manifest.preprocessing == Preprocessing(64)
    assert manifest.training == {"data": "none"}
    assert manifest.notice == "Not for diagnostic use."
    assert set(manifest.files) == set(FILES)


def test_the_manifest_survives_a_round_trip(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    training = {"steps": 3, "rate": 1e-4, "list": [1, None, {"a": True}], "wörter": "ä"}
    manifest = dataclasses.replace(manifest, training=training)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == Manifest.from_json(manifest.to_json()).to_json()


def test_open_by_name(shipped, tmp_path, monkeypatch):
    assert list_bundles() == ["small"]
    assert open_bundle("small").folder == shipped / "small"
    monkeypatch.chdir(tmp_path)
    # The default bundle must not depend on which folders happen to lie where the command is started.
    (tmp_path / "small").mkdir()
    assert open_bundle("small").folder == shipped / "small"
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle("./small")


@pytest.mark.parametrize("name", ["absent", "none", "file", "../bundles/small/absent", "small/", ""])
def test_no_such_bundle(shipped, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError) as caught:
        open_bundle(name)
    assert "no bundle" in str(caught.value) or "no manifest.json" in str(caught.value)
    if name == "absent":
        assert "'absent': neither a folder nor a bundle of the package (small)" in str(caught.value)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=rf"{tmp_path}: not a bundle \(no manifest\.json in it\)"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1, 5000])
def test_one_byte_changed(bundle_copy, name, position):
    content = bytearray((bundle_copy / name).read_bytes())
    content[position] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: SHA-256 is \w+…, but \w+… in the manifest\. .*Copy"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_missing(bundle_copy, name):
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing\. The bundle is incomplete"):
        open_bundle(bundle_copy)
    (bundle_copy / name).mkdir()
    with pytest.raises(BundleError, match=rf"{name}: missing"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", [MANIFEST, "denoiser.safetensors"])
def test_what_cannot_be_read_is_named(bundle_copy, unreadable, name):
    unreadable(bundle_copy / name)
    with pytest.raises(BundleError, match=rf"{name}: cannot be read \(Permission denied\)"):
        open_bundle(bundle_copy)


def test_a_change_of_the_manifest_is_another_bundle(bundle_copy, tiny_bundle):
    edit(bundle_copy, "name", "other")
    assert open_bundle(bundle_copy).sha256 != open_bundle(tiny_bundle).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "utf-8"),
        (b"[]", "should be an object"),
        (b"1", "should be an object"),
        (b"{}", "format is None; this version reads format 2"),
        (b'{"format": 9}', "format is 9; this version reads format 2"),
        (b'{"format": "1"}', "format is '1'"),
        (b'{"format": 2}', "field 'name' is missing"),
    ],
)
def test_a_manifest_that_is_none(bundle_copy, content, message):
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_copy)
    assert str(bundle_copy) in str(caught.value)


@pytest.mark.parametrize("path", ["extra", "denoiser/extra", "schedule/extra", "preprocessing/extra"])
def test_an_unknown_field(bundle_copy, path):
    edit(bundle_copy, path, 1)
    with pytest.raises(BundleError, match="unknown field 'extra'") as caught:
        open_bundle(bundle_copy)
    assert path.rpartition("/")[0] in str(caught.value)


@pytest.mark.parametrize(
    "field", [*(f.name for f in dataclasses.fields(Manifest)), "schedule/objective", "sampler/seed"]
)
def test_a_missing_field(bundle_copy, field):
    edit(bundle_copy, field, ABSENT)
    expected = "format is None" if field == "format" else f"field {field.rpartition('/')[2]!r} is missing"
    with pytest.raises(BundleError, match=expected):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", 5, "name should be a valid string, is 5"),
        ("enhance", 1, "enhance should be a valid boolean, is 1"),
        ("enhance", "yes", "enhance should be a valid boolean, is 'yes'"),
        ("schedule", "cosine", "schedule should be an object, is 'cosine'"),
        ("schedule/name", "linear", "schedule: name should be 'cosine' or 'squaredcos_cap_v2', is 'linear'"),
        ("schedule/objective", "x_0", "schedule: objective should be 'eps', 'v' or 'x0', is 'x_0'"),
        ("schedule/train_steps", 1000.0, r"schedule: train_steps should be a valid integer, is 1000\.0"),
        ("schedule/train_steps", True, "schedule: train_steps should be a valid integer, is True"),
        ("schedule/beta_end", "0.02", r"schedule: beta_end should be a valid number, is '0\.02'"),
        ("schedule/beta_end", True, "schedule: beta_end should be a valid number, is True"),
        ("sampler/name", "euler", "sampler: name should be 'ddpm', 'ddim', 'dpmpp-2m' or 'release', is 'euler'"),
        ("preprocessing/size", None, "preprocessing: size should be a valid integer, is None"),
        ("denoiser/channels", 64, "denoiser: channels should be a valid array, is 64"),
        ("denoiser/channels", [8, "16"], "denoiser: channels: 1 should be a valid integer, is '16'"),
        ("denoiser/attention", [0, 1], "denoiser: attention: 0 should be a valid boolean, is 0"),
        ("training", [], r"training should be an object, is \[\]"),
        ("agreement/denoiser", "small", "agreement: denoiser should be a valid number, is 'small'"),
        ("files", [], "files should be an object"),
        ("files/denoiser.onnx", 5, r"files: denoiser\.onnx should be a valid string, is 5"),
    ],
)
def test_a_field_of_the_wrong_type(bundle_copy, path, value, message):
    edit(bundle_copy, path, value)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_copy)
    assert MANIFEST in str(caught.value)


def test_a_whole_number_is_a_float(bundle_copy):
    edit(bundle_copy, "preprocessing/clahe_clip_limit", 3)
    limit = open_bundle(bundle_copy).manifest.preprocessing.clahe_clip_limit
    assert isinstance(limit, float)
    assert limit == 3


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_hash(bundle_copy, name):
    edit(bundle_copy, f"files/{name}", ABSENT)
    with pytest.raises(BundleError, match=rf"manifest\.json: files lists no {name}"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", "", "a\\..\\b"])
def test_files_stay_in_the_folder(bundle_copy, name):
    (bundle_copy.parent / "outside").write_bytes(b"")
    content = json.loads((bundle_copy / MANIFEST).read_text())
    content["files"][name] = hashlib.sha256(b"").hexdigest()
    (bundle_copy / MANIFEST).write_text(to_signed_json(content))
    with pytest.raises(BundleError, match=r"not a plain file name|missing"):
        open_bundle(bundle_copy)


def test_a_manifest_with_any_byte_changed_is_refused(bundle_copy):
    """Also one that leaves every field of the right kind: another tone, sampler or schedule is another picture."""
    path = bundle_copy / MANIFEST
    text = path.read_bytes()
    for position in range(0, len(text), 7):
        changed = bytearray(text)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BundleError):
            open_bundle(bundle_copy)
    path.write_bytes(text.replace(b'"enhance": true', b'"enhance": false'))
    with pytest.raises(BundleError, match=r"manifest\.json was changed: its sha256 does not fit"):
        open_bundle(bundle_copy)
    path.write_bytes(text)
    assert open_bundle(bundle_copy).manifest.enhance


def test_the_schema_of_the_manifest_lists_every_field():
    schema = manifest_schema()
    assert set(schema["properties"]) == set(schema["required"])
    assert set(schema["properties"]) == {*(field.name for field in dataclasses.fields(Manifest)), "sha256"}
    assert set(schema["properties"]) == set(json.loads((BUNDLES / "demo" / MANIFEST).read_text()))
    parts = schema["$defs"]
    assert set(parts) == {"DenoiserConfig", "EnhancerConfig", "Preprocessing", "SamplerSettings", "Schedule"}
    assert parts["Schedule"]["properties"]["objective"]["enum"] == ["eps", "v", "x0"]
    for part in (schema, *parts.values()):
        assert part["additionalProperties"] is False
        assert set(part["required"]) == set(part["properties"])
