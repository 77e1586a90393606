"""Measures of how well a map and its poses agree with a known truth.

A model's zero angle, the sign of its latent axis and the shape of its map are its own; every measure here is
blind to exactly those freedoms and says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

Float = NDArray[np.float64]


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Float, Float]:
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.shape != second.shape:
        raise ValueError(f"two arrays of one length are compared; these have {first.size} and {second.size}")
    if first.size < 2:
        raise ValueError(f"at least 2 values are needed to compare; there are {first.size}")
    return first, second


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two `(N,)` arrays in [-1, 1]; 0 where one of them is constant."""
    first, second = _pair(a, b)
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm > 0 else 0.0


def fisher_lee_T(a_rad: ArrayLike, b_rad: ArrayLike) -> float:
    """Fisher and Lee's correlation of two `(N,)` angles (rad), in [-1, 1]; independent angles give about 0.

    Free of means, so unlike `circular_correlation` it is sound for uniform angles; a constant offset does
    not change it, a mirrored convention flips its sign (Fisher & Lee, Biometrika 70, 1983).
    """
    a, b = _pair(a_rad, b_rad)
    n2 = float(a.size) ** 2
    product = np.sum(np.cos(a) * np.cos(b)) * np.sum(np.sin(a) * np.sin(b))
    product -= np.sum(np.cos(a) * np.sin(b)) * np.sum(np.sin(a) * np.cos(b))
    spread_a = n2 - np.sum(np.cos(2 * a)) ** 2 - np.sum(np.sin(2 * a)) ** 2
    spread_b = n2 - np.sum(np.cos(2 * b)) ** 2 - np.sum(np.sin(2 * b)) ** 2
    norm = float(np.sqrt(max(spread_a, 0.0) * max(spread_b, 0.0)))
    return float(4 * product) / norm if norm > 0 else 0.0


def circular_correlation(a_rad: ArrayLike, b_rad: ArrayLike) -> float:
    """The circular correlation of Jammalamadaka and SenGupta as published by the VAE papers (rad).

    For uniformly spread angles its sample means are random directions, so the value carries a noise
    that more data do not reduce: report `fisher_lee_T` beside it.
    """
    a, b = _pair(a_rad, b_rad)
    sin_a = np.sin(a - np.angle(np.sum(np.exp(1j * a))))
    sin_b = np.sin(b - np.angle(np.sum(np.exp(1j * b))))
    norm = float(np.sqrt((sin_a @ sin_a) * (sin_b @ sin_b)))
    return float(sin_a @ sin_b) / norm if norm > 0 else 0.0


def angle_offset_rad(truth_rad: ArrayLike, angle_rad: ArrayLike, *, fold: int = 1) -> float:
    """The constant to add to `angle_rad` so that it agrees best with the truth, modulo 2π / `fold`.

    Best means least median absolute error: the circular mean of the differences is only the start, since
    a few particles that lie upside down would pull it aside.
    """
    truth, angle = _pair(truth_rad, angle_rad)
    difference = fold * (truth - angle)
    offset = float(np.angle(np.sum(np.exp(1j * difference))))
    candidates = offset + np.linspace(-np.pi, np.pi, 181)
    sample = difference[:: max(1, difference.size // 2000)]
    for width in (np.deg2rad(2.0), np.deg2rad(0.2)):
        error = np.abs(np.angle(np.exp(1j * (sample[:, None] - candidates))))
        offset = float(candidates[np.argmin(np.median(error, axis=0))])
        candidates = offset + np.linspace(-width, width, 41)
    # the mean over the mode, which is steadier than the last candidate
    residual = np.angle(np.exp(1j * (difference - offset)))
    near = np.abs(residual) <= 2 * np.median(np.abs(residual)) + 1e-12
    return (offset + float(residual[near].mean())) / fold


def angle_error_deg(truth_rad: ArrayLike, angle_rad: ArrayLike, *, fold: int = 1) -> Float:
    """`(N,)` absolute angle errors in degrees after the best constant offset, modulo 2π / `fold`.

    `fold` is the particle's rotational symmetry (1 for none). Uniformly random angles give a median of
    90 / `fold` degrees.
    """
    truth, angle = _pair(truth_rad, angle_rad)
    difference = truth - angle - angle_offset_rad(truth, angle, fold=fold)
    return np.rad2deg(np.abs(np.angle(np.exp(1j * fold * difference)))) / fold


def knn_regression_r(
    z: ArrayLike, truth: ArrayLike, *, n_neighbours: int = 20, n_folds: int = 5, seed: int = 0
) -> float:
    """How well latent coordinates determine a scalar truth, whatever the shape of the map.

    Every particle's truth `(N,)` is predicted as the mean over its nearest neighbours in `z` `(N, d)` among
    the particles of the *other* folds; returned is Pearson's r of prediction and truth. Latents without
    information give about 0.
    """
    points = np.asarray(z, dtype=np.float64)
    points = points[:, None] if points.ndim == 1 else points
    value = np.asarray(truth, dtype=np.float64).ravel()
    if len(points) != value.size:
        raise ValueError(f"{len(points)} latent coordinates and {value.size} true values")
    if value.size < 2 * n_folds:
        raise ValueError(f"{value.size} particles are too few for {n_folds} folds")
    fold = np.random.default_rng(seed).permutation(value.size) % n_folds
    prediction = np.empty_like(value)
    for held_out in range(n_folds):
        inside, outside = fold == held_out, fold != held_out
        k = min(n_neighbours, int(outside.sum()))
        _, index = cKDTree(points[outside]).query(points[inside], k=k)
        neighbours = value[outside][np.asarray(index).reshape(int(inside.sum()), k)]
        prediction[inside] = neighbours.mean(axis=1)
    return pearson(prediction, value)
