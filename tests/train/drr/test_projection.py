"""Projection against what is known analytically: lengths of rods and a cylinder, energies, sides, distances."""

from __future__ import annotations

import numpy as np
import pytest

from train.drr.materials import CT_KEV, excess_per_mm, water_per_mm
from train.drr.projection import Beam, Pose, project

RADIUS, ROD = 80.0, 12.0  # mm
CENTRE = (100.0, 100.0, 60.0)


def cylinder(spacing=(2.0, 1.0, 1.0), at=(0.0, 0.0), radius=RADIUS, height=120.0, side=200.0):
    """A cylinder along z, its axis at (x, y) from the volume's middle; [Y, Z, X] float32 with smooth edges."""
    dz, dy, dx = spacing
    y = np.arange(round(side / dy) + 1) * dy - side / 2 - at[1]
    x = np.arange(round(side / dx) + 1) * dx - side / 2 - at[0]
    distance = np.hypot(y[:, None], x[None, :])
    plane = np.clip((radius - distance) / max(dy, dx) + 0.5, 0, 1).astype(np.float32)
    return np.repeat(plane[:, None, :], round(height / dz) + 1, axis=1)


def chord(offset, radius=RADIUS):
    return 2 * np.sqrt(np.maximum(radius**2 - offset**2, 0))


def columns_mm(beam):
    return (np.arange(beam.pixels) - (beam.pixels - 1) / 2) * beam.side_mm / beam.pixels


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (3.0, 0.7, 0.9), (1.5, 1.3, 0.6)])
def test_a_parallel_beam_sees_the_chords_of_a_cylinder_within_1_percent(spacing):
    beam = Beam(120.0, 200, source_mm=None)
    (image,) = project([cylinder(spacing)], spacing, Pose(centre=CENTRE), beam)
    expected = chord(columns_mm(beam))
    inner = np.abs(columns_mm(beam)) < 0.9 * RADIUS
    assert np.abs(image[100, inner] / expected[inner] - 1).max() < 0.01
    assert np.abs(image[:, inner] - image[100, inner]).max() < 0.01 * 2 * RADIUS


@pytest.mark.parametrize("view", ["PA", "AP"])
def test_a_cone_beam_sees_the_chords_of_its_own_rays_within_1_percent(view):
    beam = Beam(160.0, 200, view, source_mm=1200.0, gap_mm=150.0)
    (image,) = project([cylinder()], (2.0, 1.0, 1.0), Pose(centre=CENTRE), beam)
    away = 1200.0 - 150.0  # source to axis
    u = columns_mm(beam)  # where the ray crosses the plane of the axis
    offset = u * away / np.hypot(u, away)  # distance of the ray from the axis, in the slice of the source
    inner = np.abs(offset) < 0.9 * RADIUS
    assert np.abs(image[99:101, inner].mean(0) / chord(offset)[inner] - 1).max() < 0.01
    row = 20  # a ray that climbs is longer by 1 / cos
    v = columns_mm(beam)[row]
    climb = np.sqrt(1 + v**2 / (away**2 + u**2))
    assert np.abs(image[row, inner] / (chord(offset) * climb)[inner] - 1).max() < 0.01


def test_a_rod_is_as_long_and_as_far_aside_from_every_side():
    """Turned about its long axis, the pair of rods keeps its chords; their distance shrinks with the cosine."""
    rods = cylinder(at=(50.0, 0.0), radius=ROD) + cylinder(at=(-50.0, 0.0), radius=ROD)
    for yaw in (0.0, 20.0, -35.0):
        beam = Beam(160.0, 320, source_mm=None)
        (image,) = project([rods], (2.0, 1.0, 1.0), Pose(yaw=yaw, centre=CENTRE), beam)
        line, u = image[160], columns_mm(beam)
        for sign in (-1, 1):
            half = sign * u > 0
            assert (line[half] * u[half]).sum() / line[half].sum() == pytest.approx(
                sign * 50 * np.cos(np.deg2rad(yaw)), abs=0.5
            )
            assert line[half].max() == pytest.approx(2 * ROD, rel=0.03)
            assert line[half].sum() * 0.5 == pytest.approx(np.pi * ROD**2, rel=0.01)


def test_tilt_lengthens_the_path_through_a_slab_by_its_cosine():
    slab = np.ones((200, 200, 101), np.float32)
    (image,) = project([slab], (1.0, 1.0, 1.0), Pose(tilt=25.0, centre=(50, 100, 100)), Beam(40, 64, source_mm=None))
    assert image == pytest.approx(200 / np.cos(np.deg2rad(25)), rel=0.01)


def test_left_is_left_and_up_is_up():
    volume = np.zeros((50, 60, 80), np.float32)
    volume[25, 50, 70] = 1  # towards the head and the patient's left
    for view in ("PA", "AP"):
        (image,) = project([volume], (1.0, 1.0, 1.0), Pose(centre=(39.5, 24.5, 29.5)), Beam(80, 80, view))
        row, column = np.unravel_index(image.argmax(), image.shape)
        assert row < 40  # the head is up
        assert column > 40  # the patient's left is on the right of the picture


def test_turns_are_what_they_are_called():
    volume = np.zeros((81, 81, 81), np.float32)
    volume[10, 40, 40] = 1  # in front
    beam = Beam(81, 81, source_mm=None)
    pose = {"centre": (40.0, 40.0, 40.0)}
    column = project([volume], (1, 1, 1), Pose(yaw=20, **pose), beam)[0].max(0).argmax()
    assert column == pytest.approx(40 - 30 * np.sin(np.deg2rad(20)), abs=1)  # left to the front: the front goes right
    row = project([volume], (1, 1, 1), Pose(tilt=20, **pose), beam)[0].max(1).argmax()
    assert row == pytest.approx(40 + 30 * np.sin(np.deg2rad(20)), abs=1)  # the head to the front: the front goes down
    volume = np.zeros((81, 81, 81), np.float32)
    volume[40, 70, 40] = 1  # at the head
    column = project([volume], (1, 1, 1), Pose(roll=20, **pose), beam)[0].max(0).argmax()
    assert column == pytest.approx(40 + 30 * np.sin(np.deg2rad(20)), abs=1)  # the head to the patient's left


def test_what_is_nearer_to_the_source_is_larger():
    front = np.zeros((201, 41, 201), np.float32)
    front[20, :, 80:121] = 1
    sizes = {}
    for view in ("PA", "AP"):
        (image,) = project([front], (1, 1, 1), Pose(centre=(100, 100, 20)), Beam(160, 320, view, source_mm=1000.0))
        sizes[view] = (image[160] > image[160].max() / 2).sum() / 2
    assert sizes["PA"] == pytest.approx(40 * 850 / 930, abs=1.0)  # in front, near the detector
    assert sizes["AP"] == pytest.approx(40 * 850 / 770, abs=1.0)  # in front, near the source


def test_rows_at_other_heights_are_between_the_slices():
    volume = np.arange(10, dtype=np.int16)[None, :, None] * np.ones((3, 1, 5), np.int16)
    heights = np.linspace(0, 9, 37)
    pose, beam = Pose(centre=(2.0, 1.0, 4.5)), Beam(4, 8, source_mm=None)
    thick = project([volume], (1.0, 1.0, 1.0), pose, beam)[0]
    thin = project([volume], (0.25, 1.0, 1.0), pose, beam, heights)[0]
    assert thin == pytest.approx(thick, abs=0.05)


def test_attenuation_is_that_of_the_tables():
    assert water_per_mm(60) == pytest.approx(0.02059)
    assert water_per_mm(100) == pytest.approx(0.01707)
    # At the CT's energy a voxel of 1000 HU attenuates twice as much as water.
    assert water_per_mm(CT_KEV) * (1 + 0.05) + excess_per_mm(CT_KEV) * 0.95 == pytest.approx(2 * water_per_mm(CT_KEV))
    # Cortical bone of 1.92 g/cm3: soft tissue of 1.05 g/cm3, and the excess for the rest.
    thickness = (1.92 * 0.3148 - 1.05 * 0.2059) / 10 / excess_per_mm(60)
    at_80 = (1.92 * 0.2229 - 1.05 * 0.1837) / 10
    assert excess_per_mm(80) * thickness == pytest.approx(at_80, rel=1e-6)


def test_two_energies_give_both_materials_back():
    body, rod = cylinder(), cylinder(at=(30.0, 10.0), radius=ROD)
    soft, bone = project([body, rod], (2.0, 1.0, 1.0), Pose(centre=CENTRE), Beam(120, 100))
    low, high = (water_per_mm(kev) * soft + excess_per_mm(kev) * bone for kev in (45, 80))
    matrix = np.array([[water_per_mm(45), excess_per_mm(45)], [water_per_mm(80), excess_per_mm(80)]])
    found = np.linalg.solve(matrix, np.stack([low.ravel(), high.ravel()]))
    assert found[0] == pytest.approx(soft.ravel(), abs=0.01)
    assert found[1] == pytest.approx(bone.ravel(), abs=0.01)
    one, two = project([body + 2 * rod], (2.0, 1.0, 1.0), Pose(centre=CENTRE), Beam(120, 100))[0], soft + 2 * bone
    assert one == pytest.approx(two, abs=0.01)
