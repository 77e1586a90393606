"""The sign of a pose is this field's classic bug; here each conversion is held by points, not by formulas."""

from __future__ import annotations

import numpy as np
import pytest

from particle_explorer import pose


def place(points_xy, angle_deg, shift_yx):
    """Where reference points appear in the image, written out for one point at a time."""
    out = []
    for (x, y), a, (sy, sx) in zip(points_xy, angle_deg, shift_yx, strict=True):
        c, s = np.cos(np.deg2rad(a)), np.sin(np.deg2rad(a))
        out.append((c * x - s * y + sx, s * x + c * y + sy))
    return np.array(out)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_a_positive_angle_turns_x_towards_y(rng):
    # +x (right) goes to +y (down): clockwise on a screen whose row 0 is at the top
    np.testing.assert_allclose(pose.rotation_matrix(90.0) @ [1, 0], [0, 1], atol=1e-12)


def test_relion_brings_the_particle_back(rng):
    points = rng.normal(size=(20, 2)) * 10
    angle, shift = rng.uniform(-180, 180, 20), rng.normal(size=(20, 2)) * 3
    seen = place(points, angle, shift)
    psi, ox, oy = pose.to_relion(angle, shift, 2.5)
    # x_ref = R(psi) (x_particle + origin): stack_create's own order, shift first
    back = np.einsum("nij,nj->ni", pose.rotation_matrix(psi), seen + np.stack([ox, oy], -1) / 2.5)
    np.testing.assert_allclose(back, points, atol=1e-9)


def test_relion_round_trip(rng):
    angle, shift = rng.uniform(-180, 180, 50), rng.normal(size=(50, 2)) * 4
    again_angle, again_shift = pose.from_relion(*pose.to_relion(angle, shift, 1.31), 1.31)
    np.testing.assert_allclose(again_angle, angle)
    np.testing.assert_allclose(again_shift, shift)


def test_a_particle_right_of_the_centre_has_a_negative_origin():
    _, ox, oy = pose.to_relion(0.0, np.array([0.0, 3.0]), 2.0)
    assert (ox, oy) == (-6.0, 0.0)


def test_no_negative_zero_is_printed():
    values = pose.to_relion(0.0, np.zeros(2), 1.0)
    assert not any(np.signbit(v) for v in values)


def test_cryosparc_equals_relion_with_its_own_pixel_size(rng):
    angle_rad, shift_xy = rng.uniform(-3, 3, 9), rng.normal(size=(9, 2))
    ours = pose.from_cryosparc(angle_rad, shift_xy, np.full(9, 4.0), 2.0)
    theirs = pose.from_relion(np.rad2deg(angle_rad), shift_xy[:, 0] * 4.0, shift_xy[:, 1] * 4.0, 2.0)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("box", [27, 28])
def test_spatial_vae_coordinates(box, rng):
    theta, dx = rng.uniform(-np.pi, np.pi, 12), rng.normal(size=(12, 2)) * 0.1
    angle, shift = pose.from_spatial_vae(theta, dx, box)
    centre, half = box // 2, (box - 1) / 2
    for t, d, a, s in zip(theta, dx, angle, shift, strict=True):
        pixel = rng.uniform(0, box - 1, 2)  # (column, row) of a place in the image
        x = np.array([-1 + pixel[0] / half, 1 - pixel[1] / half])  # x right, y up, corners at +-1
        canonical = x @ np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]) + d
        reference = np.array([(canonical[0] + 1) * half, (1 - canonical[1]) * half]) - centre
        np.testing.assert_allclose(place([reference], [a], [s])[0] + centre, pixel, atol=1e-9)


def test_recentre_describes_the_same_image(rng):
    old = rng.normal(size=(15, 2)) * 8
    angle, shift = rng.uniform(-180, 180, 15), rng.normal(size=(15, 2))
    turn, move = rng.uniform(-30, 30, 15), rng.normal(size=(15, 2))
    new = place(old, turn, move)
    np.testing.assert_allclose(
        place(new, *pose.recentre(angle, shift, turn, move)), place(old, angle, shift), atol=1e-9
    )


def test_wrap():
    np.testing.assert_allclose(pose.wrap_deg([180, -180, 540, 10]), [-180, -180, -180, 10])
