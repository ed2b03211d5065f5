"""The graphs written for other runtimes: ONNX Runtime runs the step, and makes the picture that `sample` makes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.engines.onnx_files import save_graphs
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.registry import load_runner
from bsdiff_rt.sampling.buffers import table_rows
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

SIZE = 64


def draw(number, batch=2):
    return torch.randn(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def saved(tiny_bundle, tmp_path_factory):
    """Write the graphs of the tiny bundle in a precision, once."""
    folders = {}

    def save(precision):
        if precision not in folders:
            folders[precision] = tmp_path_factory.mktemp("onnx") / "graphs"
            save_graphs(open_bundle(tiny_bundle), precision, folders[precision])
        return folders[precision]

    return save


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "release"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 5e-2)])
def test_the_loop_in_three_lines(saved, tiny_bundle, sampler, precision, tolerance):
    bundle = open_bundle(tiny_bundle)
    table = sampler_table(bundle.manifest.schedule, sampler, 6)
    cxr = draw(99).clamp(-1, 1)
    with load_runner(bundle, "eager", torch.device("cpu")) as eager:
        expected = sample(eager, cxr, table, draw).numpy()
    step = onnxruntime.InferenceSession(saved(precision) / "step.onnx", providers=["CPUExecutionProvider"])
    x_t, x0, rows = draw(0).numpy(), np.zeros(cxr.shape, np.float32), table_rows(table).numpy().astype(np.float32)
    for k, row in enumerate(rows):
        z = draw(k + 1).numpy()
        x_t, x0 = step.run(None, {"x_t": x_t, "x0_previous": x0, "cxr": cxr.numpy(), "row": row[None], "z": z})
    assert abs(x0 - expected).max() < tolerance
    assert np.array_equal(x_t, x0)  # the last row says so


def test_what_is_not_finite_becomes_nan(saved, tiny_bundle):
    step = onnxruntime.InferenceSession(saved("fp32") / "step.onnx", providers=["CPUExecutionProvider"])
    image, zero = np.full((1, 1, SIZE, SIZE), np.inf, np.float32), np.zeros((1, 1, SIZE, SIZE), np.float32)
    row = np.array([[0, 1, 0, 0, 1, 0, 0]], np.float32)
    _, x0 = step.run(None, {"x_t": image, "x0_previous": zero, "cxr": zero, "row": row, "z": zero})
    assert np.isnan(x0).all()


def test_files(saved, tiny_bundle):
    folder, manifest = saved("fp16"), open_bundle(tiny_bundle).manifest
    assert {path.name for path in folder.iterdir()} == {"denoiser.onnx", "enhancer.onnx", "step.onnx", "rows.csv"}
    rows = np.loadtxt(folder / "rows.csv", delimiter=",", skiprows=1, ndmin=2)
    table = sampler_table(manifest.schedule, manifest.sampler.name, manifest.sampler.steps)
    np.testing.assert_allclose(rows, table_rows(table).numpy())
    assert (folder / "rows.csv").read_text().startswith("t,P,Q,A,B,C,S\n")
    for name in ("denoiser", "enhancer", "step"):
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


def test_a_file_that_exists_is_not_replaced(saved, tiny_bundle):
    with pytest.raises(SettingsError, match=r"denoiser\.onnx exists\. Choose another folder"):
        save_graphs(open_bundle(tiny_bundle), "fp16", saved("fp16"))


def test_a_folder_that_cannot_be_written(tiny_bundle, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"):
        save_graphs(open_bundle(tiny_bundle), "fp32", tmp_path / "file")


def test_the_command(cli, tiny_bundle, tmp_path, cache):
    said = cli("build-engine", tiny_bundle, "--for", "8.9", "--dry-run", "--save-onnx", tmp_path / "graphs")
    assert said.code == 0, said.err
    assert str(tmp_path / "graphs" / "step.onnx") in said.out
    assert (tmp_path / "graphs" / "step.onnx").is_file()
    assert not cache.exists()
