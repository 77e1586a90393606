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
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import rotation_matrix

Float = NDArray[np.float32]
Progress = Callable[[float], None]

OVERSAMPLING = 1.5
BLOCK_BYTES = 16 * 2**20
"""Original images read at once; with transforms and two threads about ten times this much is in memory."""

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
        # content beyond Nyquist's circle would be turned out of the grid and come back as aliases
        self.disc = (self.ky[:, None] ** 2 + kx**2 < (m / 2) ** 2).astype(np.float32)
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
    """Running sums of one class; halves first."""

    def __init__(self, channels: int, m: int, with_ctf: bool) -> None:
        half = (2, m, m // 2 + 1)
        self.images = np.zeros((2, channels, m, m), dtype=np.float32)
        self.gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.noise_gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.weight = np.zeros((2, 3))
        """Σ w, Σ w² and Σ w² · covered of each half."""
        self.power = np.zeros(m // 2 + 1)
        self.power_gain = np.zeros((2, m // 2 + 1))
        self.rows: list[int] = []

    def add(self, row: int, weight: float, part: _Part, i: int) -> None:
        half = len(self.rows) % 2
        self.rows.append(row)
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
        """`(b, m, m // 2 + 1)`, as the image carries it, the astigmatism turned by `turn_deg`."""
        v = {name: values[rows] for name, values in self.values.items()}
        round_ = v["defocus_u_A"] == v["defocus_v_A"]
        angle = np.where(round_, 0.0, v["defocus_angle_deg"] + turn_deg)
        parameters = np.stack(
            [
                pixel_size_A,
                v["defocus_u_A"],
                v["defocus_v_A"],
                angle,
                v["voltage_kV"],
                v["spherical_aberration_mm"],
                v["amplitude_contrast"],
                v["phase_shift_deg"],
            ]
        )
        # particles of one micrograph often share their CTF
        different, which = np.unique(parameters, axis=1, return_inverse=True)
        ctf = np.asarray(ctf_2d(m, *different), dtype=np.float32)[which.reshape(-1)]
        return np.where(self.flipped[rows, None, None], np.abs(ctf), ctf)


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
    (average,) = _average(
        stack,
        rows,
        np.zeros(len(rows), dtype=np.int64),
        np.asarray(angle_deg, dtype=np.float64),
        shift,
        table=table,
        config=config or AverageConfig(),
        weights=np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64),
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
    table, plan = session.table, session.plan
    label = np.nan_to_num(np.asarray(labels, dtype=np.float64), nan=-1.0).astype(np.int64)
    angle = np.zeros(len(table)) if angle_deg is None else np.asarray(angle_deg, dtype=np.float64)
    shift = np.zeros((len(table), 2)) if shift_yx_px is None else np.asarray(shift_yx_px, dtype=np.float64)
    if not len(label) == len(angle) == len(shift) == len(table):
        raise ValueError(
            f"{len(label)} labels, {len(angle)} angles and {len(shift)} shifts for {len(table)} particles"
        )
    rows = np.flatnonzero((label >= 0) & np.isfinite(angle) & np.isfinite(shift).all(1))
    if len(rows) == 0:
        raise UserError("no particle is in any class; cluster or select some first")
    wanted = np.unique(label[label >= 0])
    captions = [str(c) for c in wanted] if names is None else list(names)
    if len(captions) != len(wanted):
        raise ValueError(f"{len(captions)} names for {len(wanted)} classes")
    classes, which = np.unique(label[rows], return_inverse=True)
    config = config or AverageConfig()
    if plan.ctf == "none" and config.ctf == "auto":
        config = config.model_copy(update={"ctf": "none"})
    if plan.ctf == "flip-all":  # whatever the file says, the user knows that they are not flipped yet
        table = table.assign(ctf_state="raw")
    return _average(
        session.originals(),
        rows,
        which.reshape(-1),
        angle[rows],
        shift[rows],
        table=table.iloc[rows],
        config=config,
        weights=np.ones(len(rows)),
        labels=[captions[i] for i in np.searchsorted(wanted, classes)],
        signs=np.full(len(rows), plan.sign, dtype=np.float32),
        progress=progress,
        stop=stop,
    )


def _average(
    stack: Images,
    rows: NDArray[np.int64],
    which: NDArray[np.int64],
    angle_deg: NDArray[np.float64],
    shift_yx_px: NDArray[np.float64],
    *,
    table: pd.DataFrame | None,
    config: AverageConfig,
    weights: NDArray[np.float64],
    labels: list[str],
    signs: NDArray[np.float32],
    progress: Progress | None,
    stop: Event | None,
) -> list[ClassAverage]:
    boxes = np.asarray(stack.box_px)[rows].astype(np.int64)
    pixel_sizes = np.full(len(rows), np.nan) if table is None else table["pixel_size_A"].to_numpy(np.float64)
    m = config.box_px or int(boxes.min())
    result_pixel_sizes = pixel_sizes * boxes / m
    _check_one_scale(boxes, result_pixel_sizes)
    mode = ctf_mode(table, config.ctf)
    ctf = _CTF(table, mode) if mode != "none" and table is not None else None
    rings = _rings(m)

    def work(block: NDArray[np.int64], images: Float) -> _Part:
        pixel = result_pixel_sizes[block]
        return _part(images, block, angle_deg, shift_yx_px, signs, ctf, pixel, m, rings)

    sums: list[_Sums] | None = None
    done = 0
    # rows in rising order: one pass over the disk, whatever the classes are
    for block, part in _in_two_threads(work, stack, rows, boxes, stop):
        if sums is None:
            sums = [_Sums(part.images.shape[1], m, mode == "wiener") for _ in labels]
        for i, at in enumerate(block):
            sums[which[at]].add(int(at), float(weights[at]), part, i)
        done += len(block)
        if progress is not None:
            progress(done / len(rows))
    assert sums is not None
    uid = rows.astype(np.uint64) if table is None else table.index.to_numpy(np.uint64)
    settings = {**config.model_dump(), "box_px": m}
    pixel_size = float(np.median(result_pixel_sizes))
    return [
        _finish(one, uid, pixel_size, label, mode, settings, rings)
        for one, label in zip(sums, labels, strict=True)
    ]


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
    work: Callable[[NDArray[np.int64], Float], _Part],
    stack: Images,
    rows: NDArray[np.int64],
    boxes: NDArray[np.int64],
    stop: Event | None,
) -> Iterator[tuple[NDArray[np.int64], _Part]]:
    """Read blocks here, work on them in two threads, hand them out in order, whatever the timing."""
    waiting: deque[tuple[NDArray[np.int64], Future[_Part]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for block in _blocks(rows, boxes):
                if stop is not None and stop.is_set():
                    raise Stopped("stopped before all images were averaged; nothing was kept")
                images = np.asarray(stack.read(rows[block]), dtype=np.float32)
                waiting.append((block, pool.submit(work, block, images)))
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


def _part(
    images: Float,
    block: NDArray[np.int64],
    angle_deg: NDArray[np.float64],
    shift_yx_px: NDArray[np.float64],
    signs: NDArray[np.float32],
    ctf: _CTF | None,
    pixel_size_A: NDArray[np.float64],
    m: int,
    rings: sparse.csr_matrix,
) -> _Part:
    grid = _Grid(images.shape[-1], m)
    background = images[..., outside_circle(images.shape[-1])].mean(-1)[..., None, None]
    if not np.isfinite(images.sum((1, 2, 3), dtype=np.float64)).all():
        raise UserError("an image holds numbers that are not finite; leave it out or repair the stack")
    spectra = grid.transform((images - background) * signs[block, None, None, None])
    power = (np.abs(spectra) ** 2).sum(1, dtype=np.float64)
    counts = np.asarray(rings.sum(1)).ravel() * spectra.shape[1]
    flat = (len(block), m * (m // 2 + 1))
    power_rings = np.asarray((rings @ power.reshape(flat).T).T)
    transfer = gain = None
    power_gain = np.broadcast_to(counts, (len(block), 2, len(counts)))
    if ctf is not None:
        in_image = ctf.at(block, pixel_size_A, m, 0.0)
        untouched = ctf.premultiplied[block, None, None]
        if ctf.mode == "phase-flip":
            transfer = np.where(untouched, np.float32(1), np.sign(in_image))
        else:
            # the frame turns by R(-angle) with the image, and so does its astigmatism
            squared = ctf.at(block, pixel_size_A, m, -angle_deg[block]) ** 2
            transfer = np.where(untouched, np.float32(1), in_image)
            gain = squared
            held = [np.where(untouched, squared**2, squared), np.where(untouched, squared, np.float32(1))]
            power_gain = np.stack([np.asarray((rings @ x.reshape(flat).T).T) for x in held], 1)
            power_gain *= spectra.shape[1]
    aligned = grid.sample(spectra, angle_deg[block], shift_yx_px[block], transfer)
    covered = grid.covered(angle_deg[block], shift_yx_px[block])
    return _Part(aligned, gain, covered, power_rings, power_gain)


def _finish(
    sums: _Sums,
    uid: NDArray[np.uint64],
    pixel_size_A: float,
    label: str,
    mode: str,
    settings: dict[str, Any],
    rings: sparse.csr_matrix,
) -> ClassAverage:
    channels, m = sums.images.shape[1:3]
    spectra = scipy.fft.rfft2(sums.images.astype(np.float64))
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
        uid=uid[np.sort(sums.rows)],
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
