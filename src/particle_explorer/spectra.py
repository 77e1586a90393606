"""Images in Fourier space: rings, boxes of another size, and moving an image back by one interpolation.

An image is moved back onto the reference, x_ref = R(-angle) (x_img - shift) about n // 2 (`pose`): its
Fourier transform is cut to the disc inside Nyquist, padded to 1.5 times the box, divided by the response of
the cubic B-spline, and the spline is evaluated at the turned and shifted positions. On a smooth phantom this
reproduces the reference to 1 - r < 3e-5, for odd and even boxes, like any finer grid; without the padding the
error is 7 times larger. What lies outside an image counts as its background: 0.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, optimize, sparse

from particle_explorer.files import UserError
from particle_explorer.pose import rotation_matrix

Float = NDArray[np.float32]

OVERSAMPLING = 1.5


def ssnr_ring(ssnr: NDArray[np.float64]) -> int:
    """The last ring before the signal falls below the noise; 0 where it never rises above it.

    Rings 0 and 1 hold a handful of numbers and are passed over.
    """
    below = np.flatnonzero(ssnr[2:] < 1.0)
    last = int(below[0]) + 1 if len(below) else len(ssnr) - 1
    return last if last >= 2 else 0


def frc(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Correlation of two images, ring by ring in Fourier space.

    Parameters
    ----------
    a, b
        `(..., n, n)` images of one size; leading axes (channels) are pooled.

    Returns
    -------
    `(n // 2 + 1,)` correlations in [-1, 1]; 0 in rings without power.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"images differ in size or are not square: {a.shape} and {b.shape}")
    n = a.shape[-1]
    rings = ring_sums(n)
    fa, fb = (scipy.fft.rfft2(x).reshape(-1, n * (n // 2 + 1)) for x in (a, b))
    cross = rings @ np.real(fa * fb.conj()).sum(0)
    norm = np.sqrt((rings @ (np.abs(fa) ** 2).sum(0)) * (rings @ (np.abs(fb) ** 2).sum(0)))
    return np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 1e-12 * max(norm.max(), 1e-300))


def ring_sums(n: int) -> sparse.csr_matrix:
    """`(n // 2 + 1, n * (n // 2 + 1))`: sums of flattened half transforms over rings, other half included."""
    ky, kx = np.meshgrid(np.fft.fftfreq(n, 1 / n), np.arange(n // 2 + 1), indexing="ij")
    ring = np.rint(np.hypot(ky, kx)).astype(int).ravel()
    twice = np.where((kx == 0) | (2 * kx == n), 1.0, 2.0).ravel()
    inside = np.flatnonzero(ring <= n // 2)
    return sparse.csr_matrix((twice[inside], (ring[inside], inside)), shape=(n // 2 + 1, ring.size))


def outside_circle(m: int) -> NDArray[np.bool_]:
    """The corners outside the circle inside the box, where the particle is not."""
    y, x = np.indices((m, m)) - m // 2
    return np.hypot(y, x) > m / 2


def cropped(spectra: NDArray[Any], n: int, m: int) -> NDArray[Any]:
    """`(..., n, n // 2 + 1)` → `(..., m, m // 2 + 1)`, about the centres n // 2 and m // 2."""
    if m == n:
        return spectra
    ky = np.fft.fftfreq(m, 1 / m).astype(int)
    kept = spectra[..., ky % n, : m // 2 + 1] * np.float32((m / n) ** 2)
    offset = m // 2 - (n // 2) * m / n
    if offset:
        ramp = np.exp(-2j * np.pi * offset * np.fft.fftfreq(m)).astype(kept.dtype)
        half_ramp = np.exp(-2j * np.pi * offset * np.fft.rfftfreq(m)).astype(kept.dtype)
        kept = kept * (ramp[:, None] * half_ramp)
    return kept


@functools.lru_cache(maxsize=4)
def disc(m: int) -> Float:
    """1 inside Nyquist's circle: what lies beyond would be turned out and come back as aliases."""
    ky, kx = np.meshgrid(np.fft.fftfreq(m, 1 / m), np.arange(m // 2 + 1), indexing="ij")
    return (np.hypot(ky, kx) < m / 2).astype(np.float32)


def align(
    images: ArrayLike,
    angle_deg: ArrayLike,
    shift_yx_px: ArrayLike,
    *,
    box_px: int = 0,
    transfer: NDArray[np.float32] | None = None,
) -> Float:
    """Move images back onto their reference, by one interpolation.

    Parameters
    ----------
    images
        `(b, c, n, n)`.
    angle_deg, shift_yx_px
        `(b,)` and `(b, 2)` placement (`pose`), shifts in pixels of `images`.
    box_px
        Side m of the result, at most n; 0 keeps n. A smaller box is Fourier-cropped about n // 2: its pixels
        are n / m times larger.
    transfer
        `(b, m, m // 2 + 1)` factors for the transforms, in the frame of the image, such as its CTF.

    Returns
    -------
    `(b, c, m, m)` float32.
    """
    images = np.asarray(images, dtype=np.float32)
    grid = Grid(images.shape[-1], box_px or images.shape[-1])
    return grid.sample(grid.transform(images), np.asarray(angle_deg), np.asarray(shift_yx_px), transfer)


class Grid:
    """Images of n px sampled on a turned grid of m px."""

    def __init__(self, n: int, m: int) -> None:
        if m > n:
            raise UserError(f"box {m} px is larger than the {n} px of the images; choose {n} or less")
        self.n, self.m = n, m
        self.padded = scipy.fft.next_fast_len(math.ceil(OVERSAMPLING * m), real=True)
        self.ky = np.fft.fftfreq(m, 1 / m).astype(int)
        kx = np.arange(m // 2 + 1)
        self.disc = disc(m)
        spline_y = (2 + np.cos(2 * np.pi * self.ky / self.padded)) / 3
        spline_x = (2 + np.cos(2 * np.pi * kx / self.padded)) / 3
        scale = (self.padded / m) ** 2
        self.prefilter = (self.disc * scale / (spline_y[:, None] * spline_x)).astype(np.float32)

    def transform(self, images: Float) -> NDArray[np.complex64]:
        """`(b, c, n, n)` → `(b, c, m, m // 2 + 1)`: the transforms of the images in m px."""
        spectra = scipy.fft.rfft2(images)
        if self.m < self.n:
            spectra = spectra[:, :, self.ky % self.n, : self.m // 2 + 1]
        return spectra * (self.disc * np.float32((self.m / self.n) ** 2))

    def sample(
        self,
        spectra: NDArray[np.complex64],
        angle_deg: NDArray[Any],
        shift_yx_px: NDArray[Any],
        transfer: NDArray[np.float32] | None,
    ) -> Float:
        n, m, p = self.n, self.m, self.padded
        factors = self.prefilter if transfer is None else (self.prefilter * transfer)[:, None]
        padded = np.zeros((*spectra.shape[:2], p, p // 2 + 1), dtype=np.complex64)
        padded[:, :, self.ky % p, : m // 2 + 1] = spectra * factors
        coefficients = scipy.fft.irfft2(padded, s=(p, p), overwrite_x=True)
        turn = rotation_matrix(angle_deg)[:, ::-1, ::-1]  # acting on (y, x)
        # one pixel of the result is n / m pixels of the image, p / m of the fine grid
        matrices = turn * (p / m)
        origins = (n // 2 + shift_yx_px) * (p / n) - matrices @ np.full(2, m // 2)
        result = np.empty((*spectra.shape[:2], m, m), dtype=np.float32)
        for image, channels, matrix, origin in zip(result, coefficients, matrices, origins, strict=True):
            for out, one in zip(image, channels, strict=True):
                ndimage.affine_transform(one, matrix, origin, output=out, prefilter=False, mode="constant")
        return result

    def covered(self, angle_deg: NDArray[Any], shift_yx_px: NDArray[Any]) -> NDArray[np.float64]:
        """`(b,)` share of the turned grid that lies inside the image; the rest of it holds no noise."""
        places = (np.arange(32) + 0.5) / 32 - 0.5
        yx = np.stack(np.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)
        turn = rotation_matrix(angle_deg)[:, ::-1, ::-1]
        inside = np.abs(yx @ np.swapaxes(turn, 1, 2) + shift_yx_px[:, None] / self.n) <= 0.5
        return np.asarray(inside.all(-1).mean(-1))


class Placement(NamedTuple):
    """How a picture lies on another: x_picture = R(angle) x_reference + shift."""

    angle_deg: float
    shift_yx_px: tuple[float, float]
    correlation: float
    """At that pose, inside the mask"""


def placed(
    picture: ArrayLike,
    reference: ArrayLike,
    mask: ArrayLike,
    *,
    step_deg: float = 5.0,
    exact: bool = True,
) -> Placement:
    """The pose at which `picture` `(n, n)` correlates best with `reference` inside `mask`.

    A search over turns in steps, all whole shifts by Fourier transform, then, for an exact pose, a descent
    from the three best.
    """
    picture, reference = np.asarray(picture, np.float32), np.asarray(reference, np.float64)
    inside = np.asarray(mask, bool)
    expected = reference[inside] - reference[inside].mean()
    size = max(float(np.linalg.norm(expected)), 1e-12)

    def loss(pose: NDArray[np.float64]) -> float:
        moved = align(picture[None, None], [pose[0]], [(pose[1], pose[2])])[0, 0][inside]
        moved = moved - moved.mean()
        return -float(moved @ expected / max(float(np.linalg.norm(moved)) * size, 1e-12))

    n = picture.shape[-1]
    angles = np.arange(0, 360, step_deg)
    copies = np.broadcast_to(picture, (len(angles), 1, n, n))
    turned = align(copies, angles, np.zeros((len(angles), 2)))[:, 0]
    target = np.where(inside, reference - reference[inside].mean(), 0.0)
    score = np.fft.irfft2(np.fft.rfft2(turned) * np.fft.rfft2(target).conj(), s=(n, n))
    found: list[tuple[float, NDArray[np.float64]]] = []
    for a in np.argsort(-score.max((1, 2)))[: 3 if exact else 1]:
        y, x = np.unravel_index(int(score[a].argmax()), (n, n))
        move = np.array([(v + n // 2) % n - n // 2 for v in (x, y)], float)
        shift = (rotation_matrix(angles[a]) @ move)[::-1]  # moved in the frame of the turned copy
        start = np.array([angles[a], *shift])
        if exact:
            options = {"xatol": 0.02, "fatol": 1e-6}
            start = optimize.minimize(loss, start, method="Nelder-Mead", options=options).x
        found.append((loss(start), start))
    value, pose = min(found, key=lambda one: one[0])
    return Placement(float(pose[0]), (float(pose[1]), float(pose[2])), -value)
