"""A graph of nearest neighbours laid out by UMAP (McInnes, Healy & Melville 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Tell = Callable[[float], None]


def laid_out(
    near: NDArray[np.int32],
    distance: Array,
    points: Array,
    *,
    min_distance: float,
    n_epochs: int,
    seed: int,
    start: Array | None = None,
    n_dims: int = 2,
    tell: Tell = lambda _: None,
) -> Array:
    """`(n, n_dims)` places; the same seed gives the same ones.

    Parameters
    ----------
    near, distance
        `(n, k)` the nearest of every point, itself first, and how far they are.
    points
        `(n, d)` what is laid out.
    start
        `(n, n_dims)` places to begin with; None takes eigenvectors of the graph, which must not be in parts.
    tell
        Is told the share that is done.
    """
    with warnings.catch_warnings():  # of a part of it that needs tensorflow
        warnings.filterwarnings("ignore", category=ImportWarning)
        from umap import UMAP

    reducer = UMAP(
        n_components=n_dims,
        n_neighbors=near.shape[1],
        min_dist=min_distance,
        n_epochs=n_epochs,
        init="spectral" if start is None else start,
        random_state=seed,
        n_jobs=1,  # several threads would make the picture differ from one run to the next
        precomputed_knn=(near, distance, None),
        tqdm_kwds={
            "disable": False,
            "bar_format": "{percentage}",
            "mininterval": 0.3,
            "file": _Percentages(tell),
        },
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="precomputed_knn"
        )  # that no more points can be placed later
        return np.asarray(reducer.fit_transform(points), np.float32)


class _Percentages:
    """A file that a progress bar writes percentages to, and that tells them on."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def write(self, text: str) -> int:
        words = text.strip("\r\n \x1b[A")
        if words.replace(".", "", 1).isdigit():
            self._tell(float(words) / 100)
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""
