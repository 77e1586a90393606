"""The transform of an image times its CTF, added to the sums of an average in one pass, compiled.

What `TableCTF.at` and a few lines of numpy do in a dozen passes over memory, in single precision: the sine is
a polynomial, right to 1e-6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}
_TURNS = np.float32(1 / (2 * math.pi))
# sin(2πt) = Σ c_k t^(2k+1), |t| <= 1/4
_C0, _C1, _C2, _C3, _C4, _C5 = (
    np.float32((-1) ** k * (2 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1)) for k in range(6)
)


@njit(**_COMPILED)
def upright(sums: NDArray[np.float32], quarter: int, out: NDArray[np.float32]) -> None:
    """A picture `(n, n)` out of a transposed one, `sums` with rows of any length, turned as
    `shears.quarter_turned` does."""
    n = out.shape[0]
    first = 1 - n % 2  # an even box has one more pixel before its centre than behind it
    last = n - 1 + first
    out[:first] = 0
    for i in range(first if quarter in (1, 2) else 0, n):
        row = out[i]
        if quarter == 0:
            for j in range(n):
                row[j] = sums[j, i]
        elif quarter == 1:
            for j in range(n):
                row[j] = sums[last - i, j]
        else:
            row[:first] = 0
            if quarter == 2:
                for j in range(
                    first, n
                ):  # an index without sign is never one from the end: no question asked
                    row[j] = sums[np.uintp(last - j), last - i]
            else:
                for j in range(first, n):
                    row[j] = sums[i, np.uintp(last - j)]


@njit(**_COMPILED)
def ctf_line(factors, added, flipped, q2, cos2, sin2, q4, out):  # type: ignore[no-untyped-def]
    """The CTF along a line of frequencies; its phase: `factors` `(4,)` times four pictures, plus `added`."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    for j in range(len(out)):
        turns = (a * q2[j] + b * cos2[j] + c * sin2[j] + d * q4[j] + added) * _TURNS
        t = turns - math.floor(turns + np.float32(0.5))
        t = min(max(t, -np.float32(0.5) - t), np.float32(0.5) - t)
        s = t * t
        value = t * (_C0 + s * (_C1 + s * (_C2 + s * (_C3 + s * (_C4 + s * _C5)))))
        out[j] = abs(value) if flipped else value


@njit(**_COMPILED)
def _add_line(transform, ctf, weight, out):  # type: ignore[no-untyped-def]
    for j in range(len(ctf)):
        out[2 * j] += weight * ctf[j] * transform[2 * j]
        out[2 * j + 1] += weight * ctf[j] * transform[2 * j + 1]


@njit(**_COMPILED)
def _add_gain(ctf, weight, noise_weight, gain, noise_gain):  # type: ignore[no-untyped-def]
    for j in range(len(ctf)):
        square = ctf[j] * ctf[j]
        gain[j] += weight * square
        noise_gain[j] += noise_weight * square


@njit(**_COMPILED)
def add_through_ctf(  # type: ignore[no-untyped-def]
    transforms, pictures, factors, added, flipped, untouched, signs_only, weight, noise_weight,
    line, sums, gain, noise_gain,
):  # fmt: skip
    """Add weight · CTF · F to `sums`, weight · CTF² to `gain` and noise_weight · CTF² to `noise_gain`.

    Parameters
    ----------
    transforms, sums
        `(c, m, 2 h)` float32, real and imaginary parts by turns.
    pictures
        `(4, m, h)`, see `ctf.phase_pictures`; `factors` `(4,)` and `added` belong to them.
    flipped, untouched, signs_only
        The image carries |CTF|; it is not multiplied, because it was already; the sign alone multiplies it.
    line
        `(h,)` to work in.
    gain, noise_gain
        `(m, h)`, or `(0, 0)` for none.
    """
    for i in range(pictures.shape[1]):
        ctf_line(
            factors, added, flipped, pictures[0, i], pictures[1, i], pictures[2, i], pictures[3, i], line
        )
        if len(gain):
            _add_gain(line, weight, noise_weight, gain[i], noise_gain[i])
        if untouched:
            line[:] = 1
        elif signs_only:
            for j in range(len(line)):
                line[j] = 1.0 if line[j] > 0 else (-1.0 if line[j] < 0 else 0.0)
        for channel in range(transforms.shape[0]):
            _add_line(transforms[channel, i], line, weight, sums[channel, i])


@njit(**_COMPILED)
def all_upright(sums, quarter, out):  # type: ignore[no-untyped-def]
    """`upright` of `(b, c, ...)` pictures, each with its own quarter turn."""
    for i in range(len(quarter)):
        for channel in range(out.shape[1]):
            upright(sums[i, channel], quarter[i], out[i, channel])


@njit(**_COMPILED)
def add_all_through_ctf(  # type: ignore[no-untyped-def]
    transforms, pictures, factors, added, flipped, untouched, signs_only, weight, noise_weight,
    place, line, sums, gain, noise_gain,
):  # fmt: skip
    """`add_through_ctf` of `(b, ...)` transforms, each into the sums `place` `(b,)` of `(k, ...)`."""
    for i in range(len(place)):
        k = place[i]
        add_through_ctf(
            transforms[i], pictures, factors[i], added[i], flipped[i], untouched[i], signs_only, weight[i],
            noise_weight[i], line, sums[k], gain[k], noise_gain[k],
        )  # fmt: skip
