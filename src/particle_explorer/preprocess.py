"""From original images to the cached images that models see: CTF phases, Fourier crop, background,
contrast."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import NDArray

from particle_explorer.configs import PreprocessConfig
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError
from particle_explorer.particles import Images
from particle_explorer.resampling import resampled, resampling

DEFAULT_BOX_PX = 64
LEAST_BOX_PX = 8
DEFAULT_DIAMETER = 0.9
"""Share of the box that the particle takes where no diameter is given."""
LEAST_RING_PX = 30
USUAL_AMPLITUDE_CONTRAST = 0.1
NOISE_FLOOR = 0.1
"""The background is never taken for quieter than this share of the whole image (clean simulations, masks)."""
_NEEDED = ("defocus_u_A", "defocus_v_A", "voltage_kV", "spherical_aberration_mm")
CTF_COLUMNS = (*_NEEDED, "defocus_angle_deg", "amplitude_contrast", "phase_shift_deg")
"""Of the table, that say the CTF of an image."""


@dataclass(frozen=True)
class Plan:
    """What will be done to every image, decided once for a whole session."""

    box_px: int
    """Side of the originals."""
    cached_box_px: int
    pixel_size_A: float
    """Of the originals; NaN where unknown."""
    cached_pixel_size_A: float
    diameter_px: float
    """Particle diameter in pixels of the cached images."""
    sign: int
    """+1 keeps the contrast, -1 inverts it; afterwards the particle is bright."""
    background: str
    """"ring" or "none\""""
    ctf: str
    """"flip-raw" flips the phases of images whose `ctf_state` is raw, "flip-all" of all, "keep" of none (the
    CTF is still known), "none" does not know any CTF."""
    reasons: tuple[str, ...]
    """Why, one sentence each, for the preview and the log."""
    mixed: bool = False
    """Several boxes or pixel sizes are brought to `cached_pixel_size_A`; `box_px` and `pixel_size_A` are
    then those of most particles."""
    mask: str = "none"
    """"soft" or "none\""""
    low_pass_A: float = 0.0
    high_pass_A: float = 0.0


def plan(table: pd.DataFrame, config: PreprocessConfig, guessed_sign: int = 0) -> Plan:
    """Decide the preprocessing of all particles of `table`.

    `guessed_sign` (+1 particle bright, -1 dark, 0 unknown) is used where neither the settings nor the file
    say the contrast; `io.inspecting.guess_contrast` makes it from a sample of images.
    """
    if not len(table):
        raise UserError("there are no particles to prepare; the condition leaves none over")
    reasons: list[str] = []
    mixed = _is_mixed(table, config)
    if mixed:
        box, pixel_size, field_A = _common_field(table, reasons)
    else:
        box = _one_box(table)
        pixel_size = _pixel_size(table, config, reasons)
        field_A = box * pixel_size
    known = math.isfinite(pixel_size)
    field_px = field_A / pixel_size if known else float(box)

    if config.diameter_A:
        diameter = config.diameter_A / pixel_size if known else config.diameter_A
        unit = "Å" if known else "px"
        if diameter > field_px * (1 + 1e-9):
            size = field_A if known else box
            raise UserError(
                f"the particle diameter of {config.diameter_A:g} {unit} is larger than the box of {size:g} "
                f"{unit}"
            )
        reasons.append(f"diameter {config.diameter_A:g} {unit}" + ("" if known else " (pixel size unknown)"))
    else:
        diameter = DEFAULT_DIAMETER * field_px
        reasons.append(f"diameter {DEFAULT_DIAMETER:g} of the box, as none is given")

    largest = _largest_box(table, field_A) if mixed else box
    cached_box = config.box_px or min(largest, DEFAULT_BOX_PX) // 2 * 2
    if config.prepared_pixel_size_A:
        cached_box = _box_of(config, field_A if known else math.nan, pixel_size, largest, reasons)
    if cached_box > largest:
        raise UserError(
            f"the box of {cached_box} px is larger than the original images of {box} px"
            if not mixed
            else f"a box of {cached_box} px would be finer than the coarsest images, which have {largest} px "
            f"in the {field_A:g} Å that all of them show"
        )
    if cached_box < LEAST_BOX_PX:
        raise UserError(
            f"a box of {cached_box} px is too small to see anything in; {LEAST_BOX_PX} px or more is needed"
        )
    scale = field_px / cached_box
    if diameter / scale < 4:
        raise UserError(
            f"the particle would be only {diameter / scale:.1f} px wide in the cached images; check the "
            "diameter"
        )
    low_pass, high_pass = _pass_band(config, pixel_size * scale, reasons)

    sign = _sign(table, config, guessed_sign, reasons)
    ctf = _ctf_action(table, config, pixel_size, reasons)
    return Plan(
        box_px=box,
        cached_box_px=cached_box,
        pixel_size_A=pixel_size,
        cached_pixel_size_A=pixel_size * scale,
        diameter_px=diameter / scale,
        sign=sign,
        background=config.background,
        ctf=ctf,
        reasons=tuple(reasons),
        mixed=mixed,
        mask=config.mask,
        low_pass_A=low_pass,
        high_pass_A=high_pass,
    )


def _box_of(
    config: PreprocessConfig, field_A: float, pixel_size_A: float, largest: int, reasons: list[str]
) -> int:
    """The box of the pixel size that is wanted in the cached images."""
    wanted = config.prepared_pixel_size_A
    if config.box_px:
        raise UserError(
            f"a box of {config.box_px} px and a prepared pixel size of {wanted:g} Å: give only one"
        )
    if not math.isfinite(field_A):
        raise UserError(
            f"a prepared pixel size of {wanted:g} Å is asked for, and that of the images is not known; give "
            "it, or give a box"
        )
    box = round(field_A / wanted / 2) * 2
    if box > largest:
        raise UserError(
            f"a prepared pixel size of {wanted:g} Å is finer than the {field_A / largest:.4g} Å of the images"
        )
    reasons.append(f"{field_A / box:.4g} Å per pixel, the nearest to {wanted:g} Å that a whole box gives")
    return box


def original_pixels(table: pd.DataFrame, plan: Plan) -> NDArray[np.float64]:
    """`(N,)` pixels of each particle's original image in one pixel of its cached image."""
    if plan.mixed:
        return plan.cached_pixel_size_A / table["pixel_size_A"].to_numpy(np.float64)
    return table["box_px"].to_numpy(np.float64) / plan.cached_box_px


def _is_mixed(table: pd.DataFrame, config: PreprocessConfig) -> bool:
    """Whether boxes or pixel sizes differ, and all sizes are known, so that they can be brought to one."""
    sizes = table["pixel_size_A"].to_numpy(np.float64)
    if config.pixel_size_A or not np.isfinite(sizes).all():
        return False
    return table["box_px"].nunique() > 1 or bool(np.ptp(sizes) > 1e-3 * sizes.min())


def _common_field(table: pd.DataFrame, reasons: list[str]) -> tuple[int, float, float]:
    """(box and pixel size of most particles, side in Å of what all images show)."""
    groups = table.groupby(["box_px", "pixel_size_A"]).size().sort_values(ascending=False)
    boxes, sizes = (groups.index.get_level_values(i).to_numpy(float) for i in (0, 1))
    field = float((boxes * sizes).min())
    shown = ", ".join(
        f"{int(box)} px of {size:.4g} Å" for box, size in zip(boxes[:4], sizes[:4], strict=True)
    )
    more = f" and {len(boxes) - 4} more" if len(boxes) > 4 else ""
    reasons.append(
        f"several kinds of images ({shown}{more}) are brought to one pixel size, over the {field:.4g} Å that "
        "all of them show"
    )
    return int(boxes[0]), float(sizes[0]), field


def _largest_box(table: pd.DataFrame, field_A: float) -> int:
    """Pixels of the common field at the coarsest pixel size: more would show what some images do not have."""
    return int(field_A / float(table["pixel_size_A"].max()) + 1e-6)


def _pass_band(config: PreprocessConfig, pixel_size_A: float, reasons: list[str]) -> tuple[float, float]:
    """(low-pass, high-pass) in Å, 0 for off."""
    low, high = config.low_pass_A, config.high_pass_A
    if (low or high) and not math.isfinite(pixel_size_A):
        raise UserError("filters are given in Å, and the pixel size is not known; give it, or no filters")
    if low and high and low >= high:
        raise UserError(
            f"a low-pass at {low:g} Å and a high-pass at {high:g} Å leave nothing; the high-pass is the "
            "larger one"
        )
    if low and low <= 2 * pixel_size_A:
        reasons.append(
            f"the low-pass at {low:g} Å changes nothing: the cached pixels are {pixel_size_A:.3g} Å"
        )
        low = 0.0
    if low:
        reasons.append(f"low-pass at {low:g} Å")
    if high:
        reasons.append(f"high-pass at {high:g} Å")
    return low, high


def _one_box(table: pd.DataFrame) -> int:
    boxes = np.unique(table["box_px"])
    if len(boxes) > 1:
        raise UserError(
            f"the images have boxes of {', '.join(map(str, boxes))} px; choose one, for instance "
            f'--where "box_px == {int(boxes[-1])}"'
        )
    return int(boxes[0])


def with_pixel_size(table: pd.DataFrame, config: PreprocessConfig) -> pd.DataFrame:
    """`table` with the pixel size that the settings give, if they do.

    Shifts are in pixels and stay; they were read by what the file says, as its writer meant them.
    """
    return table.assign(pixel_size_A=config.pixel_size_A) if config.pixel_size_A else table


def _pixel_size(table: pd.DataFrame, config: PreprocessConfig, reasons: list[str]) -> float:
    if not config.pixel_size_A:
        return _one_pixel_size(table)
    said = np.unique(table["pixel_size_A"].dropna())
    other = said[np.abs(said - config.pixel_size_A) > 1e-3 * config.pixel_size_A]
    reasons.append(
        f"pixel size {config.pixel_size_A:g} Å, as given"
        + (f", although the file says {', '.join(f'{size:g}' for size in other[:3])} Å" if len(other) else "")
    )
    return config.pixel_size_A


def _one_pixel_size(table: pd.DataFrame) -> float:
    sizes = np.unique(table["pixel_size_A"].to_numpy(np.float64))  # NaN last, once
    if len(sizes) == 1 or (np.isfinite(sizes).all() and sizes[-1] - sizes[0] <= 1e-3 * sizes[0]):
        return float(np.median(sizes))
    if math.isnan(sizes[-1]) and np.ptp(sizes[:-1]) <= 1e-3 * sizes[0]:
        raise UserError(
            f"the pixel size of some images is {sizes[0]:g} Å and of others unknown; if all are alike, give "
            f"--preprocess.pixel-size-A {sizes[0]:g}"
        )
    shown = ", ".join("unknown" if math.isnan(size) else f"{size:g}" for size in sizes)
    raise UserError(
        f"the images have several pixel sizes ({shown} Å); choose one, for instance "
        f'--where "pixel_size_A < '
        f'{(sizes[0] + sizes[1]) / 2 if np.isfinite(sizes[1]) else sizes[0] * 1.01:.6g}"'
    )


def _sign(table: pd.DataFrame, config: PreprocessConfig, guessed_sign: int, reasons: list[str]) -> int:
    if config.contrast != "auto":
        reasons.append(
            "contrast inverted, as asked" if config.contrast == "invert" else "contrast kept, as asked"
        )
        return -1 if config.contrast == "invert" else 1
    said = np.unique(table["contrast_sign"])
    if len(said) > 1:
        raise UserError(
            "the file gives bright particles and dark ones; choose one kind, for instance --where "
            '"contrast_sign == -1"'
        )
    sign, by = (
        (int(said[0]), "the file says") if said[0] else (int(np.sign(guessed_sign)), "the images look like")
    )
    if sign == 0:
        reasons.append(
            "contrast kept: neither the file nor the images say whether the particle is bright or dark"
        )
        return 1
    reasons.append(
        f"contrast inverted: {by} dark particles" if sign < 0 else f"contrast kept: {by} bright particles"
    )
    return sign


def _ctf_action(
    table: pd.DataFrame, config: PreprocessConfig, pixel_size_A: float, reasons: list[str]
) -> str:
    states = set(table["ctf_state"].unique())
    if config.ctf == "model" and states == {"none"}:
        raise UserError("models cannot be told the CTF: the particles carry no defocus")
    if config.ctf == "none" or states == {"none"}:
        reasons.append(
            "no CTF, as asked" if config.ctf == "none" else "no CTF: the particles carry no defocus"
        )
        return "none"
    missing = [
        name for name in _NEEDED if name not in table or not np.isfinite(table[name].to_numpy(float)).all()
    ]
    if "none" in states:
        missing.append("the defocus of some particles")
    if not math.isfinite(pixel_size_A):
        missing.append("pixel_size_A")
    if missing:
        if config.ctf in ("phase-flip", "model"):
            what = (
                "the phases cannot be flipped" if config.ctf == "phase-flip" else "models cannot know the CTF"
            )
            raise UserError(f"{what}: {', '.join(missing)} is not known")
        reasons.append(f"CTF left alone: {', '.join(missing)} is not known")
        return "none"
    if "amplitude_contrast" not in table:
        reasons.append(f"amplitude contrast not given, {USUAL_AMPLITUDE_CONTRAST} taken")
    if config.ctf == "phase-flip":
        if "premultiplied" in states:
            raise UserError(
                "the images are multiplied by their CTF already, so their phases must not be flipped again"
            )
        reasons.append("phases flipped, as asked")
        return "flip-all"
    if config.ctf == "model":
        reasons.append("phases left as they are, as asked; models are told the CTF")
        return "keep"
    if "raw" in states:
        reasons.append("phases flipped by the CTF")
        return "flip-raw"
    reasons.append(f"phases left alone: the file says {' and '.join(sorted(states))}")
    return "keep"


def apply(images: Images, rows_table: pd.DataFrame, plan: Plan, *, known_good: bool = False) -> Images:
    """Originals `(k, c, n, n)` and their rows → cached images `(k, c, m, m)` float32.

    A blank or broken image is a `UserError`; `known_good` says that there is none, and no look is taken.

    The phases are flipped on the frequencies that are kept, which is the same as flipping the original first.
    """
    images = np.asarray(images, np.float32)
    if images.shape[-1] != plan.box_px and not plan.mixed:
        raise ValueError(f"images of {images.shape[-1]} px for a plan of {plan.box_px} px")
    if not known_good:
        _check(images, rows_table)
    flipped = _flipped_rows(rows_table, plan)
    m = plan.cached_box_px
    if plan.mixed:
        images = _at_one_pixel_size(images, rows_table, plan)
    band = _band(plan)
    if flipped.any() or m != images.shape[-1] or band is not None:
        spectrum = _cropped_spectrum(images, m)
        if flipped.any():
            transfer = _ctf(rows_table[flipped], plan)
            spectrum[flipped] *= np.where(transfer < 0, np.float32(-1), np.float32(1))[:, None]
        if band is not None:
            spectrum *= band
        images = np.asarray(scipy.fft.irfft2(spectrum, s=(m, m), axes=(-2, -1)), np.float32)
    elif not plan.mixed:
        images = images.copy()
    if plan.background == "ring":
        normalise_background(images, plan.diameter_px)
    if plan.sign < 0:
        np.negative(images, out=images)
    if plan.mask == "soft":
        mask_softly(images, plan.diameter_px)
    return images


def bad_images(images: Images) -> NDArray[np.bool_]:
    """`(k,)`: images without any content, or with values that are not finite."""
    flat = images.reshape(len(images), -1)
    # one pass for most: a sum is not finite where a value is not, and a blank image has a blank first line
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(flat.sum(axis=1))
    line = flat[:, : images.shape[-1]]
    bad |= (line == line[:, :1]).all(axis=1)
    doubtful = flat[bad]
    least, largest = doubtful.min(axis=1), doubtful.max(axis=1)
    bad[bad] = ~(np.isfinite(least) & np.isfinite(largest)) | (least == largest)
    return np.asarray(bad)


def outliers(statistics: NDArray[np.float64], limit_sd: float) -> NDArray[np.bool_]:
    """`(N, 2)` means and standard deviations of images → `(N,)`: those far from the rest.

    Deviations count in robust standard deviations (1.4826 times the median deviation) of each column; the
    second is taken by its logarithm, as contrasts are ratios. NaN rows are none.
    """
    values = statistics.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        values[:, 1] = np.log(values[:, 1])
        centre = np.nanmedian(values, axis=0)
        deviation = np.abs(values - centre)
        spread = 1.4826 * np.nanmedian(deviation, axis=0)
        far = deviation > limit_sd * np.where(spread > 0, spread, np.inf)
    return np.asarray(far.any(axis=1))


def statistics(images: Images) -> NDArray[np.float64]:
    """`(k, 2)` mean and standard deviation of every image, of every third line of a large one."""
    some = images[..., :: 3 if images.shape[-1] > 64 else 1, :].reshape(len(images), -1)
    mean = some.mean(axis=1)
    centred = some - mean[:, None]
    square = np.einsum("kp,kp->k", centred, centred) / some.shape[1]
    return np.stack([mean, np.sqrt(square)], axis=1).astype(np.float64)


def mask_softly(images: Images, diameter_px: float) -> None:
    """Bring all outside the particle to 0 in place, by a cosine over a tenth of its diameter."""
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    edge = max(0.1 * diameter_px, 2.0)
    beyond = np.clip((np.hypot(y, x) - diameter_px / 2) / edge, 0, 1)
    images *= (0.5 + 0.5 * np.cos(np.pi * beyond)).astype(np.float32)


def _at_one_pixel_size(images: Images, rows_table: pd.DataFrame, plan: Plan) -> Images:
    """Images `(k, c, n, n)` of one box and any pixel sizes → `(k, c, m, m)` of the plan's."""
    m = plan.cached_box_px
    out = np.empty((*images.shape[:2], m, m), np.float32)
    sizes = rows_table["pixel_size_A"].to_numpy(np.float64)
    for size in np.unique(sizes):
        rows = sizes == size
        matrix = resampling(images.shape[-1], float(size), m, plan.cached_pixel_size_A)
        out[rows] = resampled(images[rows], matrix)
    return out


def _band(plan: Plan) -> NDArray[np.float32] | None:
    """`(m, m // 2 + 1)` factors of the filters, None without; edges are cosines of two shells and more."""
    if not (plan.low_pass_A or plan.high_pass_A):
        return None
    m, size = plan.cached_box_px, plan.cached_pixel_size_A
    radius = np.hypot(np.fft.fftfreq(m, size)[:, None], np.fft.rfftfreq(m, size)[None])
    shell = 1 / (m * size)
    band = np.ones_like(radius)
    for wavelength, sense in ((plan.low_pass_A, 1.0), (plan.high_pass_A, -1.0)):
        if wavelength:
            edge = max(shell, 0.1 / wavelength)
            beyond = np.clip(sense * (radius - 1 / wavelength) / edge / 2 + 0.5, 0, 1)
            band *= 0.5 + 0.5 * np.cos(np.pi * beyond)
    return band.astype(np.float32)


def effective_ctf(rows_table: pd.DataFrame, plan: Plan) -> NDArray[np.float32] | None:
    """The CTF that cached images still carry → `(k, m, m // 2 + 1)`, or None where none is known.

    |CTF| after flipping, CTF² where the images came multiplied, the CTF itself where it was left alone.
    """
    if plan.ctf == "none":
        return None
    transfer = _ctf(rows_table, plan)
    state = rows_table["ctf_state"].to_numpy(str)
    positive = _flipped_rows(rows_table, plan) | (state == "phase-flipped")
    transfer[positive] = np.abs(transfer[positive])
    transfer[state == "premultiplied"] **= 2
    return transfer


def fourier_crop(images: Images, m: int) -> Images:
    """`(..., n, n)` → `(..., m, m)`: the frequencies below m / 2 kept; values keep their scale and pixel n //
    2 goes to m // 2, so poses about the centre stay true with shifts scaled by m / n."""
    spectrum = _cropped_spectrum(np.asarray(images, np.float32), m)
    return np.asarray(scipy.fft.irfft2(spectrum, s=(m, m), axes=(-2, -1)), np.float32)


def _cropped_spectrum(images: Images, m: int) -> NDArray[np.complex64]:
    n = images.shape[-1]
    if m > n:
        raise ValueError(f"cannot crop {n} px to {m} px in Fourier space")
    if m == n:
        return np.asarray(scipy.fft.rfft2(images, axes=(-2, -1)), np.complex64)
    low, high = (m + 1) // 2, m // 2
    kept = np.empty((*images.shape[:-2], m, m // 2 + 1), np.complex64)
    for place in np.ndindex(images.shape[:-2]):
        # one image at a time stays in the processor's cache; along y only the columns that are kept
        half = scipy.fft.fft(scipy.fft.rfft(images[place], axis=-1)[:, : m // 2 + 1], axis=0)
        kept[place][:low] = half[:low]
        kept[place][low:] = half[n - high :]
    kept *= np.float32((m / n) ** 2)
    offset = m // 2 - (n // 2) * m / n  # where the centre would land, short of m // 2
    if offset:
        ramp = np.exp(-2j * np.pi * offset * np.fft.fftfreq(m)).astype(np.complex64)
        half_ramp = np.exp(-2j * np.pi * offset * np.fft.rfftfreq(m)).astype(np.complex64)
        kept *= ramp[:, None] * half_ramp[None, :]
    return np.asarray(kept, np.complex64)


@functools.lru_cache(8)
def background_ring(n: int, diameter_px: float) -> NDArray[np.bool_]:
    """`(n, n)`: all that lies outside the particle, corners included as in RELION.

    Its mean is subtracted from every image, so its own noise goes into them: the more pixels the better.
    """
    y, x = np.indices((n, n)) - n // 2
    radius = np.hypot(y, x)
    ring = radius > diameter_px / 2
    if np.count_nonzero(ring) < LEAST_RING_PX:
        ring = radius >= n // 2 - 1
    ring.setflags(write=False)
    return ring


def normalise_background(images: Images, diameter_px: float) -> None:
    """Bring the ring around the particle to mean 0 and standard deviation 1, in place, per image.

    Means are per channel, the deviation one for all channels, so that colours stay. A background much quieter
    than the image (`NOISE_FLOOR`) is not blown up: clean simulations and masked images keep their relative
    contrast.
    """
    ring = background_ring(images.shape[-1], diameter_px)
    outside = images[..., ring].astype(np.float64)  # (k, c, p)
    mean = outside.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(outside - mean).mean(axis=(-2, -1)))
    overall = images.reshape(len(images), -1).std(axis=-1, dtype=np.float64)
    scale = np.maximum(deviation, NOISE_FLOOR * overall)
    images -= mean[..., None].astype(np.float32)
    images /= np.where(scale > 0, scale, 1.0).astype(np.float32)[:, None, None, None]


def _flipped_rows(rows_table: pd.DataFrame, plan: Plan) -> NDArray[np.bool_]:
    if plan.ctf == "flip-all":
        return np.ones(len(rows_table), bool)
    if plan.ctf == "flip-raw":
        return np.asarray(rows_table["ctf_state"] == "raw", dtype=bool)
    return np.zeros(len(rows_table), bool)


def _ctf(rows_table: pd.DataFrame, plan: Plan) -> NDArray[np.float32]:
    def column(name: str, default: float) -> NDArray[np.float64]:
        values = (
            rows_table[name].to_numpy(np.float64) if name in rows_table else np.full(len(rows_table), default)
        )
        return np.where(np.isfinite(values), values, default)

    return ctf_2d(
        plan.cached_box_px,
        plan.cached_pixel_size_A,
        column("defocus_u_A", 0.0),
        column("defocus_v_A", 0.0),
        column("defocus_angle_deg", 0.0),
        column("voltage_kV", 300.0),
        column("spherical_aberration_mm", 0.0),
        column("amplitude_contrast", USUAL_AMPLITUDE_CONTRAST),
        column("phase_shift_deg", 0.0),
    )


def _check(images: Images, rows_table: pd.DataFrame) -> None:
    """Images without any content cannot be normalised; the row tells which to leave out."""
    bad = np.flatnonzero(bad_images(images))
    if len(bad):
        is_broken = not np.isfinite(images[bad[0]]).all()
        row = rows_table.iloc[int(bad[0])]
        what = "holds NaN or infinite values" if is_broken else "is blank (all pixels equal)"
        raise UserError(
            f"row {int(row['source_row']) + 1} (image {int(row['stack_index']) + 1} of "
            f"{row['stack_path'] or 'the layer'}) "
            f'{what}; leave it out, for instance --where "source_row != {int(row["source_row"])}"'
        )
