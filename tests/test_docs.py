"""The pages link to files that exist, and their commands use options that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import bsdiff_rt
from bsdiff_rt.bundle import manifest_schema

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def find_commands(page: Path) -> list[list[str]]:
    """Return the words of each command of this project that a page shows, indented or between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in lines:
        command = re.sub(r"\s#\s.*", "", line).replace("|", " ")
        if re.match(r"(\S*bsdiff-rt|(\S*python3?|py) -m (train|export|benchmarks))\b", command):
            found.append(shlex.split(command.replace("'", "").replace('"', "")))
    return found


def list_options(words: list[str]) -> list[str]:
    """Return the long options among a command's words, without their values and the comma after them."""
    return [match[0] for word in words if (match := re.match(r"--[a-z][a-z-]*", word))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_program_use_its_options(page, cli):
    for words in find_commands(page):
        if words[0].endswith("bsdiff-rt") and len(words) > 1 and not words[1].startswith("-"):
            known = set(re.findall(r"--[a-z][a-z-]*", cli(words[1], "--help").out))
            assert known, words
            assert set(list_options(words)) <= known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_workshop_use_its_options(page):
    for words in find_commands(page):
        if "-m" in words:
            folder, _, module = words[words.index("-m") + 1].partition(".")
            files = [ROOT / folder / f"{module}.py"] if module else list((ROOT / folder).rglob("*.py"))
            source = "\n".join(path.read_text(encoding="utf-8") for path in files)
            for option in list_options(words):
                name = option.removeprefix("--no-").removeprefix("--")
                assert f'"--{name}' in source or name.replace("-", "_") in source, f"{page.name}: {words}"


def test_the_page_on_bundles_explains_every_key():
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    schema = manifest_schema()
    keys = {key for part in (schema, *schema["$defs"].values()) for key in part["properties"]}
    assert {key for key in keys if f"| `{key}` |" not in text} == set()


def test_the_page_on_the_api_has_the_docstrings():
    """`python .ci/write_api_page.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("write_api_page", ROOT / ".ci" / "write_api_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.write_page()


def test_the_way_of_an_x_ray_has_at_most_twelve_calls():
    """Each row of the table in docs/design.md names a function that exists."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `[\w.]+` \| `([\w.]+)` \|", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert 8 <= len(rows) <= 12
    for _, name in rows:
        thing: Any = bsdiff_rt
        for place, part in enumerate(name.split(".")):
            if not hasattr(thing, part):
                importlib.import_module(".".join(["bsdiff_rt", *name.split(".")[: place + 1]]))
            thing = getattr(thing, part)
        assert callable(thing), name
