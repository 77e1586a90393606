"""Is the file what it says? Poses by their four signs, and every image read once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, uniform_filter

from particle_explorer.particles import Particles
from particle_explorer.pose import rotation_matrix

SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Of angle and shift; the first is what the file means by its own format."""
_MOST = 256
_MOST_BYTES = 128 * 2**20
"""Read for the check of poses: a second from a disk, a few from a share."""
_LEAST = 24
_SIDE_PX = 48
_GROUPS = 8
_SURE = 3.0
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class PoseCheck:
    """Whether the poses of a file make a sharper average than the same poses with other signs."""

    verdict: str
    """"agrees", "disagrees", "inconclusive" or "none" (there is nothing to check)"""
    words: str
    energies: tuple[float, ...] = ()
    """Of the averages under `SIGNS`, relative to the largest"""
    n_images: int = 0


def check_poses(particles: Particles) -> PoseCheck:
    """Average a sample of one class under the four signs of angle and shift and compare what is left.

    The energy of an average is the mean product of averages of disjoint groups, in which noise has no share;
    its error comes from leaving out one group after the other.
    """
    table = particles.table
    if "angle_deg" not in table or "shift_y_px" not in table:
        return PoseCheck("none", "no in-plane poses to check")
    rows = np.arange(len(table))
    if "class_id" in table:
        values, counts = np.unique(table["class_id"], return_counts=True)
        rows = np.flatnonzero(table["class_id"] == values[np.argmax(counts)])
    boxes = particles.images.box_px[rows]
    rows = rows[boxes == np.bincount(boxes).argmax()]
    image_bytes = 4 * particles.images.n_channels * int(particles.images.box_px[rows[0]]) ** 2
    most = min(len(rows), _MOST, max(_LEAST, _MOST_BYTES // image_bytes))
    rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    if len(rows) < _LEAST:
        words = f"{len(rows)} particles of a class are too few to check their poses"
        return PoseCheck("inconclusive", words, (), len(rows))
    averages = _averages(particles, rows)  # (signs, groups, m, m)
    energy, left_out = _energies(averages)
    best = energy.max()
    if not best > 0:
        return PoseCheck("inconclusive", "no average stands out of the noise", (), len(rows))
    relative = tuple(float(value) for value in energy / best)
    beaten, beats = [], []
    for other in range(1, len(SIGNS)):
        difference = energy[0] - energy[other]
        each = left_out[0] - left_out[other]
        error = math.sqrt((_GROUPS - 1) / _GROUPS * float(np.square(each - each.mean()).sum()))
        if difference > _SURE * error and difference > 0.01 * best:
            beats.append(other)
        elif -difference > _SURE * error and -difference > 0.01 * best:
            beaten.append(other)
    shown = f"{len(rows)} particles"
    if beaten:
        angle, shift = SIGNS[max(beaten, key=lambda other: float(energy[other]))]
        turned = " and ".join([*["angles"] * (angle < 0), *["shifts"] * (shift < 0)])
        return PoseCheck(
            "disagrees",
            f"the average is sharper with the sign of the {turned} turned: the poses were written in another "
            f"convention ({shown})",
            relative,
            len(rows),
        )
    if len(beats) == len(SIGNS) - 1:
        words = f"the signs of angles and shifts fit the images ({shown})"
        return PoseCheck("agrees", words, relative, len(rows))
    if beats == [1, 3]:
        return PoseCheck(
            "inconclusive",
            f"the sign of the angles agrees with the images; the shifts are too small to tell ({shown})",
            relative,
            len(rows),
        )
    words = f"the averages under other signs are as good: nothing can be told ({shown})"
    return PoseCheck("inconclusive", words, relative, len(rows))


def _averages(particles: Particles, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Averages of interleaved groups under every pair of signs → `(4, groups, m, m)`, coarse and "
    "normalised."""
    n = int(particles.images.box_px[rows[0]])
    m = min(n, _SIDE_PX)
    step = n / m
    y, x = (np.indices((m, m)) - m // 2) * step
    table = particles.table.iloc[rows]
    angle = table["angle_deg"].to_numpy(np.float64)
    shift = table[["shift_y_px", "shift_x_px"]].to_numpy(np.float64)
    sums = np.zeros((len(SIGNS), _GROUPS, m, m))
    count = np.zeros(_GROUPS)
    for k, row in enumerate(rows):
        image = particles.images[int(row)].mean(axis=0)
        spread = float(image.std())
        is_known = np.isfinite(angle[k]) and np.isfinite(shift[k]).all()
        if not (math.isfinite(spread) and spread > 0 and is_known):
            continue
        image = uniform_filter((image - image.mean()) / spread, max(1, round(step)))
        count[k % _GROUPS] += 1
        for s, (angle_sign, shift_sign) in enumerate(SIGNS):
            (a, b), (c, d) = rotation_matrix(angle_sign * angle[k])
            dy, dx = shift_sign * shift[k]
            at = [c * x + d * y + dy + n // 2, a * x + b * y + dx + n // 2]
            sums[s, k % _GROUPS] += map_coordinates(image, at, order=1, mode="nearest")
    averages = sums / np.maximum(count, 1)[:, None, None]
    disc = np.hypot(x, y) <= 0.42 * n
    averages -= averages[..., disc].mean(axis=-1)[..., None, None]
    return np.asarray(averages * disc, np.float64)


def _energies(averages: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean product of different groups → (`(4,)` of all, `(4, groups)` without one group each)."""
    flat = averages.reshape(*averages.shape[:2], -1)
    products = np.einsum("sgp,shp->sgh", flat, flat)
    g = flat.shape[1]
    products[:, np.arange(g), np.arange(g)] = 0
    total = products.sum(axis=(1, 2))
    without = total[:, None] - 2 * products.sum(axis=2)
    return total / (g * (g - 1)), without / ((g - 1) * (g - 2))


@dataclass(frozen=True)
class Scan:
    """What a look at every image found; rows count from 0."""

    n: int
    blank: tuple[int, ...]
    """All pixels equal"""
    broken: tuple[int, ...]
    """NaN or infinite values"""
    duplicates: tuple[tuple[int, int], ...]
    """(row, earlier row) with the same pixels"""

    def lines(self) -> list[str]:
        """What was found, one fact a line; rows count from 1 here."""
        lines = [f"all {self.n} images were read"]
        both = (("blank (all pixels equal)", self.blank), ("broken (NaN or infinite)", self.broken))
        for what, rows in both:
            if rows:
                verb = "is" if len(rows) == 1 else "are"
                lines.append(f"{len(rows)} {verb} {what}: rows {_some([str(row + 1) for row in rows])}")
        if self.duplicates:
            pairs = [f"{row + 1} = {first + 1}" for row, first in self.duplicates]
            lines.append(f"{len(self.duplicates)} have the pixels of an earlier row: {_some(pairs)}")
        if len(lines) == 1:
            lines.append("none is blank or broken, no two are the same")
        return lines


def scan(particles: Particles) -> Iterator[tuple[float, Scan | None]]:
    """Read every image once: yields (share done, None), at last (1, the Scan)."""
    n = len(particles)
    images = particles.images
    boxes = images.box_px
    per_block = max(1, _BLOCK_BYTES // (4 * images.n_channels * int(boxes.max()) ** 2))
    blank: list[int] = []
    broken: list[int] = []
    seen: dict[bytes, int] = {}
    duplicates: list[tuple[int, int]] = []
    for start in range(0, n, per_block):
        rows = np.arange(start, min(start + per_block, n))
        for box in np.unique(boxes[rows]):
            some = rows[boxes[rows] == box]
            for row, image in zip(some.tolist(), images.read(some), strict=True):
                least, largest = float(image.min()), float(image.max())
                if not (math.isfinite(least) and math.isfinite(largest)):
                    broken.append(row)
                elif least == largest:
                    blank.append(row)
                else:
                    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
                    first = seen.setdefault(digest, row)
                    if first != row:
                        duplicates.append((row, first))
        yield min(1.0, (rows[-1] + 1) / n), None
    yield 1.0, Scan(n, tuple(sorted(blank)), tuple(sorted(broken)), tuple(sorted(duplicates)))


def listed_twice(particles: Particles) -> int:
    """Rows that name an image which an earlier row names already."""
    if particles.kind == "layer":
        return 0
    return int(particles.table.duplicated(["stack_path", "stack_index"]).sum())


def _some(words: list[str]) -> str:
    return ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")
