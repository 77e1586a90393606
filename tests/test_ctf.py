"""The CTF against torch-ctf and against what it must be on paper."""

from __future__ import annotations

import numpy as np
import pytest

from particle_explorer.ctf import ctf_2d, wavelength_A


@pytest.mark.parametrize("n", [32, 33])
@pytest.mark.parametrize("angle", [0.0, 37.0, -70.0])
@pytest.mark.parametrize(("voltage", "cs", "contrast", "phase"), [(300, 2.7, 0.1, 0), (200, 0.01, 0.07, 40)])
def test_agrees_with_torch_ctf(
    n: int, angle: float, voltage: float, cs: float, contrast: float, phase: float
) -> None:
    from torch_ctf import calculate_ctf_2d

    u, v, size = 15_000.0, 12_500.0, 3.1
    theirs = calculate_ctf_2d(
        defocus=(u + v) / 2e4,
        astigmatism=(u - v) / 2e4,
        astigmatism_angle=angle,
        voltage=voltage,
        spherical_aberration=cs,
        amplitude_contrast=contrast,
        phase_shift=phase,
        pixel_size=size,
        image_shape=(n, n),
        rfft=True,
        fftshift=False,
    ).numpy()
    ours = ctf_2d(n, size, u, v, angle, voltage, cs, contrast, phase)
    assert ours.shape == (1, n, n // 2 + 1)
    np.testing.assert_allclose(ours[0], theirs, atol=2e-3)


def test_wavelength() -> None:
    np.testing.assert_allclose(wavelength_A([200, 300]), [0.025079, 0.019687], atol=1e-6)


def test_zeros_are_where_they_must_be() -> None:
    """Without Cs and amplitude contrast, zeros at q² = k / (λ Δf)."""
    defocus, voltage = 20_000.0, 300.0
    zero = np.sqrt(np.arange(1, 4) / (float(wavelength_A(voltage)) * defocus))
    for q in zero:
        n = 200
        size = 20 / n / q  # frequency index 20 of n lies at q
        row = ctf_2d(n, size, defocus, defocus, 0, voltage, 0.0, 0.0)[0, 0]
        assert abs(row[20]) < 1e-5
        assert row[19] * row[21] < 0


def test_positive_at_low_frequency_and_equal_to_amplitude_contrast_at_zero() -> None:
    ctf = ctf_2d(64, 1.5, 20_000, 20_000, 0, 300, 2.7, 0.1)[0]
    assert ctf[0, 0] == pytest.approx(0.1, abs=1e-6)
    assert ctf[0, 1] > 0.1


def test_defocus_u_lies_along_x_at_angle_0_and_turns_towards_y() -> None:
    u = ctf_2d(64, 2.0, 20_000, 20_000)[0]
    at_0 = ctf_2d(64, 2.0, 20_000, 10_000, 0.0)[0]
    np.testing.assert_allclose(at_0[0], u[0], atol=1e-5)
    at_90 = ctf_2d(64, 2.0, 20_000, 10_000, 90.0)[0]
    np.testing.assert_allclose(at_90[:, 0], u[:, 0], atol=1e-5)
    at_45 = ctf_2d(64, 2.0, 20_000, 10_000, 45.0)[0]
    diagonal = np.arange(1, 20)
    np.testing.assert_allclose(at_45[diagonal, diagonal], u[diagonal, diagonal], atol=1e-5)


def test_one_call_for_many_is_many_calls() -> None:
    rng = np.random.default_rng(0)
    u, v, angle = rng.uniform(1e4, 2e4, 5), rng.uniform(1e4, 2e4, 5), rng.uniform(0, 180, 5)
    together = ctf_2d(24, 2.5, u, v, angle)
    for i in range(5):
        np.testing.assert_allclose(together[i], ctf_2d(24, 2.5, u[i], v[i], angle[i])[0], atol=1e-6)


def test_a_phase_plate_in_focus_is_constant() -> None:
    np.testing.assert_allclose(
        ctf_2d(16, 1.0, 0, 0, 0, 300, 0.0, 0.1, 90.0), np.cos(np.arcsin(0.1)), atol=1e-6
    )
