"""Rib cartilage is found in the wall of the chest and nowhere else; what is drawn into it is bone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_ct import SPACING, ellipse, make_chest, write_npz

from train.drr.body import find_body, find_lungs
from train.drr.bones import find_tissues
from train.drr.cartilage import BONE_HU, DEPTH_UNITS, calcify, find_cartilage
from train.drr.framing import Anatomy
from train.drr.materials import split_materials
from train.drr.pool import DrrOptions, Labels, draw_pair, make_pool
from train.drr.volume import find_sources


@pytest.fixture(scope="module")
def chest():
    """A chest whose ribs are joined to the breastbone by cartilage: HU and where the cartilage is."""
    hu = make_chest()
    rim = ellipse(hu.shape[1:], (50, 60), (33, 47)) & ~ellipse(hu.shape[1:], (50, 60), (29, 44))
    rim[30:] = False
    rim[:, :50] = rim[:, 71:] = False
    slices = np.arange(len(hu)) % 6 < 3
    cartilage = slices[:, None, None] & rim & (hu == 40)
    hu[cartilage] = 130
    return hu, cartilage


def segment(hu):
    body = find_body(hu, SPACING)
    lungs = find_lungs(hu, body, SPACING)
    return body, lungs, find_tissues(hu, body, lungs, SPACING)


def test_cartilage_is_found_and_nothing_else(chest):
    hu, cartilage = chest
    body, lungs, tissues = segment(hu)
    depth = find_cartilage(hu, body, lungs, tissues, SPACING)
    found = depth > 0
    assert found[cartilage & ~tissues.bone].mean() > 0.8
    near = np.zeros_like(found)  # voxels are 3 mm wide: a ring of one voxel is partial volume
    for k in range(len(found)):
        rows, columns = np.nonzero(cartilage[k])
        if len(rows):
            near[k, rows.min() - 1 : rows.max() + 2, columns.min() - 1 : columns.max() + 2] = True
    assert not found[~near].any()
    assert not (found & (tissues.bone | lungs | ~body)).any()
    assert depth[found].min() == pytest.approx(3.0 * DEPTH_UNITS)


def test_cartilage_that_labels_count_as_bone_is_found(chest):
    hu, cartilage = chest
    body, lungs, plain = segment(hu)
    tissues = find_tissues(hu, body, lungs, SPACING, plain.bone | cartilage)
    assert tissues.bone[cartilage].all()
    assert not find_cartilage(hu, body, lungs, tissues, SPACING)[cartilage].any()
    found = find_cartilage(hu, body, lungs, tissues, SPACING, labelled=True) > 0
    assert found[cartilage].mean() > 0.5  # what touches dense bone is left out
    assert not (found & (hu > BONE_HU)).any()


def test_calcified_cartilage_is_a_share_of_the_bone_that_a_network_can_learn(chest):
    """A fiftieth of the bone's energy was not learned (docs/experiments.md)."""
    hu, _ = chest
    depth = find_cartilage(hu, *segment(hu), SPACING)
    masses = [calcify(np.random.default_rng(seed), depth, SPACING)[depth > 0].mean() for seed in range(40)]
    assert 100 < np.median(masses) < 400  # HU; a rib has 200 to 400
    assert min(masses) < 60


def test_a_chest_without_denser_cartilage_has_none():
    hu = make_chest(contrast=True)
    assert not find_cartilage(hu, *segment(hu), SPACING).any()


def test_calcifications_lie_in_the_cartilage_and_differ(chest):
    hu, _ = chest
    depth = find_cartilage(hu, *segment(hu), SPACING)
    drawn = [calcify(np.random.default_rng(seed), depth, SPACING) for seed in range(12)]
    for excess in drawn:
        assert excess.dtype == np.int16
        assert not excess[depth == 0].any()
        assert 0 <= excess.min() <= excess.max() <= 1200  # no denser than cortical bone
    shares = [(excess > 100)[depth > 0].mean() for excess in drawn]
    assert min(shares) < 0.1
    assert max(shares) > 0.4
    np.testing.assert_array_equal(drawn[3], calcify(np.random.default_rng(3), depth, SPACING))
    assert not calcify(np.random.default_rng(0), np.zeros_like(depth), SPACING).any()


def test_a_calcified_pair_has_more_bone_and_the_same_soft_tissue(chest):
    hu, _ = chest
    body, lungs, tissues = segment(hu)
    depth = find_cartilage(hu, body, lungs, tissues, SPACING)
    materials = replace(split_materials(hu, body, lungs, tissues, SPACING), cartilage=depth.transpose(1, 0, 2))
    anatomy = Anatomy.measure(body, lungs, SPACING)
    for number in range(3):
        plain, drawn = (
            draw_pair(materials, anatomy, "one", number, DrrOptions(size=96, calcified=share)) for share in (0.0, 1.0)
        )
        bone, calcified = (pair["cxr"] - pair["soft_tissue"] for pair in (plain, drawn))
        assert np.abs(drawn["soft_tissue"] - plain["soft_tissue"]).mean() < 0.005  # the display follows the X-ray's
        assert (calcified - bone).max() > 0.01
        assert "plain" not in plain
        np.testing.assert_allclose(drawn["plain"] - drawn["soft_tissue"], bone, atol=1e-5)
    partly = [
        (
            draw_pair(materials, anatomy, "one", n, DrrOptions(size=64, calcified=0.5))["cxr"]
            != draw_pair(materials, anatomy, "one", n, DrrOptions(size=64, calcified=0.0))["cxr"]
        ).any()
        for n in range(12)
    ]
    assert 2 <= sum(partly) <= 10


def test_a_pool_has_calcified_pairs_if_asked_for(chest, tmp_path):
    sources = find_sources([write_npz(tmp_path / "one.npz", chest[0])])
    pictures = {}
    for share in (0.0, 1.0):
        make_pool(sources, tmp_path / str(share), 2, DrrOptions(size=64, calcified=share), Labels(), 1)
        pictures[share] = [path.read_bytes() for path in sorted((tmp_path / str(share)).glob("one_*_cxr.png"))]
        without = [path.name for path in sorted((tmp_path / str(share)).glob("*_plain.png"))]
        assert without == (["one_0000_plain.png", "one_0001_plain.png"] if share else [])
    assert len(pictures[0.0]) == len(pictures[1.0]) == 2
    assert not set(pictures[0.0]) & set(pictures[1.0])
