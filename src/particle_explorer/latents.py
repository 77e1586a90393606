"""Latent coordinates and poses of particles, and what is computed from coordinates alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from particle_explorer.configs import ClusterConfig, EmbedConfig
from particle_explorer.files import UserError, replacing
from particle_explorer.layouts import laid_out

Array = NDArray[np.float32]
Tell = Callable[[float], None]
"""Told how much is done, 0 to 1; may raise to end the work"""

AT_ONCE = 20_000
"""Particles whose neighbours are sought between two words of progress."""
PLACE_BY = 8
"""Fitted neighbours that say where a particle outside the fitted part lies."""
MANY, EPOCHS, EPOCHS_OF_MANY = 50_000, 200, 100
"""UMAP: from that many particles on half the passes are enough, because it starts from the components."""
PAIRS_LIMIT = 8_000
"""Particles between which all distances are kept (Ward)."""
DENSITY_LIMIT = 20_000
"""Particles whose density tree is built (HDBSCAN: its time grows with the square)."""
DENSITY_SAMPLE = 20_000
"""Positions among which neighbours are sought for a local density; a quarter of it for very many."""
BIC_LIMIT = 20_000
"""Particles that Gaussian mixtures are fitted to while their number is sought."""


@dataclass(frozen=True)
class Latents:
    """What a model says of `n` particles; angles in degrees, shifts in pixels of each particle's original."""

    uid: NDArray[np.uint64]
    """`(n,)`"""
    z: Array
    """`(n, d)`"""
    z_std: Array | None = None
    """`(n, d)` spread of the posterior"""
    angle_deg: Array | None = None
    """`(n,)` placement angle, see `pose`"""
    shift_yx_px: Array | None = None
    """`(n, 2)` placement shift"""
    extras: Mapping[str, Array] = field(default_factory=dict)
    """`(n,)` each: `residual`, `log_likelihood`, `angle_std_deg`, `shift_std_px`, `pose_entropy`,
    `junk_probability`"""

    def __len__(self) -> int:
        return len(self.uid)

    @property
    def table(self) -> pd.DataFrame:
        """Indexed by uid: z_0, …, z_std_0, …, angle_deg, shift_y_px, shift_x_px and the extras."""
        columns = {f"z_{i}": self.z[:, i] for i in range(self.z.shape[1])}
        if self.z_std is not None:
            columns |= {f"z_std_{i}": self.z_std[:, i] for i in range(self.z_std.shape[1])}
        if self.angle_deg is not None:
            columns["angle_deg"] = self.angle_deg
        if self.shift_yx_px is not None:
            columns |= {"shift_y_px": self.shift_yx_px[:, 0], "shift_x_px": self.shift_yx_px[:, 1]}
        columns |= dict(self.extras)
        return pd.DataFrame(columns, index=pd.Index(self.uid, dtype=np.uint64, name="uid"))

    def write(self, path: Path, *, overwrite: bool = True) -> None:
        """Write the table as parquet."""
        with replacing(path, overwrite=overwrite) as temporary:
            self.table.to_parquet(temporary, compression="zstd")

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Latents:
        """Undo `table`."""
        z_names = latent_columns(table)
        std_names = [name.replace("z_", "z_std_") for name in z_names]
        has_std = all(name in table for name in std_names)
        has_angle = "angle_deg" in table
        has_shift = "shift_y_px" in table and "shift_x_px" in table
        taken = {*z_names, *std_names, "angle_deg", "shift_y_px", "shift_x_px"}
        return cls(
            uid=table.index.to_numpy(np.uint64),
            z=table[z_names].to_numpy(np.float32),
            z_std=table[std_names].to_numpy(np.float32) if has_std else None,
            angle_deg=table["angle_deg"].to_numpy(np.float32) if has_angle else None,
            shift_yx_px=table[["shift_y_px", "shift_x_px"]].to_numpy(np.float32) if has_shift else None,
            extras={str(name): table[name].to_numpy(np.float32) for name in table if name not in taken},
        )


def latent_columns(table: pd.DataFrame) -> list[str]:
    """The columns z_0, z_1, … of a table, in order."""
    numbers = [str(name)[2:] for name in table.columns if str(name).startswith("z_")]
    return [f"z_{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


class PCA(NamedTuple):
    """Principal components of `(n, d)` points."""

    scores: Array
    """`(n, d)` coordinates along the components"""
    components: Array
    """`(d, d)` one unit vector per row, widest first; the largest entry of each is positive"""
    mean: Array
    """`(d,)`"""
    share: Array
    """`(d,)` share of the variance"""


def local_density(z: NDArray[np.floating], k: int = 16) -> NDArray[np.float64]:
    """`(n, d)` → `(n,)` decimal logarithm of the density of positions about each, over its median.

    By the distance to the `k`-th neighbour in a sample of the positions, which scales with the density to the
    power of -1 / d (Loftsgaarden and Quesenberry 1965). NaN where a position is not known.
    """
    from scipy.spatial import cKDTree

    density = np.full(len(z), np.nan)
    known = np.flatnonzero(np.isfinite(z).all(1))
    if len(known) <= 2:
        return density
    at_most = DENSITY_SAMPLE if len(known) <= 10 * DENSITY_SAMPLE else DENSITY_SAMPLE // 4
    some = known
    if len(known) > at_most:
        some = np.random.default_rng(0).choice(known, at_most, replace=False)
    k = min(k, len(some) - 1)
    points = np.asarray(z[known], np.float64)
    away = cKDTree(z[some]).query(points, k + 1)[0][:, -1]
    found = -z.shape[1] * np.log10(np.maximum(away, np.finfo(np.float32).tiny))
    density[known] = found - np.median(found)
    return density


def pca(z: Array) -> PCA:
    """Principal components of `z` `(n, d)`."""
    z64 = np.asarray(z, np.float64)
    mean = z64.mean(0)
    covariance = np.atleast_2d(np.cov(z64, rowvar=False, bias=True))
    variance, vectors = np.linalg.eigh(covariance)
    variance, components = np.maximum(variance[::-1], 0.0), vectors.T[::-1]
    largest = components[np.arange(len(components)), np.abs(components).argmax(1)]
    components = components * np.where(largest < 0, -1.0, 1.0)[:, None]
    scores = (z64 - mean) @ components.T
    share = variance / max(variance.sum(), np.finfo(float).tiny)
    return PCA(*(part.astype(np.float32) for part in (scores, components, mean, share)))


def embed(z: Array, config: EmbedConfig, tell: Tell = lambda _: None) -> Array:
    """`(n, d)` latent coordinates → `(n, 2)` picture coordinates; the same seed gives the same picture.

    Of more than `config.fit_at_most` particles a random part is laid out, and each of the others takes its
    place between the fitted ones nearest to it in latent space.
    """
    _check_finite(z)
    z = np.asarray(z, np.float32)
    if config.method == "pca":
        return _plane(z)
    least = config.n_neighbours if config.method == "umap" else 3 * config.perplexity
    if len(z) <= least:
        wish = "--n-neighbours" if config.method == "umap" else "--perplexity"
        name = "UMAP" if config.method == "umap" else "t-SNE"
        value = config.n_neighbours if config.method == "umap" else config.perplexity
        raise UserError(
            f"{len(z)} particles are too few for {name} with {value:g} neighbours;"
            f" choose a smaller {wish} or --method pca"
        )
    n_fit = fitted_particles(config, len(z))
    rows = np.arange(len(z))
    if len(z) > n_fit:
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(z))[:n_fit])
    share = 1.0 if len(rows) == len(z) else 0.75
    lay_out = _umap if config.method == "umap" else _tsne
    xy = np.zeros((len(z), 2), np.float32)
    xy[rows] = lay_out(z[rows], config, lambda done: tell(share * done))
    if len(rows) < len(z):
        others = np.setdiff1d(np.arange(len(z)), rows, assume_unique=True)
        xy[others] = _between_neighbours(
            z[rows], xy[rows], z[others], lambda done: tell(share + (1 - share) * done)
        )
    return xy


def fitted_particles(config: EmbedConfig, n: int) -> int:
    """How many of `n` particles an embedding is fitted to."""
    automatic = {"umap": 200_000, "tsne": 10_000, "pca": n}[config.method]
    return min(n, config.fit_at_most or automatic)


def _plane(z: Array) -> Array:
    scores = pca(z).scores[:, :2]
    return np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))


def _start_of_layout(z: Array, seed: int, span: float) -> Array:
    """The widest two directions, a little shaken: keeps what is far apart apart (Kobak & Linderman 2021)."""
    plane = _plane(z)
    scale = span / max(float(np.ptp(plane)), 1e-30)
    shake = np.random.default_rng(seed).normal(0, 1e-3 * span, plane.shape)
    return (scale * (plane - plane.mean(0)) + shake).astype(np.float32)


def _umap(z: Array, config: EmbedConfig, tell: Tell) -> Array:
    to_neighbours = 0.4
    near, distance = _neighbours(z, config.n_neighbours, lambda done: tell(to_neighbours * done))
    return laid_out(
        near,
        distance,
        z,
        min_distance=config.min_distance,
        n_epochs=EPOCHS if len(z) <= MANY else EPOCHS_OF_MANY,
        start=_start_of_layout(z, config.seed, 10.0),
        seed=config.seed,
        tell=lambda done: tell(to_neighbours + (1 - to_neighbours) * done),
    )


def _tsne(z: Array, config: EmbedConfig, tell: Tell) -> Array:
    from sklearn.manifold import TSNE

    fitted = TSNE(
        perplexity=config.perplexity,
        init=_start_of_layout(z, config.seed, 1e-4 * 5),
        random_state=config.seed,
        n_jobs=-1,
    )
    xy = np.asarray(fitted.fit_transform(z), np.float32)
    tell(1.0)
    return xy


def _neighbours(z: Array, k: int, tell: Tell) -> tuple[NDArray[np.int32], Array]:
    """The `k` nearest of every particle, itself first: rows `(n, k)` and distances `(n, k)`."""
    tree = cKDTree(z)
    near, distance = np.empty((len(z), k), np.int32), np.empty((len(z), k), np.float32)
    for start in range(0, len(z), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        distance[part], near[part] = tree.query(z[part], k, workers=-1)
        tell(min(1.0, (start + AT_ONCE) / len(z)))
    return near, distance


def _between_neighbours(known: Array, value: Array, z: Array, tell: Tell) -> Array:
    """`value (m, 2)` at `known (m, d)` carried over to `z (n, d)`: a mean over near neighbours."""
    tree = cKDTree(known)
    found = np.empty((len(z), value.shape[1]), np.float32)
    k = min(PLACE_BY, len(known))
    for start in range(0, len(z), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        distance, near = (np.asarray(each).reshape(-1, k) for each in tree.query(z[part], k, workers=-1))
        # as in UMAP: from the nearest on, strength falls over the spread of the neighbours
        away = distance - distance[:, :1]
        weight = np.exp(-away / np.maximum(away.mean(1, keepdims=True), 1e-12))
        found[part] = np.einsum("nk,nkd->nd", weight / weight.sum(1, keepdims=True), value[near])
        tell(min(1.0, (start + AT_ONCE) / len(z)))
    return found


# ---------------------------------------------------------------------- groups


def cluster(
    z: Array, config: ClusterConfig, tell: Tell = lambda _: None, found: dict[str, Any] | None = None
) -> NDArray[np.int32]:
    """`(n, d)` → `(n,)` cluster numbers from 1, counted along the widest direction of the cluster centres.

    0 marks particles in no group (HDBSCAN alone leaves some out). What a method found besides goes into
    `found`: the BIC of the numbers of Gaussians that were tried, how many particles were fitted.
    """
    _check_finite(z)
    z = np.asarray(z, np.float32)
    wanted = config.n_clusters
    if config.method != "hdbscan":
        if wanted == 0 and config.method != "gmm":
            raise UserError(f"--method {config.method} needs --n-clusters; only gmm finds the number itself")
        if len(z) < max(wanted, 2):
            raise UserError(f"{len(z)} particles cannot make {wanted or 2} clusters; ask for fewer")
    elif len(z) < 2 * config.min_size:
        raise UserError(
            f"{len(z)} particles cannot make groups of {config.min_size}; choose a smaller --min-size"
        )
    found = {} if found is None else found
    method = {"kmeans": _kmeans, "gmm": _gaussians, "hdbscan": _dense_groups, "ward": _ward}[config.method]
    return in_order(method(z, config, tell, found), z)


def in_order(label: NDArray[np.integer], z: Array) -> NDArray[np.int32]:
    """Labels numbered from 1 along the widest direction of the groups' centres; negative ones become 0."""
    values, inverse = np.unique(label, return_inverse=True)
    centres = np.stack([z[inverse == i].mean(0) for i in range(len(values))])
    groups = np.flatnonzero(values >= 0)
    number = np.zeros(len(values), np.int32)
    if len(groups):
        order = np.argsort(pca(centres[groups]).scores[:, 0], kind="stable")
        number[groups[order]] = np.arange(1, len(groups) + 1)
    return np.asarray(number[inverse.reshape(-1)], np.int32)


def _kmeans(z: Array, config: ClusterConfig, tell: Tell, found: dict[str, Any]) -> NDArray[np.integer]:
    from sklearn.cluster import KMeans

    fitted = KMeans(config.n_clusters, n_init=4, random_state=config.seed).fit(z)
    return np.asarray(fitted.labels_)


def _gaussians(z: Array, config: ClusterConfig, tell: Tell, found: dict[str, Any]) -> NDArray[np.integer]:
    from sklearn.mixture import GaussianMixture

    def mixture(k: int) -> Any:
        return GaussianMixture(k, n_init=2, reg_covar=1e-6 * float(z.var()) + 1e-12, random_state=config.seed)

    rng = np.random.default_rng(config.seed)
    some = z if len(z) <= BIC_LIMIT else z[rng.permutation(len(z))[:BIC_LIMIT]]
    k = config.n_clusters
    if k == 0:
        bic: dict[int, float] = {}
        most = min(config.most_clusters, len(some) // 2)
        for each in range(1, most + 1):
            bic[each] = float(mixture(each).fit(some).bic(some))
            tell(0.8 * each / most)
        k = min(bic, key=lambda each: bic[each])
        found["bic"] = {str(each): value for each, value in bic.items()}
    fitted = mixture(k).fit(some)
    found["n_clusters"] = k
    return np.asarray(fitted.predict(z))


def _dense_groups(z: Array, config: ClusterConfig, tell: Tell, found: dict[str, Any]) -> NDArray[np.integer]:
    from sklearn.cluster import HDBSCAN

    rows = _some(len(z), DENSITY_LIMIT, config.seed)
    share = len(rows) / len(z)
    least = max(2, round(config.min_size * share))
    label = np.asarray(HDBSCAN(min_cluster_size=least, copy=True).fit(z[rows]).labels_)
    found["fitted"] = len(rows)
    return _as_the_nearest(z, rows, label, tell)


def _ward(z: Array, config: ClusterConfig, tell: Tell, found: dict[str, Any]) -> NDArray[np.integer]:
    from sklearn.cluster import AgglomerativeClustering

    rows = _some(len(z), max(PAIRS_LIMIT, config.n_clusters), config.seed)
    label = np.asarray(AgglomerativeClustering(config.n_clusters, linkage="ward").fit(z[rows]).labels_)
    found["fitted"] = len(rows)
    return _as_the_nearest(z, rows, label, tell)


def _some(n: int, limit: int, seed: int) -> NDArray[np.intp]:
    return np.arange(n) if n <= limit else np.sort(np.random.default_rng(seed).permutation(n)[:limit])


def _as_the_nearest(
    z: Array, rows: NDArray[np.intp], label: NDArray[np.integer], tell: Tell
) -> NDArray[np.integer]:
    """Labels of `rows` for all: every other particle belongs with the fitted one nearest to it."""
    if len(rows) == len(z):
        return label
    tree = cKDTree(z[rows])
    every = np.empty(len(z), label.dtype)
    for start in range(0, len(z), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        every[part] = label[tree.query(z[part], workers=-1)[1]]
        tell(min(1.0, (start + AT_ONCE) / len(z)))
    every[rows] = label
    return every


def merged(label: NDArray[np.integer], numbers: list[int]) -> NDArray[np.int32]:
    """The groups `numbers` made one, under the smallest of them; the others close the gap."""
    _check_numbers(label, numbers)
    label = np.where(np.isin(label, numbers), min(numbers), label)
    return _without_gaps(label)


def split(
    label: NDArray[np.integer], number: int, z: Array, n_parts: int = 2, seed: int = 0
) -> NDArray[np.int32]:
    """The group `number` in `n_parts` by k-means; later ones move up."""
    _check_numbers(label, [number])
    inside = np.flatnonzero(label == number)
    part = cluster(z[inside], ClusterConfig(n_clusters=n_parts, seed=seed))
    moved = np.where(label > number, label + n_parts - 1, label).astype(np.int32)
    moved[inside] = number + part - 1
    return moved


def _without_gaps(label: NDArray[np.integer]) -> NDArray[np.int32]:
    values, inverse = np.unique(label, return_inverse=True)
    first = 0 if len(values) and values[0] == 0 else 1
    return (inverse.reshape(-1) + first).astype(np.int32)


def _check_numbers(label: NDArray[np.integer], numbers: list[int]) -> None:
    there = set(np.unique(label).tolist())
    for number in numbers:
        if number not in there:
            known = ", ".join(str(value) for value in sorted(there))
            raise UserError(f"there is no group {number}; there are {known}")


# ---------------------------------------------------------------------- does pose show in the content?


def angle_leak(z: Array, angle_deg: Array, k: int = 20, at_most: int = 4000, seed: int = 0) -> float:
    """How well content predicts the angle, 0 (not at all) to 1: 1 - Σ|u - û|² / Σ|u - ū|² over particles.

    u is the unit vector of an angle, û the mean over the `k` particles nearest in latent space, itself left
    out, and ū the mean over all. Its value for content that knows nothing, -1/k, is taken for 0.
    """
    good = np.flatnonzero(np.isfinite(z).all(1) & np.isfinite(angle_deg))
    if len(good) < 4 * k:
        return float("nan")
    tree_rows = good[_some(len(good), 50_000, seed)]
    rows = tree_rows[_some(len(tree_rows), at_most, seed + 1)]
    angle = np.deg2rad(angle_deg[tree_rows].astype(np.float64))
    unit = np.stack([np.cos(angle), np.sin(angle)], 1)
    near = cKDTree(z[tree_rows]).query(z[rows], k + 1)[1]
    at = np.searchsorted(tree_rows, rows)
    own = near == at[:, None]
    own[~own.any(1), -1] = True  # among equal positions it may miss itself: one other is left out instead
    predicted = unit[near[~own].reshape(-1, k)].mean(1)
    wrong = ((unit[at] - predicted) ** 2).sum()
    spread = ((unit[at] - unit.mean(0)) ** 2).sum()
    found = 1 - float(wrong) / max(float(spread), 1e-12)
    return float(np.clip((found + 1 / k) / (1 + 1 / k), 0.0, 1.0))


class Agreement(NamedTuple):
    """How far two runs say the same of the same particles; NaN for what one of them does not say."""

    n: int
    """Particles compared"""
    position: float
    """Share of the spread of one map's positions that the other predicts, the worse way round"""
    angle_deg: float
    """Median difference of the angles after one common turn"""
    angle_along_map_deg: float
    """The same after a turn that may change smoothly along the map, which no fit can know"""
    clusters: float
    """Adjusted Rand index of two clusterings (Hubert & Arabie 1985): 1 the same, 0 as chance would"""


def agreement(
    a: Latents,
    b: Latents,
    groups_a: NDArray[np.integer] | None = None,
    groups_b: NDArray[np.integer] | None = None,
    at_most: int = 5000,
) -> Agreement:
    """Compare two runs on the particles of one session; rows of both are in the same order."""
    if not np.array_equal(a.uid, b.uid):
        raise UserError("the runs belong to different particles; compare runs of one session")
    good = np.flatnonzero(np.isfinite(a.z).all(1) & np.isfinite(b.z).all(1))
    rows = good[_some(len(good), at_most, 0)]
    nan = float("nan")
    if len(rows) < 50:
        return Agreement(len(rows), nan, nan, nan, nan)
    k = 15
    near = [_others(each.z[rows], k) for each in (a, b)]
    position = min(_explained(b.z[rows], near[0]), _explained(a.z[rows], near[1]))
    angle = along = nan
    if a.angle_deg is not None and b.angle_deg is not None:
        turn = np.exp(1j * np.deg2rad((b.angle_deg[rows] - a.angle_deg[rows]).astype(np.float64)))
        # the commonest turn, not the mean one: some particles may be found upside down
        middle = turn * np.conj(_mode(turn))
        angle = float(np.median(np.abs(np.angle(middle, deg=True))))
        smooth = turn[_others(a.z[rows], 40)]
        local = turn * np.conj(smooth.mean(1))
        along = float(np.median(np.abs(np.angle(local, deg=True))))
    clusters = nan
    if groups_a is not None and groups_b is not None:
        clusters = rand_index(groups_a[good], groups_b[good])
    return Agreement(len(rows), position, angle, along, clusters)


def rand_index(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Adjusted Rand index of two groupings of the same particles."""
    _, first = np.unique(a, return_inverse=True)
    _, second = np.unique(b, return_inverse=True)
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / max(len(a) * (len(a) - 1) / 2, 1)
    most = (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _others(z: Array, k: int) -> NDArray[np.intp]:
    """`(n, k)` the particles nearest to each, itself left out."""
    near = np.asarray(cKDTree(z).query(z, k + 1)[1])
    own = near == np.arange(len(z))[:, None]
    own[~own.any(1), -1] = True
    return near[~own].reshape(-1, k)


def _explained(z: Array, near: NDArray[np.intp]) -> float:
    """Share of the spread of `z` that the means over `near` explain, at least 0."""
    left = ((z - z[near].mean(1)) ** 2).sum()
    spread = ((z - z.mean(0)) ** 2).sum()
    return max(0.0, 1 - float(left) / max(float(spread), 1e-30))


def _mode(turn: NDArray[np.complex128]) -> complex:
    """The commonest of unit numbers, to a fraction of a degree."""
    angle = np.angle(turn, deg=True)
    counts, edges = np.histogram(angle, 72, (-180, 180))
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    at = np.deg2rad(edges[smooth.argmax()] + 2.5)
    centre = np.exp(1j * at)
    close = np.abs(np.angle(turn * np.conj(centre))) < np.deg2rad(20)
    mean = turn[close].mean() if close.any() else centre
    return complex(mean / max(abs(mean), 1e-12))


def _check_finite(z: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if bad.size:
        raise UserError(f"the latent coordinates of row {bad[0]} are not numbers; encode the run again")
