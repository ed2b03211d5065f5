"""Which files are inputs, where their results go, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import dicom, png

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import tasks as discover
from bsdiff_rt.folder.report import digest_path, locate_map
from bsdiff_rt.folder.tasks import find_tasks

OUT = Path("/nowhere/out")
OUT_HERE = Path("out")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """tmp_path/in, empty, with tmp_path as working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def put(*paths):
    """Files with content of no format: what counts is the name."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some text")


def results(*inputs, output=OUT, file_format="auto"):
    """Output by input, both as text."""
    tasks = find_tasks(inputs, output, file_format)
    assert all(task.refusal is None for task in tasks)
    return {str(task.input): str(task.output) for task in tasks}


def refusals(*inputs, output=OUT, file_format="auto", **options):
    """Reason by input file name; those that are not refused are left out."""
    tasks = find_tasks(inputs, output, file_format, **options)
    assert all((task.output is None) == (task.refusal is not None) for task in tasks)
    return {task.input.name: task.refusal for task in tasks if task.refusal}


def test_a_folder_is_mirrored_in_sorted_order(folder):
    put(folder / "b.png", folder / "B" / "x.png", folder / "a" / "deep" / "er" / "y.jpeg", folder / "a.tif")
    tasks = find_tasks([Path("in")], OUT, "auto")
    assert [(str(task.input), str(task.output)) for task in tasks] == [
        ("in/a.tif", "a.png"),
        ("in/b.png", "b.png"),
        ("in/B/x.png", "B/x.png"),
        ("in/a/deep/er/y.jpeg", "a/deep/er/y.png"),
    ]


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.JPEG", "a.tif", "a.tiff", "a.dcm", "a.DCM", "a.ima"])
def test_suffixes_that_are_searched_for(folder, name):
    put(folder / name)
    suffix = ".dcm" if Path(name).suffix.lower() in (".dcm", ".ima") else ".png"
    assert results(folder) == {str(folder / name): f"a{suffix}"}


@pytest.mark.parametrize(
    "name", ["a.txt", "a.json", "README", ".hidden.png", ".DS_Store", "DICOMDIR", "dicomdir", "a.gif"]
)
def test_what_is_no_input(folder, name):
    put(folder / name, folder / "sub" / name)
    assert results(folder) == {}


def test_a_dicomdir_is_no_input_even_though_it_is_dicom(folder):
    dicom(folder / "DICOMDIR")
    assert results(folder) == {}


def test_hidden_folders_are_not_searched(folder):
    put(folder / ".git" / "a.png", folder / "sub" / ".cache" / "a.png")
    assert results(folder) == {}


@pytest.mark.parametrize("name", ["a.gif", ".hidden.png", "README", "DICOMDIR"])
def test_a_file_named_by_the_user_is_one(folder, name):
    put(folder / name)
    assert [task.input for task in find_tasks([folder / name], OUT, "auto")] == [folder / name]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("IM000001", "IM000001"),
        ("1.2.840.113619.2.5", "1.2.840.113619.2.5"),
        ("1.2.840.dcm", "1.2.840"),
        ("scan.v2", "scan.v2"),
        ("a.png", "a"),  # DICOM, whatever its name says
    ],
)
def test_dicom_is_found_by_content_and_keeps_its_name(folder, name, stem):
    dicom(folder / name)
    assert results(folder) == {str(folder / name): f"{stem}.dcm"}
    assert results(folder, file_format="png") == {str(folder / name): f"{stem}.png"}


def test_the_format_decides_the_suffix(folder):
    dicom(folder / "a.dcm")
    png(folder / "b.png")
    assert set(results(folder).values()) == {"a.dcm", "b.png"}
    assert set(results(folder, file_format="png").values()) == {"a.png", "b.png"}
    for kind in ("dicom", "dicom-sc"):
        assert set(results(folder, file_format=kind).values()) == {"a.dcm", "b.dcm"}


def test_files_given_one_by_one_lie_side_by_side(folder):
    put(folder / "a" / "x.png", folder / "b" / "y.png")
    assert list(results(folder / "a" / "x.png", folder / "b" / "y.png").values()) == ["x.png", "y.png"]


@pytest.mark.parametrize("second", ["in", "in/a.png", "./in/sub/../a.png", "linked/a.png"])
def test_a_file_named_twice_is_done_once(folder, second):
    put(folder / "a.png", folder / "sub" / "b.png")
    (folder.parent / "linked").symlink_to(folder)
    assert sorted(results(Path("in"), Path(second)).values()) == ["a.png", "sub/b.png"]


def test_two_links_to_one_file_are_two_files(folder):
    """Archives that store by content link every name to it; a name without its result would go unnoticed."""
    put(folder.parent / "store" / "f00.png")
    folder.mkdir(exist_ok=True)
    for name in ("p1.png", "p2.png"):
        (folder / name).symlink_to(folder.parent / "store" / "f00.png")
    assert list(results(folder).values()) == ["p1.png", "p2.png"]


def test_results_that_would_replace_each_other(folder):
    put(folder / "a.jpg", folder / "a.png", folder / "a.tif", folder / "b.png", folder.parent / "b.png")
    rename = "Rename one of them, or choose another output folder."
    common = f"Name the folder that holds both ({folder.parent}), or choose another output folder."
    assert refusals(folder, folder.parent / "b.png") == {
        "a.png": f"its result a.png would replace that of {folder / 'a.jpg'}. {rename}",
        "a.tif": f"its result a.png would replace that of {folder / 'a.jpg'}. {rename}",
        "b.png": f"its result b.png would replace that of {folder / 'b.png'}. {common}",
    }


def test_two_folders_with_the_same_names(folder, monkeypatch):
    """Two patients, each with a file of the name that the scanner gave: their common folder keeps them apart."""
    put(folder / "patientA" / "IM0001.png", folder / "patientB" / "IM0001.png")
    two = Path("in/patientA"), Path("in/patientB")
    reason = (
        "its result IM0001.png would replace that of in/patientA/IM0001.png. "
        "Name the folder that holds both (in), or choose another output folder."
    )
    assert refusals(*two) == {"IM0001.png": reason}
    assert list(results(Path("in")).values()) == ["patientA/IM0001.png", "patientB/IM0001.png"]  # as it advises
    monkeypatch.chdir(folder)
    (second,) = refusals(Path("patientA"), Path("patientB/IM0001.png")).values()
    assert "Name the folder that holds both (.), or" in second


@pytest.mark.parametrize(("first", "second"), [("/a/1", "/b/1"), ("/a", "b"), ("in/a.jpg", "in/a.png")])
def test_no_common_folder_is_advised_that_would_not_help(folder, first, second):
    put(folder / "a.jpg", folder / "a.png")
    assert discover._find_common_folder(Path(first), Path(second)) is None


def test_a_dicom_and_a_png_of_one_name_do_not_collide(folder):
    dicom(folder / "a.dcm")
    png(folder / "a.png")
    assert set(results(folder).values()) == {"a.dcm", "a.png"}
    assert refusals(folder, file_format="png").keys() == {"a.png"}


@pytest.mark.parametrize("absent", ["absent", "in/b.png", "link.png"])
def test_an_input_that_does_not_exist_ends_the_run(folder, absent):
    put(folder / "a.png")
    (folder.parent / "link.png").symlink_to("nowhere")
    with pytest.raises(SettingsError, match=f"^{absent}: no such file or folder.$"):
        find_tasks([folder, Path(absent)], OUT, "auto")


def test_the_output_folder_is_not_searched(folder, monkeypatch):
    put(
        folder / "a.png", folder / "out" / "a.png", folder / "out" / "sub" / "b.png", folder / "other" / "out" / "c.png"
    )
    (folder / "out" / "report.json").write_text(json.dumps({"bsdiff_rt": "0", "files": [{"output": "a.png"}]}))
    expected = ["a.png", "other/out/c.png"]
    assert list(results(folder, output=folder / "out").values()) == expected
    monkeypatch.chdir(folder)
    assert list(results(Path(), output=Path("out")).values()) == expected
    (folder.parent / "elsewhere").symlink_to(folder / "out")
    assert list(results(folder, output=folder.parent / "elsewhere").values()) == expected


def test_results_of_an_earlier_run_are_no_inputs(folder, caplog):
    """A folder of results below the X-rays: what its report names, its preview and its maps; nothing else there."""
    killed = folder / "killed"  # before it reported anything
    put(killed / "d.png")
    (killed / "report.json").write_text(json.dumps({"bsdiff_rt": "0", "files": [], "planned": ["d.png", "e.png"]}))
    earlier = folder / "sub" / "old"
    put(folder / "a.png", earlier / "a.png", earlier / "b" / "c.png", earlier / "preview.png", earlier / "new.png")
    put(earlier / "uncertainty" / "a.png", earlier / "uncertainty" / "new.png", folder / "preview.png")
    files = [{"output": "a.png", "maps": {"uncertainty": "1"}}, {"output": "b/c.png"}, {"output": None}]
    report = {"bsdiff_rt": "1", "files": files, "preview": "preview.png"}
    (earlier / "report.json").write_text(json.dumps(report))
    caplog.set_level("INFO")
    left = {"in/a.png", "in/preview.png", "in/sub/old/new.png", "in/sub/old/uncertainty/new.png"}
    assert set(results("in")) == left
    assert "in/sub/old: results of an earlier run are left out" in caplog.text
    assert len(results("in/sub/old")) == 6  # named by the user


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"bsdiff_rt": "1"}', '{"files": [{"output": "a.png"}]}'])
def test_a_report_that_is_none_of_ours_says_nothing(folder, report):
    put(folder / "sub" / "a.png")
    (folder / "sub" / "report.json").write_text(report)
    assert set(results("in")) == {"in/sub/a.png"}


def test_the_output_folder_as_input_is_refused(folder):
    """Its results would be the next run's X-rays."""
    put(folder / "a.jpg")
    (folder.parent / "link").symlink_to("in")
    for output in ("in", "link"):
        with pytest.raises(SettingsError, match=r"in: this is the output folder, too\. Choose another"):
            find_tasks([folder], Path(output), "auto")
    assert [path.name for path in folder.iterdir()] == ["a.jpg"]


def test_a_result_never_replaces_an_x_ray(folder):
    put(folder / "a.png", folder / "b.jpg", folder / "sub" / "c.png", folder / "sub" / "sub" / "c.png")
    reason = "its result would replace the X-ray {}. Choose another output folder."
    assert refusals(folder / "a.png", folder / "b.jpg", output=folder) == {"a.png": reason.format(folder / "a.png")}
    # in/sub/sub/c.png -> sub/c.png below in/
    found = find_tasks([folder / "sub"], folder, "auto")
    assert [task.refusal for task in found] == [None, reason.format(folder / "sub" / "c.png")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_never_replaces_a_file_that_no_report_names(folder, overwrite):
    elsewhere = folder / "elsewhere"
    put(folder / "a.jpg", folder / "a.png", elsewhere / "b.png", folder / "b.jpg")
    reason = "its result would replace {}, which this program did not write. Choose another output folder."
    for name, output in (("a", folder), ("b", elsewhere)):
        expected = {f"{name}.jpg": reason.format(output / f"{name}.png")}
        assert refusals(folder / f"{name}.jpg", output=output, overwrite=overwrite) == expected
    (elsewhere / "report.json").write_text(json.dumps({"bsdiff_rt": "0", "files": [], "planned": ["b.png"]}))
    # a run that was killed may have written it
    assert not refusals(folder / "b.jpg", output=elsewhere, overwrite=overwrite)
    (folder / "report.json").write_text(json.dumps({"bsdiff_rt": "0", "files": [{"output": "a.png"}]}))
    assert not refusals(folder / "a.jpg", output=folder, overwrite=overwrite)  # the result of an earlier run


@pytest.mark.parametrize("overwrite", [False, True])
def test_nor_does_a_deviation_map(folder, overwrite):
    put(folder / "a.png", OUT_HERE / "uncertainty" / "a.png")
    options = {"output": OUT_HERE, "overwrite": overwrite}
    assert not refusals(folder, **options)
    reason = (
        f"its uncertainty map would replace {OUT_HERE / 'uncertainty' / 'a.png'}, which this program did not write. "
    )
    expected = {"a.png": reason + "Choose another output folder."}
    assert refusals(folder, reserved=("uncertainty",), **options) == expected
    another_run(OUT_HERE, input=str(folder / "a.png"))  # without a map
    assert refusals(folder, reserved=("uncertainty",), **options) == expected
    another_run(OUT_HERE, input=str(folder / "a.png"), maps={"uncertainty": "5" * 64})
    assert not refusals(folder, reserved=("uncertainty",), **options)


def test_nor_does_a_preview(folder):
    put(folder / "a.png", OUT_HERE / "preview.png")
    with pytest.raises(SettingsError, match=r"preview\.png would replace it, and this program did not write it"):
        find_tasks([folder], OUT_HERE, "auto", reserved=("preview.png",), overwrite=True)
    assert not refusals(folder, output=OUT_HERE)
    (OUT_HERE / "report.json").write_text(json.dumps({"bsdiff_rt": "0", "files": [], "preview": "preview.png"}))
    assert not refusals(folder, output=OUT_HERE, reserved=("preview.png",))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": []}', '{"bsdiff_rt": "1"}', '{"bsdiff_rt": 1, "files": []}']
)
def test_nor_does_a_report(folder, content):
    put(folder / "a.png", OUT_HERE / "x")
    (OUT_HERE / "report.json").write_text(content)
    with pytest.raises(SettingsError, match=r"out/report\.json: not a report of bsdiff-rt, or damaged. Move it away"):
        find_tasks([folder], OUT_HERE, "auto", overwrite=True)


def another_run(out, name="a.png", **entry):
    """A run's result and its report in `out`."""
    put(out / name)
    (out / "report.json").write_text(json.dumps({"bsdiff_rt": "1", "files": [{"output": name} | entry]}))


def test_a_result_never_replaces_that_of_an_earlier_runs_other_input(folder):
    """Two folders of X-rays named alike, one after the other into the same output."""
    out, first, second = folder / "out", folder / "1" / "a.png", folder / "2" / "a.png"
    put(first, second)
    second.write_bytes(b"another patient")
    known = {"input": str(first), "path_sha256": digest_path(first), "input_sha256": file_sha256(first)}
    another_run(out, **known)
    refusal = (
        f"its result a.png would replace that of another file, {first}, from an earlier run. "
        "Choose another output folder, or allow overwriting."
    )
    assert refusals(first.parent, output=out) == {}
    assert refusals(second.parent, output=out) == {"a.png": refusal}
    assert refusals(second.parent, output=out, overwrite=True) == {}
    second.write_bytes(first.read_bytes())
    assert refusals(second.parent, output=out) == {}  # the same X-ray, moved
    first.write_bytes(b"exported again")
    assert refusals(first.parent, output=out) == {}
    (out / "a.png").unlink()
    second.write_bytes(b"another patient")
    assert refusals(second.parent, output=out) == {}


def test_two_files_given_by_the_same_relative_path_are_two(folder, monkeypatch):
    out = folder / "out"
    put(folder / "1" / "a.png", folder / "2" / "a.png")
    (folder / "2" / "a.png").write_bytes(b"another patient")
    monkeypatch.chdir(folder / "1")
    known = {"path_sha256": digest_path(Path("a.png")), "input_sha256": file_sha256(Path("a.png"))}
    another_run(out, input="a.png", **known)
    assert refusals(Path("a.png"), output=out) == {}
    monkeypatch.chdir(folder / "2")
    assert refusals(Path("a.png"), output=out).keys() == {"a.png"}


@pytest.mark.parametrize(
    ("known", "refused"),
    [
        ({}, False),
        ({"input": "in/a.png"}, False),
        ({"input": "b/a.png"}, True),
        ({"input": "b", "input_sha256": "0" * 64}, True),
    ],
)
def test_of_an_older_versions_report_the_given_path_counts(folder, known, refused):
    put(folder / "a.png")
    another_run(folder / "out", **known)
    assert bool(refusals(Path("in/a.png"), output=folder / "out")) == refused


def test_an_input_that_cannot_be_read_replaces_nothing_either(folder, monkeypatch):
    put(folder / "a.png")
    another_run(folder / "out", input="b/a.png", path_sha256="0")

    def no(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(discover, "file_sha256", no)
    assert refusals(folder, output=folder / "out").keys() == {"a.png"}


def test_a_result_that_the_preview_would_replace(folder):
    put(folder / "preview.png", folder / "sub" / "preview.png")
    assert results(folder).keys() == {str(folder / "preview.png"), str(folder / "sub" / "preview.png")}
    tasks = find_tasks([folder], OUT, "auto", reserved=("preview.png",))
    assert [task.refusal for task in tasks] == [
        "its result preview.png would replace a file of the run itself. Rename it.",
        None,
    ]


def test_a_folder_that_cannot_be_searched_is_said(folder, monkeypatch):
    put(folder / "a.png", folder / "locked" / "b.png")
    real = os.scandir

    def scandir(path):  # permissions do not stop root, who may run this test
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    tasks = find_tasks([folder], OUT, "auto")
    assert [(task.input.name, task.refusal) for task in tasks] == [
        ("a.png", None),
        ("locked", "cannot be searched (Permission denied)"),
    ]


def test_a_file_of_any_name_that_cannot_be_read_is_an_input(folder, monkeypatch):
    put(folder / "IM0001")
    assert results(folder) == {}
    monkeypatch.setattr(os, "access", lambda file, _: Path(file).name != "IM0001")
    assert results(folder) == {str(folder / "IM0001"): "IM0001.png"}


def test_a_link_to_a_folder_is_said(folder, caplog):
    put(folder.parent / "study" / "a.png")
    (folder / "linked").symlink_to(folder.parent / "study")
    assert results(folder) == {}
    assert "linked: a link to a folder is not followed. Name it to process it." in caplog.text


def test_the_deviation_maps_of_a_dicom_and_a_png_of_one_name(folder):
    assert locate_map(OUT, "uncertainty", "a/x.png") == OUT / "uncertainty" / "a" / "x.png"
    assert locate_map(OUT, "uncertainty", Path("a/x.dcm")) == OUT / "uncertainty" / "a" / "x.dcm.png"


def test_deviation_maps_that_would_replace_each_other(folder):
    dicom(folder / "x.dcm")
    png(folder / "x.dcm.png")
    assert set(results(folder).values()) == {"x.dcm", "x.dcm.png"}
    tasks = find_tasks([folder], OUT, "auto", reserved=("uncertainty",))
    assert [task.refusal for task in tasks] == [
        None,
        f"its uncertainty map x.dcm.png would replace that of {folder / 'x.dcm'}. Choose another output folder.",
    ]


def test_links(folder):
    put(folder / "a.png", folder.parent / "far" / "b.png")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "link").symlink_to(folder.parent / "far")  # not followed: it may lead in a circle
    found = {task.input.name: task.refusal for task in find_tasks([folder], OUT, "auto")}
    assert found == {"a.png": None, **dict.fromkeys(("broken.png", "loop.png"), "the link leads to no file")}
    assert list(results(folder / "link").values()) == ["b.png"]


@pytest.mark.parametrize("name", ["pipe.png", "pipe"])
def test_what_is_no_regular_file_does_not_hang(folder, name):
    os.mkfifo(folder / name)
    assert results(folder) == {}
    with pytest.raises(SettingsError, match=f"{name}: not a file or folder, but a pipe, socket or device."):
        find_tasks([folder / name], OUT, "auto")


def test_images_of_kinds_not_read_here_are_counted(tmp_path, caplog):
    names = "a.png b.BMP sub/c.bmp sub/d.webp e.txt PHANTOM01.IMG a.dcm.gz b.npy c.nii.gz d.1.gz e.zip x.stale .f.bmp"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "scan").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "array.dat").write_bytes(b"\x93NUMPY\x01")
    assert [task.input.name for task in find_tasks([tmp_path], OUT, "auto")] == ["a.png"]
    kinds = "2 .bmp, 1 .dcm.gz, 1 .gz, 1 .img, 1 .nii.gz, 1 .npy, 1 .webp, 1 .zip, 1 JPEG without .jpg, 1 NumPy array"
    assert caplog.messages == [
        f"{tmp_path}: left out files of kinds not read here ({kinds}). Unpack them, or convert them to DICOM or PNG."
    ]


def test_a_viewers_icons_beside_dicom_files_are_left_out(folder, caplog):
    """A patient CD: DICOM files in one folder, a viewer with its buttons in another."""
    dicom(folder / "DICOM" / "IM000001")
    png(folder / "VIEWER" / "button.png", shape=(64, 64))
    png(folder / "VIEWER" / "logo.png", shape=(127, 60))
    png(folder / "scan.png", shape=(128, 60))
    (folder / "VIEWER" / "damaged.png").write_bytes(b"text")
    assert {Path(file).name for file in results(folder)} == {"IM000001", "scan.png", "damaged.png"}
    assert caplog.messages == [
        f"{folder}: left out 2 small pictures beside DICOM files (under 128 px a side: a viewer's icons). "
        "Name a file to process it."
    ]
    assert results(folder / "VIEWER" / "button.png")
    assert len(results(folder / "VIEWER")) == 3  # a folder of small pictures alone is a data set


@pytest.mark.parametrize(("name", "fits"), [("a" * 251 + ".png", True), ("b" * 252 + ".dcm", True), ("c" * 254, False)])
def test_a_name_that_is_too_long_for_its_result(folder, name, fits):
    """A DICOM file of 254 bytes without a suffix: with .dcm its result would have 258."""
    (png if name.endswith("png") else dicom)(folder / (name if len(name) < 256 else name[-255:]))
    (task,) = find_tasks([folder], folder.parent / "out" / "not" / "there", "auto")
    assert (task.output is not None) == fits
    if not fits:
        assert task.status == "failed"
        assert task.refusal.startswith("the name of its result would have 258 characters or bytes, and 255 are")


def test_the_deviation_map_needs_a_longer_name(folder):
    """x.dcm.png is longer than x.dcm; and a letter may have three bytes."""
    dicom(folder / ("語" * 83 + ".d"))
    assert not refusals(folder)
    (task,) = find_tasks([folder], OUT, "auto", reserved=("uncertainty",))
    assert (task.output, task.status) == (None, "failed")
    assert "would have 259 characters" in task.refusal


def test_what_the_run_writes_besides_replaces_no_x_ray(folder):
    put(folder / "preview.png", folder / "uncertainty" / "x.png")
    with pytest.raises(SettingsError, match=r"in/preview\.png: this run's own preview\.png would replace the X-ray"):
        find_tasks([folder / "preview.png"], folder, "png", reserved=("preview.png",))
    maps = folder / "uncertainty"
    assert refusals(maps, output=folder, reserved=("uncertainty",)) == {
        "x.png": f"its uncertainty map would replace the X-ray {maps / 'x.png'}. Choose another output folder."
    }
    assert refusals(maps, output=folder) == {}
