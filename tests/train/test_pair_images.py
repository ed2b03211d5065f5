"""Reading two pictures onto one matrix and grey scale, and telling X-ray from soft tissue."""

import cv2
import numpy as np
import pytest
from synthetic import dataset, save, stored

from bsdiff_rt.errors import InputRefused
from train.pair_images import explain_same_image, explain_swap, read_pair
from train.phantoms import draw_phantom


def write(path, picture, bits=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.rint(picture * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16))


@pytest.fixture(scope="module")
def drawn():
    """Phantoms, 256 px, by seed."""
    return {seed: draw_phantom(seed, 256) for seed in (0, 4, 5)}


def test_a_mixed_pair_shares_the_xrays_depth(drawn, tmp_path):
    """12 bits saved in a 16-bit PNG, dark enough to need only 11: read alone, twice too bright."""
    save(tmp_path / "1.dcm", dataset(stored(drawn[0].cxr, 12), 12))
    write(tmp_path / "1.png", drawn[0].soft_tissue * 0.4 * 4095 / 65535)
    _, soft_tissue = read_pair(tmp_path / "1.dcm", tmp_path / "1.png")
    np.testing.assert_allclose(soft_tissue, drawn[0].soft_tissue * 0.4, atol=1e-3)
    write(tmp_path / "2.png", drawn[0].cxr, 8)
    save(tmp_path / "2.dcm", dataset(stored(drawn[0].soft_tissue, 12), 12))
    cxr, soft_tissue = read_pair(tmp_path / "2.png", tmp_path / "2.dcm")
    np.testing.assert_allclose(cxr, drawn[0].cxr, atol=3e-3)  # 8 bits
    np.testing.assert_allclose(soft_tissue, drawn[0].soft_tissue, atol=2e-4)


def test_sizes_may_differ_but_not_the_field(tmp_path, drawn):
    write(tmp_path / "c.png", drawn[0].cxr)
    write(tmp_path / "s.png", cv2.resize(drawn[0].soft_tissue, (128, 128), interpolation=cv2.INTER_AREA))
    cxr, soft_tissue = read_pair(tmp_path / "c.png", tmp_path / "s.png")
    assert cxr.shape == soft_tissue.shape == (256, 256)
    write(tmp_path / "s.png", drawn[0].soft_tissue[:200])
    with pytest.raises(InputRefused, match="aspect ratio: 256 x 256 px and 200 x 256 px"):
        read_pair(tmp_path / "c.png", tmp_path / "s.png")


def test_own_results_are_no_truth(drawn, tmp_path):
    for name, kind in (("c.dcm", ["ORIGINAL", "PRIMARY"]), ("s.dcm", ["DERIVED", "SECONDARY", "", "BONE_SUPPRESSED"])):
        save(tmp_path / name, dataset(stored(drawn[0].cxr, 12), 12, ImageType=kind))
    with pytest.raises(InputRefused, match="already bone suppressed"):
        read_pair(tmp_path / "c.dcm", tmp_path / "s.dcm")


def test_two_grey_scales_are_warned_of(drawn, tmp_path, caplog):
    write(tmp_path / "c.png", drawn[0].cxr)
    write(tmp_path / "s.png", drawn[0].soft_tissue / 16)
    read_pair(tmp_path / "c.png", tmp_path / "s.png")
    assert "c.png: its soft-tissue image is 0.06 times as bright" in caplog.text


@pytest.mark.parametrize("seed", [0, 4, 5])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_bones_tell_the_x_ray_from_the_soft_tissue(drawn, seed, power, strength):
    cxr = drawn[seed].cxr
    soft_tissue = (cxr - strength * (cxr - drawn[seed].soft_tissue)) ** power
    assert explain_swap(cxr, soft_tissue) is None
    assert "are they swapped?" in explain_swap(soft_tissue, cxr)


@pytest.mark.filterwarnings("ignore:The fit may be poorly conditioned")
def test_flat_pictures_are_no_swapped_pair():
    assert explain_swap(np.full((64, 64), 0.5, np.float32), np.full((64, 64), 0.4, np.float32)) is None


def test_one_picture_is_no_pair(drawn):
    assert (
        explain_same_image(drawn[0].cxr, drawn[0].cxr + np.float32(2e-5)) == "X-ray and soft tissue are the same image"
    )
    assert explain_same_image(drawn[0].cxr, drawn[0].soft_tissue) is None
