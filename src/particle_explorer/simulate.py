"""A simulated stack of one molecule with a hinge, every truth known.

The molecule is a few hundred pseudo-atoms of our own making: a big body (a broken ring of domains with a
foot) and a smaller arm that swings about a pivot, 20° off the viewing direction. Every pseudo-atom is a 2-D
Gaussian evaluated at the pixel centres of its image, so poses and conformations are exact: nothing is ever
interpolated. Poses follow `pose` (placement about pixel `n // 2`).

Units of the images: the noise has variance 1; the particle is bright.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from particle_explorer.configs import SimulateConfig
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError, replacing, write_text
from particle_explorer.pose import rotation_matrix

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

HINGE_RANGE_DEG = (0.0, 60.0)
EXTENT_A = 200.0
"""Smallest circle about the rotation centre that holds the molecule in every conformation."""
VOLTAGE_KV, SPHERICAL_ABERRATION_MM, AMPLITUDE_CONTRAST = 300.0, 2.7, 0.1
BLOCK = 256
"""Images rendered at a time; bounds the memory of a stack of any length."""

_PIVOT_A = np.array([24.0, -14.0, 0.0])
_VIEW_TILT_DEG = 20.0


def _ball(centre: ArrayLike, radii: ArrayLike, n_atoms: int) -> Float64:
    """`(n_atoms, 3)` points spread evenly through an ellipsoid: a low-discrepancy sequence, no dice."""
    g = 1.2207440846057596  # Roberts' R3 sequence: the root of g^4 = g + 1
    u = (0.5 + np.outer(np.arange(1, n_atoms + 1), [1 / g, 1 / g**2, 1 / g**3])) % 1.0
    radius, cos, phi = u[:, 0] ** (1 / 3), 2 * u[:, 1] - 1, 2 * np.pi * u[:, 2]
    sin = np.sqrt(1 - cos**2)
    unit = radius[:, None] * np.stack([sin * np.cos(phi), sin * np.sin(phi), cos], -1)
    return np.asarray(centre, dtype=np.float64) + unit * np.asarray(radii, dtype=np.float64)


def _body() -> Float64:
    """The fixed body, Å: five domains on a ring of six places, and a foot that breaks its symmetry."""
    places = np.deg2rad([-25.0, 35.0, 95.0, 155.0, 215.0])
    ring = [_ball((-20 + 25 * np.cos(a), 8 + 25 * np.sin(a), 0), (19, 19, 26), 64) for a in places]
    foot, shoulder = _ball((-46, 44, 4), (19, 13, 16), 40), _ball((8, -24, 0), (18, 15, 18), 48)
    return np.concatenate([*ring, foot, shoulder])


def _arm() -> Float64:
    """The moving arm at hinge 0, Å: a thin rod along the body that ends in a knob."""
    along = np.deg2rad(75.0)
    direction = np.array([np.cos(along), np.sin(along), 0.0])
    rod = [_ball(_PIVOT_A + t * direction, (10, 10, 11), 18) for t in (8.0, 21.0, 34.0)]
    return np.concatenate([*rod, _ball(_PIVOT_A + 52 * direction, (16, 16, 16), 50)])


def _view() -> Float64:
    """`(2, 3)`: from the molecule's Å to the projected (x, y)."""
    tilt = np.deg2rad(_VIEW_TILT_DEG)
    return np.array([[1.0, 0.0, 0.0], [0.0, np.cos(tilt), np.sin(tilt)]])


def pseudo_atoms(hinge_deg: ArrayLike) -> Float64:
    """Projected atoms `(k, m, 2)` as (x, y) in Å about the rotation centre, for each hinge angle `(k,)`.

    The rotation centre is the centroid of the half-open molecule, the same for all conformations. The arm
    turns about the pivot, from along the body (0°) outwards.
    """
    half_open = np.mean(HINGE_RANGE_DEG)
    hinge = np.deg2rad(np.append(np.atleast_1d(np.asarray(hinge_deg, dtype=np.float64)), half_open))
    body, arm = _body(), _arm() - _PIVOT_A
    cos, sin, zero = np.cos(hinge), np.sin(hinge), np.zeros_like(hinge)
    # opening turns the arm from +y towards +x (y down)
    rows = [(cos, sin, zero), (-sin, cos, zero), (zero, zero, zero + 1)]
    turn = np.stack([np.stack(row, -1) for row in rows], -2)
    moved = np.einsum("kij,mj->kmi", turn, arm) + _PIVOT_A
    atoms = np.concatenate([np.broadcast_to(body, (len(hinge), *body.shape)), moved], 1) @ _view().T
    return atoms[:-1] - atoms[-1].mean(0)


def render(
    hinge_deg: ArrayLike, angle_deg: ArrayLike, shift_yx_px: ArrayLike, box_px: int, pixel_size_A: float
) -> Float32:
    """Noise-free projections `(k, n, n)` without CTF; every atom weighs 1 (times the width of its Gaussian).

    `hinge_deg` and `angle_deg` `(k,)`, `shift_yx_px` `(k, 2)`. Atoms are Gaussians of 4 Å standard
    deviation, or of one pixel where that is wider.
    """
    atoms = pseudo_atoms(hinge_deg) / pixel_size_A
    xy = np.einsum("kij,kmj->kmi", rotation_matrix(np.atleast_1d(angle_deg)), atoms)
    xy = xy + np.atleast_2d(np.asarray(shift_yx_px, dtype=np.float64))[:, None, ::-1]
    pixels = np.arange(box_px, dtype=np.float32) - box_px // 2
    width = max(4.0 / pixel_size_A, 1.0)
    offset = (pixels - xy.astype(np.float32)[..., None]) / np.float32(width)  # (k, m, 2, n)
    profile = np.exp(-0.5 * np.square(offset))
    # a Gaussian is a product of its profiles: the sum over atoms is one matrix product per image
    return np.asarray(np.swapaxes(profile[:, :, 1], 1, 2) @ profile[:, :, 0], dtype=np.float32)


def noise_power(box_px: int, colour: float) -> Float64:
    """Power of the noise `(n, n // 2 + 1)` in `rfft2` layout, 1 on average over the whole spectrum.

    It falls as (s + 0.05)^(-2 · colour) with the spatial frequency s in cycles per pixel.
    """
    y, x = np.fft.fftfreq(box_px)[:, None], np.fft.rfftfreq(box_px)[None]
    power = (np.hypot(y, x) + 0.05) ** (-2.0 * colour)
    return np.asarray(power / (np.sum(power * _half_weights(box_px)) / box_px**2))


def _half_weights(box_px: int) -> Float64:
    """How often each column of the half spectrum stands in the whole one."""
    weights = np.full(box_px // 2 + 1, 2.0)
    weights[0] = 1.0
    if box_px % 2 == 0:
        weights[-1] = 1.0
    return weights


@dataclass(frozen=True)
class Simulation:
    """A stack that exists as its truth; images are made when they are read, in any order, always the same.

    `table` has one row per image: `true_hinge_deg`, `true_angle_deg`, `true_shift_y_px`, `true_shift_x_px`,
    `true_junk` (0 or 1; the other truths mean nothing for junk) and, where there is a CTF, its parameters.
    """

    config: SimulateConfig
    table: pd.DataFrame
    signal_scale: float
    """What noise-free images are multiplied with to reach the signal-to-noise ratio."""

    @property
    def path(self) -> str:
        """No file: with this a simulation can stand wherever a stack file is read."""
        return ""

    @property
    def n_images(self) -> int:
        return len(self.table)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.config.box_px, self.config.box_px

    @property
    def has_ctf(self) -> bool:
        return "defocus_u_A" in self.table

    def ctf(self, rows: ArrayLike) -> Float64 | None:
        """`(k, n, n // 2 + 1)`, or None for a stack without CTF."""
        if not self.has_ctf:
            return None
        table = self.table.iloc[np.asarray(rows)]
        return np.asarray(
            ctf_2d(
                self.config.box_px,
                self.config.pixel_size_A,
                table["defocus_u_A"].to_numpy(),
                table["defocus_v_A"].to_numpy(),
                table["defocus_angle_deg"].to_numpy(),
                VOLTAGE_KV,
                SPHERICAL_ABERRATION_MM,
                AMPLITUDE_CONTRAST,
                0.0,
            )
        )

    def signal(self, rows: ArrayLike) -> Float32:
        """The noise-free particles `(k, n, n)` with CTF, as if there were no junk."""
        table = self.table.iloc[np.asarray(rows)]
        images = render(
            table["true_hinge_deg"].to_numpy(),
            table["true_angle_deg"].to_numpy(),
            table[["true_shift_y_px", "true_shift_x_px"]].to_numpy(),
            self.config.box_px,
            self.config.pixel_size_A,
        )
        ctf = self.ctf(rows)
        if ctf is not None:
            images = np.fft.irfft2(np.fft.rfft2(images) * ctf, s=images.shape[1:]).astype(np.float32)
        return images * np.float32(self.signal_scale)

    def read(self, indices: ArrayLike) -> Float32:
        """`(k, 1, n, n)` images with noise."""
        rows = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        n = self.config.box_px
        images = np.empty((len(rows), n, n), np.float32)
        colour = np.sqrt(noise_power(n, self.config.noise_colour))
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            junk = self.table["true_junk"].to_numpy()[block].astype(bool)
            signal = np.zeros((len(block), n, n), np.float32)
            signal[~junk] = self.signal(block[~junk])
            noise = np.empty_like(signal)
            for i, row in enumerate(block):
                # a stream of its own for every image: any order and any block gives the same stack
                rng = np.random.Generator(np.random.Philox(key=[self.config.seed, int(row)]))
                noise[i] = rng.standard_normal((n, n), dtype=np.float32)
                if junk[i]:
                    signal[i] = _junk(rng, n, self.config.pixel_size_A)
            noise = np.fft.irfft2(np.fft.rfft2(noise) * colour, s=(n, n)).astype(np.float32)
            images[first : first + len(block)] = signal + noise
        return images[:, None]


def _junk(rng: np.random.Generator, n: int, pixel_size_A: float) -> Float32:
    """Something that is not the molecule: nothing, ice, or an edge of the support film."""
    y, x = np.mgrid[:n, :n] - (n // 2)
    kind = rng.integers(3)
    image = np.zeros((n, n))
    if kind == 1:
        for _ in range(rng.integers(1, 4)):
            cy, cx = rng.uniform(-n / 3, n / 3, 2)
            width = rng.uniform(20, 45) / pixel_size_A
            image += rng.uniform(1, 2.5) * np.exp(-0.5 * ((y - cy) ** 2 + (x - cx) ** 2) / width**2)
    elif kind == 2:
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-n / 4, n / 4)
        across = (np.cos(angle) * x + np.sin(angle) * y - offset) * pixel_size_A
        image = rng.uniform(0.7, 1.5) * (np.tanh(across / 8) + np.exp(-0.5 * (across / 10) ** 2))
    return image.astype(np.float32)


def simulate(config: SimulateConfig, progress: Callable[[float], None] | None = None) -> Simulation:
    """Draw the truth of a stack and its signal scale; nothing is written, no image kept.

    `progress` is called with the share done (0 to 1).
    """
    if config.box_px * config.pixel_size_A < EXTENT_A:
        raise UserError(
            f"a box of {config.box_px} px of {config.pixel_size_A:g} Å is smaller than the molecule; "
            f"box times pixel size must be {EXTENT_A:g} Å or more"
        )
    if config.defocus_max_A < config.defocus_min_A:
        raise UserError(
            f"the largest defocus, {config.defocus_max_A:g} Å, is below the least, "
            f"{config.defocus_min_A:g} Å; swap them"
        )
    rng, n = np.random.default_rng(config.seed), config.n
    shift = rng.normal(0, 1, (n, 2)) * config.shift_sd_px
    columns: dict[str, NDArray[Any]] = {
        "true_hinge_deg": rng.uniform(*HINGE_RANGE_DEG, n),
        "true_angle_deg": rng.uniform(-180, 180, n),
        "true_shift_y_px": shift[:, 0],
        "true_shift_x_px": shift[:, 1],
        "true_junk": (rng.uniform(size=n) < config.junk_fraction).astype(np.int64),
    }
    if config.defocus_max_A > 0:
        defocus = rng.uniform(config.defocus_min_A, config.defocus_max_A, n)
        difference = np.abs(rng.normal(0, 1, n)) * config.astigmatism_A
        columns["defocus_u_A"] = defocus + difference / 2
        columns["defocus_v_A"] = defocus - difference / 2
        columns["defocus_angle_deg"] = rng.uniform(0, 180, n)
        columns["voltage_kV"] = np.full(n, VOLTAGE_KV)
        columns["spherical_aberration_mm"] = np.full(n, SPHERICAL_ABERRATION_MM)
        columns["amplitude_contrast"] = np.full(n, AMPLITUDE_CONTRAST)
        columns["phase_shift_deg"] = np.zeros(n)
    # the text of a star file is the truth, so that truth read back and truth in memory are equal
    table = pd.DataFrame(columns).round(4)
    unscaled = Simulation(config, table, 1.0)
    particles = np.flatnonzero(table["true_junk"] == 0)[:2048]
    if not len(particles):
        return unscaled
    total = squares = 0.0
    for first in range(0, len(particles), BLOCK):
        images = unscaled.signal(particles[first : first + BLOCK]).astype(np.float64)
        total, squares = total + images.sum(), squares + np.square(images).sum()
        if progress is not None:
            progress(min(1.0, (first + BLOCK) / len(particles)))
    count = len(particles) * config.box_px**2
    variance = squares / count - (total / count) ** 2
    return Simulation(config, table, float(np.sqrt(config.snr / variance)))


def write(
    out_dir: Path,
    config: SimulateConfig,
    *,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Write `particles.mrcs` (float16), and `particles.star` and `particles.cs` over it, into `out_dir`.

    The star is RELION 3.1, with CTF and truth columns and without any pose; the cs is cryoSPARC's numpy
    form, its paths relative to `out_dir`. Memory stays that of one block of images.
    """
    out_dir = Path(out_dir)
    names = [out_dir / name for name in ("particles.mrcs", "particles.star", "particles.cs")]
    for path in names:
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} exists already; choose another folder or allow overwriting (--overwrite)"
            )
    simulation = simulate(config)
    with replacing(names[0], overwrite=overwrite) as temporary, temporary.open("wb") as file:
        _write_stack(file, simulation, progress)
    with replacing(names[1], overwrite=overwrite) as temporary, temporary.open("w", newline="\n") as text:
        _write_star(text, simulation)
    with replacing(names[2], overwrite=overwrite) as temporary, temporary.open("wb") as file:
        np.save(file, _cs(simulation), allow_pickle=False)
    return simulation


def _write_stack(file: IO[bytes], simulation: Simulation, progress: Callable[[float], None] | None) -> None:
    """MRC2014, mode 12 (float16), an image stack: the header first, then block after block."""
    n_images, n, size = simulation.n_images, simulation.config.box_px, simulation.config.pixel_size_A
    header = np.zeros(256, "<i4")
    header[[0, 1, 2, 3]] = n, n, n_images, 12
    header[[7, 8, 9]] = n, n, 1  # intervals of one image: a stack, not a volume
    header[10:16] = np.array([n * size, n * size, size, 90, 90, 90], "<f4").view("<i4")
    header[16:19] = 1, 2, 3
    header[19:22] = np.array([0, -1, -2], "<f4").view("<i4")  # largest below least: statistics unknown
    header[27] = 20141
    header[52] = int.from_bytes(b"MAP ", "little")
    header[53] = 0x4444
    header[54] = np.array([-1], "<f4").view("<i4")[0]
    header[55] = 1
    label = b"particle-explorer: simulated particles".ljust(80)
    file.write(header.tobytes()[:224] + label + bytes(720))
    for first in range(0, n_images, BLOCK):
        rows = np.arange(first, min(first + BLOCK, n_images))
        file.write(simulation.read(rows).astype("<f2").tobytes())
        if progress is not None:
            progress((int(rows[-1]) + 1) / n_images)


def _write_star(file: IO[str], simulation: Simulation) -> None:
    config, table = simulation.config, simulation.table
    optics = {
        "_rlnOpticsGroup": "1",
        "_rlnOpticsGroupName": "opticsGroup1",
        "_rlnImagePixelSize": f"{config.pixel_size_A:.6f}",
        "_rlnImageSize": str(config.box_px),
        "_rlnImageDimensionality": "2",
    }
    columns = ["_rlnImageName", "_rlnOpticsGroup"]
    values = ["true_hinge_deg", "true_angle_deg", "true_shift_y_px", "true_shift_x_px", "true_junk"]
    labels = [f"_{name}" for name in values]
    if simulation.has_ctf:
        optics |= {
            "_rlnVoltage": f"{VOLTAGE_KV:.6f}",
            "_rlnSphericalAberration": f"{SPHERICAL_ABERRATION_MM:.6f}",
            "_rlnAmplitudeContrast": f"{AMPLITUDE_CONTRAST:.6f}",
        }
        values = ["defocus_u_A", "defocus_v_A", "defocus_angle_deg", *values]
        labels = ["_rlnDefocusU", "_rlnDefocusV", "_rlnDefocusAngle", *labels]
    file.write("\n# version 30001\n\ndata_optics\n\nloop_\n")
    file.writelines(f"{label} #{i}\n" for i, label in enumerate(optics, 1))
    file.write(" ".join(optics.values()) + "\n\n\n# version 30001\n\ndata_particles\n\nloop_\n")
    file.writelines(f"{label} #{i}\n" for i, label in enumerate([*columns, *labels], 1))
    for first in range(0, len(table), BLOCK):
        part = table[values].iloc[first : first + BLOCK]
        for row, cells in enumerate(part.itertuples(index=False), first):
            numbers = " ".join(f"{cell:12.4f}" if isinstance(cell, float) else f"{cell:4d}" for cell in cells)
            file.write(f"{row + 1:06d}@particles.mrcs 1 {numbers}\n")
    file.write("\n")


def _cs(simulation: Simulation) -> NDArray[np.void]:
    config, table, n = simulation.config, simulation.table, simulation.n_images
    path = b"particles.mrcs"
    # any number that is unique and the same on every machine; cryoSPARC's are random 64-bit integers
    uid = np.random.default_rng([config.seed, 1]).permutation(n).astype(np.uint64) * np.uint64(
        2**32
    ) + np.uint64(1)
    fields: list[tuple[str, str, Any, Any]] = [
        ("uid", "<u8", (), uid),
        ("blob/path", f"S{len(path)}", (), path),
        ("blob/idx", "<u4", (), np.arange(n)),
        ("blob/shape", "<u4", (2,), config.box_px),
        ("blob/psize_A", "<f4", (), config.pixel_size_A),
        ("blob/sign", "<f4", (), 1.0),
        ("blob/import_sig", "<u8", (), 0),
    ]
    if simulation.has_ctf:
        fields += [
            ("ctf/type", "S9", (), b"spline"),
            ("ctf/exp_group_id", "<u4", (), 0),
            ("ctf/accel_kv", "<f4", (), VOLTAGE_KV),
            ("ctf/cs_mm", "<f4", (), SPHERICAL_ABERRATION_MM),
            ("ctf/amp_contrast", "<f4", (), AMPLITUDE_CONTRAST),
            ("ctf/df1_A", "<f4", (), table.get("defocus_u_A")),
            ("ctf/df2_A", "<f4", (), table.get("defocus_v_A")),
            ("ctf/df_angle_rad", "<f4", (), np.deg2rad(table["defocus_angle_deg"].to_numpy())),
            ("ctf/phase_shift_rad", "<f4", (), 0.0),
            ("ctf/scale", "<f4", (), 1.0),
            ("ctf/bfactor", "<f4", (), 0.0),
        ]
    array = np.zeros(n, np.dtype([(name, kind, shape) for name, kind, shape, _ in fields]))
    for name, _, _, value in fields:
        array[name] = value
    return array


def limit(
    simulation: Simulation,
    rows: ArrayLike | None = None,
    *,
    hinge_step_deg: float = 2.0,
    angle_step_deg: float = 3.0,
    shift_step_px: float = 0.5,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """How well the conformation can be known at all: |Pearson r| of its posterior mean with the truth.

    The posterior is that under the true noise-free templates on a grid of hinge × angle × shift, with the
    priors they were drawn from, the true noise spectrum, and each image's own CTF. Junk is left out.
    Whole-pixel shifts are too coarse: at a signal-to-noise ratio of 0.2 they take 0.012 off the correlation.

    Returns
    -------
    `limit_abs_r`, `standard_error`, `hinge_rms_deg` (of the estimate), `n`, and `how` in words.
    """
    config, n = simulation.config, simulation.config.box_px
    chosen = np.arange(simulation.n_images) if rows is None else np.asarray(rows)
    chosen = chosen[simulation.table["true_junk"].to_numpy()[chosen] == 0]
    low, high = HINGE_RANGE_DEG
    n_hinge = max(2, round((high - low) / hinge_step_deg))
    hinge = low + (np.arange(n_hinge) + 0.5) * (high - low) / n_hinge
    angle = np.arange(0, 360, angle_step_deg)
    reach = np.floor(3 * config.shift_sd_px / shift_step_px) * shift_step_px
    line = np.arange(-reach, reach + shift_step_px / 2, shift_step_px)
    shift = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    prior = -0.5 * np.square(shift).sum(1) / max(config.shift_sd_px, 1e-6) ** 2
    grid_hinge, grid_angle = np.repeat(hinge, len(angle)), np.tile(angle, len(hinge))
    template = np.float32(simulation.signal_scale) * np.concatenate(
        [
            render(grid_hinge[i : i + BLOCK], grid_angle[i : i + BLOCK], (0.0, 0.0), n, config.pixel_size_A)
            for i in range(0, len(grid_hinge), BLOCK)
        ]
    )
    power = noise_power(n, config.noise_colour)
    spectrum = np.square(np.abs(np.fft.rfft2(template))) * (_half_weights(n) / n**2) / power
    spectrum = spectrum.reshape(len(template), -1).astype(np.float32)
    template = template.reshape(len(template), -1)
    y, x = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]
    # the correlation with a template moved by s is that of the image moved by -s with the template
    ramps = np.exp(2j * np.pi * (shift[:, 0, None, None] * y + shift[:, 1, None, None] * x))
    estimate = np.empty(len(chosen))
    per_block = max(1, int(4e7 / (len(template) * len(shift))))
    for first in range(0, len(chosen), per_block):
        block = chosen[first : first + per_block]
        ctf = simulation.ctf(block)
        if ctf is None:
            ctf = np.ones((1, *power.shape))
        whitened = np.fft.rfft2(simulation.read(block)[:, 0]) * ctf / power
        moved = np.fft.irfft2(whitened[:, None] * ramps, s=(n, n)).reshape(len(block), len(shift), -1)
        score = moved.astype(np.float32) @ template.T
        score -= 0.5 * (np.square(ctf).reshape(len(ctf), -1).astype(np.float32) @ spectrum.T)[:, None]
        score += prior.astype(np.float32)[None, :, None]
        score -= score.max((1, 2), keepdims=True)
        weight = np.exp(score).sum(1).reshape(len(block), len(hinge), len(angle)).sum(2)
        estimate[first : first + len(block)] = weight @ hinge / weight.sum(1)
        if progress is not None:
            progress((first + len(block)) / len(chosen))
    truth = simulation.table["true_hinge_deg"].to_numpy()[chosen]
    r = float(np.corrcoef(estimate, truth)[0, 1])
    return {
        "limit_abs_r": abs(r),
        "standard_error": (1 - r**2) / float(np.sqrt(len(chosen))),
        "hinge_rms_deg": float(np.sqrt(np.mean(np.square(estimate - truth)))),
        "n": len(chosen),
        "how": (
            "|Pearson r| between the true hinge and its posterior mean under the true noise-free templates "
            f"({len(hinge)} hinge angles x {len(angle)} in-plane angles x {len(shift)} shifts, true priors, "
            "true noise spectrum, each image's own CTF), junk left out"
        ),
    }


SAMPLE = SimulateConfig(n=1400, box_px=48, pixel_size_A=5.0, snr=0.2, seed=7)
"""The stack of the demo and of napari's sample menu."""


def make_sample(out_dir: Path) -> dict[str, Any]:
    """Write the sample data and `truth.json` with its reachable limit into `out_dir`; takes a minute."""
    simulation = write(out_dir, SAMPLE, overwrite=True)
    truth = {**limit(simulation), "simulate": SAMPLE.model_dump()}
    write_text(Path(out_dir) / "truth.json", json.dumps(truth, indent=2) + "\n")
    return truth


if __name__ == "__main__":
    import sys

    print(json.dumps(make_sample(Path(sys.argv[1] if len(sys.argv) > 1 else "sample_data")), indent=2))
