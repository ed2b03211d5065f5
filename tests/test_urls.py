"""Paths that are URLs, on fsspec's storage in memory, which stands for s3:// here."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from bsdiff_rt import urls
from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.files import file_sha256, open_atomically, write_atomically
from bsdiff_rt.urls import (
    UrlPath,
    explain,
    head_on_disk,
    list_below,
    on_disk,
    parse_path,
    read_heads_ahead,
    staged,
    to_path,
    walk,
)


@pytest.fixture
def store(memory_store):
    """A folder in the storage."""
    return memory_store / "archive"


@pytest.mark.parametrize(
    ("given", "text", "parts"),
    [
        ("s3://bucket/a/b.png", "s3://bucket/a/b.png", ("s3:", "bucket", "a", "b.png")),
        (Path("s3://bucket/a"), "s3://bucket/a", ("s3:", "bucket", "a")),
        ("S3://bucket/", "s3://bucket", ("s3:", "bucket")),
    ],
)
def test_a_url_is_a_path(given, text, parts):
    path = to_path(given)
    assert isinstance(path, UrlPath)
    assert (str(path), path.parts) == (text, parts)
    assert str(path / "x" / "y.dcm") == f"{text}/x/y.dcm"
    assert str((path / "x").parent) == text
    assert (path / "x").relative_to(path).as_posix() == "x"
    assert to_path(str(path)) == path == pickle.loads(pickle.dumps(path))
    assert to_path(path) is path


def test_file_urls_are_paths(tmp_path):
    path = tmp_path / "a b.png"
    assert parse_path(path.as_uri()) == path == parse_path(f"file:{path}")
    assert parse_path("a/b.png") == to_path("a/b.png") == Path("a/b.png")
    assert not isinstance(to_path("in:x/b"), UrlPath)


def test_a_file_on_a_disk_with_such_a_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    assert not isinstance(parse_path("s3:/"), UrlPath)


@pytest.mark.parametrize(
    ("given", "words"),
    [("http://host/a", r"http://host/a.*s3://, gs://, file://"), ("file://host/a", "another machine")],
)
def test_other_urls_are_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        parse_path(given)


@pytest.mark.parametrize(("scheme", "package"), [("s3", r"bsdiff-rt\[s3\]"), ("gs", "gcsfs")])
def test_without_its_package_the_extra_is_named(monkeypatch, scheme, package):
    def fail(name):
        raise ImportError(name)

    urls._open_system.cache_clear()
    monkeypatch.setattr(urls.importlib, "import_module", fail)
    with pytest.raises(SettingsError, match=f"{scheme}://.*Install {package}"):
        parse_path(f"{scheme}://bucket/a")


def test_files_are_written_read_renamed_and_removed(store):
    path = store / "a.txt"
    assert not urls.lexists(path)
    assert list_below(store) == set()
    write_atomically(path, b"one", durable=True)
    assert (path.read_text(), path.open().read(), path.exists()) == ("one", b"one", True)
    assert (urls.is_file(path), urls.is_dir(path), urls.is_file(store), urls.is_dir(store)) == (
        True,
        False,
        False,
        True,
    )
    moved = path.rename(store / "b" / "c.txt")
    assert list_below(store) == {"b/c.txt"}
    assert file_sha256(moved) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    moved.unlink()
    assert not moved.exists()


def test_an_upload_that_is_interrupted_leaves_the_file_as_it_was(store):
    path = store / "a.txt"
    write_atomically(path, b"one")
    for write in (open_atomically, staged):
        with pytest.raises(KeyboardInterrupt), write(path):
            raise KeyboardInterrupt
    assert path.read_text() == "one"


def test_a_copy_on_the_disk_lasts_as_long_as_it_is_needed(store):
    write_atomically(store / "x.dcm", b"content")
    with on_disk(store / "x.dcm", 7) as copy:
        assert (copy.name, copy.read_bytes()) == ("x.dcm", b"content")
    assert not copy.parent.exists()
    with pytest.raises(InputRefused, match="0 MB"), on_disk(store / "x.dcm", 6):
        pass
    with pytest.raises(InputFailed, match="cannot be read: no such file"), on_disk(store / "y.dcm"):
        pass


def test_only_the_first_bytes_are_copied_to_recognise_a_file(store):
    write_atomically(store / "large.bin", bytes(range(256)) * 10)
    write_atomically(store / "empty.bin", b"")
    files = [store / name for name in ("large.bin", "empty.bin", "missing.bin")]
    assert list(read_heads_ahead(files)) == files
    sizes = []
    for file in files:
        with head_on_disk(file) as head:
            sizes.append(head.stat().st_size)
            assert head.suffix == ".bin"
    assert sizes == [urls.HEAD_BYTES, 0, 0]


def test_no_more_heads_are_kept_than_allowed(store, monkeypatch):
    monkeypatch.setattr(urls, "_HEADS", 2)
    for number in range(4):
        write_atomically(store / f"{number}", b"x")
    list(read_heads_ahead(store / f"{number}" for number in range(4)))
    assert len(urls._HEADS_READ._known) == 2


def test_a_walk_may_be_pruned(store):
    for name in ("b.png", "a/c.png", "left/d.png", "a/deep/e.png"):
        write_atomically(store / name, b"x")
    found = {}
    for folder, folders, names in walk(store, onerror=pytest.fail):
        folders[:] = [name for name in folders if name != "left"]
        found[str(folder.relative_to(store))] = names
    assert found == {".": ["b.png"], "a": ["c.png"], str(Path("a", "deep")): ["e.png"]}


def test_names_that_no_path_can_hold_are_left_out(store, monkeypatch, caplog):
    """As S3 lists them; a folder with an empty name must not be walked again and again."""
    listed = {"": "file", "/": "directory", ".": "directory", "..": "directory", "x/": "directory", "a.png": "file"}
    found = [{"name": f"/bucket/archive/{name}", "type": kind} for name, kind in listed.items()]
    monkeypatch.setattr(type(store._system()), "ls", lambda _, url, detail: found if url == str(store) else [])
    assert list(walk(store, pytest.fail)) == [(store, ["x"], ["a.png"]), (store / "x", [], [])]
    assert f"{store}: left out 3 names" in caplog.text


def test_a_folder_that_cannot_be_listed_is_reported(store, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(type(store._system()), "ls", refuse)
    errors = []
    assert list(walk(store, errors.append)) == []
    assert "access denied" in errors[0].strerror
    monkeypatch.setattr(type(store._system()), "find", refuse)
    with pytest.raises(SettingsError, match="access denied"):
        list_below(store)


class NoCredentialsError(Exception):
    """Named as botocore's."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket"),
        (FileNotFoundError("my-bucket/x"), "no such file"),
        (PermissionError("Forbidden"), "access denied: check"),
        (NoCredentialsError("secret"), "no credentials: set AWS_ACCESS_KEY_ID"),
        (ZeroDivisionError("secret"), "ZeroDivisionError of the storage's package"),
        (OSError(5, "slow down"), "slow down"),
        (OSError("?"), "OSError"),
    ],
)
def test_what_a_package_raises_becomes_a_sentence(store, error, words):
    with pytest.raises(OSError, match=words) as caught, explain(store):
        raise error
    assert caught.value.filename == str(store)
    assert "secret" not in str(caught.value)


def test_a_folder_is_not_below_itself(memory_store, monkeypatch):
    """What s3fs answers between two of its questions, while the first file of a folder is written."""
    folder = memory_store / "new"
    monkeypatch.setattr(folder._system(), "find", lambda path: ["/bucket/new", "bucket/new/a.png"])
    assert list_below(folder) == {"a.png"}
