"""What the axes and colours of the scatter can be, and what a place on the axes means in the latent space."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.latents import PCA, latent_columns, local_density, pca
from particle_explorer.status import read_status
from particle_explorer.widgets.colours import Colouring, colour_by, plain, title_of
from particle_explorer.widgets.splat import Points

Floats = NDArray[np.float64]
Place = tuple[float | None, float | None]

NEIGHBOURS = 16
"""Particles whose latent positions are averaged where the handle stands in an embedding."""
NEIGHBOUR_SAMPLE = 200_000
"""Particles among which neighbours are sought: one look takes about 2 ms."""
ONE_COLOUR = ""
DENSITY = "local density"
"""Key of the density of particles on the map, which is no column of the table: computed when asked for"""


class Choice(NamedTuple):
    """A column that can be chosen, and its name for people."""

    key: str
    title: str

    @property
    def short(self) -> str:
        """What fits a narrow combo box."""
        return self.title.replace("principal component", "PC")


@dataclass(frozen=True)
class Live:
    """Positions of some particles while a run trains: one file `live/NNNN.npz`."""

    run_path: Path
    epoch: int
    row: NDArray[np.intp]
    z: Floats


@dataclass(frozen=True)
class Positions:
    """Where particles lie on the map, and all that follows from it alone."""

    z: Floats
    """`(n, d)`, NaN where not known (yet)"""
    pca: PCA | None = None
    median: Floats = field(default_factory=lambda: np.zeros(0))
    """`(d,)` position of the particle nearest to the middle of all"""
    spread: Floats = field(default_factory=lambda: np.zeros((0, 2)))
    """`(d, 2)` lowest and highest value of each dimension"""

    @classmethod
    def of(cls, z: Floats) -> Positions:
        """What positions `(n, d)` say; without dimensions where none of them is known."""
        known = z[np.isfinite(z).all(axis=1)] if z.shape[1] else z[:0]
        if not len(known):
            return cls(np.zeros((len(z), 0)))
        components = pca(known.astype(np.float32)) if z.shape[1] > 1 else None
        middle = np.median(known[: 10 * NEIGHBOUR_SAMPLE], axis=0)
        median = known[int(np.argmin(((known - middle) ** 2).sum(axis=1)))]
        return cls(z, components, median, np.stack([known.min(axis=0), known.max(axis=0)], axis=1))

    def are(self, z: Floats) -> bool:
        """Whether these are the positions `z`."""
        return self.z.shape[1] > 0 and np.array_equal(self.z, z, equal_nan=True)

    @functools.cached_property
    def density(self) -> Floats:
        """`(n,)` decimal logarithm of how densely particles lie on the map, over that at their median."""
        return local_density(self.z)


@dataclass(frozen=True)
class Columns:
    """All that can be shown of the particles of a session: columns, latent positions, components."""

    features: pd.DataFrame
    positions: Positions
    axes: tuple[Choice, ...] = ()
    colours: tuple[Choice, ...] = ()

    @classmethod
    def none(cls, features: pd.DataFrame) -> Columns:
        """Of particles that lie on no map (yet)."""
        return cls(features, Positions(np.zeros((len(features), 0))))

    @property
    def z(self) -> Floats:
        """`(n, d)`, NaN where not known (yet)"""
        return self.positions.z

    @property
    def pca(self) -> PCA | None:
        return self.positions.pca

    @property
    def n_dims(self) -> int:
        return self.z.shape[1]

    def values(self, key: str) -> Floats:
        """`(n,)` numbers of one axis."""
        if found := re.fullmatch(r"(z|pc)_(\d+)", key):
            i = int(found[2])
            if found[1] == "z" and i < self.n_dims:
                return np.asarray(self.z[:, i], float)
            if found[1] == "pc" and self.pca is not None:
                return np.asarray((self.z - self.pca.mean) @ self.pca.components[i], float)
        if key == DENSITY:
            return self.positions.density
        return np.asarray(self.features[key], float)

    def title(self, key: str) -> str:
        return next(choice.title for choice in (*self.axes, *self.colours) if choice.key == key)

    def points(self, x: str, y: str) -> Points:
        return Points.of(self.values(x), self.values(y))

    def colouring(self, key: str) -> Colouring:
        if key == ONE_COLOUR:
            return plain(len(self.features))
        title = self.title(key)
        if key == DENSITY or self.is_of_map(key):
            return colour_by(key, self.values(key), title)
        return colour_by(key, self.features[key], title)

    def is_of_map(self, key: str) -> bool:
        """Whether an axis is a latent dimension or a principal component, not a column of the table."""
        return re.fullmatch(r"(z|pc)_\d+", key) is not None

    def first_axes(self) -> tuple[str, str] | None:
        """The two axes to show first: the map, or, of many dimensions, the two widest directions."""
        if self.n_dims == 0 or len(self.axes) < 2:
            return None
        if self.n_dims == 1:
            others = [choice.key for choice in self.axes if choice.key != "z_0"]
            liked = [key for key in ("log_likelihood", "angle_deg") if key in others]
            return "z_0", (liked or others)[0]
        return ("z_0", "z_1") if self.n_dims == 2 else ("pc_0", "pc_1")

    def handle_axes(self, x: str, y: str) -> HandleAxes:
        """What the handle means on these axes."""
        prefix = _embedding_of(x)
        if prefix and prefix == _embedding_of(y) and self.n_dims:
            return _Embedded(np.stack([self.values(x), self.values(y)], axis=1), self.z)
        return _Linear(*(self._direction(key) for key in (x, y)))

    def _direction(self, key: str) -> tuple[Floats, float] | None:
        """`a (d,)` and `c` where the axis is `a · z + c`, None for any other column."""
        found = re.fullmatch(r"(z|pc)_(\d+)", key)
        if found is None:
            return None
        i = int(found[2])
        if found[1] == "z":
            return np.eye(self.n_dims)[i], 0.0
        assert self.pca is not None
        component = self.pca.components[i].astype(float)
        return component, -float(component @ self.pca.mean)


def read_columns(features: pd.DataFrame, live: Live | None = None, before: Columns | None = None) -> Columns:
    """Find out what a table offers; with `live`, the positions of a run that trains. A thread's work.

    Where the positions are those of `before`, as after a clustering, they are the very same object, with what
    has been computed of them.
    """
    n = len(features)
    if live is not None:
        z = np.full((n, live.z.shape[1]), np.nan)
        z[live.row] = live.z
    else:
        z = features[latent_columns(features)].to_numpy(float)
    positions = before.positions if before is not None and before.positions.are(z) else Positions.of(z)
    latent = [Choice(f"z_{i}", title_of(f"z_{i}")) for i in range(positions.z.shape[1])]
    if positions.pca is not None:
        latent += [
            Choice(f"pc_{i}", f"{title_of(f'pc_{i}')} ({100 * share:.0f} %)")
            for i, share in enumerate(positions.pca.share)
        ]
    skipped = set(latent_columns(features))
    others: list[Choice] = []
    words: list[Choice] = []
    for name in map(str, features.columns):
        column = features[name]
        if name in skipped or not varies(column):
            continue
        choice = Choice(name, title_of(name))
        numeric = pd.api.types.is_numeric_dtype(column) and column.dtype.kind != "b"
        (others if numeric else words).append(choice)
    others.append(Choice(DENSITY, "local density on the map (log₁₀)"))
    others.sort(key=lambda choice: _rank(choice.key))
    colours = (Choice(ONE_COLOUR, "one colour"), *others[:8], *latent, *words, *others[8:])
    return Columns(features, positions, (*latent, *others), colours)


class HandleAxes(Protocol):
    """The way between a place on the axes and a position in the latent space."""

    def z_at(self, x: float | None, y: float | None, z: Floats) -> Floats:
        """The position at a place; what the axes do not say is kept from `z (d,)`."""

    def place(self, z: Floats) -> Place:
        """Where a position lies on the axes; None for an axis that is no function of it."""


class _Linear:
    """Axes that are latent dimensions or principal components, or, where None, anything else."""

    def __init__(self, *directions: tuple[Floats, float] | None) -> None:
        self._directions = directions

    def z_at(self, x: float | None, y: float | None, z: Floats) -> Floats:
        known = [
            (*direction, at)
            for direction, at in zip(self._directions, (x, y), strict=True)
            if direction is not None and at is not None and np.isfinite(at)
        ]
        if not known:
            return z
        rows = np.stack([a for a, _, _ in known])
        missing = np.array([at - c for _, c, at in known]) - rows @ z
        # the smallest step that gets there: dimensions and components that are not shown stay as they are
        return np.asarray(z + np.linalg.pinv(rows) @ missing)

    def place(self, z: Floats) -> Place:
        x, y = (None if one is None else float(one[0] @ z + one[1]) for one in self._directions)
        return x, y


class _Embedded:
    """An embedding such as UMAP: positions are interpolated between the particles near the handle."""

    def __init__(self, xy: Floats, z: Floats) -> None:
        known = np.flatnonzero(np.isfinite(xy).all(axis=1) & np.isfinite(z).all(axis=1))
        if known.size > NEIGHBOUR_SAMPLE:
            known = np.random.default_rng(0).choice(known, NEIGHBOUR_SAMPLE, replace=False)
        self._xy, self._z = np.ascontiguousarray(xy[known].T, np.float32), z[known]

    def z_at(self, x: float | None, y: float | None, z: Floats) -> Floats:
        if x is None or y is None or not self._z.size:
            return z
        squares = (self._xy[0] - np.float32(x)) ** 2 + (self._xy[1] - np.float32(y)) ** 2
        k = min(NEIGHBOURS, squares.size)
        near = np.argpartition(squares, k - 1)[:k]
        found = squares[near].astype(float)
        weight = np.exp((found.min() - found) / max(2 * float(np.median(found)), 1e-12))
        return np.asarray(weight @ self._z[near] / weight.sum())

    def place(self, z: Floats) -> Place:
        if not self._z.size:
            return None, None
        nearest = int(np.argmin(((self._z - z) ** 2).sum(axis=1)))
        return float(self._xy[0, nearest]), float(self._xy[1, nearest])


@dataclass(frozen=True)
class Seen:
    """What one look at the runs of a session found: the run that trains, and its newest positions if new."""

    run_path: Path | None
    live: Live | None = None


class LiveReader:
    """Looks for a run that trains and reads its newest `live/NNNN.npz`, each file once. A thread's work."""

    def __init__(self) -> None:
        self._seen: tuple[Path, str] | None = None

    def __call__(self, session_path: Path) -> Seen:
        folder = session_path / "runs"
        runs = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
        for run in runs[:3]:  # an older one that still trains is not what one waits for
            if (run / "config.json").is_file() and read_status(run).state == "running":
                return Seen(run, self._newest(run))
        return Seen(None)

    def _newest(self, run: Path) -> Live | None:
        files = sorted((run / "live").glob("[0-9]*.npz"), key=lambda path: (len(path.name), path.name))
        if not files or self._seen == (run, files[-1].name):
            return None
        try:
            with np.load(files[-1]) as found:
                live = Live(
                    run,
                    int(found["epoch"]),
                    found["row"].astype(np.intp),
                    np.atleast_2d(found["z"]).astype(float),
                )
        except FileNotFoundError:  # replaced by a newer one meanwhile: the next look finds that
            return None
        self._seen = (run, files[-1].name)
        return live


def _embedding_of(key: str) -> str:
    found = re.fullmatch(r"((?:umap|tsne|pca)(?:-\d+)?)_\d+", key)
    return found[1] if found else ""


def varies(column: pd.Series) -> bool:
    """Whether a column says anything: not one value for all."""
    # most columns show it within a few rows, and threads that look at all of them keep the window waiting
    return _varies(column.iloc[:100]) or _varies(column)


def _varies(column: pd.Series) -> bool:
    if not len(column):
        return False
    if pd.api.types.is_numeric_dtype(column):
        values = np.asarray(column, float)
        values = values[np.isfinite(values)]
        return bool(values.size and (values != values[0]).any())
    return bool((column != column.iloc[0]).any())


def _rank(key: str) -> tuple[int, str]:
    """What is looked at most comes first; columns of the file last."""
    order = (
        r"umap.*",
        r"cluster.*",
        r"class.*",
        r"angle_deg",
        r"shift_.*",
        r"log_likelihood",
        r"residual",
        DENSITY,
        r"pose-held.*",
        r"z_std_.*",
    )
    for rank, pattern in enumerate(order):
        if re.fullmatch(pattern, key):
            return rank, key
    return (len(order) + (1 if re.match(r"_?rln|.*/", key) else 0)), key
