"""A scanner's tone from its pairs, and pairs that have none."""

import cv2
import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.imaging.clahe import equalize
from bsdiff_rt.imaging.tone import tone_quantiles
from export.tone import QUANTILES, scanner_tone

PREP = Preprocessing(64)


def write(folder, name, cxr, soft_tissue):
    folder.mkdir(exist_ok=True)
    for role, image in (("cxr", cxr), ("soft_tissue", soft_tissue)):
        cv2.imwrite(str(folder / f"{name}_{role}.png"), np.rint(image * 65535).astype(np.uint16))


def with_mean(image, mean):
    return image * np.float32(mean / image.mean())


def test_what_pairs_share(tmp_path):
    """Soft tissue of one mean, X-rays of two."""
    cxrs = [with_mean(chest(64, 64, seed), mean) for seed, mean in enumerate((0.40, 0.44))]
    for name, cxr in zip("ab", cxrs, strict=True):
        write(tmp_path / "pairs", name, cxr, with_mean(cxr, 0.35))
    tone = scanner_tone(tmp_path / "pairs", PREP)
    assert tone.soft_tissue_mean == pytest.approx(0.35, abs=1e-4)
    expected = np.mean([tone_quantiles(cxr, QUANTILES) for cxr in cxrs], axis=0)
    np.testing.assert_allclose(tone.cxr, expected, atol=1e-4)  # rounded to four digits
    equalised = scanner_tone(tmp_path / "pairs", Preprocessing(64, clahe_clip_limit=2.0))
    expected = np.mean([tone_quantiles(equalize(cxr, 2.0, 8), QUANTILES) for cxr in cxrs], axis=0)
    np.testing.assert_allclose(equalised.cxr, expected, atol=2e-4)  # and the files to 16 bits


def test_pairs_that_share_no_tone_are_refused(tmp_path):
    folder = tmp_path / "pairs"
    with pytest.raises(SettingsError, match=r"pairs: no pairs NAME_cxr\.png"):
        scanner_tone(folder, PREP)
    cxr = with_mean(chest(64, 64), 0.4)
    write(folder, "a", cxr, cxr * 0.8)
    with pytest.raises(SettingsError, match=r"--tone .*pairs: one pair; it takes two or more"):
        scanner_tone(folder, PREP)
    write(folder, "b", cxr * 0.9, cxr * 0.9 * 0.8)
    with pytest.raises(SettingsError, match=r"vary by 0.0160, those of .* by 0.0040; this scanner does not equalise"):
        scanner_tone(folder, PREP)
    (folder / "b_soft_tissue.png").unlink()
    with pytest.raises(SettingsError, match=r"b_cxr\.png: expected one file b_soft_tissue"):
        scanner_tone(folder, PREP)


def test_a_prepared_data_set_is_equalised_already(tmp_path):
    """And its files have 16 bits, whatever their largest value."""
    cxrs = [with_mean(chest(64, 64, seed), mean) for seed, mean in enumerate((0.20, 0.22))]
    for name, cxr in zip("ab", cxrs, strict=True):
        write(tmp_path / "train", name, cxr, with_mean(cxr, 0.18))
    (tmp_path / "dataset.json").touch()
    tone = scanner_tone(tmp_path / "train", Preprocessing(64, clahe_clip_limit=2.0))
    assert tone.soft_tissue_mean == pytest.approx(0.18, abs=1e-4)
    expected = np.mean([tone_quantiles(cxr, QUANTILES) for cxr in cxrs], axis=0)
    np.testing.assert_allclose(tone.cxr, expected, atol=1e-4)
