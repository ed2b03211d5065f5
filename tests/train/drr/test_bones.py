"""Bone is told from contrast medium, metal and calcifications; what replaces it is soft tissue."""

from __future__ import annotations

import numpy as np
from made_ct import SPACING, make_chest

from train.drr.body import find_body, find_lungs
from train.drr.bones import find_tissues
from train.drr.materials import ENHANCED_HU, REPLACED_HU, SCALE, split_materials


def segment(hu, labels=None):
    body = find_body(hu, SPACING)
    lungs = find_lungs(hu, body, SPACING)
    return body, lungs, find_tissues(hu, body, lungs, SPACING, labels)


def overlap(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def test_ribs_spine_and_sternum_are_bone_and_nothing_else():
    hu = make_chest()
    body, lungs, tissues = segment(hu)
    bone = hu > 200
    assert overlap(tissues.bone, bone) > 0.97
    assert not tissues.contrast.any()
    assert not (tissues.bone & lungs).any()
    assert (lungs & (hu == -850)).sum() > 0.97 * (hu == -850).sum()
    assert body[bone].all()


def test_a_heart_full_of_contrast_medium_is_no_bone():
    hu = make_chest(contrast=True)
    _, _, tissues = segment(hu)
    heart = hu == 350
    assert tissues.contrast[heart].mean() > 0.99
    assert tissues.bone[heart].mean() < 0.01
    bone = (hu > 200) & ~heart
    assert tissues.bone[bone].mean() > 0.95


def test_a_calcified_node_and_a_clip_stay_with_the_soft_tissue():
    hu = make_chest()
    hu[40:44, 48:51, 56:59] = 900  # 1 ml, in the middle of the chest
    hu[30:33, 40:42, 90:92] = 3000  # in a lung
    _, _, tissues = segment(hu)
    assert not tissues.bone[40:44, 48:51, 56:59].any()
    assert not tissues.bone[30:33, 40:42, 90:92].any()


def test_labels_are_bone_for_certain():
    hu = make_chest()
    labels = np.zeros(hu.shape, bool)
    labels[10:20, 60:64, 40:44] = True  # not dense: a metastasis that dissolved the bone
    _, _, tissues = segment(hu, labels)
    assert tissues.bone[labels].all()


def test_soft_tissue_stands_where_bone_was():
    hu = make_chest(contrast=True)
    body, lungs, tissues = segment(hu)
    materials = split_materials(hu, body, lungs, tissues, SPACING)
    soft, excess = (volume.transpose(1, 0, 2) for volume in (materials.soft, materials.excess))
    assert (soft[tissues.bone] == REPLACED_HU + SCALE).all()
    assert (soft[tissues.contrast] == ENHANCED_HU + SCALE).all()
    assert (soft[~body] == 0).all()
    assert (excess[~tissues.bone] == 0).all()
    whole = soft + excess
    untouched = body & ~tissues.contrast & ~(tissues.bone & (hu < REPLACED_HU))
    np.testing.assert_array_equal(whole[untouched], hu[untouched] + SCALE)
    np.testing.assert_array_equal(materials.lungs.transpose(1, 0, 2) == SCALE, lungs)


def test_dark_glare_beside_a_vein_full_of_contrast_medium_is_repaired():
    hu = make_chest(contrast=True)
    hu[75:79, 40:44, 70:74] = 2200
    hu[75:79, 40:44, 75:77] = -600
    body, lungs, tissues = segment(hu)
    materials = split_materials(hu, body, lungs, tissues, SPACING)
    soft = materials.soft.transpose(1, 0, 2)
    assert (soft[75:79, 40:44, 75:77] == SCALE).all()
    assert (soft[75:79, 40:44, 70:74] == ENHANCED_HU + SCALE).all()
