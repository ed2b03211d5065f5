"""What `serve` may be asked for: addresses and TLS, and that wrong ones are named."""

from __future__ import annotations

import pytest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.node.settings import (
    Destination,
    NodeSettings,
    Sender,
    make_tls,
    parse_destination,
    parse_listen,
    parse_sender,
)

PACS = Destination("PACS", "10.0.0.5", 104)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PACS@10.0.0.5:104", PACS),
        ("MY PACS@pacs.example:11112/tls", Destination("MY PACS", "pacs.example", 11112, tls=True)),
        ("PACS@[fe80::1]:104", Destination("PACS", "fe80::1", 104)),
    ],
)
def test_destinations(text, expected):
    assert parse_destination(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "PACS", "PACS@host", "@host:104", "PACS@:104", "PACS@host:0", "PACS@host:65536", "A@B@host:1", " P@h:1"],
)
def test_destinations_that_are_none(text):
    with pytest.raises(SettingsError):
        parse_destination(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A TITLE THAT IS TOO LONG@host:104", "1 to 16 letters"),
        ("PACS@host:99999", "99999 is no TCP port. Use 1 to 65535"),
        ("PACS@host", "is not AET@host:port"),
    ],
)
def test_what_is_wrong_with_a_destination(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_destination(text)


def test_senders():
    assert parse_sender("XRAY1") == Sender("XRAY1")
    assert parse_sender("XRAY1@10.0.0.7") == Sender("XRAY1", "10.0.0.7")
    for text in ("", "XRAY1@", "XRAY1@host", "A TITLE THAT IS TOO LONG"):
        with pytest.raises(SettingsError):
            parse_sender(text)


def test_where_to_listen():
    assert parse_listen("0.0.0.0:104") == ("0.0.0.0", 104)
    assert parse_listen("[::1]:104") == ("::1", 104)
    for text in ("104", "host:104", "0.0.0.0:x", "0.0.0.0:70000"):
        with pytest.raises(SettingsError):
            parse_listen(text)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"destinations": ()}, "to"),
        ({"destinations": (PACS, PACS)}, "to"),
        ({"host": "0.0.0.0"}, "allow"),
        ({"destinations": (Destination("P", "h", 1, tls=True),)}, "tls_cert"),
        ({"aet": "A TITLE THAT IS TOO LONG"}, "aet"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, named):
    asked = {"folder": tmp_path, "destinations": (PACS,)} | settings
    with pytest.raises(SettingsError) as error:
        NodeSettings(**asked).check()
    assert error.value.setting == named


def test_everybody_may_be_let_in_from_this_machine_alone(tmp_path):
    NodeSettings(folder=tmp_path, destinations=(PACS,)).check()
    NodeSettings(folder=tmp_path, destinations=(PACS,), host="0.0.0.0", senders=(Sender("XRAY"),)).check()


def test_tls_needs_three_files(tmp_path):
    assert make_tls(None, None, None) is None
    with pytest.raises(SettingsError, match="three files"):
        make_tls(tmp_path / "cert.pem", None, None)
    tls = make_tls(*(tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")))
    with pytest.raises(SettingsError, match="cannot be used"):
        tls.make_context(server=True)


def test_the_command_names_the_option(cli, tmp_path):
    pytest.importorskip("pynetdicom")
    pytest.importorskip("prometheus_client")
    outcome = cli("serve", tmp_path / "node", "--to", "PACS")
    assert outcome.code == 2
    assert "--to: 'PACS' is not AET@host:port" in outcome.err
    outcome = cli("serve", tmp_path / "node", "--to", "PACS@localhost:104", "--listen", "0.0.0.0:11112")
    assert "--allow: 0.0.0.0 can be reached from other machines" in outcome.err
    assert not (tmp_path / "node").exists()


def test_a_missing_package_is_named(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("bsdiff_rt.node.settings.find_spec", lambda name: None)
    outcome = cli("serve", tmp_path / "node", "--to", "PACS@localhost:104")
    assert outcome.code == 2
    assert "pip install 'bsdiff-rt[serve]'" in outcome.err
