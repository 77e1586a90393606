"""Class averages of original images, aligned by inferred poses.

With a CTF, an average is the Wiener sum of its members, Σ CTF·F / (Σ CTF² + σ²/τ²), where noise σ² and
signal τ² are estimated ring by ring from the members: from the power of the sum and the sum of the powers.
The same two numbers give the spectral signal-to-noise ratio (Unser et al. 1987; Penczek 2010). `summing`
moves the images back and adds them up, on the CPU or on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from particle_explorer.configs import AverageConfig
from particle_explorer.ctf import TableCTF, ctf_mode
from particle_explorer.files import UserError
from particle_explorer.resampling import AtOneScale, Scale
from particle_explorer.spectra import Float, frc, outside_circle, ring_sums, ssnr_ring
from particle_explorer.summing.balance import Balance
from particle_explorer.summing.shearing import shear_sums
from particle_explorer.summing.splines import spline_sums
from particle_explorer.summing.where import DEVICE_PIXELS, gpu
from particle_explorer.summing.work import Event, Images, Members, Progress, Sums, Work

FRC_THRESHOLD = 0.143
"""Of two halves, each with half of the members (Rosenthal & Henderson 2003)."""
SPLINE_PIXELS = 2e8
"""Pixels of all members up to which every image is moved back by a spline: some seconds on two cores."""


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

    @property
    def scale(self) -> Scale | None: ...

    def originals(self) -> Images: ...


@dataclass(frozen=True, eq=False)
class ClassAverage:
    """The average of some particles, and what is known of its quality."""

    image: Float
    """`(n, n)`, or `(c, n, n)` for images of several channels; particle bright, background about 0."""
    half_a: Float
    """Average of the members 0, 2, 4, …, or of those of the first model; same shape."""
    half_b: Float
    """Average of the members 1, 3, 5, …, or of those of the second model"""
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
    def resolution_A(self) -> float:
        """Where the FRC of independent halves falls below 0.143, in Å; NaN where they share an alignment,
        infinite where they never agree."""
        if not self.halves_independent:
            return math.nan
        below = np.flatnonzero(self.frc[2:] < FRC_THRESHOLD)
        last = int(below[0]) + 1 if len(below) else len(self.frc) - 1
        return self.image.shape[-1] * self.pixel_size_A / last if last >= 2 else math.inf

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
    device: str = "auto",
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
    device
        What computes: `cpu`, `cuda:N`, `mps`, or `auto`: a CUDA device where there is one and the images are
        many. A GPU moves images back by splines, whatever their number. `torch-cpu` has torch do on the CPU
        what it would do on a GPU, to compare.
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
        device=device,
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
    device: str = "auto",
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
        session,
        members,
        captions,
        angle_deg,
        shift_yx_px,
        config,
        device=device,
        progress=progress,
        stop=stop,
    )


def average_members(
    session: Originals,
    members: Members,
    names: Sequence[str],
    angle_deg: ArrayLike | None = None,
    shift_yx_px: ArrayLike | None = None,
    config: AverageConfig | None = None,
    *,
    half: NDArray[np.int64] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[ClassAverage]:
    """Averages of weighted members that may belong to several, in one pass over the disk.

    Members without a pose are left out, and so is an average of which nothing remains. Images that show
    different fields are brought to the scale of the session first. For the rest see `average_classes`;
    `names` are the captions of the averages 0, 1, … `half` `(M,)` says which member is in half 0 and which in
    half 1, and that their alignments know nothing of each other; without it the members of an average are in
    either by turns.
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
    stack, scale, ratio = session.originals(), session.scale, np.ones(len(table))
    if scale is not None:
        sizes = table["pixel_size_A"].to_numpy(np.float64)
        stack, ratio = AtOneScale(stack, sizes, scale), sizes / scale.pixel_size_A
        table = table.assign(pixel_size_A=scale.pixel_size_A, box_px=scale.box_px)
    averages = _average(
        stack,
        rows,
        Members(at.reshape(-1), which.reshape(-1), members.weight[kept]),
        angle[rows],
        shift[rows] * ratio[rows, None],
        half=None if half is None else half[kept],
        table=table.iloc[rows],
        config=config,
        labels=[names[i] for i in present],
        signs=np.full(len(rows), plan.sign, dtype=np.float32),
        device=device,
        progress=progress,
        stop=stop,
    )
    if scale is None:
        return averages
    back = pd.Series(1 / ratio, index=table.index)  # shifts are told in pixels of each original
    return [
        replace(one, shift_yx_px=one.shift_yx_px * back.loc[one.uid].to_numpy()[:, None]) for one in averages
    ]


def _average(
    stack: Images,
    rows: NDArray[np.int64],
    members: Members,
    angle_deg: NDArray[np.float64],
    shift_yx_px: NDArray[np.float64],
    *,
    half: NDArray[np.int64] | None = None,
    table: pd.DataFrame | None,
    config: AverageConfig,
    labels: list[str],
    signs: NDArray[np.float32],
    device: str,
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
    ctf = TableCTF(table) if mode != "none" and table is not None else None
    order = np.lexsort((rows[members.row], members.average))
    members = Members(members.row[order], members.average[order], members.weight[order])
    starts = np.searchsorted(members.average, np.arange(len(labels) + 1))
    rank = np.arange(len(order)) - starts[members.average]
    work = Work(
        stack,
        rows,
        boxes,
        members,
        rank,
        rank % 2 if half is None else half[order],
        np.diff(starts),
        angle_deg,
        shift_yx_px,
        signs,
        ctf,
        result_pixel_sizes,
        m,
        mode,
        ring_sums(m),
        stop,
    )
    pixels = len(order) * float(boxes.max()) ** 2
    # by splines, a GPU is worth its start where the CPU would be asked for shears
    least = {"auto": DEVICE_PIXELS, "spline": SPLINE_PIXELS, "shears": math.inf}[config.interpolation]
    on = gpu(device, pixels, least)
    shears = config.interpolation == "shears"
    if config.interpolation == "auto":
        shears = pixels > SPLINE_PIXELS
    shears &= not on and bool((boxes == boxes[0]).all())
    sums: Iterator[Sums]
    if on:
        from particle_explorer.summing.on_device import device_sums, device_words

        sums, computed_on = device_sums(work, on, progress), device_words(on)
    else:
        sums = shear_sums(work, progress) if shears else iter(spline_sums(work, progress))
        computed_on = "CPU, 2 threads"
    uid = rows.astype(np.uint64) if table is None else table.index.to_numpy(np.uint64)
    settings = {
        **config.model_dump(),
        "box_px": m,
        "interpolation": "shears" if shears else "spline",
        "computed_on": computed_on,
    }
    pixel_size = float(np.median(result_pixel_sizes))
    averages = []
    for i, label in enumerate(labels):
        own = slice(starts[i], starts[i + 1])
        at = members.row[own]
        averages.append(
            _finish(
                next(sums),  # kept by nobody: one group's memory is needed by the next
                Placed(uid[at], members.weight[own], angle_deg[at], shift_yx_px[at]),
                pixel_size,
                label,
                mode,
                settings,
                work.rings,
                halves_independent=half is not None,
            )
        )
    return averages


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


class Placed(NamedTuple):
    """The members of one average and how they were moved back."""

    uid: NDArray[np.uint64]
    weight: NDArray[np.float64]
    angle_deg: NDArray[np.float64]
    shift_yx_px: NDArray[np.float64]


def _finish(
    sums: Sums,
    placed: Placed,
    pixel_size_A: float,
    label: str,
    mode: str,
    settings: dict[str, Any],
    rings: sparse.csr_matrix,
    *,
    halves_independent: bool = False,
) -> ClassAverage:
    spectra = sums.spectra()
    channels, m = spectra.shape[1:3]
    shape = (2, m, m // 2 + 1)
    gain: NDArray[Any] | None = sums.gain
    noise_gain: NDArray[Any] | None = sums.noise_gain
    if gain is None or noise_gain is None:
        gain, noise_gain = (np.broadcast_to(sums.weight[:, i, None, None], shape) for i in (0, 2))
    balance = Balance.of(sums, spectra.sum(0), gain.sum(0), noise_gain.sum(0), rings, channels)

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
        halves_independent=halves_independent,
    )
