"""The contrast transfer function of the microscope."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from particle_explorer.files import UserError

if TYPE_CHECKING:
    import pandas as pd

CTF = NDArray[np.float32]

CTF_COLUMNS = ("defocus_u_A", "defocus_v_A", "voltage_kV", "spherical_aberration_mm")
CTF_DEFAULTS = {"defocus_angle_deg": 0.0, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0}
"""What is taken where the file does not say, as for the cached images."""


def wavelength_A(voltage_kV: ArrayLike) -> NDArray[np.float64]:
    """Relativistic electron wavelength in Å (200 kV: 0.02508, 300 kV: 0.01969)."""
    volt = np.asarray(voltage_kV, np.float64) * 1e3
    return 12.2643247 / np.sqrt(volt * (1.0 + volt * 0.978466e-6))


def ctf_2d(
    n: int,
    pixel_size_A: ArrayLike,
    defocus_u_A: ArrayLike,
    defocus_v_A: ArrayLike,
    defocus_angle_deg: ArrayLike = 0.0,
    voltage_kV: ArrayLike = 300.0,
    cs_mm: ArrayLike = 2.7,
    amplitude_contrast: ArrayLike = 0.1,
    phase_shift_deg: ArrayLike = 0.0,
) -> CTF:
    """CTF of k images on the frequencies of `numpy.fft.rfft2` → `(k, n, n // 2 + 1)` float32.

    RELION's convention (`ctf.h`): defocus positive under focus, `defocus_angle_deg` from the x axis (columns)
    to the direction of `defocus_u_A`, turning like psi from +x to +y (rows, downwards); the value is positive
    at low frequencies, sin(pi λ Δf q² - pi/2 Cs λ³ q⁴ + phase shift + arcsin(amplitude contrast)), q in 1/Å.
    """
    u, v, angle, volt, cs, contrast, phase, size = (
        np.atleast_1d(np.asarray(value, np.float64))
        for value in (
            defocus_u_A, defocus_v_A, np.deg2rad(defocus_angle_deg), voltage_kV, cs_mm, amplitude_contrast,
            np.deg2rad(phase_shift_deg), pixel_size_A,
        )
    )  # fmt: skip
    # Δf(θ) q² = mean q² + half difference · q² cos 2(θ - angle), the double angle written without arctan
    factors = _factors(u, v, angle, volt, cs, size)
    chi = (factors @ _phase_pictures(n)).reshape(-1, n, n // 2 + 1)
    return np.sin(chi + (phase + np.arcsin(contrast))[:, None, None]).astype(np.float32)


def _factors(
    defocus_u_A: NDArray[np.float64],
    defocus_v_A: NDArray[np.float64],
    angle_rad: NDArray[np.float64],
    voltage_kV: NDArray[np.float64],
    cs_mm: NDArray[np.float64],
    pixel_size_A: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`(b, 4)` what each of `phase_pictures` counts in the phase of the sine."""
    wave = wavelength_A(voltage_kV)
    scale, half = np.pi * wave / pixel_size_A**2, 0.5 * (defocus_u_A - defocus_v_A)
    factors = (
        scale * 0.5 * (defocus_u_A + defocus_v_A),
        scale * half * np.cos(2 * angle_rad),
        scale * half * np.sin(2 * angle_rad),
        -0.5 * np.pi * cs_mm * 1e7 * wave**3 / pixel_size_A**4,
    )
    return np.stack(np.broadcast_arrays(*factors), 1)


@functools.lru_cache(maxsize=4)
def _phase_pictures(m: int) -> NDArray[np.float64]:
    """`phase_pictures` in double precision."""
    fy, fx = np.meshgrid(np.fft.fftfreq(m), np.fft.rfftfreq(m), indexing="ij")
    q2 = fx**2 + fy**2
    return np.stack([q2, fx**2 - fy**2, 2 * fx * fy, q2**2]).reshape(4, -1)


class TableCTF:
    """The CTFs of the rows of a table, on the grid of the averages."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.values = {name: table[name].to_numpy(np.float64) for name in CTF_COLUMNS}
        for name, usual in CTF_DEFAULTS.items():
            given = table[name].to_numpy(np.float64) if name in table else np.full(len(table), usual)
            self.values[name] = np.where(np.isnan(given), usual, given)
        state = table["ctf_state"].to_numpy(str)
        self.flipped = state == "phase-flipped"
        self.premultiplied = state == "premultiplied"

    def phase(
        self, rows: NDArray[np.int64], pixel_size_A: NDArray[np.float64], turn_deg: ArrayLike
    ) -> tuple[CTF, CTF]:
        """`(b, 4)` factors of `phase_pictures` and `(b,)` what is added to make the phase of the sine."""
        v = {name: values[rows] for name, values in self.values.items()}
        factors = _factors(
            v["defocus_u_A"],
            v["defocus_v_A"],
            np.deg2rad(v["defocus_angle_deg"] + turn_deg),
            v["voltage_kV"],
            v["spherical_aberration_mm"],
            np.asarray(pixel_size_A, np.float64),
        )
        added = np.deg2rad(v["phase_shift_deg"]) + np.arcsin(v["amplitude_contrast"])
        return factors.astype(np.float32), added.astype(np.float32)

    def at(
        self, rows: NDArray[np.int64], pixel_size_A: NDArray[np.float64], m: int, turn_deg: ArrayLike
    ) -> CTF:
        """`(b, m, m // 2 + 1)`, as the image carries it, the astigmatism turned by `turn_deg`.

        `ctf_2d` in single precision: its phase is a product of four coefficients and four pictures.
        """
        factors, added = self.phase(rows, pixel_size_A, turn_deg)
        phase = (factors @ phase_pictures(m)).reshape(len(rows), m, m // 2 + 1)
        phase += added[:, None, None]
        ctf = np.sin(phase, out=phase)
        ctf[self.flipped[rows]] = np.abs(ctf[self.flipped[rows]])
        return ctf


@functools.lru_cache(maxsize=4)
def phase_pictures(m: int) -> CTF:
    """`(4, m * (m // 2 + 1))`: q², q² cos 2θ, q² sin 2θ and q⁴ on the frequencies of `rfft2`, q per pixel."""
    return _phase_pictures(m).astype(np.float32)


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
