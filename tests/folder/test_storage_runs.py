"""Runs whose inputs and results are in object storage: the same files, report and refusals as on a disk.

Most tests use fsspec's storage in memory. Those of S3 use moto's server on this machine, and skip where moto or s3fs is
not installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from helpers import ToyRunner, dicom, png, toy_command, tree

from bsdiff_rt import urls
from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder import journal, pipeline, search, stored_journal, tasks, writing
from bsdiff_rt.folder.earlier import list_results
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.stored_journal import open_journal
from bsdiff_rt.folder.summary import summarise
from bsdiff_rt.urls import UrlPath, list_below, to_path

SIZE = 64  # px, of the tiny bundle
REPORTS = {"report.json", "report.html", "preview.png", "report.parquet", "report.journal"}


@pytest.fixture
def inputs(tmp_path):
    """X-rays of two formats in two folders, one without a suffix, and files of other kinds."""
    folder = tmp_path / "in"
    png(folder / "a.png")
    png(folder / "deep" / "b c.png", bits=12, seed=1)
    dicom(folder / "deep" / "d.dcm", seed=2)
    dicom(folder / "IM0001", seed=3)
    (folder / "e.png").write_bytes(b"")
    (folder / "deep" / "f.txt").write_bytes(b"text")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "g.gif").write_bytes(b"GIF89a")
    return folder


def upload(folder, url):
    for name in tree(folder):
        write_atomically(url / name, (folder / name).read_bytes())


def list_results_below(url):
    """Return the names of results in the storage: neither reports nor the file that tries whether it can be written."""
    kept = {*REPORTS, ".bsdiff-rt-probe"}
    return [name for name in list_below(url) if name.partition("/")[0] not in kept]


def results(place):
    """Return the bytes of every file below a folder or URL but the reports."""
    names = tree(place) if isinstance(place, Path) and not urls.is_url(place) else list_below(place)
    kept = (name for name in names if name.partition("/")[0] not in REPORTS and not name.startswith("report.sqlite"))
    return {name: (place / name).read_bytes() for name in kept}


def list_files(report):
    return json.loads((report / "report.json").read_text())["files"]


def drop_places(entries):
    """Return entries without what says where the input is, and how long it took."""
    return [{key: entry[key] for key in entry if key not in ("input", "path_sha256", "seconds")} for entry in entries]


@pytest.fixture(autouse=True)
def one_time(monkeypatch):
    """Every DICOM result is made at the same time, which its header states."""
    describe = writing.describe_derivation
    made = datetime(2026, 11, 30, 12)
    monkeypatch.setattr(writing, "describe_derivation", lambda *known: replace(describe(*known), created=made))


@pytest.fixture
def run(tiny_bundle):
    """Does inputs into an output folder with the toy runner; returns the report."""

    def do(inputs, output, **settings):
        asked = {"output": to_path(output), "bundle": str(tiny_bundle), "format": "auto"} | settings
        inference = Inference(InferSettings(**asked), ToyRunner(SIZE))
        return inference.run(inference.find_tasks([to_path(inputs)]))

    return do


@pytest.mark.parametrize("options", [{}, {"samples": 2, "probe": True, "preview": True, "html": True}])
def test_the_files_and_the_report_are_those_of_a_run_on_a_disk(run, inputs, memory_store, tmp_path, options):
    upload(inputs, memory_store / "in")
    run(inputs, tmp_path / "out", **options)
    run(str(memory_store / "in"), str(memory_store / "out"), **options)
    assert results(memory_store / "out") == results(tmp_path / "out") != {}
    there, here = list_files(memory_store / "out"), list_files(tmp_path / "out")
    assert drop_places(there) == drop_places(here)
    assert [entry["input"] for entry in there] == [
        entry["input"].replace(str(inputs), "memory://bucket/in") for entry in here
    ]
    assert (tmp_path / "out" / "preview.png").exists() == bool(options)
    if options:
        assert (memory_store / "out" / "preview.png").read_bytes() == (tmp_path / "out" / "preview.png").read_bytes()
        assert '"result": "deep/d.dcm"' in (memory_store / "out" / "report.html").read_text()


@pytest.mark.parametrize("there", ["input", "output"])
def test_only_one_of_both_may_be_in_the_storage(run, inputs, memory_store, tmp_path, there):
    upload(inputs, memory_store / "in")
    run(inputs, tmp_path / "out")
    source, target = (memory_store / "in", tmp_path / "o") if there == "input" else (inputs, memory_store / "o")
    run(source, target)
    assert results(target) == results(tmp_path / "out")


def test_nothing_stays_in_the_temporary_folder(run, inputs, memory_store, tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    upload(inputs, memory_store / "in")
    report = run(memory_store / "in", memory_store / "out")
    assert report.counts() == {"ok": 4, "failed": 1}
    assert list(spool.iterdir()) == []


def test_finished_files_are_skipped_and_changed_ones_done_again(run, inputs, memory_store):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "out")
    (memory_store / "out" / "IM0001.dcm").unlink()
    write_atomically(memory_store / "in" / "a.png", (inputs / "deep" / "b c.png").read_bytes())
    write_atomically(memory_store / "in" / "deep" / "b c.png", b"")
    report = run(memory_store / "in", memory_store / "out")
    found = {entry.input.rpartition("/")[2]: entry.status for entry in report.files}
    assert found == {"IM0001": "ok", "a.png": "ok", "b c.png": "failed", "d.dcm": "skipped", "e.png": "failed"}
    assert "deep/b c.png.stale" in list_below(memory_store / "out")
    assert "deep/b c.png" not in list_below(memory_store / "out")


def test_no_file_of_the_users_is_replaced(run, inputs, memory_store):
    upload(inputs, memory_store / "in")
    write_atomically(memory_store / "out" / "a.png", b"mine")
    report = run(memory_store / "in", memory_store / "out", overwrite=True)
    refused = {entry.input: entry.reason for entry in report.files if entry.status == "refused"}
    assert list(refused) == ["memory://bucket/in/a.png"]
    assert "memory://bucket/out/a.png, which this program did not write" in refused["memory://bucket/in/a.png"]
    assert (memory_store / "out" / "a.png").read_bytes() == b"mine"


def test_results_of_an_earlier_run_are_no_inputs(run, inputs, memory_store):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "in" / "out")
    report = run(memory_store / "in", memory_store / "other")
    assert report.counts() == {"ok": 4, "failed": 1}


def test_results_never_replace_inputs(run, inputs, memory_store):
    upload(inputs, memory_store / "in")
    with pytest.raises(SettingsError, match="this is the output folder, too"):
        run(memory_store / "in", memory_store / "in")
    report = run(memory_store / "in" / "a.png", memory_store / "in", format="png")
    assert "would replace the X-ray memory://bucket/in/a.png" in report.files[0].reason
    report = run(memory_store / "in" / "deep", memory_store / "in", format="png")
    assert [entry.status for entry in report.files] == ["ok", "ok"]


def test_a_file_that_is_too_large_is_not_copied(run, inputs, memory_store, monkeypatch):
    upload(inputs, memory_store / "in")
    monkeypatch.setattr("bsdiff_rt.formats.MAX_FILE_BYTES", 1000)
    report = run(memory_store / "in" / "a.png", memory_store / "out")
    assert report.files[0].status == "refused"
    assert "at most 0 MB" in report.files[0].reason


def test_two_inputs_with_one_result(run, inputs, memory_store):
    png(inputs / "deep" / "d.png")
    upload(inputs, memory_store / "in")
    report = run(memory_store / "in", memory_store / "out", format="png")
    refused = [entry.reason for entry in report.files if entry.status == "refused"]
    assert ["would replace that of memory://bucket/in/deep/d.dcm. Rename one" in reason for reason in refused] == [True]


def test_icons_beside_dicom_files_are_left_out(run, inputs, memory_store, caplog):
    png(inputs / "icon.png", shape=(32, 32))
    upload(inputs, memory_store / "in")
    report = run(memory_store / "in", memory_store / "out")
    assert report.counts() == {"ok": 4, "failed": 1}
    assert "left out 1 small picture" in caplog.text
    assert "(1 .gif)" in caplog.text


@pytest.fixture
def long(monkeypatch):
    """A run of more than two files is a long one here."""
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 2)


def read_journal(output):
    with open_journal(output) as opened:
        return list(opened.read_entries())


def test_a_long_run_is_that_of_a_disk(run, inputs, memory_store, tmp_path, long):
    upload(inputs, memory_store / "in")
    report = run(memory_store / "in", memory_store / "out", samples=2)
    run(inputs, tmp_path / "out", samples=2)
    assert report.counts() == {"ok": 4, "failed": 1}
    assert results(memory_store / "out") == results(tmp_path / "out") != {}
    assert drop_places(read_journal(memory_store / "out")) == drop_places(read_journal(tmp_path / "out"))
    head = json.loads((memory_store / "out" / "report.json").read_text())
    assert (head["files"], head["files_in"], head["counts"]) == ([], "report.journal", {"ok": 4, "failed": 1})
    assert summarise(memory_store / "out")["counts"] == {"ok": 4, "failed": 1}
    assert {path.as_posix() for path, _ in list_results(memory_store / "out")} == {
        entry["output"] for entry in read_journal(tmp_path / "out") if entry["output"]
    }


def test_a_long_run_resumes(run, inputs, memory_store, long):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "out")
    (memory_store / "out" / "IM0001.dcm").unlink()
    write_atomically(memory_store / "in" / "deep" / "b c.png", b"")
    report = run(memory_store / "in", memory_store / "out")
    assert report.counts() == {"ok": 1, "skipped": 2, "failed": 2}
    assert "deep/b c.png.stale" in list_below(memory_store / "out")
    assert run(memory_store / "in", memory_store / "out", seed=1).counts() == {"ok": 3, "failed": 2}


def test_a_short_run_and_a_long_one_go_on_with_each_other(run, inputs, memory_store, monkeypatch):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "out")
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 2)
    assert run(memory_store / "in", memory_store / "out").counts() == {"skipped": 4, "failed": 1}
    assert run(memory_store / "in" / "a.png", memory_store / "out").counts() == {"skipped": 1}
    write_atomically(memory_store / "out" / "new.png", b"mine")
    write_atomically(memory_store / "in" / "new.png", (inputs / "a.png").read_bytes())
    assert run(memory_store / "in", memory_store / "out").counts() == {"skipped": 4, "failed": 1, "refused": 1}


def test_a_journal_that_was_not_uploaded_last_goes_on_where_the_storage_ends(memory_store):
    """As after a kill: what was planned is known, and what was added since the last commit is not."""
    folder = memory_store / "out"
    entry = {"input": "a", "output": "a.png", "status": "ok"}
    first = open_journal(folder)
    first.begin_run({"bundle": {}})
    first.plan([Path("a.png"), Path("b.png")])
    first.add(0, entry, [Path("uncertainty/a.png")], Path("a.png"))
    first.commit()
    first.add(1, entry | {"output": "b.png"}, planned=Path("b.png"))
    stored_journal._OPEN.clear()  # the process is gone
    with open_journal(folder) as second:
        assert (second.find("a.png"), second.find("b.png")) == ((1, entry), None)
        assert second.is_planned(Path("b.png"))
        assert not second.is_planned(Path("a.png"))
        assert second.is_map(Path("uncertainty/a.png"))
        second.begin_run({"bundle": {}})
        second.forget(Path("a.png"))
    with open_journal(folder) as third:
        assert third.find("a.png") is None
        assert len(third.read_heads()) == 2
    assert not stored_journal._OPEN


def test_changes_that_the_storage_refuses_are_uploaded_later(memory_store, monkeypatch):
    def refuse(self, data):
        raise OSError(5, "the storage does not answer")

    with open_journal(memory_store / "out") as opened:
        opened.begin_run({})
        opened.add(0, {"input": "a", "output": "a.png", "status": "ok"})
        with monkeypatch.context() as patch:
            patch.setattr(UrlPath, "write_bytes", refuse)
            with pytest.raises(
                SettingsError, match=r"report\.journal: cannot be written \(the storage does not answer\)"
            ):
                opened.commit()
    with open_journal(memory_store / "out") as opened:
        assert opened.find("a.png") is not None


@pytest.mark.parametrize("content", [b"no json", b'["drop", 1]', b'["plan"]', b"[1]", b"{}", b"\xff", b""])
def test_a_damaged_journal_is_refused(run, inputs, memory_store, long, content):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "out")
    (memory_store / "out" / "report.journal" / "000000001-00000000.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match=r"report\.journal/000000001-00000000\.jsonl: damaged"):
        run(memory_store / "in", memory_store / "out")


def test_the_journal_of_a_run_on_a_disk_is_not_used_in_the_storage(run, inputs, memory_store, tmp_path, long):
    upload(inputs, memory_store / "in")
    run(inputs, tmp_path / "out")
    upload(tmp_path / "out", memory_store / "out")
    with pytest.raises(SettingsError, match=r"names report\.sqlite, which is of a run on a disk\. Copy"):
        run(memory_store / "in", memory_store / "out")


def test_what_is_missing_from_a_journal_is_noticed(run, inputs, memory_store, long):
    upload(inputs, memory_store / "in")
    run(memory_store / "in", memory_store / "out", steps=2)
    parts = sorted(list_below(memory_store / "out" / "report.journal"))
    content = (memory_store / "out" / "report.journal" / parts[0]).read_bytes()
    (memory_store / "out" / "report.journal" / parts[0]).unlink()  # it says with which settings the rest was made
    with pytest.raises(SettingsError, match=r"report\.journal: 000000000-\*\.jsonl is missing"):
        run(memory_store / "in", memory_store / "out")
    (memory_store / "out" / "report.journal" / parts[0]).write_bytes(content)
    for foreign in ("notes.txt", "mark"):
        (memory_store / "out" / "report.journal" / foreign).write_bytes(b"")
    assert run(memory_store / "in", memory_store / "out", steps=2).counts() == {"skipped": 4, "failed": 1}
    for part in list_below(memory_store / "out" / "report.journal"):
        (memory_store / "out" / "report.journal" / part).unlink()
    with pytest.raises(SettingsError, match=r"names report\.journal, which is missing"):
        run(memory_store / "in", memory_store / "out")


def test_another_programs_table_stays(run, inputs, memory_store, long):
    upload(inputs, memory_store / "in")
    write_atomically(memory_store / "out" / "report.parquet", b"mine")
    with pytest.raises(SettingsError, match=r"report\.parquet: no report\.json says"):
        run(memory_store / "in", memory_store / "out")
    assert (memory_store / "out" / "report.parquet").read_bytes() == b"mine"


def test_a_report_that_the_storage_does_not_give_once_makes_no_results_foreign(run, inputs, memory_store, monkeypatch):
    """Whichever read of report.json fails: the run ends, or does what it would have done."""
    upload(inputs, memory_store / "in")
    run(memory_store / "in" / "deep", memory_store / "out")
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 2)
    read, left = UrlPath.read_bytes, [0]

    def fail_once(self):
        left[0] -= self.name == "report.json"
        if self.name == "report.json" and left[0] == 0:
            raise OSError(5, "the storage does not answer")
        return read(self)

    monkeypatch.setattr(UrlPath, "read_bytes", fail_once)
    said = []
    for which in range(1, 16):
        left[0] = which
        try:
            assert run(memory_store / "in" / "deep", memory_store / "out").counts() == {"skipped": 2}
        except SettingsError as error:
            said.append(str(error))
            stored_journal._OPEN.clear()
    assert said
    assert all("does not answer" in one for one in said)
    left[0] = 0
    assert run(memory_store / "in" / "deep", memory_store / "out").counts() == {"skipped": 2}


@pytest.mark.parametrize("where", ["storage", "disk"])
def test_a_run_killed_while_it_takes_over_a_shorter_one_orphans_nothing(
    run, inputs, memory_store, tmp_path, monkeypatch, where
):
    source, output = inputs, tmp_path / "out"
    if where == "storage":
        upload(inputs, memory_store / "in")
        source, output = memory_store / "in", memory_store / "out"
    run(source, output)
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 2)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:

        def kill(*_, **__):
            raise Killed

        patch.setattr(journal.Journal, "add", kill)
        patch.setattr(journal.Journal, "close", lambda _: None)
        patch.setattr(stored_journal.StoredJournal, "close", lambda _: None)
        with pytest.raises(Killed):
            run(source, output)
    stored_journal._OPEN.clear()
    assert run(source, output).counts() == {"skipped": 4, "failed": 1}


def test_what_the_command_line_says(cli, inputs, memory_store, tiny_bundle, tmp_path, toy):
    upload(inputs, memory_store / "in")
    out = str(memory_store / "out")
    missing = cli("infer", memory_store / "no", "-o", out, "--bundle", tiny_bundle)
    assert (missing.code, missing.err) == (2, "bsdiff-rt: memory://bucket/no: no such file or folder.\n")
    done = cli("infer", memory_store / "in", "-o", out, "--bundle", tiny_bundle)
    assert done.code == 3
    assert f"wrote 4 images, refused 0, failed 1 ({report_rate(memory_store)} images/s)" in done.out
    assert done.out.endswith(f"Results and report.json: {out}\n")
    assert "files      failed 1, ok 4" in cli("report", out).out
    for words in (["watch", inputs, "-o", out], ["watch", memory_store / "in", "-o", tmp_path / "out"]):
        refused = cli(*words, "--bundle", tiny_bundle)
        assert refused.code == 2
        assert "memory://bucket" in refused.err
        assert "watch needs folders on a disk" in refused.err


def report_rate(store):
    return f"{json.loads((store / 'out' / 'report.json').read_text())['images_per_second']:.2f}"


@pytest.mark.services
def test_s3_gives_the_files_of_a_disk(run, s3, inputs, tmp_path):
    upload(inputs, to_path("s3://archive/in"))
    run(inputs, tmp_path / "out", samples=2)
    first = run("s3://archive/in", "s3://archive/out", samples=2)
    assert first.counts() == {"ok": 4, "failed": 1}
    assert results(to_path("s3://archive/out")) == results(tmp_path / "out")
    assert drop_places(list_files(to_path("s3://archive/out"))) == drop_places(list_files(tmp_path / "out"))
    again = run("s3://archive/in", "s3://archive/out", samples=2)
    assert again.counts() == {"skipped": 4, "failed": 1}
    (to_path("s3://archive/in/a.png")).rename(to_path("s3://archive/moved/a.png"))
    assert list_below(to_path("s3://archive/moved")) == {"a.png"}


LONG_RUN = """
from bsdiff_rt.folder import journal, pipeline, search, tasks
for module in (journal, pipeline, search, tasks):
    module.LONG = 2
"""


@pytest.mark.services
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("before", ["", LONG_RUN], ids=["short", "long"])
def test_a_killed_run_into_s3_is_resumed(s3, tiny_bundle, tmp_path, run, before):
    """Every file that the killed run finished is complete; after the second run all are there, with the same bytes.

    The killed run leaves at most four files of its reader and writer threads on the disk, and a report.
    """
    count = 60
    for number in range(count):
        png(tmp_path / "in" / f"{number:02}.png", seed=number)
    upload(tmp_path / "in", to_path("s3://archive/many"))
    run(tmp_path / "in", tmp_path / "out")
    done = to_path(f"s3://archive/done{len(before)}")
    words = ["infer", "s3://archive/many", "-o", str(done), "--bundle", str(tiny_bundle), "--runner", "eager"]
    command = [sys.executable, "-c", f"{before}\n{toy_command(SIZE, words)}"]
    (spool := tmp_path / "spool").mkdir()
    environment = os.environ | s3 | {"TMPDIR": str(spool)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list_results_below(done)) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    written = {name: content for name, content in results(done).items() if name != ".bsdiff-rt-probe"}
    assert 9 <= len(written) < count
    expected = results(tmp_path / "out")
    assert written == {name: expected[name] for name in written}
    assert len([path for path in spool.iterdir() if path.name.startswith("bsdiff-rt-")]) <= 5
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=120)
    assert results(done) == expected
    assert summarise(done)["counts"].keys() <= {"ok", "skipped"}
    assert sum(summarise(done)["counts"].values()) == count


@pytest.mark.services
@pytest.mark.parametrize(
    ("words", "change", "sentence"),
    [
        (["s3://nowhere/in", "-o", "out"], {}, "s3://nowhere/in: no such file or folder."),
        (["in", "-o", "s3://nowhere/out"], {}, "--output: s3://nowhere/out: cannot be written (no such bucket)."),
        (["s3://archive/in", "-o", "out"], {"AWS_ACCESS_KEY_ID": None}, "no credentials: set AWS_ACCESS_KEY_ID"),
        (["s3://archive/in", "-o", "out"], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the storage does not answer"),
    ],
)
def test_what_goes_wrong_with_s3_is_said_in_a_sentence(
    cli, s3, tiny_bundle, tmp_path, monkeypatch, words, change, sentence
):
    png(tmp_path / "in" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where credentials are looked for
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    open_new = urls._open_system.__wrapped__
    monkeypatch.setattr(urls, "_open_system", lambda scheme: open_new(scheme))
    said = cli("infer", *words, "--bundle", tiny_bundle, "--runner", "eager")
    assert said.code == 2
    assert sentence in said.err
    assert "Traceback" not in said.err
