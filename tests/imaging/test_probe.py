"""Virtual nodules, and how much of them a model that is known leaves in the picture."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.one_image import count_passes, finish, list_passes, prepare
from bsdiff_rt.imaging.probe import CONTRAST, PICTURES, add_nodules, place_nodules

PREP = Preprocessing(256)


def suppressed(prepared, change):
    """What a model that does `change` to its input returns for every pass."""
    passes = [change(cxr_net) for cxr_net, _ in list_passes(prepared, 1, mirror=False)]
    return finish(prepared, np.stack(passes).astype(np.float32), mirror=False, detail="model")


def body(rows=256, columns=240):
    return (0.2 + 0.5 * chest(rows, columns)).astype(np.float32)


def test_neighbours_are_in_different_pictures():
    pictures = place_nodules(body())
    assert len(pictures) == PICTURES
    assert sum(map(len, pictures)) > 100
    for nodules in pictures:
        centres = np.array([one.centre for one in nodules])
        distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + 1e9 * np.eye(len(centres))
        assert distances.min() > 256 * 30 / 400  # twice the grid, px, less rounding


def test_nodules_fit_into_the_grey_scale_and_stay_out_of_air():
    cxr = body()
    cxr[:, :60], cxr[:, 180:] = 0.0, 0.97
    for nodules in place_nodules(cxr):
        picture = add_nodules(cxr, nodules)
        assert picture.max() <= 1
        assert all(one.centre[1] >= 55 for one in nodules)  # there the mean over a nodule is no longer air
        assert all(one.contrast == pytest.approx(CONTRAST) for one in nodules if one.centre[1] < 160)
    assert not any(one.centre[1] > 190 and one.contrast > 0.031 for ones in place_nodules(cxr) for one in ones)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_a_model_that_keeps_a_known_share_of_everything(share):
    prepared = prepare(body(), PREP, probe=True)
    assert len(list_passes(prepared, 1, mirror=False)) == count_passes(1, mirror=False, probe=True) == 1 + PICTURES
    cxr_net = prepared.cxr_net
    found = suppressed(prepared, lambda seen: cxr_net * 0.9 + share * (seen - cxr_net))
    retention = found.retention
    assert retention is not None
    assert retention.mean == pytest.approx(share, abs=0.02)
    assert retention.percentile_5 == pytest.approx(share, abs=0.03)
    assert np.nanmin(retention.map) == pytest.approx(share, abs=0.05)
    assert retention.map.shape == prepared.cxr.shape
    assert retention.to_report()["count"] == retention.count > 100


def test_a_faint_picture_that_is_spread_does_not_cut_nodules_off():
    """What the model sees as white holds no more: the loss would be the probe's own."""
    prepared = prepare(0.4 + 0.25 * chest(256, 240), Preprocessing(256, least_span=0.45), probe=True)
    assert prepared.view.gain > 1
    retention = suppressed(prepared, lambda seen: seen).retention
    assert retention.worst[2] > 0.99


def test_the_map_and_the_worst_place_show_where_nodules_vanish():
    """This model takes everything away in the upper left quarter, and nothing elsewhere."""
    prepared = prepare(body(256, 256), PREP, probe=True)
    cxr_net = prepared.cxr_net

    def change(seen):
        out = seen * 0.999
        out[:128, :128] = cxr_net[:128, :128] * 0.999
        return out

    retention = suppressed(prepared, change).retention
    assert retention is not None
    assert np.nanmean(retention.map[20:100, 20:100]) < 0.05
    assert np.nanmean(retention.map[156:236, 156:236]) > 0.95
    row, column, kept = retention.worst
    assert (row < 128, column < 128) == (True, True)
    assert kept < 0.05
    assert 0.6 < retention.mean < 0.9


def test_a_frame_moves_the_map_along():
    cxr = np.ones((336, 320), np.float32)
    cxr[40:-40, 40:-40] = body(256, 240)
    prepared = prepare(cxr, PREP, probe=True)
    retention = suppressed(prepared, lambda seen: seen * 0.999).retention
    assert retention is not None
    assert retention.mean == pytest.approx(1.0, abs=0.02)
    assert np.isnan(retention.map[:20]).all()


def test_without_a_probe_nothing_is_measured():
    prepared = prepare(body(), PREP)
    assert suppressed(prepared, lambda seen: seen * 0.9).retention is None


def test_a_picture_without_room_for_nodules_has_no_figures():
    white = np.full((256, 256), 0.99, np.float32)
    white[:8, :8] = 0.9
    prepared = prepare(white, PREP, probe=True)
    assert suppressed(prepared, lambda seen: seen - np.linspace(0, 0.1, 256)[None]).retention is None
