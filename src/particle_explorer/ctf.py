"""The contrast transfer function of the microscope."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CTF = NDArray[np.float32]


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
        np.atleast_1d(np.asarray(value, np.float64))[:, None, None]
        for value in (
            defocus_u_A, defocus_v_A, np.deg2rad(defocus_angle_deg), voltage_kV, cs_mm, amplitude_contrast,
            np.deg2rad(phase_shift_deg), pixel_size_A,
        )
    )  # fmt: skip
    fy = np.fft.fftfreq(n)[:, None]
    fx = np.fft.rfftfreq(n)[None, :]
    q2 = (fx * fx + fy * fy) / size**2
    # Δf(θ) q² = mean q² + half difference · q² cos 2(θ - angle), the double angle written without arctan
    cos2 = (fx * fx - fy * fy) / size**2
    sin2 = 2.0 * fx * fy / size**2
    defocus_q2 = 0.5 * (u + v) * q2 + 0.5 * (u - v) * (np.cos(2 * angle) * cos2 + np.sin(2 * angle) * sin2)
    wave = wavelength_A(volt)
    chi = np.pi * wave * defocus_q2 - 0.5 * np.pi * cs * 1e7 * wave**3 * q2**2
    return np.sin(chi + phase + np.arcsin(contrast)).astype(np.float32)
