"""A node beside a real archive: 20 X-rays, two kills, Orthanc down and up again. Each result is there once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
# Orthanc 1.10 listens at every address, and no setting changes this. So it runs where there is only loopback.
ALONE = ("unshare", "--map-root-user", "--net", "sh", "-c")


def find_obstacle():
    """Return why Orthanc cannot be started here without a network, or None."""
    if shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        return "Orthanc is not installed (Debian: apt-get install orthanc)"
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "unshare or ip is not installed"
    if subprocess.run([*ALONE, "ip link set lo up"], capture_output=True, check=False).returncode:
        return "this machine allows no network namespace"
    return None


@pytest.mark.services
@pytest.mark.slow
def test_each_result_is_in_orthanc_once(small, tmp_path):
    if reason := find_obstacle():
        pytest.skip(reason)
    command = [sys.executable, "-m", "benchmarks.node_trial", "--orthanc", "--images", "20", "--kills", "2"]
    command += ["--bundle", str(small.folder), "--runner", "eager"]
    # Beside the trial: nobody listens where another machine could reach them, because there is no other address.
    script = f'ip link set lo up && ip -o addr >{tmp_path}/addresses && exec "$@"'
    done = subprocess.run(
        [*ALONE, script, "sh", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["results"] == {"once": 20, "more often": 0, "other pixels": 0, "unexpected": 0, "missing": 0}
    assert found["commitments"]["done"] >= 18  # a kill may cost a report, which is asked for three times
    assert found["commitments"]["wanted"] == found["commitments"]["asked"] == 0
    addresses = [line.split()[3] for line in (tmp_path / "addresses").read_text().splitlines()]
    assert set(addresses) <= {"127.0.0.1/8", "::1/128"}
