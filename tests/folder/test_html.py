"""report.html as a document: what it holds, what it never holds, and when it is written."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import ToyRunner, dicom, png, report_of, tree
from PIL import Image
from stand_in import SIZE
from synthetic import SECRETS

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder import html
from bsdiff_rt.folder.pictures import BONE_GAIN
from bsdiff_rt.folder.pipeline import Inference

VOID = {"meta", "link", "img", "input", "br"}


@pytest.fixture
def run(small, tmp_path):
    """Does tmp_path/in into tmp_path/out with the page, by the toy; returns the page's text."""

    def do(**settings):
        asked = {"output": tmp_path / "out", "bundle": str(small.folder), "html": True} | settings
        inference = Inference(InferSettings(**asked), ToyRunner(SIZE))
        inference.run(inference.find_tasks([tmp_path / "in"]))
        return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    return do


class Elements(HTMLParser):
    """Checks that every element is closed, and keeps the content of scripts by id and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts, self.values, self._script = [], {}, [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.values += [value for _, value in attributes if value]
        self.open += [] if tag in VOID else [tag]
        self._script = dict(attributes).get("id", "program") if tag == "script" else None

    def handle_startendtag(self, tag, attributes):
        self.values += [value for _, value in attributes if value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._script = None

    def handle_data(self, text):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + text


def read_run(page):
    """Return what the page's program reads."""
    return json.loads(Elements(page).scripts["run"])


def cards_of(page):
    """Return the cards of a page by name."""
    return {card["name"]: card for card in read_run(page)["cards"]}


def read_picture(page, key):
    """Return an embedded picture, [h, w, 3], uint8."""
    text = Elements(page).scripts[key]
    assert text.startswith("data:image/webp;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB"))


def test_a_card_for_each_file(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "sub" / "b.dcm")
    (tmp_path / "in" / "bad.png").write_bytes(b"text")
    page = run()
    cards = cards_of(page)
    assert {name: card["status"] for name, card in cards.items()} == {
        "a.png": "ok",
        "sub/b.dcm": "ok",
        "bad.png": "refused",
    }
    assert cards["bad.png"]["reason"] == "not a PNG, JPEG or TIFF file"
    assert cards["bad.png"]["pictures"] == []
    assert cards["a.png"]["pictures"] == ["xray", "soft", "bone"]
    assert cards["sub/b.dcm"]["facts"][:2] == ["160 x 144 px", "12 bits"]
    assert read_run(page)["counts"] == {"ok": 2, "refused": 1}
    facts = dict(read_run(page)["facts"])
    assert "steps 2, seed 0" in facts["settings"]
    assert facts["model"].startswith("small net (SHA-256 ")
    assert tree(tmp_path / "out") == {"a.png", "sub/b.dcm", "report.json", "report.html"}
    assert report_of(tmp_path / "out")["page"] == "report.html"


def test_the_pictures_are_those_of_the_files(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    page = run()
    xray, soft, bone = (read_picture(page, f"{key}-0").astype(float) for key in ("xray", "soft", "bone"))
    for shown, path in ((xray, tmp_path / "in" / "a.png"), (soft, tmp_path / "out" / "a.png")):
        assert shown.shape == (160, 144, 3)  # not enlarged
        assert np.abs(shown[..., 0] - np.asarray(Image.open(path))).mean() < 3  # WebP smooths the noise
    assert np.abs(bone - np.clip(BONE_GAIN * (xray - soft), 0, 255)).mean() < 8


def test_large_pictures_are_reduced(run, tmp_path):
    png(tmp_path / "in" / "a.png", shape=(1200, 600))
    page = run()
    assert read_picture(page, "xray-0").shape == (html.SIDE_PX, html.SIDE_PX // 2, 3)
    assert cards_of(page)["a.png"]["side_px"] == 1200


def test_the_deviation_of_samples_is_shown(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    page = run(samples=2)
    assert cards_of(page)["a.png"]["pictures"] == ["xray", "soft", "bone", "deviation"]
    red, _, blue = read_picture(page, "deviation-0").astype(int).transpose(2, 0, 1)
    assert (red - blue).mean() > 5


def test_what_the_probe_found_is_shown(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    page = run(probe=True)
    card = cards_of(page)["a.png"]
    assert card["pictures"] == ["xray", "soft", "bone", "retention"]
    assert read_picture(page, "retention-0").shape == (160, 144, 3)
    kept = report_of(tmp_path / "out")["files"][0]["retention"]
    assert f"small nodules keep {kept['mean']:.0%}, 5% of them {kept['percentile_5']:.0%} or less" in card["facts"]


@pytest.mark.parametrize(("bits", "full"), [(8, True), (12, False)])
def test_a_browser_shows_files_of_8_bits_only(run, tmp_path, bits, full):
    png(tmp_path / "in" / "a.png", bits)
    card = cards_of(run())["a.png"]
    assert card["full"] is full
    assert (card["source"], card["result"]) == ("../in/a.png", "a.png")


def test_dicom_is_linked_and_not_shown(run, tmp_path):
    dicom(tmp_path / "in" / "a.dcm", 8)
    card = cards_of(run())["a.dcm"]
    assert card["full"] is False
    assert card["result"] == "a.dcm"


def test_nothing_of_a_header_and_nothing_from_outside(run, tmp_path):
    dicom(tmp_path / "in" / "a.dcm")
    page = run()
    assert not [secret for secret in SECRETS if secret in page]
    for value in (*Elements(page).values, *(card["source"] for card in cards_of(page).values())):
        assert not re.match(r"(https?:)?//", value), value
    assert "http" not in page.replace("http-equiv", "")


def test_only_the_pages_own_program_may_run(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    page = run()
    program = Elements(page).scripts["program"]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        in page
    )


@pytest.mark.parametrize(
    "name", ["<script>alert(1)<!--.png", "a&b 'c\" %41#?.png", "日本 é.png", "javascript:alert(1).png"]
)
def test_names_stay_names(run, tmp_path, name):
    png(tmp_path / "in" / name)
    page = run()
    card = cards_of(page)[name]
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("alert(1)") <= 3
    assert "<script>alert" not in page
    assert not set(card["result"]) & set("<>\"'&#?: ")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text(run, tmp_path, caplog):
    caplog.set_level("ERROR", "bsdiff_rt")  # xdist cannot pass on a log that holds such a name
    name = os.fsdecode(b"a\xff.png")
    try:
        png(tmp_path / "in" / name)
    except OSError:
        pytest.skip("this file system takes text only")
    card = cards_of(run())[name]
    assert card["result"] == "a%FF.png"


def test_skipped_files_are_shown_too(run, tmp_path):
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    first = cards_of(run())
    (tmp_path / "out" / "1.png").unlink()
    again = cards_of(run())
    assert {name: card["status"] for name, card in again.items()} == {
        "0.png": "skipped",
        "1.png": "ok",
        "2.png": "skipped",
    }
    assert {name: card["pictures"] for name, card in again.items()} == {
        name: card["pictures"] for name, card in first.items()
    }


def test_a_file_that_is_gone_has_a_card_without_pictures(small, tmp_path):
    png(tmp_path / "in" / "a.png")
    inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(small.folder)), ToyRunner(SIZE))
    report = inference.run(inference.find_tasks([tmp_path / "in"]))
    (tmp_path / "in" / "a.png").unlink()
    card = cards_of("".join(html.make_page(report, tmp_path / "out")))["a.png"]
    assert card["pictures"] == []
    assert card["warnings"][-1].startswith("no pictures: cannot be read")


def test_warnings_are_shown(small, tmp_path):
    png(tmp_path / "in" / "a.png")
    inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(small.folder)), ToyRunner(SIZE))
    report = inference.run(inference.find_tasks([tmp_path / "in"]))
    report.files = [dataclasses.replace(report.files[0], warnings=["may be inverted"])]
    assert cards_of("".join(html.make_page(report, tmp_path / "out")))["a.png"]["warnings"] == ["may be inverted"]


def test_a_page_that_cannot_be_written_is_reported(run, tmp_path, monkeypatch, caplog):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "open_atomically", full)
    with pytest.raises(FileNotFoundError):
        run()
    assert "report.html cannot be written (No space left on device). The results do not depend on it." in caplog.text
    assert report_of(tmp_path / "out")["files"][0]["status"] == "ok"


def test_a_page_of_the_users_is_not_replaced(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    with pytest.raises(SettingsError, match=r"report\.html would replace it, and this program did not write it"):
        run()
    assert (tmp_path / "out" / "report.html").read_text() == "mine"


def test_the_page_of_an_earlier_run_is_replaced(run, tmp_path):
    png(tmp_path / "in" / "a.png")
    run()
    run(html=False)  # this run does not name the page, and its report must not forget it
    png(tmp_path / "in" / "b.png")
    assert set(cards_of(run())) == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("view", "facts"),
    [
        ({}, []),
        ({"top": 0, "bottom": 100, "left": 0, "right": 80, "gain": 1.0, "offset": 0.0, "mark_pixels": 0}, []),
        (
            {"top": 4, "bottom": 96, "left": 0, "right": 80, "gain": 1.5, "offset": 0.1, "mark_pixels": 7},
            [
                "borders hidden from the model: it saw rows 5-96, columns 1-80",
                "grey levels spread 1.50 times for the model",
                "7 px of text or markers hidden from the model",
            ],
        ),
    ],
)
def test_what_was_hidden_from_the_model_is_said_in_words(view, facts):
    assert html.describe_view(view, (100, 80)) == facts
