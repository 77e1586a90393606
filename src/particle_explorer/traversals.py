"""Ways through the latent space, as rows of positions to be drawn, and the particles that lie along them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, dijkstra, minimum_spanning_tree
from scipy.spatial import cKDTree
from scipy.special import ndtri

from particle_explorer.configs import MOST_DIMS_OF_A_GRID
from particle_explorer.files import UserError
from particle_explorer.latents import pca

Floats = NDArray[np.float64]
Prior = Literal["normal", "uniform", "particles"]
"""How a model's own positions are spread: a standard normal, evenly over ±1, or as its particles are"""

TAILS = (0.01, 0.99)
"""Quantiles of the particles between which a path runs: beyond there are too few to learn from."""
GRAPH_NEIGHBOURS = 12
GRAPH_LIMIT = 50_000
"""Particles whose neighbour graph is built."""


def along(z: ArrayLike, direction: ArrayLike, at: ArrayLike, n: int) -> Floats:
    """`(n, d)` positions on the line through `at (d,)`, from one end of the particles to the other.

    `direction` `(d,)` is a dimension (a unit vector) or a principal component.
    """
    z, at = np.asarray(z, float), np.asarray(at, float)
    direction = np.asarray(direction, float)
    direction /= np.linalg.norm(direction)
    low, high = np.quantile(z @ direction, TAILS)
    return np.asarray(at + (np.linspace(low, high, n) - at @ direction)[:, None] * direction)


def along_dimension(z: ArrayLike, dimension: int, at: ArrayLike, n: int) -> Floats:
    """Along dimension `dimension`, counted from 1; the others stay as in `at`."""
    d = np.asarray(z).shape[1]
    _check_number("dimension", dimension, d)
    return along(z, np.eye(d)[dimension - 1], at, n)


def along_component(z: ArrayLike, component: int, at: ArrayLike, n: int) -> Floats:
    """Along the principal component `component`, counted from 1."""
    z = np.asarray(z, np.float32)
    _check_number("component", component, z.shape[1])
    return along(z, pca(z).components[component - 1], at, n)


def straight(start: ArrayLike, end: ArrayLike, n: int) -> Floats:
    """`(n, d)` evenly from one position to another."""
    first, last = np.asarray(start, float), np.asarray(end, float)
    return first + np.linspace(0, 1, n)[:, None] * (last - first)


def along_curve(points: ArrayLike, n: int) -> Floats:
    """`(m, d)` corners of a curve → `(n, d)` positions at equal steps along it."""
    points = np.asarray(points, float)
    if points.ndim != 2 or len(points) < 2:
        raise UserError("a curve needs at least two different positions")
    length = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    if not length[-1] > 0:
        raise UserError("a curve needs at least two different positions")
    wanted = np.linspace(0, length[-1], n)
    return np.stack([np.interp(wanted, length, points[:, i]) for i in range(points.shape[1])], 1)


def along_graph(z: ArrayLike, start: int, end: int, n: int, seed: int = 0) -> tuple[Floats, NDArray[np.intp]]:
    """From particle `start` to particle `end` (rows of `z`) through particles between: where the data are.

    The shortest way on the graph of near neighbours, where a step costs the square of its length, so that
    many short steps through dense parts are cheaper than one over a gap; smoothed, then `n` equal steps.

    Returns the positions `(n, d)` and the rows of the particles that were passed.
    """
    z = np.asarray(z, float)
    if start == end:
        raise UserError("a way between particles needs two different ones")
    rows = np.arange(len(z))
    if len(z) > GRAPH_LIMIT:
        some = np.random.default_rng(seed).permutation(len(z))[:GRAPH_LIMIT]
        rows = np.union1d(some, [start, end])
    graph = _neighbour_graph(z[rows])
    first, last = np.searchsorted(rows, [start, end])
    _, before = dijkstra(graph, directed=False, indices=first, return_predecessors=True)
    way = [int(last)]
    while way[-1] != first:
        way.append(int(before[way[-1]]))
    passed = rows[way[::-1]]
    return along_curve(_smoothed(z[passed]), n), passed


def _neighbour_graph(z: Floats) -> coo_matrix:
    """Squared distances between near neighbours; islands are joined by the shortest bridges there are."""
    k = min(GRAPH_NEIGHBOURS + 1, len(z))
    distance, near = cKDTree(z).query(z, k, workers=-1)
    here = np.repeat(np.arange(len(z)), k)
    # a distance of 0 would be no edge at all
    graph = coo_matrix((np.maximum(distance.ravel() ** 2, 1e-18), (here, near.ravel())), (len(z),) * 2)
    n_islands, island = connected_components(graph, directed=False)
    if n_islands == 1:
        return graph
    members = [np.flatnonzero(island == i) for i in range(n_islands)]
    trees = [cKDTree(z[rows]) for rows in members]
    bridges: list[tuple[float, int, int]] = []
    length = np.zeros((n_islands, n_islands))
    ends = {}
    for i in range(n_islands):
        for j in range(i + 1, n_islands):
            few, many = (i, j) if len(members[i]) <= len(members[j]) else (j, i)
            away, to = trees[many].query(z[members[few]])
            nearest = int(np.argmin(away))
            length[i, j] = max(float(away[nearest]), 1e-9)
            ends[i, j] = members[few][nearest], members[many][to[nearest]]
    tree = minimum_spanning_tree(length).tocoo()
    for i, j, value in zip(tree.row, tree.col, tree.data, strict=True):
        a, b = ends[min(i, j), max(i, j)]
        bridges.append((float(value) ** 2, int(a), int(b)))
    cost, a_rows, b_rows = (np.array(part) for part in zip(*bridges, strict=True))
    return coo_matrix(
        (np.r_[graph.data, cost], (np.r_[graph.row, a_rows], np.r_[graph.col, b_rows])), graph.shape
    )


def _smoothed(points: Floats, n_rounds: int = 3) -> Floats:
    """A polyline without the zigzag of single particles; its ends stay."""
    for _ in range(n_rounds if len(points) > 2 else 0):
        middle = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4
        points = np.vstack([points[:1], middle, points[-1:]])
    return points


def grid(z: ArrayLike, n: int, prior: Prior, dimensions: tuple[int, int] = (1, 2)) -> Floats:
    """`(n * n, d)` positions on a square, row by row from the top, evenly spaced in *probability*.

    Along each of the two dimensions (counted from 1) lie the quantiles 0.5/n, 1.5/n, … of the prior: the
    inverse cumulative distribution of Bepler et al. (2019), figure 3; with `particles`, of the particles
    themselves. Other dimensions stay at the median.
    """
    z = np.asarray(z, float)
    d = z.shape[1]
    if d < 2:
        raise UserError("a grid needs a map of two dimensions or more; walk along the one there is")
    for dimension in dimensions:
        _check_number("dimension", dimension, d)
    share = (np.arange(n) + 0.5) / n
    first, second = dimensions[0] - 1, dimensions[1] - 1
    across, down = (_quantiles(z[:, i], share, prior) for i in (first, second))
    found = np.tile(np.median(z, axis=0), (n * n, 1))
    found[:, first], found[:, second] = np.tile(across, n), np.repeat(down[::-1], n)
    return found


def samples(z: ArrayLike, n: int, prior: Prior, seed: int = 0) -> Floats:
    """`(n, d)` positions drawn from the model's prior; with `particles`, positions of random particles."""
    z, rng = np.asarray(z, float), np.random.default_rng(seed)
    if prior == "normal":
        return rng.normal(size=(n, z.shape[1]))
    if prior == "uniform":
        return rng.uniform(-1, 1, (n, z.shape[1]))
    return z[rng.integers(0, len(z), n)]


def prior_of(model_kind: str, latent_dim: int = 2) -> Prior:
    """The prior of a model's latent positions."""
    if model_kind == "class-map" and latent_dim <= MOST_DIMS_OF_A_GRID:
        return "uniform"
    return "normal" if model_kind in ("class-map", "spatial-vae", "target-vae", "vae") else "particles"


def members(z: ArrayLike, positions: ArrayLike, n_each: int) -> NDArray[np.int64]:
    """`(N,)` the position that each particle is averaged at, -1 for none.

    A particle belongs to the position nearest to it; of those, each position keeps the `n_each` nearest.
    """
    z, positions = np.asarray(z, float), np.asarray(positions, float)
    good = np.flatnonzero(np.isfinite(z).all(1))
    label = np.full(len(z), -1, np.int64)
    if not len(good) or n_each < 1:
        return label
    distance, nearest = cKDTree(positions).query(z[good])
    order = np.lexsort((distance, nearest))
    sorted_nearest = nearest[order]
    starts = np.searchsorted(sorted_nearest, np.arange(len(positions)))
    rank = np.arange(len(order)) - starts[sorted_nearest]
    kept = order[rank < n_each]
    label[good[kept]] = nearest[kept]
    return label


def _quantiles(values: Floats, share: Floats, prior: Prior) -> Floats:
    if prior == "normal":
        return np.asarray(ndtri(share))
    if prior == "uniform":
        return 2 * share - 1
    return np.asarray(np.quantile(values, share))


def _check_number(what: str, number: int, d: int) -> None:
    if not 1 <= number <= d:
        raise UserError(f"there is no {what} {number}; the map has {d}, counted from 1")
