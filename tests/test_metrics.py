from __future__ import annotations

from typing import Literal

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


def test_local_angle_error_is_blind_to_frames_that_turn_along_the_map(rng: np.random.Generator) -> None:
    z, truth = rng.uniform(-1, 1, (2000, 2)), rng.uniform(-np.pi, np.pi, 2000)
    sd = np.deg2rad(2)
    found = truth + 3 * z[:, 0] + rng.integers(0, 2, truth.size) * np.pi + rng.normal(size=truth.size) * sd
    assert np.median(metrics.angle_error_deg(truth, found, fold=2)) > 20
    local = metrics.local_angle_error_deg(z, truth, found, fold=2)
    # of nine angles, and of the frame over the mean place of eight neighbours
    spread = np.hypot(2 * np.sqrt(1 + 1 / 8), np.rad2deg(3 * 0.036 / np.sqrt(8)))
    assert np.median(local) == pytest.approx(0.6745 * spread, rel=0.15)
    assert np.median(metrics.local_angle_error_deg(z, truth, found)) > 30


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_random_angles_are_at_chance(rng: np.random.Generator, fold: int) -> None:
    truth, other = rng.uniform(-np.pi, np.pi, (2, 6000))
    assert np.median(metrics.angle_error_deg(truth, other, fold=fold)) == pytest.approx(90 / fold, rel=0.08)
    local = metrics.local_angle_error_deg(rng.normal(size=(6000, 2)), truth, other, fold=fold)
    assert np.median(local) == pytest.approx(90 / fold, rel=0.08)


def test_knn_regression_follows_a_folded_map(rng: np.random.Generator) -> None:
    truth = rng.uniform(size=3000)
    circle = np.column_stack([np.cos(6 * truth), np.sin(6 * truth)])
    assert metrics.knn_regression_r(circle, truth) > 0.98
    assert abs(metrics.knn_regression_r(rng.normal(size=(3000, 2)), truth)) < 0.08
    assert metrics.knn_regression_r(truth, truth) > 0.999


def test_wrapped_rms_is_the_least_over_all_offsets(rng: np.random.Generator) -> None:
    truth = rng.uniform(-np.pi, np.pi, 300)
    found = truth + 1 + 0.8 * rng.normal(size=300)
    found[:30] += np.pi
    offsets = np.linspace(-np.pi, np.pi, 20001)
    errors = np.angle(np.exp(1j * (truth - found - offsets[:, None])))
    least = np.rad2deg(np.sqrt(np.mean(errors**2, axis=1)).min())
    assert metrics.wrapped_rms_deg(truth, found) == pytest.approx(least, abs=1e-3)
    assert metrics.wrapped_rms_deg(truth, truth - 3) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_wrapped_rms_knows_noise_symmetry_and_chance(rng: np.random.Generator, fold: int) -> None:
    truth, other = rng.uniform(-np.pi, np.pi, (2, 20000))
    sd = np.deg2rad(4)
    turned = truth + sd * rng.normal(size=truth.size) + 2 * np.pi / fold * rng.integers(0, fold, truth.size)
    assert metrics.wrapped_rms_deg(truth, turned, fold=fold) == pytest.approx(4, rel=0.05)
    chance = 360 / np.sqrt(12) / fold
    assert chance * 0.96 < metrics.wrapped_rms_deg(truth, other, fold=fold) <= chance


def test_rotation_rmse_is_each_image_against_itself(rng: np.random.Generator) -> None:
    applied = np.arange(160) * 2 * np.pi / 160
    own_frame = rng.uniform(-9, 9, (7, 1))
    assert metrics.rotation_rmse_deg(applied, own_frame + applied) == pytest.approx(np.zeros(7), abs=1e-5)
    noise = np.deg2rad(5) * rng.normal(size=(400, 160))
    # the noise of the unturned image is in every difference
    found = metrics.rotation_rmse_deg(applied, applied + noise)
    assert np.sqrt(np.mean(found**2)) == pytest.approx(5 * np.sqrt(2), rel=0.05)
    guess = metrics.rotation_rmse_deg(applied, rng.uniform(-np.pi, np.pi, (400, 160)))
    assert guess.mean() == pytest.approx(360 / np.sqrt(12), rel=0.02)
    constant = metrics.rotation_rmse_deg(applied, np.zeros((1, 160)))
    assert constant[0] == pytest.approx(360 / np.sqrt(12), rel=0.01)
    with pytest.raises(ValueError, match="must be 0"):
        metrics.rotation_rmse_deg(applied + 1, own_frame + applied)


def test_matched_accuracy_is_blind_to_names_only(rng: np.random.Generator) -> None:
    label = rng.integers(0, 10, 1000)
    renamed = rng.permutation(10)[label] + 100
    assert metrics.matched_accuracy(label, renamed) == 1
    # one cluster may stand for one label only: ten labels in one cluster are the largest label
    assert metrics.matched_accuracy(label, np.zeros(1000)) == np.bincount(label).max() / 1000
    # two labels that share a cluster, while the other cluster is empty of labels, count once
    assert metrics.matched_accuracy([0, 0, 1, 1], [5, 5, 5, 5]) == 0.5
    assert metrics.matched_accuracy([0, 0, 0, 1], [5, 5, 6, 6]) == 0.75
    with pytest.raises(ValueError, match="3 labels and 2 clusters"):
        metrics.matched_accuracy([1, 2, 3], [1, 2])


def test_ten_random_labels_are_at_eleven_per_cent(rng: np.random.Generator) -> None:
    accuracy = metrics.matched_accuracy(rng.integers(0, 10, 10_000), rng.integers(0, 10, 10_000))
    assert accuracy == pytest.approx(0.113, abs=0.006)


@pytest.mark.parametrize("method", ["ward", "kmeans"])
def test_clusters_that_are_apart_are_found(
    rng: np.random.Generator, method: Literal["ward", "kmeans"]
) -> None:
    label = rng.integers(0, 5, 600)
    centre = 10 * np.column_stack([np.cos(2 * np.arange(5)), np.sin(2 * np.arange(5))])
    points = centre[label] + 0.3 * rng.normal(size=(600, 2))
    assert metrics.clustering_accuracy(points, label, method=method, n_restarts=3) == 1
    shuffled = metrics.clustering_accuracy(points, rng.permutation(label), method=method, n_restarts=3)
    assert 0.2 < shuffled < 0.32


def test_auc_counts_pairs(rng: np.random.Generator) -> None:
    assert metrics.auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert metrics.auc([4, 2, 3, 1], [False, True, True, False]) == 0.5
    assert metrics.auc([1, 1], [True, False]) == 0.5
    chance = metrics.auc(rng.normal(size=5000), rng.uniform(size=5000) < 0.1)
    assert chance == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="0 positives"):
        metrics.auc([1, 2], [False, False])


def test_image_mse_is_per_image_and_per_pixel() -> None:
    target = np.zeros((2, 1, 4, 4))
    drawn = target.copy()
    drawn[1, 0, 0, 0] = 2
    assert metrics.image_mse(drawn, target) == pytest.approx([0, 4 / 16])
    with pytest.raises(ValueError, match="one shape"):
        metrics.image_mse(drawn, target[:1])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="3 and 4"):
        metrics.pearson(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="3 latent coordinates and 4"):
        metrics.knn_regression_r(np.zeros((3, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="2 features and 3 labels"):
        metrics.clustering_accuracy(np.zeros((2, 2)), [0, 1, 2])
