from __future__ import annotations

import numpy as np
import pytest

from particle_explorer import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_pearson_knows_lines_and_chance(rng: np.random.Generator) -> None:
    x = rng.normal(size=5000)
    assert metrics.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert metrics.pearson(x, rng.normal(size=5000)) == pytest.approx(0, abs=0.05)
    assert metrics.pearson(x, np.ones(5000)) == 0
    assert metrics.pearson(x, x + rng.normal(size=5000)) == pytest.approx(np.sqrt(0.5), abs=0.02)


def test_fisher_lee_is_blind_to_the_offset_and_sees_the_mirror(rng: np.random.Generator) -> None:
    angle = rng.uniform(-np.pi, np.pi, 4000)
    assert metrics.fisher_lee_T(angle, angle + 2.3) == pytest.approx(1)
    assert metrics.fisher_lee_T(angle, -angle + 0.4) == pytest.approx(-1)
    assert metrics.fisher_lee_T(angle, rng.uniform(-np.pi, np.pi, 4000)) == pytest.approx(0, abs=0.03)


def test_fisher_lee_of_noisy_angles_is_the_known_one(rng: np.random.Generator) -> None:
    """For uniform angles with Gaussian errors of s rad it is exp(-s²)."""
    angle = rng.uniform(-np.pi, np.pi, 20000)
    for sd in (0.1, 0.3, 0.5):
        noisy = angle + rng.normal(size=angle.size) * sd
        assert metrics.fisher_lee_T(angle, noisy) == pytest.approx(np.exp(-(sd**2)), abs=0.01)


def test_circular_correlation_as_published(rng: np.random.Generator) -> None:
    angle = rng.normal(size=20000) * np.pi / 4
    assert metrics.circular_correlation(angle, angle + 1) == pytest.approx(1)
    assert metrics.circular_correlation(angle, -angle) == pytest.approx(-1)
    assert metrics.circular_correlation(angle, rng.normal(size=20000)) == pytest.approx(0, abs=0.03)


def test_angle_error_leaves_the_constant_out(rng: np.random.Generator) -> None:
    truth = rng.uniform(-np.pi, np.pi, 4000)
    sd = np.deg2rad(3)
    found = truth + 2 + rng.normal(size=truth.size) * sd
    found[:400] += np.pi  # a tenth upside down must not move the offset
    error = metrics.angle_error_deg(truth, found)
    assert np.median(error) == pytest.approx(0.6745 * 3 * 1.2, rel=0.15)
    assert error[:400].min() > 150
    assert metrics.angle_error_deg(truth, found, fold=2).max() < 20
    assert metrics.angle_offset_rad(truth, truth - 2) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_random_angles_are_at_chance(rng: np.random.Generator, fold: int) -> None:
    truth, other = rng.uniform(-np.pi, np.pi, (2, 6000))
    assert np.median(metrics.angle_error_deg(truth, other, fold=fold)) == pytest.approx(90 / fold, rel=0.08)


def test_knn_regression_follows_a_folded_map(rng: np.random.Generator) -> None:
    truth = rng.uniform(size=3000)
    circle = np.column_stack([np.cos(6 * truth), np.sin(6 * truth)])
    assert metrics.knn_regression_r(circle, truth) > 0.98
    assert abs(metrics.knn_regression_r(rng.normal(size=(3000, 2)), truth)) < 0.08
    assert metrics.knn_regression_r(truth, truth) > 0.999


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="3 and 4"):
        metrics.pearson(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="3 latent coordinates and 4"):
        metrics.knn_regression_r(np.zeros((3, 2)), np.zeros(4))
