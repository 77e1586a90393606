"""Ways through clouds whose shape is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from particle_explorer import traversals
from particle_explorer.files import UserError


def horseshoe(n: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Particles on three quarters of a circle of radius 1 in three dimensions, and their angle (rad)."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 1.5 * np.pi, n)
    z = np.stack([np.cos(angle), np.sin(angle), np.zeros(n)], 1)
    return (z + rng.normal(0, 0.03, z.shape)).astype(np.float32), angle


def steps(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(positions, axis=0), axis=1)


def test_a_dimension_is_walked_from_end_to_end_and_the_others_stand():
    z, _ = horseshoe()
    way = traversals.along_dimension(z, 2, [0.3, 0.0, -0.1], 9)
    np.testing.assert_allclose(way[:, [0, 2]], np.tile([0.3, -0.1], (9, 1)))
    np.testing.assert_allclose(way[[0, -1], 1], np.quantile(z[:, 1], [0.01, 0.99]), atol=1e-6)


def test_a_component_is_walked_along_the_widest_direction():
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    z = (rng.normal(size=(4000, 5)) * [5, 2, 1, 1, 1]) @ turn
    way = traversals.along_component(z, 1, z.mean(0), 7)
    direction = (way[-1] - way[0]) / np.linalg.norm(way[-1] - way[0])
    assert abs(direction @ turn[0]) > 0.99
    np.testing.assert_allclose(way[3], z.mean(0), atol=0.3)


def test_the_way_between_particles_stays_where_particles_are():
    z, angle = horseshoe()
    start, end = int(angle.argmin()), int(angle.argmax())
    way, passed = traversals.along_graph(z, start, end, 40)
    assert passed[0] == start and passed[-1] == end
    np.testing.assert_allclose(way[[0, -1]], z[[start, end]], atol=1e-6)
    assert np.abs(np.linalg.norm(way[:, :2], axis=1) - 1).max() < 0.08  # around, not through the hole
    assert steps(way).max() < 1.25 * steps(way).min()
    walked = np.unwrap(np.arctan2(way[:, 1], way[:, 0]))
    assert np.all(np.diff(walked) > 0) and walked[-1] - walked[0] == pytest.approx(1.5 * np.pi, abs=0.1)
    line = traversals.straight(z[start], z[end], 40)
    assert np.linalg.norm(line[:, :2], axis=1).min() < 0.8  # the straight way does cross it


def test_islands_are_joined_by_the_shortest_bridge():
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.normal(size=(80, 2)) * 0.1 + [x, 0] for x in (0, 4, 9)])
    way, passed = traversals.along_graph(z, 0, 239, 30)
    assert {row // 80 for row in passed} == {0, 1, 2}
    assert np.all(np.abs(way[:, 1]) < 0.5)


def test_a_curve_is_walked_at_even_pace():
    corners = [[0, 0], [3, 0], [3, 0], [3, 1]]
    way = traversals.along_curve(corners, 9)
    np.testing.assert_allclose(steps(way), 0.5)
    np.testing.assert_allclose(way[6], [3, 0])


def test_the_grid_is_even_in_probability():
    z = np.random.default_rng(3).normal(size=(500, 3))
    square = traversals.grid(z, 5, "normal")
    np.testing.assert_allclose(norm.cdf(square[:5, 0]), [0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(norm.cdf(square[::5, 1]), [0.9, 0.7, 0.5, 0.3, 0.1])  # top row first
    np.testing.assert_allclose(square[:, 2], np.median(z[:, 2]))
    np.testing.assert_allclose(traversals.grid(z, 4, "uniform")[:4, 0], [-0.75, -0.25, 0.25, 0.75])
    data = traversals.grid(z, 10, "particles")
    assert np.mean(z[:, 0] < data[3, 0]) == pytest.approx(0.35, abs=0.01)


def test_samples_follow_the_prior():
    z = np.random.default_rng(4).normal(3, 2, (100, 2))
    drawn = traversals.samples(z, 4000, "normal")
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 1], atol=0.05)
    assert np.abs(traversals.samples(z, 500, "uniform")).max() <= 1
    particles = traversals.samples(z, 50, "particles")
    assert all((row == z).all(1).any() for row in particles)


def test_particles_belong_to_the_nearest_position_and_no_more_than_wanted():
    z = np.linspace(0, 10, 1001)[:, None]
    z[7] = np.nan
    label = traversals.members(z, [[0.0], [5.0], [10.0]], 100)
    assert label[7] == -1
    for i, at in enumerate((0.0, 5.0, 10.0)):
        inside = z[label == i, 0]
        assert len(inside) == 100 and np.abs(inside - at).max() <= 1.01
    assert (traversals.members(z, [[0.0]], 0) == -1).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda z: traversals.along_dimension(z, 4, np.zeros(3), 5), "no dimension 4; the map has 3"),
        (lambda z: traversals.grid(z[:, :1], 5, "normal"), "two dimensions or more"),
        (lambda z: traversals.along_graph(z, 3, 3, 5), "two different"),
        (lambda z: traversals.along_curve(z[:1], 5), "at least two different"),
        (lambda z: traversals.along_curve(np.zeros((3, 2)), 5), "at least two different"),
    ],
)
def test_impossible_wishes_are_said_in_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(horseshoe()[0])
