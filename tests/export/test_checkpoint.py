"""Reading what training wrote."""

from __future__ import annotations

import pickle

import pytest
import torch

from bsdiff_rt.errors import SettingsError
from export.checkpoint import read_averaged_weights

HEADER = {"preset": "tiny", "step": 7, "size": 64}


def test_header_and_averaged_weights(tmp_path):
    weights = {"a": torch.rand(3)}
    first = {"schedule": {"name": "cosine"}, "start": "ab" * 32, "clahe": 2.0, "trained_on": ["ab"]}
    torch.save(HEADER | first | {"averaged": weights, "model": {}}, tmp_path / "d.pt")
    header, averaged = read_averaged_weights(tmp_path / "d.pt")
    assert header == HEADER | first | {"stage_one": None}
    assert torch.equal(averaged["a"], weights["a"])
    torch.save(HEADER | {"averaged": weights}, tmp_path / "e.pt")
    assert read_averaged_weights(tmp_path / "e.pt")[0] == HEADER | dict.fromkeys([*first, "stage_one"])


def test_no_checkpoint(tmp_path):
    with pytest.raises(SettingsError, match=r"d\.pt: no such checkpoint\. Write it with `python -m train`"):
        read_averaged_weights(tmp_path / "d.pt")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps(Evil(), 2), pickle.dumps({"a": 1}, 2)],
    ids=["empty", "text", "code", "dictionary"],
)
def test_what_is_no_checkpoint_is_not_run(tmp_path, content):
    (tmp_path / "d.pt").write_bytes(content)
    with pytest.raises(SettingsError, match=r"not a checkpoint of `python -m train` \(\w+\)"):
        read_averaged_weights(tmp_path / "d.pt")


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    torch.save(HEADER | {"averaged": Evil()}, tmp_path / "d.pt")
    with pytest.raises(SettingsError, match="not a checkpoint"):
        read_averaged_weights(tmp_path / "d.pt")


@pytest.mark.parametrize("missing", ["preset", "step", "size", "averaged"])
def test_a_checkpoint_with_something_missing(tmp_path, missing):
    state = HEADER | {"averaged": {}}
    del state[missing]
    torch.save(state, tmp_path / "d.pt")
    with pytest.raises(SettingsError, match=r"not a checkpoint .*KeyError"):
        read_averaged_weights(tmp_path / "d.pt")
