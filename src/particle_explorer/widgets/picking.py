"""Selecting by what particles are: neighbours in the latent space, one micrograph, one group."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.state import Mask
from particle_explorer.widgets.colours import is_category

Floats = NDArray[np.floating]
BLOCK = 1 << 16


def nearest(points: Floats, to: Floats, k: int) -> Mask:
    """`(n,)` the `k` of `points (n, d)` nearest to `to (d,)`; unknown positions are never among them."""
    squares = np.empty(len(points), np.float32)
    centre = np.asarray(to, points.dtype)
    for start in range(0, len(points), BLOCK):  # stays in the processor's cache
        away = points[start : start + BLOCK] - centre
        np.einsum("ij,ij->i", away, away, out=squares[start : start + BLOCK], casting="same_kind")
    known = np.isfinite(squares)
    squares[~known] = np.inf
    k = min(k, int(np.count_nonzero(known)))
    mask = np.zeros(len(points), bool)
    if k:
        mask[np.argpartition(squares, k - 1)[:k]] = True
    return mask


def same(column: pd.Series, rows: NDArray[np.intp]) -> Mask:
    """`(n,)` all particles that share the value of one of `rows` in a column."""
    values = column.iloc[rows].dropna().unique()
    return np.asarray(column.isin(values), bool)


def micrographs(features: pd.DataFrame) -> str | None:
    """The column that names micrographs, if there is one with more than one name."""
    for name in ("micrograph", "rlnMicrographName", "location/micrograph_path"):
        if name in features and features[name].nunique() > 1:
            return name
    return None


def groups(features: pd.DataFrame, preferred: str | None) -> str | None:
    """The column that sorts particles into groups: the one they are coloured by, else the newest clusters."""
    if preferred and preferred in features and is_category(preferred, features[preferred]):
        return preferred
    found = [name for name in map(str, features.columns) if re.match(r"cluster", name)]
    if found:
        return found[-1]
    return "class_id" if "class_id" in features and features["class_id"].nunique() > 1 else None
