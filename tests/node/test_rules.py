"""Rules of a node: what they say about an X-ray, and what is wrong with a file that is none."""

from __future__ import annotations

import pytest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.node.rules import MOST_BYTES, read_rules

EXAMPLE = """
otherwise = "process"

[[rule]]
modality = ["CR", "DX"]
station = "ICU-*"
do = "process"

[[rule]]
view = "AP"
do = "ignore"

[[rule]]
body_part = ""
modality = "OT"
do = "ignore"
"""


def write(folder, text):
    path = folder / "rules.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"modality": "CR", "station": "ICU-3", "view": "AP"}, None),  # the first rule that fits decides
        ({"modality": "dx", "station": "icu-3 ", "view": "AP"}, None),
        ({"modality": "CR", "station": "WARD", "view": "AP"}, "ignored by rule 2"),
        ({"modality": "CR", "station": "WARD", "view": "PA"}, None),
        ({"modality": "OT"}, "ignored by rule 3"),
        ({"modality": "OT", "body_part": "CHEST"}, None),
        ({}, None),
    ],
)
def test_the_first_rule_that_fits_decides(tmp_path, values, reason):
    assert read_rules(write(tmp_path, EXAMPLE)).find_reason(values) == reason


def test_otherwise_decides_without_a_rule_that_fits(tmp_path):
    rules = read_rules(write(tmp_path, 'otherwise = "ignore"\n[[rule]]\nview = "P?"\ndo = "process"'))
    assert rules.find_reason({"view": "PA"}) is None
    assert rules.find_reason({"view": "LATERAL"}) == "ignored: no rule fits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule"),
        ("rule", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        ("a = " + "[" * 100_000, "not a TOML file"),
        ("[rule]\ndo = 'ignore'", r"begin each rule with a line \[\[rule\]\]"),
        ("rule = [1]", r"begin each rule with a line \[\[rule\]\]"),
        ("[[rules]]\ndo = 'ignore'", "'rules' is not known"),
        ("[[rule]]\nview = 'AP'", 'rule 1: "do" is missing'),
        ("[[rule]]\ndo = 'ignore'", "rule 1: it asks for nothing"),
        ("[[rule]]\nview = 'AP'\ndo = 'ignore'\n[[rule]]\nstations = 'A'\ndo = 'ignore'", "rule 2: 'stations' is not"),
        ("[[rule]]\nview = 1\ndo = 'ignore'", "rule 1: view is not text"),
        ("[[rule]]\nview = []\ndo = 'ignore'", "rule 1: view is not text"),
        ("[[rule]]\nview = 'AP'\ndo = 'drop'", "rule 1: do is 'drop'"),
        ("otherwise = 1\n[[rule]]\nview = 'AP'\ndo = 'ignore'", "otherwise is 1"),
        (b"#" * (MOST_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message) as caught:
        read_rules(write(tmp_path, text))
    assert caught.value.setting == "rules"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none.toml: cannot be read \(No such file"):
        read_rules(tmp_path / "none.toml")
