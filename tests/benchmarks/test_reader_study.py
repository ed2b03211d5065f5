"""Reader study: a blinded page and its key, and the figures from what readers send back."""

import base64
import csv
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from helpers import dicom, png
from synthetic import SECRETS
from typer.testing import CliRunner

from benchmarks.reader_study import (
    CRITERIA,
    Answers,
    app,
    build_study,
    compute_agreement,
    evaluate_answers,
    fleiss_kappa,
    main,
    print_study,
    read_answers,
    read_key,
    weighted_kappa,
)
from bsdiff_rt.errors import InputFailed, SettingsError


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folders(tmp_path):
    for number in range(3):
        png(tmp_path / "xrays" / f"secretname{number}_cxr.png", seed=number)
        png(tmp_path / "ours" / f"secretname{number}_soft_tissue.png", seed=10 + number)
        png(tmp_path / "theirs" / f"secretname{number}.png", bits=12, seed=20 + number)
    return tmp_path


def study_of(page):
    return json.loads(re.search(r"^const study = (.*);$", page, re.MULTILINE)[1])


def decoded(uri):
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def made(folders, *options):
    method = ("--method", f"alpha={folders / 'ours'}", "--method", f"beta={folders / 'theirs'}")
    return run("make", "--cxr", folders / "xrays", *method, "-o", folders / "s.html", *options)


def test_the_page_shows_every_result_beside_its_xray_under_the_keys_code(folders):
    result = made(folders)
    assert result.exit_code == 0
    assert "6 items" in result.stdout
    study, key = study_of((folders / "s.html").read_text()), read_key(folders / "s_key.json")
    assert study["study"] == key["study"]
    assert {item["code"] for item in study["items"]} == set(key["items"])
    sides = {"alpha": ("ours", "_soft_tissue", 255), "beta": ("theirs", "", 4095)}
    for item in study["items"]:
        behind = key["items"][item["code"]]
        folder, suffix, top = sides[behind["method"]]
        source = cv2.imread(str(folders / "xrays" / f"{behind['image']}_cxr.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(decoded(study["images"][item["cxr"]]), source)
        stored = cv2.imread(str(folders / folder / f"{behind['image']}{suffix}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(decoded(study["images"][item["result"]]), np.rint(stored / top * 255))
    assert len(study["images"]) == 3 + 6  # each X-ray once


def test_the_page_tells_nothing_and_loads_nothing(folders):
    made(folders)
    page = (folders / "s.html").read_text()
    for hidden in ("alpha", "beta", "secretname", str(folders), "/*STUDY*/"):
        assert hidden not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "https:" not in page
    assert "http:" not in page
    assert "default-src 'none'" in page


def test_dicom_headers_do_not_travel(tmp_path):
    dicom(tmp_path / "x" / "1.dcm")
    dicom(tmp_path / "r" / "1.dcm", seed=1)
    page, _ = build_study(tmp_path / "x", {"m": tmp_path / "r"}, 0, 64)
    assert not [secret for secret in SECRETS if secret in page]
    assert max(decoded(study_of(page)["images"][0]).shape) == 64  # 80 x 72 px, made smaller


def test_codes_and_order_follow_the_seed(folders):
    def build(seed):
        methods = {"alpha": folders / "ours", "beta": folders / "theirs"}
        return build_study(folders / "xrays", methods, seed, 768)

    assert build(3) == build(3)
    assert set(build(3)[1]["items"]) != set(build(4)[1]["items"])
    assert build(3)[1]["study"] != build(4)[1]["study"]
    orders = {tuple(entry["method"] for entry in build(seed)[1]["items"].values()) for seed in range(6)}
    assert len(orders) > 3  # blinded readers cannot learn a pattern


def test_what_make_refuses(folders):
    assert made(folders).exit_code == 0
    with pytest.raises(SettingsError, match="exists"):
        made(folders)
    with pytest.raises(SettingsError, match="exists"):
        made(folders, "--key", folders / "s.html", "-o", folders / "new.html")
    xrays = folders / "xrays"
    for text in ("alpha", "=x", "alpha="):
        with pytest.raises(SettingsError, match="NAME=FOLDER"):
            run("make", "--cxr", xrays, "--method", text, "-o", folders / "n.html")
    twice = ("--method", f"a={folders / 'ours'}", "--method", f"a={folders / 'theirs'}")
    with pytest.raises(SettingsError, match="two methods have this name"):
        run("make", "--cxr", xrays, *twice, "-o", folders / "n.html")
    with pytest.raises(SettingsError, match="no such file or folder"):
        build_study(folders / "none", {}, 0, 64)
    (folders / "empty").mkdir()
    with pytest.raises(SettingsError, match="no image there"):
        build_study(folders / "empty", {}, 0, 64)
    (folders / "theirs" / "secretname1.png").unlink()
    with pytest.raises(SettingsError, match=r"no result for secretname1 \(1 of 3 missing\)"):
        build_study(xrays, {"b": folders / "theirs"}, 0, 64)
    png(folders / "ours" / "sub" / "secretname0_soft_tissue.png")
    with pytest.raises(SettingsError, match="have the same stem"):
        build_study(xrays, {"a": folders / "ours"}, 0, 64)


def test_maps_of_deviations_and_the_xrays_beside_the_truth_are_no_results(folders):
    png(folders / "ours" / "uncertainty" / "secretname0_soft_tissue.png")
    png(folders / "ours" / "secretname0_cxr.png")
    _, record = build_study(folders / "xrays", {"a": folders / "ours"}, 0, 64)
    assert len(record["items"]) == 3
    assert all(re.fullmatch("[A-Z]{4}", code) for code in record["items"])


def test_a_damaged_xray_is_named(folders):
    (folders / "xrays" / "secretname0_cxr.png").write_bytes(b"")
    with pytest.raises(InputFailed, match=r"secretname0_cxr.png: the file is empty"):
        build_study(folders / "xrays", {"a": folders / "ours"}, 0, 64)


def answered(path, key, reader, score, **changes):
    """A file as the page exports it: `score(image, method, criterion)`, "" for not rated."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study", "reader", "item", *CRITERIA])
        for code, item in key["items"].items():
            given = [score(item["image"], item["method"], criterion) for criterion in CRITERIA]
            writer.writerow([changes.get("study", key["study"]), reader, changes.get("item", code), *given])
    return path


@pytest.fixture
def key(tmp_path):
    items = {f"C{i}{m}": {"image": f"i{i}", "method": m} for i in range(4) for m in ("a", "b")}
    made = {"study": "abc", "seed": 0, "items": items}
    (tmp_path / "key.json").write_text(json.dumps(made))
    return made


def test_means_and_agreement(tmp_path, key):
    """Method a gets 3 and b 1 from the first reader; the second is one milder to b, and left one image out."""
    one = answered(tmp_path / "1.csv", key, "R1", lambda _, method, __: 3 if method == "a" else 1)
    two = answered(tmp_path / "2.csv", key, "R2", lambda i, method, _: "" if i == "i3" else (3 if method == "a" else 2))
    result = run("tabulate", one, two, "--key", tmp_path / "key.json", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["rated"] == {"R1": 8, "R2": 6}
    assert found["methods"]["a"]["bone_suppression"] == {"mean": 3.0, "ratings": 7}
    assert found["methods"]["b"]["pulmonary_vessels"] == {"mean": pytest.approx((4 * 1 + 3 * 2) / 7), "ratings": 7}
    agreed = found["agreement"]["central_airway"]
    assert agreed["items"] == 6
    # By hand: observed 1/2; shares 1/4, 1/4, 1/2, chance 3/8: (1/2 - 3/8) / (5/8).
    assert agreed["fleiss_kappa"] == pytest.approx(0.2)
    # Disagreement 3 x 1 against 3 x 3 x (1 + 4 + 0 + 1) / 6.
    assert agreed["weighted_kappa"] == {"R1 - R2": pytest.approx(1 - 3 / 9)}
    text = run("tabulate", one, two, "--key", tmp_path / "key.json").stdout
    assert re.search(r"^a +3\.000 \(7\) +3\.000 \(7\) +3\.000 \(7\)$", text, re.MULTILINE)
    assert re.search(r"^R2 +6 +8$", text, re.MULTILINE)
    assert re.search(r"^criterion +items +Fleiss +R1 - R2$", text, re.MULTILINE)
    assert re.search(r"^Central airway +6 +0\.200 +0\.667$", text, re.MULTILINE)


def test_one_reader_agrees_with_nobody(tmp_path, key, capsys):
    one = read_answers(answered(tmp_path / "1.csv", key, "R1", lambda *_: ""))
    found = evaluate_answers(key, [one])
    assert found["agreement"] == {}
    assert found["methods"]["a"]["central_airway"] == {"mean": None, "ratings": 0}
    print_study(found)
    shown = capsys.readouterr().out
    assert " - (0)" in shown
    assert "agreement" not in shown


def test_nothing_in_common_has_no_agreement():
    name = next(iter(CRITERIA))
    answers = [Answers("s", reader, {code: {name: 2}}) for reader, code in (("A", "1"), ("B", "2"))]
    assert compute_agreement(name, answers) == {"items": 0, "fleiss_kappa": None, "weighted_kappa": {"A - B": None}}


def test_fleiss_kappa_of_a_published_example():
    """Ten subjects, fourteen raters, five categories: 0.210 (Wikipedia, Fleiss' kappa); statsmodels 0.2099."""
    rows = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"
    counts = np.array([[int(count) for count in row.split()] for row in rows.split("|")])
    assert fleiss_kappa(counts) == pytest.approx(0.20993, abs=1e-5)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == pytest.approx(1.0)
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None


def test_weighted_kappa_of_a_published_example():
    """Husbands and wives (Hout, Duncan and Sobel 1987; R's vcd, SexualFun): 0.2374 linear; scikit-learn both."""
    both = np.array([[7, 7, 2, 3], [2, 8, 3, 7], [1, 5, 4, 9], [2, 8, 9, 14]])
    assert weighted_kappa(both, power=1) == pytest.approx(0.2374, abs=5e-5)
    assert weighted_kappa(both) == pytest.approx(0.332046, abs=1e-6)
    assert weighted_kappa(np.diag([3, 4, 5])) == 1.0
    assert weighted_kappa(np.diag([0, 4, 0])) is None


def test_files_that_are_no_answers(tmp_path, key):
    path = tmp_path / "x.csv"
    for content in ("a,b\n1,2\n", "\0", "study,reader,item\ns,r,i\n"):
        path.write_text(content)
        with pytest.raises(SettingsError, match=r"not exported|0 readers"):
            read_answers(path)
    with pytest.raises(SettingsError, match=r"none\.csv: cannot be read \(No such file"):
        read_answers(tmp_path / "none.csv")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingsError, match="not exported"):
        read_answers(path)
    with pytest.raises(SettingsError, match=r"pulmonary_vessels is '4'\. Scores are 1, 2 and 3"):
        read_answers(answered(path, key, "R", lambda *_: 4))
    with pytest.raises(SettingsError, match="listed twice"):
        read_answers(answered(path, key, "R", lambda *_: 1, item="C0a"))
    one = answered(path, key, "R", lambda *_: 1).read_text()
    path.write_text(one.replace(",R,C1b", ",S,C1b"))
    with pytest.raises(SettingsError, match="2 readers and 1 studies"):
        read_answers(path)


def test_answers_that_do_not_belong_together(tmp_path, key):
    right = read_answers(answered(tmp_path / "1.csv", key, "R", lambda *_: 1))
    with pytest.raises(SettingsError, match="two files have the same reader"):
        evaluate_answers(key, [right, right])
    other = read_answers(answered(tmp_path / "2.csv", key, "S", lambda *_: 1, study="xyz"))
    with pytest.raises(SettingsError, match="answers of S belong to another study"):
        evaluate_answers(key, [right, other])
    with pytest.raises(SettingsError, match="another study"):
        evaluate_answers(key | {"items": {}}, [right])


def test_files_that_are_no_key(tmp_path):
    path = tmp_path / "key.json"
    for content in ("{", "[]", '{"study": 1, "items": {}}', '{"study": "a", "items": {"c": {"image": "i"}}}'):
        path.write_text(content)
        with pytest.raises(SettingsError, match="not the key of a reader study"):
            read_key(path)
    with pytest.raises(SettingsError, match=r"none: cannot be read \(No such file"):
        read_key(tmp_path / "none")


def test_an_error_is_one_line_and_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reader_study", "tabulate", str(tmp_path / "x.csv"), "--key", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- the page in a browser: keys and buttons in, what tabulate reads out ---

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def in_a_browser(test):
    """Mark a test that needs Chromium."""
    return pytest.mark.services(pytest.mark.skipif(BROWSER is None, reason="no Chromium here")(test))


def browse(page, folder, script):
    """Open the page, run `script` in it, and return the lines it gave to `say`; localStorage is kept in `folder`."""
    acted = folder / "acted.html"
    helpers = """
      const said = [];
      const say = (text) => said.push(text);
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const click = (id) => byId(id).click();
      const enter = (name) => { byId("reader").value = name; byId("reader").dispatchEvent(new Event("input")); };
      const warning = () => byId("warning").textContent;
    """
    ending = 'document.body.outerHTML = "<pre>" + btoa(unescape(encodeURIComponent(JSON.stringify(said)))) + "</pre>";'
    text = page.read_text(encoding="utf-8")
    acted.write_text(text.replace("</body>", f"<script>{helpers}{script};{ending}</script></body>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--disable-background-networking", "--dump-dom", acted.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(base64.b64decode(re.search(r"<pre>(.*)</pre>", done.stdout)[1]))


@in_a_browser
def test_a_reader_rates_everything_with_the_keyboard(folders):
    made(folders)
    page = folders / "s.html"
    items = study_of(page.read_text(encoding="utf-8"))["items"]
    unnamed, *said, answers, thanks = browse(
        page,
        folders,
        """
        press("1"); say(warning());
        enter('Dr. "R", 1');
        say(byId("progress").textContent);
        for (const entry of study.items) for (const name of names) press(String(1 + (item + names.indexOf(name)) % 3));
        say(byId("progress").textContent);
        say(String(byId("next").disabled));
        press("ArrowLeft"); press("ArrowDown"); press("3");
        say(csv());
        click("export"); say(warning());
        """,
    )
    assert unnamed == "Enter your name or number first."
    assert said == ["item 1 of 6 · 0 rated", "item 6 of 6 · 6 rated · all rated: export now", "true"]
    assert thanks == "Exported. Thank you."
    sheet = folders / "answers.csv"
    sheet.write_bytes(answers.encode())
    read = read_answers(sheet)
    assert read.reader == 'Dr. "R", 1'
    expected = {
        entry["code"]: [1 + (number + place) % 3 for place in range(len(CRITERIA))]
        for number, entry in enumerate(items)
    }
    expected[items[4]["code"]][1] = 3  # changed afterwards
    assert {code: list(scores.values()) for code, scores in read.scores.items()} == expected


@in_a_browser
def test_answers_outlive_the_window_and_are_each_readers_own(folders):
    made(folders)
    page = folders / "s.html"
    browse(page, folders, 'enter("first"); press("2"); press("3")')
    said = browse(
        page,
        folders,
        """
        say(byId("reader").value);
        say(JSON.stringify(scores(study.items[0].code)));
        enter("second"); say(JSON.stringify(scores(study.items[0].code)));
        click("export"); say(warning());
        click("next"); click("unrated"); say(byId("progress").textContent);
        """,
    )
    first, second = list(CRITERIA)[:2]
    assert said == [
        "first",
        json.dumps({first: 2, second: 3}, separators=(",", ":")),
        "{}",
        "Exported; 6 items are not rated yet.",
        "item 1 of 6 · 0 rated",
    ]
