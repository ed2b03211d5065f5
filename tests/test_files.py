"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from bsdiff_rt.files import file_sha256, flush_to_disk, open_atomically, put_in_place, remove_parts, write_atomically


def test_file_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_written_in_parts_appears_whole(tmp_path):
    path = tmp_path / "a.html"
    with open_atomically(path) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    kept = {tmp_path / "a.png", tmp_path / ".hidden", tmp_path / "sub" / "b.part"}
    for path in kept:
        path.write_bytes(b"mine")
    never_ended = [open_atomically(folder / "x.png") for folder in (tmp_path, tmp_path / "sub")]
    for each in never_ended:
        each.__enter__().write(b"half")
    assert len(list_files(tmp_path)) == len(kept) + 2
    remove_parts(tmp_path)
    assert list_files(tmp_path) == kept


def list_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def folder_of(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_put_in_place(tmp_path, there):
    if there:
        folder_of(tmp_path / "target", "old")
    put_in_place(folder_of(tmp_path / "made", "new"), tmp_path / "target", tmp_path / "aside")
    assert (tmp_path / "target" / "a").read_text() == "new"
    assert (tmp_path / "aside").exists() is there
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path):
    folder_of(tmp_path / "target", "old")
    with pytest.raises(OSError, match="No such file"):
        put_in_place(tmp_path / "never made", tmp_path / "target", tmp_path / "aside")
    assert (tmp_path / "target" / "a").read_text() == "old"
    assert not (tmp_path / "aside").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_drive_that_cannot_flush_is_left_alone(tmp_path, monkeypatch, code):
    monkeypatch.setattr("os.fsync", fail_with(code))
    flush_to_disk(tmp_path)
    (tmp_path / "a").write_bytes(b"a")
    flush_to_disk(tmp_path / "a")


def test_an_error_of_the_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match="disk"):
        flush_to_disk(tmp_path)


def test_a_folder_that_cannot_be_read_is_left_alone_and_a_file_is_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    flush_to_disk(tmp_path)
    with pytest.raises(PermissionError):
        flush_to_disk(tmp_path / "a")


def fail_with(code):
    def fsync(_):
        raise OSError(code, "error of the disk")

    return fsync
