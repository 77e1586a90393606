"""Members of averages: who counts, how much, and how two sets of classes compare."""

from __future__ import annotations

import numpy as np
import pytest

from particle_explorer.files import UserError
from particle_explorer.membership import by_class, cells, matched, near, together

rng = np.random.default_rng(0)


def test_hard_classes_are_the_labels() -> None:
    label = rng.integers(-1, 4, 50)
    members, classes = by_class(label * 2)
    assert list(classes) == [0, 2, 4, 6]
    np.testing.assert_array_equal(members.row, np.flatnonzero(label >= 0))
    np.testing.assert_array_equal(classes[members.average], 2 * label[label >= 0])
    assert (members.weight == 1).all()


def test_the_nearest_are_near_and_weigh_less_the_farther_they_are() -> None:
    z = rng.uniform(-1, 1, (400, 2))
    z[7] = np.nan
    positions = np.array([[0.0, 0.0], [0.5, -0.5]])
    members = near(z, positions, 30, "distance")
    for i, position in enumerate(positions):
        own = members.average == i
        distance = np.linalg.norm(z[members.row[own]] - position, axis=1)
        others = np.setdiff1d(np.flatnonzero(np.isfinite(z[:, 0])), members.row[own])
        assert own.sum() == 30 and distance.max() <= np.linalg.norm(z[others] - position, axis=1).min()
        order = np.argsort(distance)
        assert np.all(np.diff(members.weight[own][order]) <= 0)
    with pytest.raises(UserError, match="coordinates"):
        near(z, [[0.0]], 5)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_cells_hold_every_particle_once_and_lie_where_they_say(d: int) -> None:
    z = rng.normal(size=(600, d))
    members, names, middles = cells(z, 5)
    assert sorted(members.row) == list(range(600)) and len(set(names)) == len(names) == len(middles)
    for i in range(len(names)):
        own = z[members.row[members.average == i]]
        assert len(own)
        if len(own) > 20:
            assert np.abs(own[:, : min(d, 2)].mean(0) - middles[i, : min(d, 2)]).max() < 0.6


def test_the_posterior_shares_a_particle_between_classes() -> None:
    z = np.array([[-1.0], [-0.9], [0.0], [0.9], [1.0]])
    label = np.array([0, 0, 0, 1, 1])
    members, _ = by_class(label, z, np.full((5, 1), 0.8), "posterior")
    total = np.bincount(members.row, members.weight)
    np.testing.assert_allclose(total, 1, atol=0.05)
    assert set(members.average[members.row == 2]) == {0, 1}
    sure, _ = by_class(label, z, np.full((5, 1), 1e-3), "posterior")
    assert len(sure.row) == 5
    with pytest.raises(UserError, match="spread"):
        by_class(label, z, None, "posterior")


def test_agreement_is_one_for_renamed_classes_and_none_for_random_ones() -> None:
    label = rng.integers(0, 6, 3000)
    renamed = np.array([3, 5, 0, 1, 2, 4])[label]
    same = together(label, renamed)
    assert same["both"] == 1 and same["rand"] == pytest.approx(1)
    assert all((count, share) == ((label == a).sum(), 1) for a, _, count, share in matched(label, renamed))
    random = together(label, rng.integers(0, 6, 3000))
    assert abs(random["rand"]) < 0.01 and random["both"] == pytest.approx(1 / 6, abs=0.01)
