"""Images of several boxes and pixel sizes brought to one, about the same centre."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SAME_FIELD = 0.01
"""Fields that differ by less count as one."""


class Scale(NamedTuple):
    """What all images of a table can be brought to."""

    box_px: int
    pixel_size_A: float

    @property
    def field_A(self) -> float:
        """Side of the box."""
        return self.box_px * self.pixel_size_A


class Images(Protocol):
    """The part of an image stack that is needed here."""

    @property
    def box_px(self) -> NDArray[Any]: ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]: ...


def common_scale(box_px: NDArray[Any], pixel_size_A: NDArray[np.float64]) -> Scale | None:
    """The coarsest pixel size, and the largest field that all images show; None where fields are one anyway,
    or unknown."""
    fields = np.asarray(box_px, np.float64) * pixel_size_A
    if not len(fields) or not np.isfinite(fields).all() or np.ptp(fields) <= SAME_FIELD * fields.min():
        return None
    coarsest = float(pixel_size_A.max())
    return Scale(int(fields.min() / coarsest + 1e-6), coarsest)


def resampling(n: int, pixel_size_A: float, m: int, new_pixel_size_A: float) -> NDArray[np.float32]:
    """`(m, n)`: what takes a line of `n` pixels to `m` of another size, centre on centre, `n // 2` to
    `m // 2`.

    Interpolation by the line's own Fourier series, up to the finest detail that both pixel sizes hold. Where
    `n` and `m` pixels show the same field it is a Fourier crop.
    """
    at = (np.arange(m) - m // 2) * new_pixel_size_A / pixel_size_A + n // 2
    finest = min(n / 2, n / 2 * pixel_size_A / new_pixel_size_A)
    k = np.arange(1, math.ceil(finest - 1e-9))
    phase = 2 * np.pi / n * k
    terms = np.cos(at[:, None] * phase) @ np.cos(np.arange(n)[:, None] * phase).T
    terms += np.sin(at[:, None] * phase) @ np.sin(np.arange(n)[:, None] * phase).T
    return np.asarray((1 + 2 * terms) / n, np.float32)


def resampled(images: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images `(k, c, n, n)` → `(k, c, m, m)` by the matrix of `resampling`."""
    m, n = matrix.shape
    # two products of whole blocks: one small product per image starts threads for each
    along_x = (images.reshape(-1, n) @ matrix.T).reshape(-1, images.shape[1], n, m)
    return np.asarray(np.einsum("yj,kcjx->kcyx", matrix, along_x, optimize=True), np.float32)


class AtOneScale:
    """A stack of images of several kinds as one of a single box and pixel size, made as they are read."""

    def __init__(self, images: Images, pixel_size_A: NDArray[np.float64], scale: Scale) -> None:
        self._images, self._size, self.scale = images, np.asarray(pixel_size_A, np.float64), scale
        self._boxes = np.asarray(images.box_px)
        self._matrices: dict[tuple[int, float], NDArray[np.float32]] = {}

    @property
    def box_px(self) -> NDArray[Any]:
        """`(N,)`, all the same."""
        return np.full(len(self._boxes), self.scale.box_px)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(k, c, m, m)`."""
        rows = np.asarray(rows, np.int64)
        out: NDArray[np.float32] | None = None
        kinds = np.stack([self._boxes[rows].astype(np.float64), self._size[rows]], 1)
        for box, size in np.unique(kinds, axis=0).tolist():
            at = np.flatnonzero((kinds == (box, size)).all(1))
            images = self._images.read(rows[at])
            if out is None:
                m = self.scale.box_px
                out = np.empty((len(rows), images.shape[1], m, m), np.float32)
            out[at] = resampled(images, self._matrix(int(box), size))
        assert out is not None
        return out

    def _matrix(self, box: int, size: float) -> NDArray[np.float32]:
        if (box, size) not in self._matrices:
            self._matrices[box, size] = resampling(box, size, self.scale.box_px, self.scale.pixel_size_A)
        return self._matrices[box, size]
