"""The micrographs that particles were cut from: where particles lie in them, and a picture to see it in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io.joining import micrograph_pixel_size, places
from particle_explorer.io.mrc import MrcFile
from particle_explorer.io.paths import find_file

MOST_PX = 2048
"""Longest side of a picture that is shown; larger micrographs are averaged down."""


@dataclass(frozen=True)
class Locations:
    """Where all `n` particles of a table lie."""

    names: tuple[str, ...]
    """of the micrographs, in the order of the table"""
    micrograph: NDArray[np.intp]
    """`(n,)` index into `names`"""
    xy_px: NDArray[np.float64]
    """`(n, 2)` in pixels of the micrograph"""
    pixel_size_A: NDArray[np.float64]
    """`(n,)` of the micrographs, NaN where the file does not say"""
    size_px: NDArray[np.float64]
    """`(n,)` side of the box as extracted, in pixels of the micrograph"""

    @classmethod
    def of(cls, table: pd.DataFrame, what: str) -> Locations:
        """Of a table of particles; a `UserError` says what it lacks, `what` being its name."""
        names, xy = places(table, what)
        codes, unique = pd.factorize(names, sort=False)
        size = micrograph_pixel_size(table)
        own = table["pixel_size_A"].to_numpy(np.float64)
        factor = np.where(np.isfinite(size) & np.isfinite(own) & (size > 0), own / size, 1.0)
        box = table["box_px"].to_numpy(np.float64) * factor
        return cls(tuple(map(str, unique)), np.asarray(codes, np.intp), xy, size, box)

    def counts(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """`(k,)` particles of a mask on each micrograph."""
        return np.bincount(self.micrograph[mask], minlength=len(self.names)).astype(np.int64)


@dataclass(frozen=True)
class Picture:
    """A micrograph as it is shown."""

    pixels: NDArray[np.float32]
    """`(h, w)`"""
    binning: int
    """Pixels of the micrograph that became one, along each side"""
    limits: tuple[float, float]
    """Grey values to show it with"""


def find(name: str, source: Path, stack: Path) -> Path | None:
    """The file of a micrograph: from where the star or cs file lay, else from where the stacks were found."""
    return find_file(name, source) or find_file(name, stack)


def read(path: Path) -> Picture:
    """Read a micrograph, averaged down to `MOST_PX`; of several frames the first."""
    if path.suffix.lower() not in (".mrc", ".mrcs", ".gz", ".bz2"):
        raise UserError(f"{path.name} is not an MRC file; only MRC micrographs are shown")
    pixels = MrcFile(path, square=False).read(np.zeros(1, np.int64))[0, 0]
    binning = max(1, -(-max(pixels.shape) // MOST_PX))
    h, w = (side // binning for side in pixels.shape)
    if binning > 1:
        pixels = pixels[: h * binning, : w * binning]
        pixels = pixels.reshape(h, binning, w, binning).mean((1, 3), dtype=np.float32)
    some = pixels[:: max(1, h // 256), :: max(1, w // 256)]
    low, high = (float(value) for value in np.nanpercentile(some, [1, 99]))
    return Picture(pixels, binning, (low, max(high, low + 1e-6)))
