"""Class averages of original images, aligned by inferred poses.

Every image is moved back onto the reference, x_ref = R(-angle) (x_img - shift) about n // 2 (`pose`), by one
interpolation: its Fourier transform is cut to the disc inside Nyquist, padded to 1.5 times the box, divided
by the response of the cubic B-spline, and the spline is evaluated at the turned and shifted positions. On a
smooth phantom this reproduces the reference to 1 - r < 3e-5, for odd and even boxes, like any finer grid;
without the padding the error is 7 times larger. What lies outside an image counts as its background: 0.

With a CTF, an average is the Wiener sum of its members, Σ CTF·F / (Σ CTF² + σ²/τ²), where noise σ² and
signal τ² are estimated ring by ring from the members: from the power of the sum and the sum of the powers.
The same two numbers give the spectral signal-to-noise ratio (Unser et al. 1987; Penczek 2010).

Memory holds one block of images and three images per class, never the stack.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, sparse

from particle_explorer.configs import AverageConfig
from particle_explorer.ctf import wavelength_A
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import rotation_matrix

Float = NDArray[np.float32]
Progress = Callable[[float], None]

OVERSAMPLING = 1.5
SPLINE_PIXELS = 2e8
"""Pixels of all members up to which every image is moved back by a spline: some seconds on two cores."""
TORCH_PIXELS = 2e8
SUMS_BYTES = 384 * 2**20
"""Sums of averages held at once where images are sheared."""
POWER_MEMBERS = 256
"""At least as many members of either half say how much power an image has, where images are sheared."""
TRANSFORMS = 16
"""Images transformed in one go."""
BLOCK_BYTES = 16 * 2**20
"""Original images read at once; with transforms and two threads about ten times this much is in memory."""

SHEAR_BLOCK_BYTES = 4 * 2**20
"""The same for sheared images: what fits into the cache."""

CTF_COLUMNS = ("defocus_u_A", "defocus_v_A", "voltage_kV", "spherical_aberration_mm")
CTF_DEFAULTS = {"defocus_angle_deg": 0.0, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0}
"""What is taken where the file does not say, as for the cached images."""


class Images(Protocol):
    """The part of `ImageStack` that is needed here."""

    @property
    def box_px(self) -> NDArray[Any]: ...

    def read(self, rows: NDArray[np.int64]) -> Float: ...


class Plan(Protocol):
    """The part of `preprocess.Plan` that is needed here."""

    @property
    def sign(self) -> int: ...

    @property
    def ctf(self) -> str: ...


class Originals(Protocol):
    """The part of a session that is needed here."""

    @property
    def plan(self) -> Plan: ...

    @property
    def table(self) -> pd.DataFrame: ...

    def originals(self) -> Images: ...


class Event(Protocol):
    """The part of `threading.Event` that is needed here."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class ClassAverage:
    """The average of some particles, and what is known of its quality."""

    image: Float
    """`(n, n)`, or `(c, n, n)` for images of several channels; particle bright, background about 0."""
    half_a: Float
    """Average of the members 0, 2, 4, …; same shape."""
    half_b: Float
    """Average of the members 1, 3, 5, …"""
    uid: NDArray[np.uint64]
    """`(m,)` members."""
    weight: NDArray[np.float64]
    """`(m,)` how much each counts."""
    angle_deg: NDArray[np.float64]
    """`(m,)` the poses they were moved back by (`pose`)."""
    shift_yx_px: NDArray[np.float64]
    """`(m, 2)`, pixels of the originals."""
    pixel_size_A: float
    """Of the average; NaN where unknown."""
    frc: NDArray[np.float64]
    """`(n // 2 + 1,)` Fourier ring correlation of the halves; ring `i` is `i / (n * pixel_size_A)` per Å."""
    ssnr: NDArray[np.float64]
    """`(n // 2 + 1,)` signal over noise of the average, by the variance over its members."""
    n_effective: float
    """(Σ w)² / Σ w²; the number of members where all weigh the same."""
    label: str = ""
    ctf: str = "none"
    """How the CTF was treated: "none", "phase-flip" or "wiener"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that made it."""
    control_frc: NDArray[np.float64] | None = None
    """FRC of the halves of as many images of pure noise, put through the same alignment and averaging."""
    control_ssnr: NDArray[np.float64] | None = None
    """Their SSNR: what the alignment alone makes of nothing."""
    control_image: Float | None = None
    """Their average."""
    control_n: int = 0
    """How many they were."""
    halves_independent: bool = False
    """Whether the halves were aligned by models that saw no particle of the other half."""

    @property
    def n(self) -> int:
        """Number of members."""
        return len(self.uid)

    @property
    def frc_label(self) -> str:
        """What the FRC may be called."""
        if self.halves_independent:
            return "half-set FRC (independent alignment)"
        return "half-set FRC (shared alignment: self-consistency, upper bound)"

    @property
    def believable_ring(self) -> int:
        """The last ring up to which the SSNR exceeds both 1 and twice that of the noise control."""
        least = 1.0 if self.control_ssnr is None else np.maximum(1.0, 2 * self.control_ssnr)
        return ssnr_ring(self.ssnr / least)

    @property
    def ssnr_radius_A(self) -> float:
        """Where the SSNR falls below 1, in Å; infinite where it never exceeds 1, NaN without pixel size."""
        ring = ssnr_ring(self.ssnr)
        return self.image.shape[-1] * self.pixel_size_A / ring if ring else math.inf


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
    rings = _rings(n)
    fa, fb = (scipy.fft.rfft2(x).reshape(-1, n * (n // 2 + 1)) for x in (a, b))
    cross = rings @ np.real(fa * fb.conj()).sum(0)
    norm = np.sqrt((rings @ (np.abs(fa) ** 2).sum(0)) * (rings @ (np.abs(fb) ** 2).sum(0)))
    return np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 1e-12 * max(norm.max(), 1e-300))


def _rings(n: int) -> sparse.csr_matrix:
    """`(n // 2 + 1, n * (n // 2 + 1))`: sums of flattened half transforms over rings, other half included."""
    ky, kx = np.meshgrid(np.fft.fftfreq(n, 1 / n), np.arange(n // 2 + 1), indexing="ij")
    ring = np.rint(np.hypot(ky, kx)).astype(int).ravel()
    twice = np.where((kx == 0) | (2 * kx == n), 1.0, 2.0).ravel()
    inside = np.flatnonzero(ring <= n // 2)
    return sparse.csr_matrix((twice[inside], (ring[inside], inside)), shape=(n // 2 + 1, ring.size))


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
    grid = _Grid(images.shape[-1], box_px or images.shape[-1])
    return grid.sample(grid.transform(images), np.asarray(angle_deg), np.asarray(shift_yx_px), transfer)


class _Grid:
    """Images of n px sampled on a turned grid of m px."""

    def __init__(self, n: int, m: int) -> None:
        if m > n:
            raise UserError(f"box {m} px is larger than the {n} px of the images; choose {n} or less")
        self.n, self.m = n, m
        self.padded = scipy.fft.next_fast_len(math.ceil(OVERSAMPLING * m), real=True)
        self.ky = np.fft.fftfreq(m, 1 / m).astype(int)
        kx = np.arange(m // 2 + 1)
        self.disc = _disc(m)
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


class Members(NamedTuple):
    """Which particle weighs how much in which average; a particle may be in several."""

    row: NDArray[np.int64]
    """`(M,)` rows of the session"""
    average: NDArray[np.int64]
    """`(M,)` 0 …"""
    weight: NDArray[np.float64]
    """`(M,)` above 0"""


class _Part(NamedTuple):
    """What one block of images contributes."""

    images: Float
    """`(b, c, m, m)`, aligned, CTF applied where it must be."""
    gain: Float | None
    """`(b, m, m // 2 + 1)` how much of the signal, and of the power of the noise, each image contributes, in
    the frame of the reference; None where that is 1."""
    covered: NDArray[np.float64]
    """`(b,)` how much of the average each image covers with its noise."""
    power: NDArray[np.float64]
    """`(b, k)` power of the images, ring by ring."""
    power_gain: NDArray[np.float64]
    """`(b, 2, k)` how much signal and noise that power holds."""


class _Sums:
    """Running sums of one average; halves first."""

    def __init__(self, channels: int, m: int, with_ctf: bool) -> None:
        half = (2, m, m // 2 + 1)
        self.images = np.zeros((2, channels, m, m), dtype=np.float32)
        self.gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.noise_gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.weight = np.zeros((2, 3))
        """Σ w, Σ w² and Σ w² · covered of each half."""
        self.power = np.zeros(m // 2 + 1)
        self.power_gain = np.zeros((2, m // 2 + 1))

    def add(self, half: int, weight: float, part: _Part, i: int) -> None:
        if weight == 1.0:
            self.images[half] += part.images[i]
        else:
            self.images[half] += np.float32(weight) * part.images[i]
        if self.gain is not None and self.noise_gain is not None:
            assert part.gain is not None
            self.gain[half] += np.float32(weight) * part.gain[i]
            self.noise_gain[half] += np.float32(weight**2 * part.covered[i]) * part.gain[i]
        self.weight[half] += weight, weight**2, weight**2 * part.covered[i]
        self.power += part.power[i]
        self.power_gain += part.power_gain[i]

    def spectra(self) -> NDArray[np.complex128]:
        """`(2, c, m, m // 2 + 1)`"""
        return np.asarray(scipy.fft.rfft2(self.images.astype(np.float64)))


class _ShearSums(_Sums):
    """Running sums of one average of sheared images of n px.

    Without CTF the pictures are summed, by quarter turn, and cut to m px at the end; else their transforms.
    """

    def __init__(self, channels: int, n: int, m: int, mode: str) -> None:
        self.n, self.m = n, m
        self.turned = np.zeros((2, 4, channels, n, n) if mode == "none" else 0, dtype=np.float32)
        half = (2, m, m // 2 + 1)
        self.transforms = np.zeros((2, channels, *half[1:]) if mode != "none" else 0, dtype=np.complex64)
        self.gain = np.zeros(half, dtype=np.float32) if mode == "wiener" else None
        self.noise_gain = np.zeros(half, dtype=np.float32) if mode == "wiener" else None
        self.weight = np.zeros((2, 3))
        self.power = np.zeros((2, m // 2 + 1))
        self.power_gain = np.zeros((2, 2, m // 2 + 1))

    def merge_halves(self) -> None:
        """The powers of both halves, which were added up by two threads, in one."""
        self.power, self.power_gain = self.power.sum(0), self.power_gain.sum(0)

    def spectra(self) -> NDArray[np.complex128]:
        from particle_explorer.shears import quarter_turned, transfer

        if self.turned.size:
            pictures = sum(quarter_turned(self.turned[:, q].astype(np.float64), q) for q in range(4))
            found = _cropped(scipy.fft.rfft2(pictures), self.n, self.m)
        else:
            found = self.transforms.astype(np.complex128)
        ky, kx = np.meshgrid(np.fft.fftfreq(self.m, 1 / self.m), np.arange(self.m // 2 + 1), indexing="ij")
        radius = np.hypot(ky, kx)
        left = np.interp(radius / self.n, np.linspace(0, math.sqrt(0.5), self.n + 1), transfer(self.n))
        return np.asarray(found * ((radius < self.m / 2) / left))


def _cropped(spectra: NDArray[Any], n: int, m: int) -> NDArray[Any]:
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


class _CTF:
    """The CTFs of the rows of a table, on the grid of the averages."""

    def __init__(self, table: pd.DataFrame, mode: str) -> None:
        self.mode = mode
        self.values = {name: table[name].to_numpy(np.float64) for name in CTF_COLUMNS}
        for name, usual in CTF_DEFAULTS.items():
            column = table.get(name, pd.Series(usual, index=table.index))
            self.values[name] = column.fillna(usual).to_numpy(np.float64)
        state = table["ctf_state"].to_numpy(str)
        self.flipped = state == "phase-flipped"
        self.premultiplied = state == "premultiplied"

    def at(
        self, rows: NDArray[np.int64], pixel_size_A: NDArray[np.float64], m: int, turn_deg: ArrayLike
    ) -> Float:
        """`(b, m, m // 2 + 1)`, as the image carries it, the astigmatism turned by `turn_deg`.

        `ctf.ctf_2d` in single precision: its phase is a product of four coefficients and four pictures.
        """
        v = {name: values[rows] for name, values in self.values.items()}
        angle = 2 * np.deg2rad(v["defocus_angle_deg"] + turn_deg)
        wave = wavelength_A(v["voltage_kV"])
        mean = 0.5 * (v["defocus_u_A"] + v["defocus_v_A"])
        half = 0.5 * (v["defocus_u_A"] - v["defocus_v_A"])
        scale = np.pi * wave / pixel_size_A**2
        quartic = -0.5 * np.pi * v["spherical_aberration_mm"] * 1e7 * wave**3 / pixel_size_A**4
        factors = np.stack(
            [scale * mean, scale * half * np.cos(angle), scale * half * np.sin(angle), quartic], 1
        )
        phase = (factors.astype(np.float32) @ _phase_pictures(m)).reshape(len(rows), m, m // 2 + 1)
        added = np.deg2rad(v["phase_shift_deg"]) + np.arcsin(v["amplitude_contrast"])
        phase += added.astype(np.float32)[:, None, None]
        ctf = np.sin(phase, out=phase)
        ctf[self.flipped[rows]] = np.abs(ctf[self.flipped[rows]])
        return ctf


@functools.lru_cache(maxsize=4)
def _phase_pictures(m: int) -> Float:
    """`(4, m * (m // 2 + 1))`: q², q² cos 2θ, q² sin 2θ and q⁴ on the frequencies of `rfft2`, q per pixel."""
    fy, fx = np.meshgrid(np.fft.fftfreq(m), np.fft.rfftfreq(m), indexing="ij")
    q2 = fx**2 + fy**2
    return np.stack([q2, fx**2 - fy**2, 2 * fx * fy, q2**2]).reshape(4, -1).astype(np.float32)


def ctf_mode(table: pd.DataFrame | None, wanted: str) -> str:
    """What `AverageConfig.ctf` means for these particles: "none", "phase-flip" or "wiener"."""
    if wanted == "none":
        return "none"
    known = table is not None and "ctf_state" in table and all(name in table for name in CTF_COLUMNS)
    if known and table is not None:
        numbers = table[[*CTF_COLUMNS, "pixel_size_A"]].to_numpy(np.float64)
        known = bool(np.isfinite(numbers).all()) and not (table["ctf_state"] == "none").any()
    if known:
        return "wiener" if wanted == "auto" else wanted
    if wanted == "auto":
        return "none"
    raise UserError(
        f"averages with ctf {wanted!r} need pixel size, defocus, voltage and Cs of every particle, and "
        "some are missing; choose 'none'"
    )


def class_average(
    stack: Images,
    rows: ArrayLike,
    angle_deg: ArrayLike,
    shift_yx_px: ArrayLike,
    *,
    table: pd.DataFrame | None = None,
    config: AverageConfig | None = None,
    weights: ArrayLike | None = None,
    label: str = "",
    sign: int = 1,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> ClassAverage:
    """The average of the images `rows` `(m,)` of `stack`, moved back by their poses.

    Parameters
    ----------
    angle_deg, shift_yx_px
        `(m,)` and `(m, 2)` placement of those images (`pose`), in pixels of the originals.
    table
        Their `m` rows of the particle table: uid as index, pixel size, CTF, contrast sign. Without it there
        is no CTF, and members are known by their row.
    weights
        `(m,)`, at least 0; 1 by default.
    sign
        -1 turns particles bright that are dark, where the table's `contrast_sign` does not say.
    """
    rows = np.asarray(rows, dtype=np.int64)
    shift = np.asarray(shift_yx_px, dtype=np.float64).reshape(len(rows), 2)
    if len(rows) == 0:
        raise UserError("there are no particles to average")
    weight = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    (average,) = _average(
        stack,
        rows,
        Members(np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64), weight),
        np.asarray(angle_deg, dtype=np.float64),
        shift,
        table=table,
        config=config or AverageConfig(),
        labels=[label],
        signs=_signs(table, sign, len(rows)),
        progress=progress,
        stop=stop,
    )
    return average


def average_classes(
    session: Originals,
    labels: ArrayLike,
    angle_deg: ArrayLike | None = None,
    shift_yx_px: ArrayLike | None = None,
    config: AverageConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[ClassAverage]:
    """One average per class, in one pass over the disk.

    Parameters
    ----------
    labels
        `(N,)` class of every row of the session; negative or NaN is in no class.
    angle_deg, shift_yx_px
        `(N,)` and `(N, 2)` poses, pixels of the originals; None for models without them. Rows with NaN are
        left out, and so is a class of which nothing remains.
    names
        Captions, one per class in rising order of the label; by default the label.

    Contrast and state of the CTF are taken as for the cached images (`session.plan`).
    """
    label = np.nan_to_num(np.asarray(labels, dtype=np.float64), nan=-1.0).astype(np.int64)
    if len(label) != len(session.table):
        raise ValueError(f"{len(label)} labels for {len(session.table)} particles")
    wanted, which = np.unique(label[label >= 0], return_inverse=True)
    captions = [str(c) for c in wanted] if names is None else list(names)
    if len(captions) != len(wanted):
        raise ValueError(f"{len(captions)} names for {len(wanted)} classes")
    rows = np.flatnonzero(label >= 0)
    members = Members(rows, which.reshape(-1), np.ones(len(rows)))
    return average_members(
        session, members, captions, angle_deg, shift_yx_px, config, progress=progress, stop=stop
    )


def average_members(
    session: Originals,
    members: Members,
    names: Sequence[str],
    angle_deg: ArrayLike | None = None,
    shift_yx_px: ArrayLike | None = None,
    config: AverageConfig | None = None,
    *,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[ClassAverage]:
    """Averages of weighted members that may belong to several, in one pass over the disk.

    Members without a pose are left out, and so is an average of which nothing remains. For the rest see
    `average_classes`; `names` are the captions of the averages 0, 1, …
    """
    table, plan = session.table, session.plan
    angle = np.zeros(len(table)) if angle_deg is None else np.asarray(angle_deg, dtype=np.float64)
    shift = np.zeros((len(table), 2)) if shift_yx_px is None else np.asarray(shift_yx_px, dtype=np.float64)
    if not len(angle) == len(shift) == len(table):
        raise ValueError(f"{len(angle)} angles and {len(shift)} shifts for {len(table)} particles")
    posed = np.isfinite(angle) & np.isfinite(shift).all(1)
    kept = posed[members.row] & (members.weight > 0)
    if not kept.any():
        raise UserError("no particle is in any class; cluster or select some first")
    rows, at = np.unique(members.row[kept], return_inverse=True)
    present, which = np.unique(members.average[kept], return_inverse=True)
    config = config or AverageConfig()
    if plan.ctf == "none" and config.ctf == "auto":
        config = config.model_copy(update={"ctf": "none"})
    if plan.ctf == "flip-all":  # whatever the file says, the user knows that they are not flipped yet
        table = table.assign(ctf_state="raw")
    return _average(
        session.originals(),
        rows,
        Members(at.reshape(-1), which.reshape(-1), members.weight[kept]),
        angle[rows],
        shift[rows],
        table=table.iloc[rows],
        config=config,
        labels=[names[i] for i in present],
        signs=np.full(len(rows), plan.sign, dtype=np.float32),
        progress=progress,
        stop=stop,
    )


def _average(
    stack: Images,
    rows: NDArray[np.int64],
    members: Members,
    angle_deg: NDArray[np.float64],
    shift_yx_px: NDArray[np.float64],
    *,
    table: pd.DataFrame | None,
    config: AverageConfig,
    labels: list[str],
    signs: NDArray[np.float32],
    progress: Progress | None,
    stop: Event | None,
) -> list[ClassAverage]:
    """`members.row` counts in `rows`, `angle_deg`, `shift_yx_px`, `table` and `signs`."""
    boxes = np.asarray(stack.box_px)[rows].astype(np.int64)
    pixel_sizes = np.full(len(rows), np.nan) if table is None else table["pixel_size_A"].to_numpy(np.float64)
    m = config.box_px or int(boxes.min())
    if m > boxes.min():
        raise UserError(f"box {m} px is larger than the {boxes.min()} px of the images; choose less")
    result_pixel_sizes = pixel_sizes * boxes / m
    _check_one_scale(boxes, result_pixel_sizes)
    mode = ctf_mode(table, config.ctf)
    ctf = _CTF(table, mode) if mode != "none" and table is not None else None
    order = np.lexsort((rows[members.row], members.average))
    members = Members(members.row[order], members.average[order], members.weight[order])
    starts = np.searchsorted(members.average, np.arange(len(labels) + 1))
    rank = np.arange(len(order)) - starts[members.average]
    work = _Work(
        stack,
        rows,
        boxes,
        members,
        rank,
        np.diff(starts),
        angle_deg,
        shift_yx_px,
        signs,
        ctf,
        result_pixel_sizes,
        m,
        mode,
        _rings(m),
        stop,
    )
    shears = config.interpolation == "shears"
    if config.interpolation == "auto":
        shears = len(order) * float(boxes.max()) ** 2 > SPLINE_PIXELS
    shears &= bool((boxes == boxes[0]).all())
    sums = _shear_sums(work, progress) if shears else _spline_sums(work, progress)
    uid = rows.astype(np.uint64) if table is None else table.index.to_numpy(np.uint64)
    settings = {**config.model_dump(), "box_px": m, "interpolation": "shears" if shears else "spline"}
    pixel_size = float(np.median(result_pixel_sizes))
    averages = []
    for i, label in enumerate(labels):
        own = slice(starts[i], starts[i + 1])
        at = members.row[own]
        averages.append(
            _finish(
                sums[i],
                Placed(uid[at], members.weight[own], angle_deg[at], shift_yx_px[at]),
                pixel_size,
                label,
                mode,
                settings,
                work.rings,
            )
        )
    return averages


class Placed(NamedTuple):
    """The members of one average and how they were moved back."""

    uid: NDArray[np.uint64]
    weight: NDArray[np.float64]
    angle_deg: NDArray[np.float64]
    shift_yx_px: NDArray[np.float64]


class _Work(NamedTuple):
    """What is to be summed; arrays of `rows`, and members sorted by average and row."""

    stack: Images
    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    members: Members
    rank: NDArray[np.int64]
    """`(M,)` place of a member in its average: even in half a, odd in half b"""
    sizes: NDArray[np.int64]
    """`(k,)` members of every average"""
    angle_deg: NDArray[np.float64]
    shift_yx_px: NDArray[np.float64]
    signs: NDArray[np.float32]
    ctf: _CTF | None
    pixel_size_A: NDArray[np.float64]
    m: int
    mode: str
    rings: sparse.csr_matrix
    stop: Event | None


def _spline_sums(work: _Work, progress: Progress | None) -> list[_Sums]:
    """Every image moved back exactly, in two threads; sums taken in order, whatever the timing."""

    def part(block: NDArray[np.int64], images: Float) -> _Part:
        return _part(images, block, work)

    order = np.argsort(work.members.row, kind="stable")
    starts = np.searchsorted(work.members.row[order], np.arange(len(work.rows) + 1))
    sums: list[_Sums] | None = None
    done = 0
    # rows in rising order: one pass over the disk, whatever the classes are
    for block, found in _in_two_threads(part, work):
        if sums is None:
            channels = found.images.shape[1]
            sums = [_Sums(channels, work.m, work.mode == "wiener") for _ in work.sizes]
        for i, at in enumerate(block):
            for member in order[starts[at] : starts[at + 1]]:
                one = sums[work.members.average[member]]
                one.add(int(work.rank[member] % 2), float(work.members.weight[member]), found, i)
        done += len(block)
        if progress is not None:
            progress(done / len(work.rows))
    assert sums is not None
    return sums


def _shear_sums(work: _Work, progress: Progress | None) -> list[_Sums]:
    """Images moved back by three shears: one thread for either half, which it alone adds to.

    Averages are taken in groups whose sums fit into `SUMS_BYTES`, each in one pass over its images.
    """
    n, m = int(work.boxes[0]), work.m
    channels = int(work.stack.read(work.rows[:1]).shape[1])
    each = 2 * channels * (16 * n * n if work.mode == "none" else 4 * m * m + 4 * m * m)
    per_group = max(1, SUMS_BYTES // each)
    done, total = 0, len(work.members.row)
    sums: list[_Sums] = []
    for first in range(0, len(work.sizes), per_group):
        last = min(first + per_group, len(work.sizes))
        group = [_ShearSums(channels, n, m, work.mode) for _ in range(first, last)]
        for added in _add_group(work, group, first):
            done += added
            if progress is not None:
                progress(done / total)
        sums += group
    return sums


def _add_group(work: _Work, sums: list[_ShearSums], first: int) -> Iterator[int]:
    from particle_explorer import shears

    n, size = int(work.boxes[0]), max(1, SHEAR_BLOCK_BYTES // int(4 * work.boxes[0] ** 2))
    average = work.members.average
    own = np.flatnonzero((average >= first) & (average < first + len(sums)))
    own = own[np.argsort(work.rows[work.members.row[own]], kind="stable")]
    at = work.members.row[own]
    wanted, where = np.unique(at, return_inverse=True)  # in the order of the rows: `rows` rises
    wanted = wanted[np.argsort(work.rows[wanted], kind="stable")]
    where = np.searchsorted(work.rows[wanted], work.rows[at])
    spans = shears.corners(n)
    halves = [_HalfAdder(work, sums, first, half, n) for half in range(2)]
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(wanted), size):
            if work.stop is not None and work.stop.is_set():
                raise Stopped("stopped before all images were averaged; nothing was kept")
            stop = min(start + size, len(wanted))
            images = np.ascontiguousarray(work.stack.read(work.rows[wanted[start:stop]]), dtype=np.float32)
            background = shears.backgrounds(images, spans)
            if not np.isfinite(background).all():
                raise UserError(
                    "an image holds numbers that are not finite; leave it out or repair the stack"
                )
            low, high = np.searchsorted(where, [start, stop])
            for future in pending:
                future.result()
            pending = [
                pool.submit(half.add, images, background, own[low:high], where[low:high] - start)
                for half in halves
            ]
            yield int(high - low)
        for future in pending:
            future.result()
    for one in sums:
        one.merge_halves()


class _HalfAdder:
    """Adds the members of one half; no other thread touches its part of the sums."""

    def __init__(self, work: _Work, sums: list[_ShearSums], first: int, half: int, n: int) -> None:
        from particle_explorer import shears

        self.work, self.sums, self.first, self.half, self.n = work, sums, first, half, n
        self.turner = shears.Turner(n)
        self.grid = _Grid(n, work.m)
        self.stride = np.maximum(1, work.sizes // POWER_MEMBERS)
        self.transform = _fast_transform(0.0 if work.mode == "none" else len(work.rows) * float(n) ** 2)

    def add(self, images: Float, background: Float, chosen: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        """The members `chosen` `(k,)`, which show the images `at` `(k,)` of this block."""
        from particle_explorer.shears import split_angle

        work = self.work
        mine = work.rank[chosen] % 2 == self.half
        chosen, at = chosen[mine], at[mine]
        if not len(chosen):
            return
        row, average = work.members.row[chosen], work.members.average[chosen]
        weight = work.members.weight[chosen]
        covered = self.grid.covered(work.angle_deg[row], work.shift_yx_px[row])
        for i, w, share in zip(average, weight, covered, strict=True):
            self.sums[i - self.first].weight[self.half] += w, w**2, w**2 * share
        quarter, angle = split_angle(work.angle_deg[row])
        shift = np.ascontiguousarray(work.shift_yx_px[row])
        if work.mode == "none":
            signed = (weight * work.signs[row]).astype(np.float32)
            for i in np.unique(average):
                own = np.flatnonzero(average == i)
                out = self.sums[i - self.first].turned[self.half]
                self.turner.add(
                    images, background, at[own], angle[own], shift[own], signed[own], quarter[own], out
                )
        else:
            for start in range(0, len(chosen), TRANSFORMS):
                some = slice(start, start + TRANSFORMS)
                self._add_transforms(
                    images, background, chosen[some], at[some], angle[some], quarter[some], covered[some]
                )
        self._add_powers(images, background, chosen, at)

    def _add_transforms(
        self,
        images: Float,
        background: Float,
        chosen: NDArray[np.int64],
        at: NDArray[np.int64],
        angle: NDArray[np.float64],
        quarter: NDArray[np.int64],
        covered: NDArray[np.float64],
    ) -> None:
        from particle_explorer.shears import quarter_turned

        work, half = self.work, self.half
        row, n, m = work.members.row[chosen], self.n, work.m
        turned = np.zeros((len(chosen), *images.shape[1:]), dtype=np.float32)
        signed = work.signs[row].astype(np.float32)
        every = np.arange(len(chosen))
        shift = np.ascontiguousarray(work.shift_yx_px[row])
        self.turner.add(images, background, at, angle, shift, signed, every, turned)
        for i, q in enumerate(quarter):
            if q:
                turned[i] = quarter_turned(turned[i], int(q))
        spectra = _cropped(self.transform(turned), n, m)
        assert work.ctf is not None
        # the frame turns by R(-angle) with the image, and so does its astigmatism
        ctf = work.ctf.at(row, work.pixel_size_A[row], m, -work.angle_deg[row])
        untouched = work.ctf.premultiplied[row]
        weight = work.members.weight[chosen].astype(np.float32)
        factor = np.sign(ctf) if work.mode == "phase-flip" else ctf
        for i, average in enumerate(work.members.average[chosen]):
            one = self.sums[average - self.first]
            by = weight[i] if untouched[i] else weight[i] * factor[i]
            one.transforms[half] += spectra[i] * by
            if one.gain is not None and one.noise_gain is not None:
                squared = ctf[i] ** 2
                one.gain[half] += weight[i] * squared
                one.noise_gain[half] += np.float32(weight[i] ** 2 * covered[i]) * squared

    def _add_powers(
        self, images: Float, background: Float, chosen: NDArray[np.int64], at: NDArray[np.int64]
    ) -> None:
        """Power of some of the members, evenly spread: their mean is known well from a few hundred."""
        work = self.work
        some = np.flatnonzero(work.rank[chosen] // 2 % self.stride[work.members.average[chosen]] == 0)
        for start in range(0, len(some), TRANSFORMS):
            part = some[start : start + TRANSFORMS]
            row, which = work.members.row[chosen[part]], at[part]
            plain = images[which] - background[which][..., None, None]
            spectra = _cropped(self.transform(plain), self.n, work.m)
            powers, gains = _powers(spectra, row, work, None)
            for average, power, gain in zip(work.members.average[chosen[part]], powers, gains, strict=True):
                self.sums[average - self.first].power[self.half] += power
                self.sums[average - self.first].power_gain[self.half] += gain


def _fast_transform(pixels: float) -> Callable[[Float], NDArray[np.complex64]]:
    """`rfft2` of many images; torch's is three times as fast, and worth its import for large stacks."""
    if pixels < TORCH_PIXELS:
        return lambda images: np.asarray(scipy.fft.rfft2(images))
    import torch

    return lambda images: np.asarray(torch.fft.rfft2(torch.from_numpy(images)).numpy())


@functools.lru_cache(maxsize=4)
def _disc(m: int) -> Float:
    """1 inside Nyquist's circle: what lies beyond would be turned out and come back as aliases."""
    ky, kx = np.meshgrid(np.fft.fftfreq(m, 1 / m), np.arange(m // 2 + 1), indexing="ij")
    return (np.hypot(ky, kx) < m / 2).astype(np.float32)


def _powers(
    spectra: NDArray[np.complex64], rows: NDArray[np.int64], work: _Work, squared: Float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(b, k)` power of images ring by ring, and `(b, 2, k)` how much signal and noise it holds.

    `squared` `(b, m, m // 2 + 1)` are their CTFs squared, where they were computed already.
    """
    flat = (len(rows), spectra.shape[-2] * spectra.shape[-1])
    power = (np.abs(spectra) ** 2).sum(1, dtype=np.float64).reshape(flat) * _disc(work.m).ravel()
    power_rings = np.asarray((work.rings @ power.T).T)
    if work.mode != "wiener" or work.ctf is None:
        counts = np.asarray(work.rings.sum(1)).ravel() * spectra.shape[1]
        return power_rings, np.broadcast_to(counts, (len(rows), 2, len(counts)))
    if squared is None:
        squared = work.ctf.at(rows, work.pixel_size_A[rows], work.m, 0.0) ** 2
    untouched = work.ctf.premultiplied[rows, None, None]
    held = [np.where(untouched, squared**2, squared), np.where(untouched, squared, np.float32(1))]
    gain = np.stack([np.asarray((work.rings @ x.reshape(flat).T).T) for x in held], 1)
    return power_rings, gain * spectra.shape[1]


def _check_one_scale(boxes: NDArray[np.int64], result_pixel_sizes: NDArray[np.float64]) -> None:
    unknown = np.isnan(result_pixel_sizes)
    if unknown.all() and (boxes == boxes[0]).all():
        return
    if unknown.any() or np.ptp(result_pixel_sizes) > 0.01 * result_pixel_sizes.min():
        raise UserError(
            f"the particles have boxes of {boxes.min()} to {boxes.max()} px that show fields of different or "
            "unknown size in Å; average particles of one box and pixel size together"
        )


def _signs(table: pd.DataFrame | None, sign: int, n: int) -> NDArray[np.float32]:
    if table is None or "contrast_sign" not in table:
        return np.full(n, sign, dtype=np.float32)
    given = table["contrast_sign"].to_numpy(np.float32)
    return np.where(given == 0, np.float32(sign), given)


def _in_two_threads(
    part: Callable[[NDArray[np.int64], Float], _Part], work: _Work
) -> Iterator[tuple[NDArray[np.int64], _Part]]:
    """Read blocks here, work on them in two threads, hand them out in order, whatever the timing."""
    waiting: deque[tuple[NDArray[np.int64], Future[_Part]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for block in _blocks(work.rows, work.boxes):
                if work.stop is not None and work.stop.is_set():
                    raise Stopped("stopped before all images were averaged; nothing was kept")
                images = np.asarray(work.stack.read(work.rows[block]), dtype=np.float32)
                waiting.append((block, pool.submit(part, block, images)))
                if len(waiting) == 3:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _blocks(rows: NDArray[np.int64], boxes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    order = np.argsort(rows, kind="stable")
    for box in np.unique(boxes):
        same = order[boxes[order] == box]
        size = max(1, BLOCK_BYTES // int(4 * box**2))
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _part(images: Float, block: NDArray[np.int64], work: _Work) -> _Part:
    m, ctf, angle, shift = work.m, work.ctf, work.angle_deg[block], work.shift_yx_px[block]
    grid = _Grid(images.shape[-1], m)
    background = images[..., outside_circle(images.shape[-1])].mean(-1)[..., None, None]
    if not np.isfinite(images.sum((1, 2, 3), dtype=np.float64)).all():
        raise UserError("an image holds numbers that are not finite; leave it out or repair the stack")
    spectra = grid.transform((images - background) * work.signs[block, None, None, None])
    transfer = gain = None
    if ctf is not None:
        pixel = work.pixel_size_A[block]
        in_image = ctf.at(block, pixel, m, 0.0)
        untouched = ctf.premultiplied[block, None, None]
        if work.mode == "phase-flip":
            transfer = np.where(untouched, np.float32(1), np.sign(in_image))
        else:
            # the frame turns by R(-angle) with the image, and so does its astigmatism
            gain = ctf.at(block, pixel, m, -angle) ** 2
            transfer = np.where(untouched, np.float32(1), in_image)
    power, power_gain = _powers(spectra, block, work, gain)
    aligned = grid.sample(spectra, angle, shift, transfer)
    return _Part(aligned, gain, grid.covered(angle, shift), power, power_gain)


def _finish(
    sums: _Sums,
    placed: Placed,
    pixel_size_A: float,
    label: str,
    mode: str,
    settings: dict[str, Any],
    rings: sparse.csr_matrix,
) -> ClassAverage:
    spectra = sums.spectra()
    channels, m = spectra.shape[1:3]
    shape = (2, m, m // 2 + 1)
    gain: NDArray[Any] | None = sums.gain
    noise_gain: NDArray[Any] | None = sums.noise_gain
    if gain is None or noise_gain is None:
        gain, noise_gain = (np.broadcast_to(sums.weight[:, i, None, None], shape) for i in (0, 2))
    balance = _Balance.of(sums, spectra.sum(0), gain.sum(0), noise_gain.sum(0), rings, channels)

    def image(total: NDArray[np.complex128], gain: NDArray[Any], noise_gain: NDArray[Any]) -> Float:
        if mode == "wiener":
            spectrum = total * balance.wiener(gain, noise_gain, m)
        else:
            spectrum = total / max(float(gain.flat[0]), 1e-12)
        picture = scipy.fft.irfft2(spectrum, s=(m, m))
        picture -= picture[..., outside_circle(m)].mean(-1)[..., None, None]
        return (picture[0] if channels == 1 else picture).astype(np.float32)

    half_a, half_b = (image(spectra[h], gain[h], noise_gain[h]) for h in range(2))
    weight = sums.weight.sum(0)
    return ClassAverage(
        image=image(spectra.sum(0), gain.sum(0), noise_gain.sum(0)),
        half_a=half_a,
        half_b=half_b,
        uid=placed.uid,
        weight=placed.weight,
        angle_deg=placed.angle_deg,
        shift_yx_px=placed.shift_yx_px,
        pixel_size_A=pixel_size_A,
        frc=frc(half_a, half_b),
        ssnr=balance.ssnr,
        n_effective=float(weight[0] ** 2 / weight[1]) if weight[1] > 0 else 0.0,
        label=label,
        ctf=mode,
        settings=settings,
    )


def outside_circle(m: int) -> NDArray[np.bool_]:
    """The corners outside the circle inside the box, where the particle is not."""
    y, x = np.indices((m, m)) - m // 2
    return np.hypot(y, x) > m / 2


class _Balance(NamedTuple):
    """Signal and noise of a class, ring by ring, in units of one image."""

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    ssnr: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        sums: _Sums,
        total: NDArray[np.complex128],
        gain: NDArray[Any],
        noise_gain: NDArray[Any],
        rings: sparse.csr_matrix,
        channels: int,
    ) -> _Balance:
        """Two equations per ring: power of the sum and sum of the powers, each signal plus noise."""
        of_sum = rings @ (np.abs(total) ** 2).sum(0).ravel()
        signal_in_sum = channels * (rings @ np.asarray(gain, dtype=np.float64).ravel() ** 2)
        noise_in_sum = channels * (rings @ np.asarray(noise_gain, dtype=np.float64).ravel())
        signal_in_powers, noise_in_powers = sums.power_gain
        terms = [of_sum, sums.power, signal_in_sum, noise_in_sum, signal_in_powers, noise_in_powers]

        def solve(terms: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            total_, powers, a, b, c, d = terms
            determinant = a * d - b * c
            known = determinant > 1e-9 * a * d
            safe = np.where(known, determinant, 1.0)
            signal = np.where(known, (total_ * d - b * powers) / safe, 0.0)
            noise = np.where(known, (a * powers - c * total_) / safe, 0.0)
            return np.maximum(signal, 0.0), np.maximum(noise, 0.0)

        signal, noise = solve(terms)
        floor = 1e-9 * (signal + noise).max() + 1e-300
        # noise is counted as if every image covered the whole average
        covered = sums.weight[:, 2].sum() / max(sums.weight[:, 1].sum(), 1e-300)
        per_noise = signal_in_sum * covered / np.where(noise_in_sum > 0, noise_in_sum, np.inf)
        ssnr = per_noise * signal / np.maximum(noise, floor)
        # the filter wants steady numbers more than sharp ones: three rings together
        smooth = solve([ndimage.uniform_filter1d(term, 3, mode="nearest") for term in terms])
        return cls(*smooth, ssnr)

    def wiener(self, gain: NDArray[Any], noise_gain: NDArray[Any], m: int) -> NDArray[np.float64]:
        """`(m, m // 2 + 1)` factors that turn Σ CTF·F into the average.

        Rings without measurable signal are kept at a tenth of it rather than wiped out: a blank average would
        hide what is there.
        """
        ky, kx = np.meshgrid(np.fft.fftfreq(m, 1 / m), np.arange(m // 2 + 1), indexing="ij")
        ring = np.minimum(np.rint(np.hypot(ky, kx)).astype(int), m // 2)
        noise = np.where(self.noise > 0, self.noise, 1.0)
        total_gain, total_noise = np.asarray(gain, dtype=np.float64), np.asarray(noise_gain, dtype=np.float64)
        typical = max(float(total_gain.mean()), 1e-12)
        least = 0.1 * max(float(total_noise.mean()), 1e-12) / typical**2
        ratio = np.maximum(np.where(self.noise > 0, self.signal / noise, 1.0), least)[ring]
        return total_gain * ratio / (total_gain**2 * ratio + np.maximum(total_noise, 1e-12))
