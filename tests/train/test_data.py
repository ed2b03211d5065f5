"""Training data: pairs found and read, tone matched, augmentation that keeps the two images of a pair together."""

import json
import re
from dataclasses import asdict, fields, replace

import cv2
import numpy as np
import pytest

from bsdiff_rt.errors import InputFailed, SettingsError
from bsdiff_rt.formats.raster import find_pairs
from train.augment import AUGMENTATION_SETS, BLACK_OUTSIDE, Augmentation, degrade, tone_curve, warp
from train.data import (
    CALCIFIED_WEIGHT,
    FOREIGN_BONE,
    NO_PAIRS,
    Batches,
    Drawn,
    Pair,
    load_dataset,
    load_pair,
    load_projected,
    match_tone,
    read_dataset_settings,
    xray_digest,
)
from train.phantoms import draw_phantom, write_pairs

PLAIN = Augmentation(geometry=0.0, foreign=0.0, swap_bones=0.0, blur_noise=0.0, inserts=0.0)


@pytest.fixture(scope="module")
def pair():
    made = draw_phantom(3, 128)
    return Pair("p", made.cxr, made.soft_tissue, made.soft_tissue)


@pytest.fixture(scope="module")
def pool():
    made = [draw_phantom(seed, 64) for seed in range(3)]
    return np.rint(np.stack([[p.cxr, p.soft_tissue] for p in made]) * 255).astype(np.uint8)


def test_a_pair_is_read_on_one_grey_scale(tmp_path):
    """The truth's largest value needs 15 bits, the X-ray's 16: read alone they would be scaled apart."""
    cxr = np.full((64, 64), 40000, np.uint16)
    cxr[:32] = 60000
    cv2.imwrite(str(tmp_path / "b_cxr.png"), cxr)
    cv2.imwrite(str(tmp_path / "b_soft_tissue.png"), cxr // 2)
    loaded = load_pair("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.png", size=64)
    np.testing.assert_allclose(loaded.soft_tissue * 2, loaded.cxr, atol=1e-4)
    assert loaded.cxr.max() == pytest.approx(60000 / 65535, abs=1e-4)


def test_a_pair_that_is_not_square_is_padded_as_inference_pads_it(tmp_path):
    cxr = np.zeros((400, 300), np.uint16)
    cxr[:5, :5] = cxr[-5:, -5:] = 20000  # no uniform borders
    cv2.circle(cxr, (150, 200), 100, 60000, -1)
    for role in ("cxr", "soft_tissue"):
        cv2.imwrite(str(tmp_path / f"b_{role}.png"), cxr)
    loaded = load_pair("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.png", size=64)
    round_ = loaded.cxr > 0.5
    assert (round_.any(0).sum(), round_.any(1).sum()) == (32, 32)  # 200 of 400 px, both ways
    cv2.imwrite(str(tmp_path / "b_soft_tissue.png"), cxr[:300])
    with pytest.raises(
        SettingsError, match="pair b: the X-ray is 400 x 300 px, its soft tissue 300 x 300, another shape"
    ):
        load_pair("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.png", size=64)


def test_what_a_mask_marks_is_put_back_into_the_truth(tmp_path):
    """Dual-energy truths lack leads and clips. A model trained on such truths takes them away."""
    soft_tissue = np.random.default_rng(0).integers(80, 120, (64, 64), dtype=np.uint8)
    cxr, mask = soft_tissue + np.uint8(20), np.zeros_like(soft_tissue)
    cxr[30:33, 10:50] += 60
    mask[28:35, 8:52] = 255
    for name, image in (("cxr", cxr), ("soft_tissue", soft_tissue), ("keep", mask)):
        cv2.imwrite(str(tmp_path / f"b_{name}.png"), image)
    loaded = load_pair("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.png", size=64)
    np.testing.assert_allclose(loaded.soft_tissue, (cxr - 20.0) / 255, atol=1e-5)
    cv2.imwrite(str(tmp_path / "b_keep.png"), mask[:40])
    with pytest.raises(SettingsError, match="the mask b_keep"):
        load_pair("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.png", size=64)


def test_tone_matching_removes_a_change_of_tone_and_keeps_bone(pair):
    darker = np.clip(pair.soft_tissue * 0.9 - 0.02, 0, 1).astype(np.float32)
    before = np.abs(darker - pair.soft_tissue).mean()
    after = np.abs(match_tone(pair.cxr, darker) - pair.soft_tissue).mean()
    assert after < 0.5 * before
    bone = pair.cxr - match_tone(pair.cxr, pair.soft_tissue)
    truth = pair.cxr - pair.soft_tissue
    assert np.corrcoef(bone.ravel(), truth.ravel())[0, 1] > 0.8


def test_a_batch_depends_on_seed_and_step_alone(pair, pool):
    first, again = (Batches([pair], pool, 0.5, Augmentation(), 1) for _ in range(2))
    np.testing.assert_array_equal(first.batch(7, 3, 64, 64), again.batch(7, 3, 64, 64))
    assert not np.array_equal(first.batch(7, 3, 64, 64), first.batch(8, 3, 64, 64))
    assert not np.array_equal(
        first.batch(7, 3, 64, 64), Batches([pair], pool, 0.5, Augmentation(), 2).batch(7, 3, 64, 64)
    )


def test_batches_have_the_networks_range_and_shape(pair, pool):
    batch = Batches([pair], pool, 0.5, Augmentation(), 0).batch(0, 6, 64, 48)
    assert batch.shape == (6, 2, 48, 48)
    assert batch.dtype == np.float32
    assert batch.min() >= -1.0
    assert batch.max() <= 1.0


def test_without_augmentation_a_phantom_comes_back_as_it_is(pool):
    batch = Batches([], pool, 0.5, PLAIN, 0).batch(0, 1, 64, 64)[0]
    # One of the pool, within the rounding of the warp's coordinates.
    assert min(np.abs((batch + 1) / 2 - stored / 255).max() for stored in pool.astype(np.float32)) < 1e-3


def test_nothing_to_train_on_is_refused():
    with pytest.raises(SettingsError, match="nothing to train on"):
        Batches([], np.empty((0, 2, 8, 8), np.uint8), 0.5, PLAIN, 0)


def test_real_share_is_one_without_phantoms(pair):
    assert Batches([pair], np.empty((0, 2, 8, 8), np.uint8), 0.3, PLAIN, 0).real_share == 1.0


def test_warp_moves_every_image_alike(pair):
    """Whatever is done to the X-ray is done to the bone layer: warping commutes with subtraction."""
    for seed in range(4):
        cxr, soft_tissue = warp(np.random.default_rng(seed), [pair.cxr, pair.soft_tissue], 64, 48, Augmentation())
        (bone,) = warp(np.random.default_rng(seed), [pair.cxr - pair.soft_tissue], 64, 48, Augmentation())
        np.testing.assert_allclose(cxr - soft_tissue, bone, atol=2e-3)  # remap's 5-bit sub-pixel positions


def one_dot(x, y):
    """Black but for one bright dot, and where such a dot is: (x, y) in [-1, 1], the middle being 0."""
    picture = np.zeros((65, 65), np.float32)
    cv2.circle(picture, (round((x + 1) * 32), round((y + 1) * 32)), 2, 1.0, -1)
    return picture


def where(picture):
    y, x = np.unravel_index(cv2.GaussianBlur(picture, (0, 0), 1.5).argmax(), picture.shape)
    return (x - 32) / 32, (y - 32) / 32


def test_flip_alone_mirrors_half_of_the_samples():
    flip = Augmentation(rotation=False, zoom=False, elastic=False)
    found = [where(warp(np.random.default_rng(s), [one_dot(0.5, 0.25)], 65, 65, flip)[0]) for s in range(40)]
    assert set(found) == {(0.5, 0.25), (-0.5, 0.25)}
    assert 10 < sum(x > 0 for x, _ in found) < 30


def test_rotation_alone_keeps_the_middle_and_the_distance_from_it():
    rotation = Augmentation(flip=False, zoom=False, elastic=False)
    assert where(warp(np.random.default_rng(0), [one_dot(0, 0)], 65, 65, rotation)[0]) == (0, 0)
    found = [where(warp(np.random.default_rng(s), [one_dot(0.75, 0)], 65, 65, rotation)[0]) for s in range(20)]
    assert all(np.hypot(*place) == pytest.approx(0.75, abs=0.05) for place in found)
    angles = np.degrees([np.arctan2(y, x) for x, y in found])
    assert np.abs(angles).max() < 15 + 3  # a pixel is 2.4 degrees there
    assert angles.max() > 8
    assert angles.min() < -8


def test_some_turned_samples_have_black_corners_and_no_others():
    def black(off):
        made = [warp(np.random.default_rng(s), [np.ones((65, 65), np.float32)], 65, 65, off)[0] for s in range(100)]
        return sum(image.min() < 0.5 for image in made)

    still = Augmentation(flip=False, zoom=False, elastic=False)
    assert 100 * BLACK_OUTSIDE * 0.5 < black(still) < 100 * BLACK_OUTSIDE * 1.5
    assert black(replace(still, rotation=False)) == black(replace(still, geometry=0.0)) == 0


def test_zoom_and_elastic_deformation_change_places_each_alone():
    plain = one_dot(0.5, 0.5)
    for kind in ("zoom", "elastic"):
        off = {name: name == kind for name in ("flip", "rotation", "zoom", "elastic")}
        found = {where(warp(np.random.default_rng(s), [plain], 65, 65, Augmentation(**off))[0]) for s in range(20)}
        assert len(found) > (5 if kind == "zoom" else 2)  # elastic: about 1 %, a third of a pixel here


def test_without_any_part_of_the_geometry_nothing_moves(pair):
    still = Augmentation(flip=False, rotation=False, zoom=False, elastic=False)
    (same,) = warp(np.random.default_rng(0), [pair.cxr], 128, 128, still)
    np.testing.assert_allclose(same, pair.cxr, atol=1e-3)  # remap's 5-bit sub-pixel positions


def test_contrast_is_a_switch(pair):
    none = np.empty((0, 2, 8, 8), np.uint8)
    plain = Batches([pair], none, 1.0, Augmentation.of("none"), 0).batch(0, 1, 128, 128)[0]
    np.testing.assert_allclose((plain[0] + 1) / 2, pair.cxr, atol=1e-3)
    np.testing.assert_allclose((plain[1] + 1) / 2, pair.soft_tissue, atol=1e-3)
    changed = Batches([pair], none, 1.0, Augmentation.of("contrast"), 0).batch(0, 1, 128, 128)[0]
    assert 1e-3 < np.abs(changed - plain).mean() < 0.15


def test_kinds_of_augmentation_by_name():
    assert Augmentation.of("demo") == Augmentation()
    assert Augmentation.of("paper") == Augmentation.of("contrast,flip,rotation")
    assert Augmentation.of("paper") == Augmentation(
        zoom=False, elastic=False, foreign=0, swap_bones=0, blur_noise=0, inserts=0
    )
    none = Augmentation.of("none")
    assert not any(getattr(none, field.name) for field in fields(none) if field.name not in ("geometry", "phantoms"))
    for kind in AUGMENTATION_SETS["demo"]:
        only = Augmentation.of(kind)
        on = {field.name for field in fields(only) if getattr(only, field.name)} - {"geometry", "phantoms"}
        assert on == {kind.replace("-", "_")}
        assert getattr(only, kind.replace("-", "_")) == getattr(Augmentation(), kind.replace("-", "_"))
    for wrong in ("", "shear", "flip,", "flip, rotation"):
        with pytest.raises(SettingsError, match=r"is not known\. Choose from demo, paper, none, blur-noise"):
            Augmentation.of(wrong)


def test_switches_leave_the_rest_of_a_batch_as_it_was(pair, pool):
    """A switch takes no draw away: with the flip off, the samples that were not flipped are the same to the bit."""
    on, off = (Batches([pair], pool, 0.5, Augmentation(flip=flip), 1) for flip in (True, False))
    same = [np.array_equal(on.batch(step, 1, 64, 64), off.batch(step, 1, 64, 64)) for step in range(24)]
    assert 4 < sum(same) < 20


def written(folder, largest=65535):
    (folder / "train").mkdir(parents=True)
    for role, share in (("cxr", 1.0), ("soft_tissue", 0.4)):
        values = np.rint(np.linspace(0, largest, 64 * 64).reshape(64, 64) * share).astype(np.uint16)
        cv2.imwrite(str(folder / "train" / f"[a]_{role}.png"), values)
    pairs = [{"name": "[a]", "part": "train"}, {"name": "b", "part": None}]
    (folder / "dataset.json").write_text(json.dumps({"pairs": pairs, "settings": {"size": 64, "clahe": 2.0}}))


def test_a_data_set_is_read_at_its_full_range(tmp_path):
    """Both images need fewer than 16 bits; read like foreign files they would be stretched."""
    written(tmp_path, largest=20000)
    (loaded,) = load_dataset(tmp_path, "train")
    assert loaded.name == "[a]"
    assert loaded.cxr.max() == pytest.approx(20000 / 65535, abs=1e-6)
    assert loaded.soft_tissue.max() == pytest.approx(8000 / 65535, abs=1e-6)
    np.testing.assert_array_equal(loaded.tone_matched, match_tone(loaded.cxr, loaded.soft_tissue))
    assert load_dataset(tmp_path, "val") == []
    assert read_dataset_settings(tmp_path) == (64, 2.0)
    (smaller,), (larger,) = (load_dataset(tmp_path, "train", size) for size in (32, 96))
    np.testing.assert_allclose(smaller.cxr, loaded.cxr.reshape(32, 2, 32, 2).mean(axis=(1, 3)), atol=1e-6)
    assert larger.soft_tissue.shape == (96, 96)
    assert smaller.digest == larger.digest == loaded.digest == xray_digest(loaded.cxr)


def test_an_x_ray_is_known_by_its_pixels(tmp_path):
    list(write_pairs(tmp_path, 2, 0, 64))
    first, second = find_pairs(tmp_path)
    digests = [load_pair(*entry).digest for entry in (first, second)]
    assert load_pair("other name", *first[1:], size=32).digest == digests[0] != digests[1]
    assert re.fullmatch("[0-9a-f]{16}", digests[0])


def test_what_a_checkpoint_says_of_its_samples(pair, pool):
    told = Batches([replace(pair, digest="b"), replace(pair, digest="a")], pool, 0.5, PLAIN, 0).description()
    assert json.loads(json.dumps(told))["trained_on"] == ["a", "b"]
    assert (told["phantoms"], told["real_share"], told["clahe"]) == (len(pool), 0.5, None)
    assert told["augmentation"] == asdict(PLAIN)


def test_the_fingerprint_is_of_what_was_read(pair, pool):
    """The last bits of what is computed from it depend on the processor."""
    expected = Batches([pair], pool, 0.5, PLAIN, 0).fingerprint()
    near = replace(pair, tone_matched=np.nextafter(pair.tone_matched, np.float32(1)))
    assert Batches([near], pool, 0.5, PLAIN, 0).fingerprint() == expected
    for changed in (replace(pair, cxr=1 - pair.cxr), replace(pair, soft_tissue=1 - pair.soft_tissue)):
        assert Batches([changed], pool, 0.5, PLAIN, 0).fingerprint() != expected
    for other in (Batches([pair], pool, 0.5, PLAIN, 1), Batches([pair], 255 - pool, 0.5, PLAIN, 0)):
        assert other.fingerprint() != expected


def test_phantoms_that_would_be_drawn_for_nothing(pair, pool):
    with pytest.raises(SettingsError, match=r"phantoms, but --real-share 1 and --drr-share 0 leave none to them"):
        Batches([pair], pool, 1.0, PLAIN, 0)
    assert Batches([], pool, 1.0, PLAIN, 0).real_share == 0.0


def count_kinds(monkeypatch, batches):
    kinds = []
    for kind in ("_draw_real", "_draw_projected", "_phantom"):
        drawn = Drawn(*np.zeros((2, 64, 64), np.float32))
        monkeypatch.setattr(Batches, kind, lambda *_, kind=kind, drawn=drawn: kinds.append(kind) or drawn)
    for step in range(400):
        batches.batch(step, 1, 64, 64)
    return [kinds.count(kind) / 400 for kind in ("_draw_real", "_draw_projected", "_phantom")]


@pytest.mark.parametrize(
    ("real", "phantoms", "shares"),
    [
        (True, True, (0.5, 0.3, 0.2)),
        (True, False, (0.7, 0.3, 0)),
        (False, True, (0, 0.3, 0.7)),
        (False, False, (0, 1, 0)),
    ],
)
def test_projected_pairs_have_their_share_whatever_else_there_is(monkeypatch, pair, pool, real, phantoms, shares):
    given = pool if phantoms else pool[:0]
    batches = Batches([pair] if real else [], given, 0.5, PLAIN, 0, projected=pool, projected_share=0.3)
    assert (batches.real_share, batches.projected_share) == pytest.approx(shares[:2])
    # Three standard errors of a share in 400 draws.
    assert count_kinds(monkeypatch, batches) == pytest.approx(shares, abs=0.075)


@pytest.fixture(scope="module")
def calcified():
    """X-ray with a calcification, soft tissue, X-ray without it; then a pair without any."""
    soft_tissue = np.tile(np.linspace(60, 120, 64, dtype=np.uint8), (64, 1))
    plain = soft_tissue.copy()
    plain[10:14] += 40
    cxr = plain.copy()
    cxr[40:50, 20:40] += 60
    return np.stack([[cxr, soft_tissue, plain], [plain, soft_tissue, plain]])


def test_calcifications_are_in_the_second_x_ray_and_in_no_truth(calcified):
    batches = Batches([], NO_PAIRS, 0.0, replace(PLAIN, rotation=False, zoom=False), 0, projected=calcified[:1])
    for sample in batches.draw_pairs(0, 6, 64, 64):
        plain, truth, cxr, same_truth, weight = sample
        np.testing.assert_array_equal(truth, same_truth)
        change = cxr - plain
        strength = change.max() / (2 * 60 / 255)  # both in [-1, 1]
        assert FOREIGN_BONE[0] - 0.01 < strength < FOREIGN_BONE[1] + 0.01
        assert 180 < (change > change.max() / 2).sum() < 220  # 10 x 20 px
        assert (plain - truth).max() == pytest.approx(strength * 2 * 40 / 255, rel=0.05)  # the rib, in both
        # Left in the result, it is an error of about CALCIFIED_WEIGHT; less where LEAST_ENERGY counts.
        assert (weight * change**2).sum() == pytest.approx(CALCIFIED_WEIGHT, rel=0.1)
        assert not weight[:30].any()
    (without,) = Batches([], NO_PAIRS, 0.0, PLAIN, 0, projected=calcified[1:]).draw_pairs(0, 1, 64, 64)
    np.testing.assert_array_equal(without[0], without[2])
    assert not without[4].any()


def test_a_folder_where_some_pairs_have_calcifications(tmp_path, calcified):
    for name, images in zip("ab", calcified, strict=True):
        for role, image in zip(("cxr", "soft_tissue", "plain"), images, strict=True):
            cv2.imwrite(str(tmp_path / f"{name}_{role}.png"), image)
    (tmp_path / "b_plain.png").unlink()
    np.testing.assert_array_equal(load_projected(tmp_path, 64), calcified)
    (tmp_path / "a_plain.png").unlink()
    np.testing.assert_array_equal(load_projected(tmp_path, 64), calcified[:, :2])
    cv2.imwrite(str(tmp_path / "a_plain.png"), calcified[0, 0, :32])
    with pytest.raises(SettingsError, match="pair a: its images differ in shape"):
        load_projected(tmp_path, 64)


def test_shares_that_leave_something_out(pair, pool):
    with pytest.raises(SettingsError, match=r"--real-share 0\.8 and --drr-share 0\.5 leave none to them"):
        Batches([pair], pool, 0.8, PLAIN, 0, projected=pool, projected_share=0.5)
    with pytest.raises(SettingsError, match=r"projected from CTs, but their share is 0\. Give --drr-share"):
        Batches([pair], pool[:0], 1.0, PLAIN, 0, projected=pool)
    with pytest.raises(SettingsError, match=r"--drr-share 1 leaves none"):
        Batches([pair], pool[:0], 0.5, PLAIN, 0, projected=pool, projected_share=1.0)


def test_phantoms_beside_equalised_pairs(pair, pool):
    with pytest.raises(
        SettingsError, match=r"the data set is equalised \(CLAHE 2\), phantoms are not\. Give --phantoms 0"
    ):
        Batches([pair], pool, 0.5, PLAIN, 0, clahe=2.0)
    with pytest.raises(SettingsError, match=r"pairs projected from CTs are not\. Give --phantoms 0 and no --drrs"):
        Batches([pair], pool[:0], 0.5, PLAIN, 0, clahe=2.0, projected=pool, projected_share=0.3)
    assert Batches([pair], pool[:0], 0.5, PLAIN, 0, clahe=2.0).description()["clahe"] == 2.0


def test_no_data_set_or_a_damaged_one_is_said_so(tmp_path):
    with pytest.raises(SettingsError, match=r"no such file.*train prepare"):
        load_dataset(tmp_path, "train")
    for content in ("{", "[]", '{"pairs": []}', '{"settings": {"size": 64, "clahe": 0}, "pairs": [{"name": "a"}]}'):
        (tmp_path / "dataset.json").write_text(content)
        for read in (lambda: load_dataset(tmp_path, "train"), lambda: read_dataset_settings(tmp_path)):
            with pytest.raises(SettingsError, match="not the record of a data set"):
                read()
    written(tmp_path / "set")
    (tmp_path / "set" / "train" / "[a]_cxr.png").unlink()
    with pytest.raises(InputFailed, match="cannot be read"):
        load_dataset(tmp_path / "set", "train")


def test_tone_curves_are_monotone_and_stay_in_range():
    grid = np.linspace(0, 1, 500, dtype=np.float32)
    for seed in range(20):
        shown = tone_curve(np.random.default_rng(seed))(grid)
        assert (np.diff(shown) >= 0).all()
        assert shown[0] >= 0
        assert shown[-1] <= 1
        assert shown[-1] - shown[0] > 0.5


def test_degrading_changes_both_images_and_adds_the_same_noise_to_both(pair):
    """Noise is no bone: a network that had to take it out would smooth fine tissue with it."""
    noisy = 0
    for seed in range(12):
        cxr, soft_tissue = degrade(np.random.default_rng(seed), pair.cxr, pair.soft_tissue)
        assert not np.array_equal(cxr, pair.cxr)
        assert not np.array_equal(soft_tissue, pair.soft_tissue)
        noisy += np.allclose(cxr - soft_tissue, pair.cxr - pair.soft_tissue, atol=1e-6)  # rounding of float32 sums
    assert 0 < noisy < 12


def test_warped_phantoms_show_bone_as_weak_or_strong_as_another_scanner_does(pool):
    """The soft tissue is the same, the bone layer a multiple of it; as drawn they keep theirs."""

    def strengths(phantoms, foreign):
        # Toned anew never (a share this small), so that the layers can be compared.
        augmentation = Augmentation(geometry=0.0, phantoms=phantoms, foreign=foreign, blur_noise=0.0, inserts=0.0)
        found = []
        for step in range(40):
            cxr, soft_tissue = (Batches([], pool, 0.0, augmentation, 0).batch(step, 1, 64, 64)[0] + 1) / 2
            own = min(pool.astype(np.float32) / 255, key=lambda one: np.abs(one[1] - soft_tissue).max())
            np.testing.assert_allclose(soft_tissue, own[1], atol=2e-3)
            bone = own[0] - own[1]
            seen = cxr < 0.99  # what is stronger may reach white
            found.append(float(((cxr - soft_tissue) * bone)[seen].sum() / (bone**2)[seen].sum()))
        return np.array(found)

    np.testing.assert_allclose(strengths(phantoms=1.0, foreign=0.0), 1, atol=0.02)
    np.testing.assert_allclose(strengths(phantoms=0.0, foreign=1e-9), 1, atol=0.02)
    changed = strengths(phantoms=1.0, foreign=1e-9)
    assert changed.min() > FOREIGN_BONE[0] - 0.02
    assert changed.max() < FOREIGN_BONE[1] + 0.02
    assert changed.std() > 0.2


def test_phantoms_are_bent_and_toned_anew_as_often_as_asked_else_only_mirrored(pool):
    def as_drawn(augmentation):
        batches = Batches([], pool, 0.0, augmentation, 0)
        drawn = [stored.astype(np.float32) / 255 for stored in pool]
        drawn += [image[:, :, ::-1] for image in drawn]
        made = [(batches.batch(step, 1, 64, 64)[0] + 1) / 2 for step in range(40)]
        # 2e-3: the warp's sub-pixel positions are multiples of 1/32 px.
        return sum(min(np.abs(image - stored).max() for stored in drawn) < 2e-3 for image in made)

    assert as_drawn(Augmentation(phantoms=0.0, blur_noise=0.0, inserts=0.0)) == 40
    assert as_drawn(Augmentation(phantoms=1.0, blur_noise=0.0, inserts=0.0)) == 0
    assert 20 <= as_drawn(Augmentation(blur_noise=0.0, inserts=0.0)) <= 35


def test_a_pair_in_a_frame_is_read_without_it(tmp_path):
    drawn = draw_phantom(5, 128)
    for name, padded in (("plain", 0), ("framed", 16)):
        for role, grey in (("cxr", 1.0), ("soft_tissue", 0.0)):
            picture = np.pad(getattr(drawn, role), padded, constant_values=grey)
            cv2.imwrite(str(tmp_path / f"{name}_{role}.png"), np.rint(picture * 65535).astype(np.uint16))
    plain, framed = (
        load_pair(name, tmp_path / f"{name}_cxr.png", tmp_path / f"{name}_soft_tissue.png", 96)
        for name in ("plain", "framed")
    )
    np.testing.assert_allclose(framed.cxr, plain.cxr, atol=2e-5)
    np.testing.assert_allclose(framed.soft_tissue, plain.soft_tissue, atol=2e-5)


def test_inserts_are_added_alike_to_x_ray_and_truth(pair, pool):
    """Without a tone curve and noise both images change by the same picture, and the weight lies on it."""
    augmentation = replace(PLAIN, inserts=1.0)
    batch = Batches([pair], pool, 0.5, augmentation, 0).draw_pairs(3, 4, 64, 64)
    assert batch.shape == (4, 5, 64, 64)
    cxr, truth, cxr_with, truth_with, weight = batch.swapaxes(0, 1)
    np.testing.assert_allclose(cxr_with - cxr, truth_with - truth, atol=1e-5)
    for change, where in zip(truth_with - truth, weight, strict=True):
        assert np.abs(change).max() > 0.02
        assert where[np.abs(change) == np.abs(change).max()] > 0
        assert (where >= 0).all()
        energy = float((where * change**2).sum())  # of an output without any insert: about 1, less for faint ones
        assert 0.3 < energy < 2.5


def test_a_batch_shows_the_images_with_inserts_of_the_pairs(pair, pool):
    batches = Batches([pair], pool, 0.5, Augmentation(inserts=1.0), 5)
    paired = batches.draw_pairs(2, 3, 64, 64)
    np.testing.assert_array_equal(batches.batch(2, 3, 64, 64), paired[:, 2:4])
    without = Batches([pair], pool, 0.5, replace(Augmentation(), inserts=0.0), 5).draw_pairs(2, 3, 64, 64)
    np.testing.assert_array_equal(without[:, 0:2], without[:, 2:4])
    assert not without[:, 4].any()


def test_both_images_of_a_sample_are_blurred_and_toned_alike(pair):
    """A curve and noise that differed between the picture without and with inserts would be a response of their own."""
    augmentation = Augmentation(foreign=1.0, blur_noise=1.0, inserts=1.0)
    batches = Batches([pair], np.empty((0, 2, 64, 64), np.uint8), 1.0, augmentation, 0)
    for step in range(6):
        cxr, _, cxr_with, _, weight = batches.draw_pairs(step, 1, 64, 64)[0]
        far = cv2.dilate((weight > 0).astype(np.uint8), np.ones((15, 15))) == 0
        np.testing.assert_allclose(cxr[far], cxr_with[far], atol=0.02)


def test_pairs_projected_from_cts_are_a_source_of_their_own(tmp_path, pool):
    write_pairs(tmp_path, 2, first_seed=20, size=64)
    projected = load_projected(tmp_path, 64)
    assert projected.shape == (2, 2, 64, 64)
    batches = Batches([], pool[:0], 0.0, PLAIN, 0, projected=projected)
    batch = batches.batch(0, 1, 64, 64)[0]
    truth = (batch[1] + 1) / 2
    assert min(np.abs(truth - stored[1] / 255).max() for stored in projected.astype(np.float32)) < 2e-3
    assert batches.description()["projected"] == 2
    assert batches.fingerprint() != Batches([], pool[:0], 0.0, PLAIN, 0, projected=projected[:1]).fingerprint()
    cv2.imwrite(str(tmp_path / "phantom000020_soft_tissue.png"), np.eye(64, dtype=np.uint8)[:32] * 255)
    with pytest.raises(SettingsError, match="pair phantom000020: its images differ in shape"):
        load_projected(tmp_path, 64)
