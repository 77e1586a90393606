"""Which particles make which average, and how much each counts: by class, by cell of the map, by nearness."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from particle_explorer.files import UserError
from particle_explorer.latents import rand_index
from particle_explorer.summing.work import Members

Floats = NDArray[np.float64]
Weighting = Literal["hard", "distance", "posterior"]

LEAST_SHARE = 0.02
"""Posterior shares below this are left out: they would cost as much as a whole member."""
TAILS = (0.005, 0.995)
"""Quantiles of the particles between which a grid lies."""


def by_class(
    labels: ArrayLike,
    z: ArrayLike | None = None,
    z_std: ArrayLike | None = None,
    weighting: Weighting = "hard",
) -> tuple[Members, NDArray[np.int64]]:
    """`(N,)` class of every particle, negative for none → members, and the `(k,)` classes in rising order.

    With `distance`, members count less the farther they lie from the mean of their class; with `posterior`,
    particles are shared between classes by what their own spread says.
    """
    label = np.asarray(labels, dtype=np.int64)
    rows = np.flatnonzero(label >= 0)
    classes, which = np.unique(label[rows], return_inverse=True)
    which = which.reshape(-1)
    if weighting == "hard":
        return Members(rows, which, np.ones(len(rows))), classes
    z = _positions(z)
    good = np.isfinite(z[rows]).all(1)
    rows, which = rows[good], which[good]
    counts = np.maximum(np.bincount(which, minlength=len(classes)), 1)
    centres = np.zeros((len(classes), z.shape[1]))
    np.add.at(centres, which, z[rows])
    centres /= counts[:, None]
    if weighting == "posterior":
        return _shared(rows, z, z_std, centres, counts), classes
    square = ((z[rows] - centres[which]) ** 2).sum(1)
    typical = np.bincount(which, square, minlength=len(classes)) / counts
    return Members(rows, which, _falling(square, typical[which])), classes


def near(z: ArrayLike, positions: ArrayLike, n_near: int, weighting: Weighting = "hard") -> Members:
    """The `n_near` particles nearest to each of the positions `(k, d)`; a particle may be near several.

    With `distance` they count as exp(-distance² / 2 h²), h the root mean square of their distances.
    """
    z, positions = _positions(z), np.atleast_2d(np.asarray(positions, dtype=np.float64))
    if positions.shape[1] != z.shape[1]:
        raise UserError(f"positions have {positions.shape[1]} coordinates, the map has {z.shape[1]}")
    good = np.flatnonzero(np.isfinite(z).all(1))
    k = min(n_near, len(good))
    if k < 1:
        raise UserError("there are no particles near any position")
    distance, at = cKDTree(z[good]).query(positions, k)
    distance, at = distance.reshape(len(positions), k), at.reshape(len(positions), k)
    square = distance**2
    weight = _falling(square, square.mean(1, keepdims=True)) if weighting == "distance" else np.ones(at.shape)
    return Members(good[at].ravel(), np.repeat(np.arange(len(positions)), k), weight.ravel())


def cells(
    z: ArrayLike, n_cells: int, z_std: ArrayLike | None = None, weighting: Weighting = "hard"
) -> tuple[Members, list[str], Floats]:
    """Members of the cells of a regular grid over the first two dimensions of the map (or the one there is).

    Returns members, names such as "row 1 column 3" counted from the top left, and the middles `(k, d)` of the
    cells that hold particles. Particles beyond the grid are in its outer cells.
    """
    z = _positions(z)
    good = np.flatnonzero(np.isfinite(z).all(1))
    if not len(good):
        raise UserError("no particle has a position on the map")
    d = min(z.shape[1], 2)
    low, high = np.quantile(z[good, :d], TAILS, axis=0)
    step = np.maximum((high - low) / n_cells, 1e-12)
    place = np.clip(np.floor((z[good, :d] - low) / step), 0, n_cells - 1).astype(np.int64)
    if d == 2:
        place[:, 1] = n_cells - 1 - place[:, 1]  # rows from the top
    number = place[:, 0] if d == 1 else place[:, 1] * n_cells + place[:, 0]
    label = np.full(len(z), -1)
    label[good] = number
    middle = np.median(z[good], axis=0)
    present = np.unique(number)
    names, middles = [], np.tile(middle, (len(present), 1))
    for i, cell in enumerate(present):
        row, column = divmod(int(cell), n_cells)
        middles[i, 0] = low[0] + (column + 0.5) * step[0]
        if d == 2:
            middles[i, 1] = low[1] + (n_cells - row - 0.5) * step[1]
        names.append(f"row {row + 1} column {column + 1}" if d == 2 else f"place {column + 1}")
    members, _ = by_class(label, z, z_std, weighting)
    return members, names, middles


def _positions(z: ArrayLike | None) -> Floats:
    if z is None:
        raise UserError("weights by distance or posterior need positions on the map; choose 'hard'")
    found = np.asarray(z, dtype=np.float64)
    return found[:, None] if found.ndim == 1 else found


def _falling(square: Floats, typical: Floats) -> Floats:
    return np.asarray(np.exp(-0.5 * square / np.maximum(typical, 1e-30)))


def _shared(
    rows: NDArray[np.int64], z: Floats, z_std: ArrayLike | None, centres: Floats, counts: NDArray[np.int64]
) -> Members:
    """Particles shared between centres by N(centre; z, z_std²) times how many each has."""
    if z_std is None:
        raise UserError("this model gives no spread of positions; choose 'hard' or 'distance'")
    spread = _positions(z_std)[rows]
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], Floats]] = []
    floor = np.maximum(np.nanmedian(spread, axis=0) * 1e-2, 1e-12)
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        sd = np.maximum(np.nan_to_num(spread[start : start + 4096], nan=0.0), floor)
        away = ((z[some][:, None] - centres) / sd[:, None]) ** 2
        log_share = -0.5 * away.sum(-1) + np.log(counts)
        share = np.exp(log_share - log_share.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        particle, which = np.nonzero(share >= LEAST_SHARE)
        parts.append((some[particle], which, share[particle, which]))
    row, which, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Members(row, which, weight)


def labels_of_members(uid: pd.Index, members: pd.DataFrame) -> NDArray[np.int64]:
    """`(N,)` class of every particle of `uid`, -1 for none; of several that in which it counts most.

    `members` as of stored averages: indexed by uid, with `average` and `weight`.
    """
    order = np.argsort(members["weight"].to_numpy(float), kind="stable")  # the largest is written last
    rows = uid.get_indexer(members.index[order])
    label = np.full(len(uid), -1, np.int64)
    label[rows[rows >= 0]] = members["average"].to_numpy(np.int64)[order][rows >= 0]
    return label


class _Crossed(NamedTuple):
    """Two groupings `(N,)`, negative for none, over the `n` particles that have a class in both."""

    used: NDArray[np.bool_]
    """`(N,)`"""
    first: NDArray[np.int64]
    """`(k,)` classes of the first"""
    second: NDArray[np.int64]
    row: NDArray[np.intp]
    """`(n,)` place of each particle's class in `first`"""
    column: NDArray[np.intp]
    table: NDArray[np.float64]
    """`(k, l)` particles in both"""


def _crossed(first: ArrayLike, second: ArrayLike) -> _Crossed:
    a, b = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    used = (a >= 0) & (b >= 0)
    classes, row = np.unique(a[used], return_inverse=True)
    others, column = np.unique(b[used], return_inverse=True)
    row, column = row.reshape(-1), column.reshape(-1)
    counts = np.bincount(row * len(others) + column, minlength=len(classes) * len(others))
    table = counts.reshape(len(classes), len(others)).astype(np.float64)
    return _Crossed(used, classes, others, row, column, table)


def together(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """How often two particles that share a class in one set share one in the other.

    Both are `(N,)` labels, negative for none; only particles with a class in both count. `both` is the share
    of pairs of the first set that stay together in the second, `rand` the adjusted Rand index (0 by chance,
    1 for the same classes).
    """
    found = _crossed(first, second)
    n = float(len(found.row))
    if not n:
        return {"n": 0.0, "both": float("nan"), "rand": float("nan")}
    pairs = (found.table * (found.table - 1)).sum()
    size = found.table.sum(1)
    in_first = (size * (size - 1)).sum()
    both = float(pairs / in_first) if in_first else float("nan")
    return {"n": n, "both": both, "rand": rand_index(found.row, found.column)}


def staying(label: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """`(N,)` of the particles in the class of a particle, the share that is with it in `other` too."""
    found = _crossed(label, other)
    share = np.full(len(found.used), np.nan)
    size = found.table.sum(1)[found.row] - 1
    kept = found.table[found.row, found.column] - 1
    share[found.used] = np.divide(kept, size, out=np.full(len(size), np.nan), where=size > 0)
    return share


def matched(first: ArrayLike, second: ArrayLike) -> list[tuple[int, int, int, float]]:
    """Each class of the first once, with the class of the second that shares most particles with it, how many
    these are, and their share of all that the first has."""
    found = _crossed(first, second)
    size = np.bincount(np.asarray(first, dtype=np.int64)[np.asarray(first) >= 0], minlength=1)
    matches = []
    for one, counts in zip(found.first.tolist(), found.table, strict=True):
        best = int(counts.argmax())
        matches.append((one, int(found.second[best]), int(counts[best]), float(counts[best] / size[one])))
    return matches
