"""report.json: what it holds, and what a later run takes from it."""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import platform
import socket
from datetime import datetime
from pathlib import Path

import pytest

from bsdiff_rt import __version__
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.report import (
    FileEntry,
    Report,
    check_output,
    describe_environment,
    digest_path,
    list_package_versions,
    read_finished,
    read_named,
    read_results,
)

BUNDLE = {"name": "tiny", "sha256": "0" * 64, "licence": "MIT"}
DONE = FileEntry("in/a.png", "a.png", "ok", None, 0.5, "1" * 64, "2" * 64)
FAILED = FileEntry("in/b.png", None, "failed", "truncated", 0.1)


def make(files=(), **changes) -> Report:
    settings = {"seed": 0, "steps": 3} | changes
    return Report(BUNDLE, settings, {"device": "cpu"}, files=list(files))


def test_the_document():
    document = json.loads(make([DONE, FAILED]).to_json())
    run = ["started", "ended", "images_per_second", "model_busy", "preview", "page"]
    assert list(document) == ["bsdiff_rt", "bundle", "settings", "environment", *run, "files", "earlier", "planned"]
    assert document["bsdiff_rt"] == __version__
    assert document["bundle"] == BUNDLE
    assert document["files"] == [dataclasses.asdict(entry) | {"warnings": []} for entry in (DONE, FAILED)]
    assert {"input", "output", "status", "reason", "seconds", "sha256", "warnings"} <= set(document["files"][0])
    started = datetime.fromisoformat(document["started"])
    assert started.utcoffset() is not None
    assert abs((datetime.now().astimezone() - started).total_seconds()) < 60
    assert document["ended"] is None


def test_every_key_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    document = json.loads(make([DONE]).to_json())
    keys = {*document, *document["files"][0], *document["bundle"], *describe_environment("cpu")}
    assert not {key for key in keys if f"`{key}`" not in page}


def test_names_of_any_kind_survive(tmp_path):
    names = ["Ünï 日本.png", 'quote" and \\.png', "line\nbreak.png", b"\xff\xfe.png".decode(errors="surrogateescape")]
    entries = [FileEntry(name, name, "ok", None, 0.0, "1", "2") for name in names]
    make(entries).write(tmp_path)
    assert read_finished(tmp_path, make()) == {entry.output: entry for entry in entries}


def test_counts():
    assert make([DONE, DONE, FAILED]).counts() == {"ok": 2, "failed": 1}


def test_only_finished_files_count(tmp_path):
    skipped = dataclasses.replace(DONE, output="c.png", status="skipped")
    refused = FileEntry("in/d.png", None, "refused", "too small")
    make([DONE, FAILED, skipped, refused]).write(tmp_path)
    assert read_finished(tmp_path, make()) == {"a.png": DONE, "c.png": skipped}


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"seed": 1}, "seed 0, now 1"), ({"steps": None}, "steps 3, now None"), ({"mirror": True}, "now True")],
)
def test_other_settings_finish_nothing(tmp_path, changed, words, caplog):
    make([DONE]).write(tmp_path)
    with caplog.at_level(logging.INFO):
        assert read_finished(tmp_path, make(**changed)) == {}
    assert f"{words}. Every file is processed again." in caplog.text


def test_another_bundle_finishes_nothing(tmp_path):
    make([DONE]).write(tmp_path)
    assert read_finished(tmp_path, dataclasses.replace(make(), bundle={"name": "tiny", "sha256": "9" * 64})) == {}


def test_another_version_finishes_the_same(tmp_path):
    """A new release does not redo an archive: not for its version, and not for a setting it adds, at its default."""
    make([DONE]).write(tmp_path)
    assert read_finished(tmp_path, dataclasses.replace(make(), bsdiff_rt="9.0")) == {"a.png": DONE}
    assert read_finished(tmp_path, make(mirror=None, samples=1)) == {"a.png": DONE}
    assert read_finished(tmp_path, make(samples=2)) == {}
    document = json.loads((tmp_path / "report.json").read_text())
    document["files"][0] |= {"new": 1}
    del document["files"][0]["warnings"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert read_finished(tmp_path, make()) == {"a.png": DONE}


def test_another_name_of_the_bundle_does_not_matter(tmp_path):
    make([DONE]).write(tmp_path)
    assert read_finished(tmp_path, dataclasses.replace(make(), bundle=BUNDLE | {"licence": "unstated"}))


def test_no_report_is_no_news(tmp_path, caplog):
    assert read_finished(tmp_path, make()) == {}
    assert read_finished(tmp_path / "absent", make()) == {}
    assert not caplog.records


WHOLE = json.loads(make([DONE]).to_json())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\x00\xfe",
        b"null",
        b"[]",
        b"{}",
        json.dumps(WHOLE | {"files": None}).encode(),
        json.dumps(WHOLE | {"files": [1]}).encode(),
        json.dumps(WHOLE | {"files": [{"input": "a"}]}).encode(),
        json.dumps(WHOLE | {"files": [WHOLE["files"][0] | {"output": ["a.png"]}]}).encode(),
        json.dumps(WHOLE)[:-20].encode(),
    ],
)
def test_a_damaged_report_finishes_nothing(tmp_path, content, caplog):
    (tmp_path / "report.json").write_bytes(content)
    assert read_finished(tmp_path, make()) == {}
    assert "cannot be used" in caplog.text
    assert "Every file is processed again." in caplog.text
    if b'"output": ["a.png"]' not in content:
        with pytest.raises(SettingsError, match=r"not a report of bsdiff-rt, or damaged\. Move it away"):
            check_output(tmp_path)


def test_a_folder_in_the_reports_place(tmp_path, caplog):
    (tmp_path / "report.json").mkdir()
    assert read_finished(tmp_path, make()) == {}
    assert "cannot be used (IsADirectoryError)" in caplog.text
    with pytest.raises(SettingsError, match=r"report\.json: cannot be read \(Is a directory\)"):
        check_output(tmp_path)


def test_an_output_folder_that_can_be_used(tmp_path):
    check_output(tmp_path / "absent")
    check_output(tmp_path)
    make([DONE, FAILED]).write(tmp_path)
    check_output(tmp_path)


def test_every_file_that_a_report_names(tmp_path):
    mapped = dataclasses.replace(DONE, output="b.dcm", maps={"uncertainty": "5" * 64})
    former = dataclasses.replace(DONE, output="c.png", maps={"uncertainty": "6" * 64})
    report = make([DONE, mapped, FAILED])
    dataclasses.replace(report, earlier=[former], planned=["d.png"], preview="preview.png").write(tmp_path)
    names = (
        "a.png b.dcm uncertainty/b.dcm.png c.png uncertainty/c.png d.png uncertainty/d.png preview.png retention/d.png"
    )
    assert read_named(tmp_path) == {Path(name) for name in names.split()}
    assert read_named(tmp_path / "absent") == set()


def test_results_are_those_of_every_run(tmp_path):
    former = dataclasses.replace(DONE, output="sub/c.png", status="skipped", seconds=0.0, path_sha256="4" * 64)
    dataclasses.replace(make([DONE, FAILED]), earlier=[former]).write(tmp_path)
    done = dataclasses.replace(DONE, status="skipped", seconds=0.0)
    assert read_results(tmp_path) == {Path("sub/c.png"): former, Path("a.png"): done}


def test_results_of_a_report_by_an_older_version(tmp_path):
    entry = {"input": "in/a.png", "output": "a.png", "sha256": "1" * 64}
    document = {"bsdiff_rt": "0", "files": [entry], "earlier": [{"output": "d.png", "sha256": None}]}
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert read_results(tmp_path) == {
        Path("a.png"): FileEntry("in/a.png", "a.png", "skipped", sha256="1" * 64),
        Path("d.png"): FileEntry("", "d.png", "skipped"),
    }
    del document["earlier"]  # 0.1.0 and before
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert read_results(tmp_path).keys() == {Path("a.png")}


def test_a_path_is_known_by_whatever_name(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    names = (Path("a.png"), Path("./sub/../a.png"), tmp_path / "a.png", Path("link"))
    assert len({digest_path(name) for name in names}) == 1
    assert digest_path(Path("b.png")) != digest_path(Path("a.png"))
    assert len(digest_path(Path(b"\xff.png".decode(errors="surrogateescape")))) == 64


def test_the_environment_names_no_user_and_no_host(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asked for the host's name"))
    found = describe_environment("cpu")
    assert set(found) == {"python", "platform", "device", "packages"}
    assert found["device"] == "cpu"
    text = json.dumps(found)
    assert socket.gethostname() not in text
    if getpass.getuser() != "root":  # a word that may occur by chance
        assert getpass.getuser() not in text


def test_package_versions_are_those_installed():
    found = list_package_versions()
    assert {"torch", "numpy", "pydicom"} <= set(found)
    assert "tensorrt" not in found or found["tensorrt"]
    assert all(found.values())
