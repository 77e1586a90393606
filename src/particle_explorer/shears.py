"""Images turned by three shears, compiled: what averaging large stacks takes instead of splines.

    R(a) = X(-tan a/2) · Y(sin a) · X(-tan a/2)        (Paeth 1986; Unser, Thévenaz & Yaroslavsky 1995)

A shear moves every row (or column) by a constant, so it is a filter of eight taps and needs no gathering.
Sixteen rows, each moved by its own whole pixels, are stood up into columns in registers; there one vector
holds the same column of sixteen rows, and their sixteen filters meet it at once. What comes out lies the
other way round, as the next shear wants it; three shears leave the picture transposed. Angles beyond 45° are
quarter turns of the sum, which cost nothing per image. Poses are those of `pose`: an image is moved back,
x_ref = R(-angle) (x_img - shift) about n // 2, in one go from the original; what lies outside an image counts
as its background, 0.

Numba compiles these functions at their first use on a computer (about three seconds) and keeps the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

TAPS = 8
STEPS = 512
"""Fractions of a pixel in the table of filters; the next one is at most 1/1024 px away."""
LANES = 16
"""Rows that are turned into columns together: one line of the cache, one register of 512 bits."""
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


def backgrounds(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """`(b, c)` means outside the circle; NaN or infinite where anything in the image is."""
    means = np.empty(images.shape[:2], np.float32)
    _weighted(images, corners(images.shape[-1]), means)
    return means


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


@njit(**_COMPILED)
def _weighted(images: NDArray[np.float32], weight: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    n = images.shape[-1]
    for i in range(images.shape[0]):
        for k in range(images.shape[1]):
            total = 0.0
            for y in range(n):
                row, share = images[i, k, y], weight[y]
                part = np.float32(0)
                for x in range(n):  # 0 · NaN is NaN, 0 · ∞ too
                    part += row[x] * share[x]
                total += float(part)
            out[i, k] = total


# --- sixteen numbers at a time, which numba cannot say but LLVM can ---------------------------------------

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INT = ir.IntType(64)


def _load(builder: Any, pointer: Any) -> Any:
    found = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
    found.align = 4
    return found


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer())).align = 4


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen numbers, rows to columns: within quarters of a register, then quarters."""

    def pick(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))

    quarters = range(0, LANES, 4)
    low = [i for q in quarters for i in (q, q + 16, q + 1, q + 17)]
    high = [i for q in quarters for i in (q + 2, q + 18, q + 3, q + 19)]
    low_pairs = [i for q in quarters for i in (q, q + 1, q + 16, q + 17)]
    high_pairs = [i for q in quarters for i in (q + 2, q + 3, q + 18, q + 19)]
    even = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [i + 4 for i in even]
    half = [pick(rows[i], rows[i + 1], part) for i in range(0, LANES, 2) for part in (low, high)]
    fours = [
        pick(half[g + part], half[g + part + 2], pairs)
        for g in quarters
        for part in (0, 1)
        for pairs in (low_pairs, high_pairs)
    ]
    columns: list[Any] = [None] * LANES
    for c in range(4):
        a, b, d, e = fours[c::4]
        for place, part in ((0, even), (4, odd)):
            first, second = pick(a, b, part), pick(d, e, part)
            columns[place + c], columns[place + 8 + c] = pick(first, second, even), pick(first, second, odd)
    return columns


@intrinsic
def _stand_up(typing, source, offsets, j, tile):  # type: ignore[no-untyped-def]
    """Of sixteen rows, which begin at `offsets` `(16,)` of `source`, the numbers `j` … `j + 15`: columns of
    `tile`, one after the other."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = [_data(context, builder, signature, arguments, i) for i in (0, 1, 3)]
        rows = []
        for r in range(LANES):
            start = builder.load(builder.gep(data[1], [ir.Constant(_INT, r)]))
            rows.append(_load(builder, builder.gep(data[0], [builder.add(start, arguments[2])])))
        at = builder.mul(arguments[2], ir.Constant(_INT, LANES))
        for c, column in enumerate(_transposed(builder, rows)):
            place = builder.add(at, ir.Constant(_INT, c * LANES))
            _store(builder, column, builder.gep(data[2], [place]))
        return context.get_dummy_value()

    return types.void(source, offsets, types.int64, tile), code


def _filtering(adds: bool) -> Any:
    @intrinsic
    def filtered(typing, tile, j, filters, out, at, stride):  # type: ignore[no-untyped-def]
        """Columns `j` … `j + 15` of `tile` under `filters` `(8, 16)`, to `out` at `at`, `at + stride` …"""

        def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            data = [_data(context, builder, signature, arguments, i) for i in (0, 2, 3)]
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
            )

            def vector(pointer: Any, first: Any, number: int) -> Any:
                place = builder.add(first, ir.Constant(_INT, number * LANES))
                return _load(builder, builder.gep(pointer, [place]))

            weights = [vector(data[1], ir.Constant(_INT, 0), k) for k in range(TAPS)]
            start, place = builder.mul(arguments[1], ir.Constant(_INT, LANES)), arguments[4]
            columns = [vector(data[0], start, k) for k in range(TAPS - 1)]
            for k in range(LANES):  # no more than a window of columns, or they leave the registers
                columns = [*columns[-TAPS + 1 :], vector(data[0], start, k + TAPS - 1)]
                pointer = builder.gep(data[2], [place])
                if adds:
                    total = builder.call(multiply_add, [weights[0], columns[0], _load(builder, pointer)])
                else:
                    total = builder.fmul(weights[0], columns[0])
                for weight, column in zip(weights[1:], columns[1:], strict=True):
                    total = builder.call(multiply_add, [weight, column, total])
                _store(builder, total, pointer)
                place = builder.add(place, arguments[5])
            return context.get_dummy_value()

        return types.void(tile, types.int64, filters, out, types.int64, types.int64), code

    return filtered


def _data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


_put_filtered, _add_filtered = _filtering(False), _filtering(True)


# --- one image ----------------------------------------------------------------------------------------------


@njit(**_COMPILED)
def _less(row, background, out):  # type: ignore[no-untyped-def]
    for j in range(len(out)):
        out[j] = row[j] - background


@njit(**_COMPILED)
def _set_filter(r, at, weight, filters, of_rows):  # type: ignore[no-untyped-def]
    """The filter of row `r` that reads at `at`; returns the first pixel it meets."""
    whole = math.floor(at)
    q = int((at - whole) * STEPS + 0.5)
    for t in range(TAPS):
        of_rows[t * LANES + r] = weight * filters[q, t]
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
    lines,
    first,
    second,
    tile,
    offsets,
    of_rows,
    out,
):
    n, side = image.shape[0], out.shape[0]
    centre, one = n // 2, np.float32(1)
    shear_x, shear_y = -math.tan(angle / 2), math.sin(angle)
    width = (int(n * (1 + abs(shear_x))) + 12 + LANES - 1) // LANES * LANES
    middle = width // 2
    line_length, first_length, second_length = lines.shape[1], first.shape[1], second.shape[1]
    line_pad, first_pad, second_pad = (line_length - n) // 2, (first_length - side - LANES) // 2, 2 * LANES
    flat_lines, flat_first, flat_second = lines.reshape(-1), first.reshape(-1), second.reshape(-1)
    flat_out, row_length = out.reshape(-1), out.shape[1]
    nothing = LANES * line_length  # the last row of `lines` is 0
    for i0 in range(0, side, LANES):
        low, high = width, 0
        for r in range(LANES):
            i = i0 + r
            if i >= n:
                offsets[r] = nothing
                _set_filter(r, 0.0, one, filters, of_rows)
                continue
            row, line = image[i], lines[r]
            _less(row, background, line[line_pad : line_pad + n])
            at = line_pad + centre - middle + shear_x * (i - centre - shift_y) + shift_x
            start = _set_filter(r, at, one, filters, of_rows)
            if start < 0 or start + width + TAPS + LANES > line_length:  # moved out of the box altogether
                offsets[r] = nothing
            else:
                offsets[r] = r * line_length + start
                low, high = min(low, line_pad - start - TAPS), max(high, line_pad + n - start)
        begin, end = max(0, low) // LANES, (max(0, min(width, high)) + LANES - 1) // LANES
        for b in range(begin, end + 1):
            _stand_up(flat_lines, offsets, b * LANES, tile)
        at_row = first_pad + i0
        for j in range(begin * LANES):
            flat_first[at_row + j * first_length : at_row + j * first_length + LANES] = 0
        for b in range(begin, end):
            place = at_row + b * LANES * first_length
            _put_filtered(tile, b * LANES, of_rows, flat_first, place, first_length)
        for j in range(max(begin, end) * LANES, width):
            flat_first[at_row + j * first_length : at_row + j * first_length + LANES] = 0
    blocks = side // LANES
    nothing = (first.shape[0] - 1) * first_length
    for j0 in range(0, width, LANES):
        for r in range(LANES):
            at = first_pad + shear_y * (j0 + r - middle) + shift_y
            start = _set_filter(r, at, one, filters, of_rows)
            if start < 0 or start + side + TAPS + LANES > first_length:
                offsets[r] = nothing
            else:
                offsets[r] = (j0 + r) * first_length + start
        begin, end = blocks, 0
        for b in range(blocks):  # rows that meet these columns in the last shear
            one_end = middle - centre + shear_x * (b * LANES - centre)
            other = middle - centre + shear_x * (b * LANES + LANES - 1 - centre)
            if j0 + LANES > min(one_end, other) - TAPS and j0 < max(one_end, other) + side + TAPS + 1:
                begin, end = min(begin, b), max(end, b + 1)
        if begin < end:
            for b in range(begin, end + 1):
                _stand_up(flat_first, offsets, b * LANES, tile)
        for b in range(begin, end):
            place = b * LANES * second_length + second_pad + j0
            _put_filtered(tile, b * LANES, of_rows, flat_second, place, second_length)
    for i0 in range(0, side, LANES):
        for r in range(LANES):
            at = second_pad + middle - centre + shear_x * (i0 + r - centre)
            offsets[r] = (i0 + r) * second_length + _set_filter(r, at, weight, filters, of_rows)
        for b in range(blocks + 1):
            _stand_up(flat_second, offsets, b * LANES, tile)
        for b in range(blocks):
            _add_filtered(tile, b * LANES, of_rows, flat_out, b * LANES * row_length + i0, row_length)


@njit(**_COMPILED)
def _add_turned(  # type: ignore[no-untyped-def]
    images, background, chosen, angle, shift_yx, weight, place,
    filters, lines, first, second, tile, offsets, of_rows, out,
):  # fmt: skip
    for k in range(len(chosen)):
        for channel in range(images.shape[1]):
            _turn(
                images[chosen[k], channel],
                background[chosen[k], channel],
                angle[k],
                shift_yx[k, 0],
                shift_yx[k, 1],
                weight[k],
                filters,
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


def _odd_lines(n: int) -> int:
    """At least `n`, in lines of the cache, an odd number of them: rows then do not share places in it."""
    lines = -(-n // LANES)
    return (lines + 1 - lines % 2) * LANES


class Turner:
    """Moves images of n px back and adds them up; its buffers serve one thread."""

    def __init__(self, n: int) -> None:
        self.n, self.side = n, -(-n // LANES) * LANES
        width = (int(n * 1.4143) + 12 + 2 * LANES) // LANES * LANES
        self.lines = zeros(LANES + 1, _odd_lines(5 * n))
        self.first = zeros(width + 1, self.side + 2 * (_odd_lines(n)) + LANES)
        self.second = zeros(self.side, _odd_lines(width + 5 * LANES))
        self.tile = zeros((width + 2 * LANES) * LANES)
        self.offsets = np.zeros(LANES, np.int64)
        self.of_rows = zeros(TAPS * LANES)

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
        """Add the images `chosen` `(k,)` of `(b, c, n, n)`, moved back, to `out[place]`, which is of `sums`.

        `angle_rad` within ±45°; `background` `(b, c)`; `angle_rad`, `shift_yx_px`, `weight` and `place` have
        `k` rows.
        """
        _add_turned(
            images,
            background,
            chosen,
            angle_rad,
            shift_yx_px,
            weight,
            place,
            FILTERS,
            self.lines,
            self.first,
            self.second,
            self.tile,
            self.offsets,
            self.of_rows,
            out,
        )
