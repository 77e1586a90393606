"""Images turned by three shears, compiled: what averaging large stacks takes instead of splines.

    R(a) = X(-tan a/2) · Y(sin a) · X(-tan a/2)        (Paeth 1986; Unser, Thévenaz & Yaroslavsky 1995)

A shear moves every row (or column) by a constant, so it is a filter of eight taps along contiguous
memory and needs no gathering. Angles beyond 45° are quarter turns of the sum, which cost nothing per image.
Poses are those of `pose`: an image is moved back, x_ref = R(-angle) (x_img - shift) about n // 2, in one go
from the original; what lies outside an image counts as its background, 0.

Numba compiles these functions at their first use on a computer (about ten seconds) and keeps the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

TAPS = 8
STEPS = 512
"""Fractions of a pixel in the table of filters; the next one is at most 1/1024 px away."""
LANES = 16
"""Rows that are turned into columns together: one line of the cache."""
# NaN must stay NaN, so that it is found
_COMPILED: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


def _filters(beta: float = 5.0) -> NDArray[np.float32]:
    """`(STEPS + 1, TAPS)` Kaiser-windowed sinc at the fractions 0 … 1."""
    fraction = np.arange(STEPS + 1) / STEPS
    away = np.arange(TAPS) - (TAPS // 2 - 1) - fraction[:, None]
    window = np.i0(beta * np.sqrt(np.clip(1 - (away / (TAPS / 2)) ** 2, 0, None)))
    taps = np.sinc(away) * window
    return np.asarray(taps / taps.sum(1, keepdims=True), dtype=np.float32)


FILTERS = _filters()


@functools.cache
def transfer(n: int) -> NDArray[np.float64]:
    """`(n + 1,)` mean amplitude that three shears leave of the frequencies 0 … 1 / √2 per pixel.

    1 up to 0.3 and 0.62 at 0.5; dividing a sum of many turned images by it gives back the amplitudes.
    """
    fraction = np.arange(0, STEPS + 1, 8) / STEPS
    away = np.arange(TAPS) - (TAPS // 2 - 1) - fraction[:, None]
    line = np.linspace(0, 1.5, 601)
    one = np.cos(2 * np.pi * line[:, None, None] * away) * FILTERS[::8]
    one_filter = one.sum(-1).mean(-1)
    size = np.linspace(0, math.sqrt(0.5), n + 1)
    turn, direction = np.meshgrid(np.deg2rad(np.arange(-45, 46, 3)), np.deg2rad(np.arange(0, 360, 5)))
    x = size[:, None, None] * np.cos(direction)
    y = size[:, None, None] * np.sin(direction) - np.tan(turn / 2) * x
    z = x + np.sin(turn) * y
    left = np.ones_like(x)
    for frequency in (x, y, z):
        left = left * np.interp(np.abs(frequency), line, one_filter)
    return np.asarray(np.maximum(left.mean((1, 2)), 0.2))


def corners(n: int) -> NDArray[np.int64]:
    """`(n, 2)` per row: where the circle inside the box begins and ends; outside it is background."""
    y = np.arange(n) - n // 2
    inside = np.hypot(y[:, None], y[None, :]) <= n / 2
    first = inside.argmax(1)
    last = n - inside[:, ::-1].argmax(1)
    empty = ~inside.any(1)
    return np.stack([np.where(empty, n, first), np.where(empty, n, last)], 1).astype(np.int64)


def split_angle(angle_deg: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Quarter turns 0 … 3 and the rest within ±45°, in radians."""
    quarter = np.rint(np.asarray(angle_deg, dtype=np.float64) / 90.0)
    return (quarter.astype(np.int64) % 4), np.deg2rad(angle_deg - 90.0 * quarter)


def quarter_turned(images: NDArray[Any], quarter: int) -> NDArray[Any]:
    """`(..., n, n)`: the picture A(u) = B(R(90° · quarter) u) about n // 2."""
    if quarter % 4 == 0:
        return images
    n = images.shape[-1]
    pad = [(0, 0)] * (images.ndim - 2) + [(0, 1 - n % 2)] * 2
    # an even box has one more pixel before its centre than behind it
    return np.rot90(np.pad(images, pad), quarter, axes=(-2, -1))[..., :n, :n]


def backgrounds(images: NDArray[np.float32], spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """`(b, c)` means outside the circle; NaN or infinite where anything in the image is."""
    sums = np.empty((*images.shape[:2], 2))
    _sums(images, spans, sums)
    n = images.shape[-1]
    count = max(1, n * n - int((spans[:, 1] - spans[:, 0]).sum()))
    means = np.where(np.isfinite(sums[..., 1]), sums[..., 0] / count, np.nan)
    return means.astype(np.float32)


@njit(**_COMPILED)
def _sums(images: NDArray[np.float32], spans: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    n = images.shape[-1]
    for i in range(images.shape[0]):
        for k in range(images.shape[1]):
            outside, inside = 0.0, 0.0
            for y in range(n):
                row = images[i, k, y]
                first, last = spans[y]
                a, b = np.float32(0), np.float32(0)
                for x in range(first):
                    a += row[x]
                for x in range(last, n):
                    a += row[x]
                for x in range(first, last):
                    b += row[x]
                outside += float(a)
                inside += float(b)
            out[i, k, 0] = outside
            out[i, k, 1] = inside + outside


@njit(**_COMPILED)
def _filtered(x: NDArray[np.float32], w: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for j in range(len(out)):
        out[j] = (w0 * x[j] + w1 * x[j + 1] + w2 * x[j + 2] + w3 * x[j + 3]) + (
            w4 * x[j + 4] + w5 * x[j + 5] + w6 * x[j + 6] + w7 * x[j + 7]
        )


@njit(**_COMPILED)
def _add_filtered(
    x: NDArray[np.float32], w: NDArray[np.float32], weight: np.float32, out: NDArray[np.float32]
) -> None:
    w0, w1, w2, w3 = weight * w[0], weight * w[1], weight * w[2], weight * w[3]
    w4, w5, w6, w7 = weight * w[4], weight * w[5], weight * w[6], weight * w[7]
    for j in range(len(out)):
        out[j] += (w0 * x[j] + w1 * x[j + 1] + w2 * x[j + 2] + w3 * x[j + 3]) + (
            w4 * x[j + 4] + w5 * x[j + 5] + w6 * x[j + 6] + w7 * x[j + 7]
        )


@njit(**_COMPILED)
def _stand_up(tile: NDArray[np.float32], width: int, y: NDArray[np.float32], at: int, rows: int) -> None:
    """Rows of `tile` become the columns `at` … of `y`."""
    if rows == LANES:
        for j in range(width):
            column = y[j, at : at + LANES]
            for r in range(LANES):
                column[r] = tile[r, j]
    else:
        for j in range(width):
            for r in range(rows):
                y[j, at + r] = tile[r, j]


@njit(**_COMPILED)
def _turn(image, background, angle, shift_y, shift_x, weight, filters, line, tile, first, second, out):  # type: ignore[no-untyped-def]
    n = image.shape[0]
    centre = n // 2
    shear_x, shear_y = -math.tan(angle / 2), math.sin(angle)
    width = (int(n * (1 + abs(shear_x))) + 12 + LANES - 1) // LANES * LANES
    middle = width // 2
    line_pad, first_pad, second_pad = (len(line) - n) // 2, (first.shape[1] - n) // 2, LANES
    for i0 in range(0, n, LANES):
        rows = min(LANES, n - i0)
        for r in range(rows):
            i = i0 + r
            row = image[i]
            for j in range(n):
                line[line_pad + j] = row[j] - background
            at = line_pad + centre - middle + shear_x * (i - centre - shift_y) + shift_x
            whole = math.floor(at)
            q = int((at - whole) * STEPS + 0.5)
            if whole < 3 or whole + width + 5 > len(line):  # moved out of the box altogether
                tile[r, :width] = 0
            else:
                _filtered(line[whole - 3 : whole + width + 5], filters[q], tile[r, :width])
        _stand_up(tile, width, first, first_pad + i0, rows)
    for j0 in range(0, width, LANES):
        for r in range(LANES):
            at = first_pad + shear_y * (j0 + r - middle) + shift_y
            whole = math.floor(at)
            q = int((at - whole) * STEPS + 0.5)
            if whole < 3 or whole + n + 5 > first.shape[1]:
                tile[r, :n] = 0
            else:
                _filtered(first[j0 + r, whole - 3 : whole + n + 5], filters[q], tile[r, :n])
        _stand_up(tile, n, second, second_pad + j0, LANES)
    for i in range(n):
        at = second_pad + middle - centre + shear_x * (i - centre)
        whole = math.floor(at)
        q = int((at - whole) * STEPS + 0.5)
        _add_filtered(second[i, whole - 3 : whole + n + 5], filters[q], weight, out[i])


@njit(**_COMPILED)
def add_turned(  # type: ignore[no-untyped-def]
    images, background, chosen, angle, shift_yx, weight, place, filters, line, tile, first, second, out
):
    """Add the images `chosen` `(k,)` of `(b, c, n, n)`, moved back, to the `(c, n, n)` of `out[place]`.

    `angle` in radians within ±45°; `background` `(b, c)`; `angle`, `shift_yx`, `weight` and `place` have `k`
    rows.
    """
    for k in range(len(chosen)):
        i = chosen[k]
        for channel in range(images.shape[1]):
            _turn(
                images[i, channel],
                background[i, channel],
                angle[k],
                shift_yx[k, 0],
                shift_yx[k, 1],
                weight[k],
                filters,
                line,
                tile,
                first,
                second,
                out[place[k], channel],
            )


class Turner:
    """Moves images of n px back and adds them up; its buffers serve one thread."""

    def __init__(self, n: int) -> None:
        width = (int(n * 1.4143) + 12 + 2 * LANES) // LANES * LANES
        self.line = np.zeros(n + 4 * n, np.float32)
        self.tile = np.zeros((LANES, max(width, n)), np.float32)
        self.first = np.zeros((width, n + 4 * n), np.float32)
        self.second = np.zeros((n, width + 3 * LANES), np.float32)

    def add(
        self,
        images: NDArray[np.float32],
        background: NDArray[np.float32],
        chosen: NDArray[np.int64],
        angle_rad: NDArray[np.float64],
        shift_yx_px: NDArray[np.float64],
        weight: NDArray[np.float32],
        place: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> None:
        """`add_turned` with these buffers."""
        add_turned(
            images,
            background,
            chosen,
            angle_rad,
            shift_yx_px,
            weight,
            place,
            FILTERS,
            self.line,
            self.tile,
            self.first,
            self.second,
            out,
        )
