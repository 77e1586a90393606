"""Images turned by three shears, compiled: what averaging large stacks takes instead of splines.

    R(a) = X(-tan a/2) · Y(sin a) · X(-tan a/2)        (Paeth 1986; Unser, Thévenaz & Yaroslavsky 1995)

A shear moves every row (or column) by a constant, so it is a filter of eight taps and needs no gathering.
Sixteen rows, each moved by its own whole pixels, are stood up into columns in registers (`vectors`); there
their filters meet the same pixels of all of them at once. What comes out lies the other way round, as the
next shear wants it; three shears leave the picture transposed. Between the shears pixels are numbers of 16
bits, of which processors multiply and add two where they do one of 32; what rounding adds to the noise of an
image is less than 10⁻⁶ of its power. Angles beyond 45° are quarter turns of the sum, which cost nothing per
image. Poses are those of `pose`: an image is moved back, x_ref = R(-angle) (x_img - shift) about n // 2, in
one go from the original; what lies outside an image counts as its background, 0.

Numba compiles these functions at their first use on a computer (about three seconds) and keeps the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from particle_explorer.vectors import (
    COLUMNS,
    LANES,
    MOST,
    ONE,
    TAPS,
    add_filtered,
    put_filtered,
    shorten,
    stand_up,
)

STEPS = 512
"""Fractions of a pixel in the table of filters; the next one is at most 1/1024 px away."""
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


def _pairs() -> NDArray[np.int32]:
    """`(STEPS + 1, TAPS / 2)`: two taps of 16 bits each, which add up to exactly 1."""
    taps = np.rint(FILTERS * np.float32(1 << ONE)).astype(np.int64)
    largest = taps.argmax(1)[:, None]
    np.put_along_axis(
        taps,
        largest,
        np.take_along_axis(taps, largest, 1) + (1 << ONE) - taps.sum(1, keepdims=True),
        1,
    )
    low, high = (taps[:, i::2].astype(np.int16).view(np.uint16).astype(np.uint32) for i in (0, 1))
    return np.ascontiguousarray(low | high << np.uint32(16)).view(np.int32)


PAIRS = _pairs()


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


@functools.cache
def corners(n: int) -> NDArray[np.float32]:
    """`(n, n)`: what every pixel counts in the background, the mean outside the circle inside the box."""
    y = np.arange(n) - n // 2
    outside = np.hypot(y[:, None], y[None, :]) > n / 2
    return np.asarray(outside / max(1, outside.sum()), dtype=np.float32)


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


def covered(n: int, angle_rad: NDArray[np.float64], shift_yx_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(k,)` share of the turned box that lies inside the image; the rest of it holds no noise."""
    share = np.empty(len(angle_rad))
    _covered(np.asarray(angle_rad), np.asarray(shift_yx_px) / n, share)
    return share


@njit(**_COMPILED)
def _covered(angle: NDArray[np.float64], shift_yx: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    side = 32
    for k in range(len(angle)):
        cos, sin = math.cos(angle[k]), math.sin(angle[k])
        inside = 0
        for i in range(side):
            y = (i + 0.5) / side - 0.5
            for j in range(side):
                x = (j + 0.5) / side - 0.5
                at_x, at_y = cos * x - sin * y + shift_yx[k, 1], sin * x + cos * y + shift_yx[k, 0]
                inside += (abs(at_x) <= 0.5) & (abs(at_y) <= 0.5)
        out[k] = inside / side**2


# --- one image ----------------------------------------------------------------------------------------------


@njit(**_COMPILED)
def _weighted(image, weight):  # type: ignore[no-untyped-def]
    n, total = image.shape[0], 0.0
    for i in range(n):
        row, share, part = image[i], weight[i], np.float32(0)
        for j in range(n):  # 0 · NaN is NaN, 0 · ∞ too
            part += row[j] * share[j]
        total += float(part)
    return np.float32(total)


@njit(**_COMPILED)
def _size(image, background):  # type: ignore[no-untyped-def]
    """At least as much as any pixel is away from the background, and not much more: (Σ |d|⁸)^⅛, which a
    processor finds sooner than the largest."""
    pixels = image.reshape(-1)
    some = np.float32(0)
    for j in range(len(pixels) // 8):
        some += abs(pixels[j] - background)
    if some > 0:
        per_unit, total = np.float32(len(pixels) // 8) / some, 0.0
        for start in range(0, len(pixels), 2048):
            row, part = pixels[start : start + 2048], np.float32(0)
            for j in range(len(row)):
                away = (row[j] - background) * per_unit
                away *= away
                away *= away
                part += away * away
            total += float(part)
        if total < 1e37:
            return math.sqrt(math.sqrt(math.sqrt(total))) / per_unit
    largest = 0.0
    for j in range(len(pixels)):
        largest = max(largest, abs(pixels[j] - background))
    return largest


@njit(**_COMPILED)
def _set_filter(r, at, filters, of_rows):  # type: ignore[no-untyped-def]
    """The filter of row `r` that reads at `at`; returns the first pixel it meets."""
    whole = math.floor(at)
    q = int((at - whole) * STEPS + 0.5)
    for t in range(TAPS // 2):
        of_rows[t * LANES + r] = filters[q, t]
    return int(whole) - (TAPS // 2 - 1)


@njit(**_COMPILED)
def _turn(  # type: ignore[no-untyped-def]
    image,
    background,
    angle,
    shift_y,
    shift_x,
    weight,
    filters,
    line,
    lines,
    first,
    second,
    tile,
    offsets,
    of_rows,
    out,
):
    n, side = image.shape[0], out.shape[0]
    largest = _size(image, background)
    if not largest > 0:
        return
    per_unit, nought = np.float32(MOST / largest), np.float32(0)
    added = np.float32(MOST + 1.5 - background * float(per_unit))
    back = np.float32(weight * largest / MOST / (1 << ONE))
    centre = n // 2
    shear_x, shear_y = -math.tan(angle / 2), math.sin(angle)
    width = (int(n * (1 + abs(shear_x))) + 12 + COLUMNS - 1) // COLUMNS * COLUMNS
    middle = width // 2
    line_length, first_length, second_length = lines.shape[1], first.shape[1], second.shape[1]
    line_pad, first_pad = (line_length - n) // 2, (first_length - side - COLUMNS) // 2
    second_pad = 2 * COLUMNS
    flat_lines, flat_first, flat_second = lines.reshape(-1), first.reshape(-1), second.reshape(-1)
    flat_out, row_length = out.reshape(-1), out.shape[1]
    nothing = LANES * line_length  # the last row of `lines` is 0
    for i0 in range(0, side, LANES):
        low, high = width, 0
        for r in range(LANES):
            i = i0 + r
            if i >= n:
                offsets[r] = nothing
                _set_filter(r, 0.0, filters, of_rows)
                continue
            place = r * line_length + line_pad
            for j in range(0, n - LANES + 1, LANES):
                shorten(image[i], j, per_unit, added, flat_lines, place + j)
            if n % LANES:
                line[: n % LANES] = image[i, n - n % LANES :]
                shorten(line, 0, per_unit, added, flat_lines, place + n - n % LANES)
                flat_lines[place + n : place + n + LANES] = 0
            at = line_pad + centre - middle + shear_x * (i - centre - shift_y) + shift_x
            start = _set_filter(r, at, filters, of_rows)
            if start < 0 or start + width + TAPS + COLUMNS > line_length:  # moved out of the box altogether
                offsets[r] = nothing
            else:
                offsets[r] = r * line_length + start
                low, high = min(low, line_pad - start - TAPS), max(high, line_pad + n - start)
        begin, end = max(0, low) // COLUMNS, (max(0, min(width, high)) + COLUMNS - 1) // COLUMNS
        for b in range(begin, end + 1):
            stand_up(flat_lines, offsets, b * COLUMNS, tile)
        at_row = first_pad + i0
        for j in range(begin * COLUMNS):
            flat_first[at_row + j * first_length : at_row + j * first_length + LANES] = 0
        for b in range(begin, end):
            place = at_row + b * COLUMNS * first_length
            put_filtered(tile, b * COLUMNS, of_rows, flat_first, place, first_length, nought)
        for j in range(max(begin, end) * COLUMNS, width):
            flat_first[at_row + j * first_length : at_row + j * first_length + LANES] = 0
    blocks = side // COLUMNS
    nothing = (first.shape[0] - 1) * first_length
    for j0 in range(0, width, LANES):
        for r in range(LANES):
            at = first_pad + shear_y * (j0 + r - middle) + shift_y
            start = _set_filter(r, at, filters, of_rows)
            if start < 0 or start + side + TAPS + COLUMNS > first_length:
                offsets[r] = nothing
            else:
                offsets[r] = (j0 + r) * first_length + start
        begin, end = blocks, 0
        for b in range(blocks):  # rows that meet these columns in the last shear
            one_end = middle - centre + shear_x * (b * COLUMNS - centre)
            other = middle - centre + shear_x * (b * COLUMNS + COLUMNS - 1 - centre)
            if j0 + LANES > min(one_end, other) - TAPS and j0 < max(one_end, other) + side + TAPS + 1:
                begin, end = min(begin, b), max(end, b + 1)
        if begin < end:
            for b in range(begin, end + 1):
                stand_up(flat_first, offsets, b * COLUMNS, tile)
        for b in range(begin, end):
            place = b * COLUMNS * second_length + second_pad + j0
            put_filtered(tile, b * COLUMNS, of_rows, flat_second, place, second_length, nought)
    for i0 in range(0, side, LANES):
        for r in range(LANES):
            at = second_pad + middle - centre + shear_x * (i0 + r - centre)
            offsets[r] = (i0 + r) * second_length + _set_filter(r, at, filters, of_rows)
        for b in range(blocks + 1):
            stand_up(flat_second, offsets, b * COLUMNS, tile)
        for b in range(blocks):
            place = b * COLUMNS * row_length + i0
            add_filtered(tile, b * COLUMNS, of_rows, flat_out, place, row_length, back)


@njit(**_COMPILED)
def _add_turned(  # type: ignore[no-untyped-def]
    images, outside, background, chosen, angle, shift_yx, weight, place,
    filters, line, lines, first, second, tile, offsets, of_rows, out,
):  # fmt: skip
    for k in range(len(chosen)):
        for channel in range(images.shape[1]):
            if k == 0 or chosen[k] != chosen[k - 1]:
                background[chosen[k], channel] = _weighted(images[chosen[k], channel], outside)
            _turn(
                images[chosen[k], channel],
                background[chosen[k], channel],
                angle[k],
                shift_yx[k, 0],
                shift_yx[k, 1],
                weight[k],
                filters,
                line,
                lines,
                first,
                second,
                tile,
                offsets,
                of_rows,
                out[place[k], channel],
            )


def zeros(*shape: int) -> NDArray[np.float32]:
    """Zeros that begin at a line of the cache."""
    size = int(np.prod(shape))
    raw = np.zeros(size + LANES, np.float32)
    start = (-raw.ctypes.data % (4 * LANES)) // 4
    return raw[start : start + size].reshape(shape)


def _shorts(*shape: int) -> NDArray[np.int16]:
    return zeros(math.prod(shape) // 2).view(np.int16).reshape(shape)


def _odd_lines(n: int, size: int = LANES) -> int:
    """At least `n`, in lines of the cache of `size` numbers, an odd number of them: rows then do not share
    places in it."""
    lines = -(-n // size)
    return (lines + 1 - lines % 2) * size


class Turner:
    """Moves images of n px back and adds them up; its buffers serve one thread."""

    def __init__(self, n: int) -> None:
        self.n, self.side = n, -(-n // COLUMNS) * COLUMNS
        width = (int(n * 1.4143) + 12 + 2 * COLUMNS) // COLUMNS * COLUMNS
        self.outside = corners(n)
        self.line = zeros(LANES)
        self.lines = _shorts(LANES + 1, _odd_lines(5 * n, COLUMNS))
        self.first = _shorts(width + 1, self.side + 2 * _odd_lines(n, COLUMNS) + COLUMNS)
        self.second = _shorts(self.side, _odd_lines(width + 5 * COLUMNS, COLUMNS))
        self.tile = zeros((width + 4 * COLUMNS) * LANES // 2).view(np.int32)
        self.offsets = np.zeros(LANES, np.int64)
        self.of_rows = zeros(TAPS // 2 * LANES).view(np.int32)

    def sums(self, *shape: int) -> NDArray[np.float32]:
        """What `add` adds to, for `shape` pictures."""
        return zeros(*shape, self.side, _odd_lines(self.side))

    def pictures(self, sums: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(..., n, n)` of the sums."""
        return np.swapaxes(sums[..., : self.n, : self.n], -1, -2)

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
        """Add the images `chosen` `(k,)`, rising, of `(b, c, n, n)`, moved back, to `out[place]`, which is of
        `sums`.

        `angle_rad` within ±45°; `angle_rad`, `shift_yx_px`, `weight` and `place` have `k` rows. What an image
        has outside the circle in its box, on average, is taken off first and noted in `background` `(b, c)`:
        NaN or infinite where anything in the image is.
        """
        _add_turned(
            images,
            self.outside,
            background,
            chosen,
            angle_rad,
            shift_yx_px,
            weight,
            place,
            PAIRS,
            self.line,
            self.lines,
            self.first,
            self.second,
            self.tile,
            self.offsets,
            self.of_rows,
            out,
        )
