"""Measures of how well a map and its poses agree with a known truth.

A model's zero angle, the sign of its latent axis and the shape of its map are its own; every measure here is
blind to exactly those freedoms and says so.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.stats import rankdata

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


def local_angle_error_deg(
    z: ArrayLike, truth_rad: ArrayLike, angle_rad: ArrayLike, *, fold: int = 1, n_neighbours: int = 8
) -> Float:
    """`(N,)` absolute angle errors in degrees after the mean offset of the nearest in `z` `(N, d)`.

    A map may turn the frame that its angles are counted from along with what it shows, so angles can be right
    and yet no constant offset fits them all; this is blind to that, modulo 2π / `fold`. Uniformly random
    angles give a median of 90 / `fold` degrees, as with a constant offset.
    """
    truth, angle = _pair(truth_rad, angle_rad)
    points = np.asarray(z, dtype=np.float64).reshape(len(truth), -1)
    k = min(n_neighbours, len(points) - 1)
    _, near = cKDTree(points).query(points, k=k + 1)
    difference = np.exp(1j * fold * (truth - angle))
    beside = difference[near].sum(axis=1) - difference  # without itself, which is among the nearest
    return np.rad2deg(np.abs(np.angle(difference * beside.conj()))) / fold


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


def wrapped_rms_deg(truth_rad: ArrayLike, angle_rad: ArrayLike, *, fold: int = 1) -> float:
    """Root mean square of angle errors in degrees, after the constant offset that makes it least.

    Errors are modulo 2π / `fold`, the particle's rotational symmetry. Uniformly random angles give
    360 / √12 / `fold` = 103.9 / `fold` degrees, or slightly less, as the offset is fitted.
    """
    truth, angle = _pair(truth_rad, angle_rad)
    turn = np.sort(np.mod(fold * (truth - angle), 2 * np.pi))
    # the best offset is the mean after cutting the circle somewhere: try the cut before every value
    n = turn.size
    passed = np.arange(n)
    carried = np.concatenate([[0.0], np.cumsum(turn)[:-1]])
    mean = (turn.sum() + 2 * np.pi * passed) / n
    square = (turn @ turn + 4 * np.pi * carried + 4 * np.pi**2 * passed) / n
    return float(np.rad2deg(np.sqrt(max(0.0, float((square - mean**2).min())))) / fold)


def rotation_rmse_deg(applied_rad: ArrayLike, angle_rad: ArrayLike) -> Float:
    """`(m,)` how well the angle of each image follows when it is turned, in degrees.

    Every image was turned by the known `applied_rad` `(t,)`, the first of which is 0; `angle_rad` `(m, t)`
    is what was found. The angle found for the unturned image is subtracted, so the frame of every image is
    its own (Nasiri & Bepler, NeurIPS 2022, table 3, there with 160 turns; errors are wrapped here, which the
    paper leaves open). A guess gives 103.9 degrees.
    """
    applied = np.asarray(applied_rad, dtype=np.float64).ravel()
    found = np.asarray(angle_rad, dtype=np.float64).reshape(-1, applied.size)
    if applied.size < 2 or applied[0] != 0:
        raise ValueError(
            "an image is compared with itself unturned: the first of two or more turns must be 0"
        )
    error = found - found[:, :1] - applied
    error = np.angle(np.exp(1j * error[:, 1:]))
    return np.asarray(np.rad2deg(np.sqrt(np.mean(error**2, axis=1))), dtype=np.float64)


def matched_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of `(N,)` particles whose cluster is that of their label, under the best one-to-one matching.

    The Hungarian method on the table of counts. Random clusters of equal size give little more than one over
    their number.
    """
    _, label = np.unique(np.asarray(labels).ravel(), return_inverse=True)
    _, cluster = np.unique(np.asarray(clusters).ravel(), return_inverse=True)
    if label.size != cluster.size or not label.size:
        raise ValueError(f"{label.size} labels and {cluster.size} clusters")
    count = np.zeros((label.max() + 1, cluster.max() + 1), dtype=np.int64)
    np.add.at(count, (label, cluster), 1)
    return float(count[linear_sum_assignment(count, maximize=True)].sum()) / label.size


def clustering_accuracy(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    method: Literal["ward", "kmeans"] = "ward",
    n_restarts: int = 100,
    seed: int = 0,
) -> float:
    """How well as many clusters as there are labels agree with them, in [0, 1].

    `features` `(N, d)` are clustered without the labels `(N,)`: `ward` cuts the full tree of Ward's linkage
    (memory 4·N² bytes), `kmeans` keeps the best of `n_restarts`; clusters are matched to labels one to one.
    Ten balanced labels at random give about 0.11.
    """
    points = np.asarray(features, dtype=np.float64)
    points = points[:, None] if points.ndim == 1 else points
    label = np.asarray(labels).ravel()
    if len(points) != label.size:
        raise ValueError(f"{len(points)} features and {label.size} labels")
    n_clusters = len(np.unique(label))
    if n_clusters < 2:
        raise ValueError("labels of at least two kinds are needed to score clusters")
    if method == "ward":
        found = fcluster(linkage(points, "ward"), n_clusters, criterion="maxclust")
    else:
        from sklearn.cluster import KMeans  # half a second to import

        found = KMeans(n_clusters, n_init=n_restarts, random_state=seed).fit_predict(points)
    return matched_accuracy(label, found)


def auc(score: ArrayLike, positive: ArrayLike) -> float:
    """How often a positive `(N,)` has the higher score, ties counting half; chance is 0.5."""
    value, wanted = np.asarray(score, np.float64).ravel(), np.asarray(positive, bool).ravel()
    n_positive, n_other = int(wanted.sum()), int((~wanted).sum())
    if value.size != wanted.size or not n_positive or not n_other:
        raise ValueError(f"{value.size} scores, {n_positive} positives and {n_other} others")
    rank_sum = float(rankdata(value)[wanted].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_other)


def image_mse(drawn: ArrayLike, target: ArrayLike) -> Float:
    """`(b,)` mean squared difference of images `(b, ..., n, n)`, over all their pixels and channels.

    The mean and the largest over a test set are the average and worst MSE of rotation-invariant
    autoencoders (methods differ in the units of their images: give both in the same).
    """
    a, b = np.asarray(drawn, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"images of one shape are compared; these are {a.shape} and {b.shape}")
    return np.asarray(np.mean((a - b).reshape(len(a), -1) ** 2, axis=1), dtype=np.float64)
