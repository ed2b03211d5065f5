"""Dual-energy phantoms: range, physics, repeatability, and one patient at every size."""

import cv2
import numpy as np
import pytest

from train.anatomy import MARGIN, Canvas, fit_curve
from train.phantoms import apply_curves, compute_local_curves, draw_phantom, write_pairs

SEEDS = range(12)


@pytest.fixture(scope="module")
def pairs():
    return [draw_phantom(seed, 128) for seed in SEEDS]


def test_images_are_float32_in_the_unit_range():
    for seed, size in ((0, 64), (1, 100), (2, 256)):
        pair = draw_phantom(seed, size)
        for image in (pair.cxr, pair.soft_tissue):
            assert image.shape == (size, size)
            assert image.dtype == np.float32
            assert np.isfinite(image).all()
            assert 0.0 <= image.min() < 0.3
            assert 0.6 < image.max() <= 1.0


def test_the_seed_alone_decides():
    first, again, other = draw_phantom(5, 96), draw_phantom(5, 96), draw_phantom(6, 96)
    np.testing.assert_array_equal(first.cxr, again.cxr)
    np.testing.assert_array_equal(first.soft_tissue, again.soft_tissue)
    assert np.abs(first.cxr - other.cxr).mean() > 0.02


def test_images_differ_by_bone(pairs):
    """Same curves on both images: bone adds light, nearly nowhere takes it (only sharpening overshoots a little)."""
    for pair in pairs:
        bone = pair.cxr - pair.soft_tissue
        assert bone.mean() > 0.005
        assert np.percentile(bone, 1) > -0.08
        assert (bone > 0.01).mean() > (bone < -0.01).mean() * 1.5
    unsharpened = sum((pair.cxr - pair.soft_tissue).min() > -1e-3 for pair in pairs)
    assert unsharpened >= len(pairs) // 2


def test_bone_covers_a_plausible_part_of_the_film(pairs):
    for pair in pairs:
        bone = pair.cxr - pair.soft_tissue
        assert 0.15 < (bone > 0.01).mean() < 0.75
        assert 0.01 < np.sqrt((bone**2).mean()) < 0.16


def test_air_is_dark_and_the_lungs_lie_between_air_and_spine(pairs):
    for pair in pairs:
        n = pair.cxr.shape[0]
        soft = pair.soft_tissue
        lung = np.median(soft[int(0.35 * n) : int(0.5 * n), int(0.25 * n) : int(0.36 * n)])
        middle = np.median(soft[int(0.35 * n) : int(0.5 * n), int(0.47 * n) : int(0.53 * n)])
        assert soft.min() < lung < middle


def test_many_builds_occur():
    pairs = [draw_phantom(seed, 64) for seed in range(24)]
    rms = [np.sqrt(((p.cxr - p.soft_tissue) ** 2).mean()) for p in pairs]
    assert min(rms) < 0.04
    assert max(rms) > 0.08
    assert np.std([p.cxr.mean() for p in pairs]) > 0.02


def test_a_seed_is_one_patient_at_every_size():
    for seed in (1, 2):
        small, large = draw_phantom(seed, 256), draw_phantom(seed, 1024)
        for few, many in ((small.cxr, large.cxr), (small.soft_tissue, large.soft_tissue)):
            shrunk = cv2.resize(many, few.shape, interpolation=cv2.INTER_AREA)
            assert np.corrcoef(shrunk.ravel(), few.ravel())[0, 1] > 0.98
        detail = [cv2.Laplacian(cv2.resize(p.cxr, (1024, 1024)), cv2.CV_32F).std() for p in (small, large)]
        assert detail[1] > 1.2 * detail[0]


def test_a_solid_tube_has_the_mass_of_its_section():
    """A straight solid tube of length l, half width w and depth d holds l * w * d * pi / 2."""
    canvas = Canvas(240)
    canvas.tube(fit_curve((0.2, 0.3), (0.8, 0.5)), 0.03, 10.0)
    mass = canvas.render().sum() / canvas.scale**2
    assert mass == pytest.approx(np.hypot(0.6, 0.2) * 0.03 * 10.0 * np.pi / 2, rel=0.02)


def test_what_lies_outside_the_canvas_leaves_no_mark():
    canvas = Canvas(60)
    canvas.tube(fit_curve((-1.0, 1.5), (2.0, 1.5)), 0.02, 5.0)
    assert canvas.scale == pytest.approx(60 / (1 + 2 * MARGIN))
    assert canvas.render().max() == 0.0


def test_local_curves_are_monotone_and_span_the_range():
    image = np.random.default_rng(0).random((64, 64), dtype=np.float32) ** 2
    curves = compute_local_curves(image, 4, 2.0)
    assert (np.diff(curves, axis=2) >= 0).all()
    np.testing.assert_allclose(curves[..., -1], 1.0, atol=1e-5)
    low, high = apply_curves(image, curves), apply_curves(np.minimum(image + 0.1, 1), curves)
    assert (high >= low - 1e-6).all()


def test_pairs_are_written_16_bit(tmp_path):
    names = write_pairs(tmp_path / "new", 2, first_seed=7, size=64)
    assert len(set(names)) == 2
    for seed, name in enumerate(names, 7):
        pair = draw_phantom(seed, 64)
        for kind, image in (("cxr", pair.cxr), ("soft_tissue", pair.soft_tissue)):
            stored = cv2.imread(str(tmp_path / "new" / f"{name}_{kind}.png"), cv2.IMREAD_UNCHANGED)
            assert stored.dtype == np.uint16
            np.testing.assert_allclose(stored / 65535, image, atol=1e-5)


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match=r"16 px\. At least 64"):
        draw_phantom(0, 16)
