"""Columns as colours and words: which map suits which column, and what a microscopist calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Kind = Literal["none", "category", "continuous", "cyclic"]

# Okabe & Ito's colours that can be told apart by everybody (their black is left out: it is a background)
OKABE_ITO = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
TAB20 = (
    "1f77b4 aec7e8 ff7f0e ffbb78 2ca02c 98df8a d62728 ff9896 9467bd c5b0d5 "
    "8c564b c49c94 e377c2 f7b6d2 7f7f7f c7c7c7 bcbd22 dbdb8d 17becf 9edae5"
).split()
CATEGORY_COLOURS = (*OKABE_ITO, *TAB20)
# 17 and 25 anchors of matplotlib's viridis and twilight (CC0); straight lines in between differ by < 6 of 255
VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26818e 21908c 1f9f88 28ae80 3ebc74 5dc963 82d34c "
    "abdc32 d5e21a fde725"
).split()
TWILIGHT = (
    "e2d9e2 d1d4da b3c6ce 94b4c7 7ba1c2 6b8dbf 6275ba 5f5eb3 5e43a5 592a8f 4e186f 3c114c 301437 3f123d "
    "581648 751e4f 8e2c50 a23f50 b25752 be705b c6896d cca489 d4bcad ddd0ce e2d9e2"
).split()

N_LEVELS = 256
MAX_CATEGORIES = 40
"""Whole numbers with more different values than this are coloured as a range, not as categories."""
LIMITS_SAMPLE = 100_000
"""Rows looked at for the colour range; more do not move a percentile that one can see."""


def rgb(colours: tuple[str, ...] | list[str]) -> NDArray[np.float64]:
    """`(k, 3)` in 0..255 from hexadecimal texts."""
    return np.array([[int(text[i : i + 2], 16) for i in (0, 2, 4)] for text in colours], float)


def ramp(anchors: tuple[str, ...] | list[str], n: int = N_LEVELS) -> NDArray[np.float64]:
    """`(n, 3)` in 0..255: straight lines between the anchors."""
    values = rgb(anchors)
    at, grid = np.linspace(0, 1, len(values)), np.linspace(0, 1, n)
    return np.stack([np.interp(grid, at, values[:, channel]) for channel in range(3)], axis=1)


# both ends of a map must show on black and on white: viridis starts a little later, twilight is squeezed
RANGE = ramp(VIRIDIS, 276)[20:]
DENSITY = RANGE
CIRCLE = 50 + ramp(TWILIGHT) * 0.66


@dataclass(frozen=True)
class Colouring:
    """What each of `n` particles is coloured by.

    `level (n,)` uint16 points into `lut (k, 3)` (0..255); the level `k` stands for "no value".
    """

    level: NDArray[np.uint16]
    lut: NDArray[np.float64]
    kind: Kind = "none"
    title: str = ""
    low: float = 0.0
    high: float = 1.0
    labels: tuple[str, ...] = ()
    values: NDArray[np.generic] | None = field(default=None, repr=False)

    @property
    def missing(self) -> int:
        return len(self.lut)

    def text(self, row: int) -> str:
        """The value of one particle in words, without the title."""
        if self.kind == "none":
            return ""
        if self.kind == "category":
            level = int(self.level[row])
            return self.labels[level] if level < len(self.labels) else "no value"
        if self.values is None or not np.isfinite(float(self.values[row])):
            return "no value"
        return number(float(self.values[row]), step=abs(self.high - self.low) / 1000)


def plain(n: int) -> Colouring:
    """All particles in one colour."""
    return Colouring(np.zeros(n, np.uint16), rgb(["56b4e9"]), title="")


def colour_by(name: str, values: pd.Series | NDArray[np.generic], title: str = "") -> Colouring:
    """The colouring that suits a column: categories, a range, or a circle for angles over a full turn."""
    series = pd.Series(np.asarray(values)) if not isinstance(values, pd.Series) else values
    title = title or title_of(name)
    if is_category(name, series):
        return _categories(series, title)
    numbers = np.asarray(series, float)
    if is_angle(name):
        return _cyclic(numbers, title)
    sample = numbers[:: max(1, numbers.size // LIMITS_SAMPLE)]
    sample = sample[np.isfinite(sample)]
    low, high = (float(v) for v in np.percentile(sample, (0.5, 99.5))) if sample.size else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return _ranged(numbers, title, low, high)


def recoloured(colouring: Colouring, colours: Mapping[str, str]) -> Colouring:
    """Categories with colours of their own, `{label: hexadecimal}`, for some of them."""
    if colouring.kind != "category" or not colours:
        return colouring
    lut = colouring.lut.copy()
    for i, label in enumerate(colouring.labels):
        if label in colours:
            lut[i] = rgb([colours[label]])[0]
    return replace(colouring, lut=lut)


def with_limits(colouring: Colouring, low: float, high: float) -> Colouring:
    """A continuous colouring over another range; values beyond have the colours of its ends."""
    assert colouring.kind == "continuous" and colouring.values is not None
    return _ranged(np.asarray(colouring.values, float), colouring.title, low, high)


def _ranged(numbers: NDArray[np.float64], title: str, low: float, high: float) -> Colouring:
    scaled = np.clip((numbers - low) * ((N_LEVELS - 1) / (high - low)), 0, N_LEVELS - 1)
    return Colouring(_levels(scaled), RANGE, "continuous", title, low, high, values=numbers)


def is_category(name: str, series: pd.Series) -> bool:
    """Whether a column names groups: texts, yes/no, and whole numbers of few different values."""
    if series.dtype.kind == "b" or not pd.api.types.is_numeric_dtype(series):
        return True
    if series.dtype.kind in "iu":
        head = series.iloc[:LIMITS_SAMPLE]
        return bool(head.nunique() <= MAX_CATEGORIES)
    return bool(re.search(r"class|cluster|group", name, re.IGNORECASE)) and series.nunique() <= MAX_CATEGORIES


def is_angle(name: str) -> bool:
    """Whether a column is an angle over the full turn (defocus angles repeat after 180° and are not)."""
    if name.startswith("rlnAngle"):
        return name in ("rlnAnglePsi", "rlnAngleRot")
    return name.endswith("angle_deg") and "defocus" not in name


def _levels(scaled: NDArray[np.float64]) -> NDArray[np.uint16]:
    known = np.isfinite(scaled)
    return np.where(known, np.where(known, scaled, 0), N_LEVELS).astype(np.uint16)


def _cyclic(degrees: NDArray[np.float64], title: str) -> Colouring:
    turn = np.mod(degrees + 180.0, 360.0)
    return Colouring(
        _levels(turn * (N_LEVELS / 360.0) % N_LEVELS), CIRCLE, "cyclic", title, -180.0, 180.0, values=degrees
    )


def _categories(series: pd.Series, title: str) -> Colouring:
    codes, uniques = pd.factorize(series, sort=series.dtype.kind in "biuf")
    if series.dtype.kind not in "biuf":
        texts = np.array([str(value) for value in uniques])
        order = np.argsort(texts, kind="stable")
        rank = np.empty(len(order), np.intp)
        rank[order] = np.arange(len(order))
        codes = np.where(codes >= 0, rank[codes], -1) if len(order) else codes
        labels = tuple(str(text) for text in texts[order])
    elif series.dtype.kind == "b":
        labels = tuple("yes" if value else "no" for value in uniques)
    else:
        labels = tuple(f"{value:g}" for value in uniques)
    n = min(len(labels), 2**16 - 2)  # more different texts than a uint16 can hold share the last colour
    colours = rgb([CATEGORY_COLOURS[i % len(CATEGORY_COLOURS)] for i in range(max(n, 1))])
    level = np.where(codes >= 0, np.minimum(codes, n - 1), len(colours)).astype(np.uint16)
    return Colouring(level, colours, "category", title, labels=labels[: max(n, 1)])


UNITS = {"A": "Å", "px": "px", "deg": "°", "kV": "kV", "mm": "mm"}
TITLES = {
    "angle_deg": "angle (°)",
    "shift_y_px": "shift y (px)",
    "shift_x_px": "shift x (px)",
    "log_likelihood": "log-likelihood",
    "class_id": "class",
    "residual": "reconstruction error",
    "angle_std_deg": "uncertainty of angle (°)",
    "shift_std_px": "uncertainty of shift (px)",
    "pose_entropy": "uncertainty of pose (entropy)",
    "spherical_aberration_mm": "spherical aberration (mm)",
    "source_row": "row in the file",
    "stack_index": "position in the stack",
    "stack_path": "stack",
    "pixel_size_A": "pixel size (Å)",
    "box_px": "box (px)",
    "ctf_state": "CTF state",
}


CLUSTERS = {
    "kmeans": "k-means cluster",
    "gmm": "Gaussian cluster",
    "hdbscan": "HDBSCAN cluster",
    "ward": "Ward cluster",
    "named": "named group",
    "regrouped": "regrouped cluster",
}


def title_of(column: str) -> str:
    """The name of a column in a microscopist's words; a column of the user's file keeps its own name."""
    if column in TITLES:
        return TITLES[column]
    for pattern, words in (
        (r"z_(\d+)", "map {}"),
        (r"z_std_(\d+)", "uncertainty of map {}"),
        (r"pc_(\d+)", "principal component {}"),
    ):
        if found := re.fullmatch(pattern, column):
            return words.format(int(found[1]) + 1)
    if found := re.fullmatch(r"(umap|tsne)(?:-(\d+))?_(\d+)", column):
        run = f" (run {found[2]})" if found[2] and found[2] != "1" else ""
        return f"{'UMAP' if found[1] == 'umap' else 't-SNE'} {int(found[3]) + 1}{run}"
    if found := re.fullmatch(r"cluster-(kmeans|gmm|hdbscan|ward|named|regrouped)(?:-(\d+))?", column):
        return CLUSTERS[found[1]] + (f" (run {found[2]})" if found[2] else "")
    if found := re.fullmatch(r"pose-held(-\d+)? (.+)", column):
        return f"{title_of(found[2])}, held still"
    if re.match(r"(_?rln[A-Z]|.*/)", column):
        return column
    words = column
    unit = ""
    stem, _, last = column.rpartition("_")
    if stem and last in UNITS:
        words, unit = stem, f" ({UNITS[last]})"
    return words.replace("_", " ").replace("kmeans", "k-means") + unit


def number(value: float, *, step: float = 0.0) -> str:
    """A number with the digits that steps of `step` need; spaces between thousands."""
    if abs(value) < step * 1e-6 or value == 0:
        return "0"
    step = step or abs(value) / 100
    if abs(value) >= 1e6 or abs(value) < 1e-3 or step < 1e-5:
        return f"{value:.3g}".replace("-", "−")
    digits = int(np.clip(-np.floor(np.log10(step) + 1e-9), 0, 5))
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")
