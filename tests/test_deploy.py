"""The files in deploy/ use options that exist, open no port to other machines, and are what their programs expect."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bsdiff_rt.node.settings import parse_destination, parse_listen, parse_sender

DEPLOY = Path(__file__).parents[1] / "deploy"


def check_options(cli, words):
    """Check that a command's options exist and that its addresses are some. Return their values by option."""
    known = set(re.findall(r"--[a-z][a-z-]*", cli("serve", "--help").out))
    given = [word.partition("=") if "=" in word else (word, "", None) for word in words]
    values = {}
    for number, (option, _, value) in enumerate(given):
        if option.startswith("--"):
            assert option in known
            values[option] = words[number + 1] if value is None else value
    parse_destination(values["--to"])
    parse_listen(values["--listen"])
    return values


def test_the_unit_starts_the_node(cli):
    unit = (DEPLOY / "bsdiff-rt.service").read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    assert command[1] == "serve"
    assert command[-1] == "$BSDIFF_RT_OPTIONS"  # without braces: split into words
    options = re.search(r"^BSDIFF_RT_OPTIONS=(.*)$", (DEPLOY / "bsdiff-rt.conf").read_text(), re.MULTILINE)[1]
    values = check_options(cli, shlex.split(options))
    parse_sender(values["--allow"])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path):
    unit = (DEPLOY / "bsdiff-rt.service").read_text(encoding="utf-8")
    copy = tmp_path / "bsdiff-rt.service"
    copy.write_text(unit.replace("/opt/bsdiff-rt/bin/bsdiff-rt", shutil.which("true")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_compose_file_starts_both(cli):
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text(encoding="utf-8"))
    services = compose["services"]
    node, archive = services["bsdiff-rt"], services["orthanc"]
    command, folder, *options = node["command"]
    assert command == "serve"
    values = check_options(cli, options)
    host, port = parse_listen(values["--listen"])
    assert host == compose["networks"]["default"]["ipam"]["config"][0]["gateway"]  # no other machine reaches it
    assert f"node:{folder}" in node["volumes"]
    dockerfile = (DEPLOY / node["build"]["context"] / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"chown bsdiff .*{folder}$", dockerfile, re.MULTILINE)  # a volume gets the owner of its folder
    assert "serve" in node["build"]["args"]["RUNTIME"].split(",")
    assert f":{values['--http']}/health" in node["healthcheck"]["test"][-1]
    assert all(port.startswith("127.0.0.1:") for port in archive["ports"])
    destination = parse_destination(values["--to"])
    configuration = json.loads((DEPLOY / "orthanc.json").read_text(encoding="utf-8"))
    assert destination.aet == configuration["DicomAet"]
    assert f"127.0.0.1:{destination.port}:{configuration['DicomPort']}" in archive["ports"]
    assert configuration["DicomModalities"]["bsdiff"] == ["BSDIFF", host, port]  # else it may not ask by C-FIND
    assert parse_sender(values["--allow"]).aet == configuration["DicomAet"]
