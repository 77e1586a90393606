from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from particle_explorer.configs import SimulateConfig
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError
from particle_explorer.io.reading import read
from particle_explorer.simulate import (
    SAMPLE,
    Simulation,
    limit,
    noise_power,
    pseudo_atoms,
    render,
    simulate,
    write,
)

TRUTH = ["true_hinge_deg", "true_angle_deg", "true_shift_y_px", "true_shift_x_px", "true_junk"]
CLEAN = SimulateConfig(
    n=800, box_px=41, pixel_size_A=6.0, snr=2.0, defocus_min_A=0, defocus_max_A=0, junk_fraction=0, seed=3
)


def correlation(a: NDArray, b: NDArray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def brought_back(image: NDArray, angle_deg: float, shift_y: float, shift_x: float) -> NDArray:
    """The reference x_ref shows the image at R(angle) x_ref + shift (written apart from the package)."""
    n = len(image)
    y, x = np.mgrid[:n, :n] - n // 2
    cos, sin = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    at = [sin * x + cos * y + shift_y + n // 2, cos * x - sin * y + shift_x + n // 2]
    return map_coordinates(image, at, order=3)


@pytest.mark.parametrize("box_px", [40, 41])
def test_images_brought_back_by_their_truth_average_to_the_template(box_px: int) -> None:
    simulation = simulate(CLEAN.model_copy(update={"box_px": box_px}))
    for hinge in (10.0, 50.0):
        rows = np.flatnonzero(np.abs(simulation.table["true_hinge_deg"] - hinge) < 4)
        poses = simulation.table.loc[rows, TRUTH[1:4]].to_numpy()
        images = simulation.read(rows)[:, 0]
        average = np.mean([brought_back(i, *p) for i, p in zip(images, poses, strict=True)], 0)
        template = render([hinge], [0.0], [(0.0, 0.0)], box_px, CLEAN.pixel_size_A)[0]
        other = render([60.0 - hinge], [0.0], [(0.0, 0.0)], box_px, CLEAN.pixel_size_A)[0]
        assert correlation(average, template) > 0.99
        assert correlation(average, other) < 0.97


def test_the_arm_opens_and_the_body_stays() -> None:
    hinge = np.array([0.0, 20.0, 40.0, 60.0])
    atoms = pseudo_atoms(hinge)
    moves = np.ptp(atoms, axis=0).max(-1) > 1e-9
    assert 0.1 < moves.mean() < 0.4
    far = atoms[:, moves].max(1)[:, 0]
    assert np.all(np.diff(far) > 5)
    # no turn brings the molecule onto itself
    image = render([30.0], [0.0], [(0.0, 0.0)], 64, 4.0)[0]
    turned = render(np.full(11, 30.0), np.arange(30, 360, 30), np.zeros((11, 2)), 64, 4.0)
    assert max(correlation(image, other) for other in turned) < 0.8


@pytest.mark.parametrize("snr", [0.05, 1.0])
@pytest.mark.parametrize("colour", [0.0, 1.0])
def test_signal_to_noise_is_as_asked(snr: float, colour: float) -> None:
    config = SimulateConfig(n=400, box_px=48, pixel_size_A=5.0, snr=snr, noise_colour=colour, seed=1)
    simulation = simulate(config)
    rows = np.flatnonzero(simulation.table["true_junk"] == 0)
    signal = simulation.signal(rows)
    noise = simulation.read(rows)[:, 0] - signal
    assert signal.var() / noise.var() == pytest.approx(snr, rel=0.05)
    assert noise.var() == pytest.approx(1, rel=0.05)
    power = np.square(np.abs(np.fft.rfft2(noise))).mean(0) / 48**2
    assert np.median(power / noise_power(48, colour)) == pytest.approx(1, rel=0.03)


def test_coloured_noise_is_stronger_at_low_frequencies() -> None:
    power = noise_power(32, 0.5)
    assert power[1, 0] > 5 * power[16, 16]
    assert np.allclose(noise_power(33, 0.0), 1)


def test_the_ctf_has_its_zero_where_the_formula_says() -> None:
    defocus, wavelength, cs, amplitude = 15_000.0, 0.0196875, 2.7e7, 0.1  # Å, 300 kV
    config = SimulateConfig(
        n=8,
        box_px=128,
        pixel_size_A=3.0,
        defocus_min_A=defocus,
        defocus_max_A=defocus,
        astigmatism_A=0,
        junk_fraction=0,
    )
    simulation = simulate(config)
    s = np.linspace(0.01, 0.1, 20_000)
    phase = np.pi * wavelength * defocus * s**2 - np.pi / 2 * cs * wavelength**3 * s**4 + np.arcsin(amplitude)
    zero = s[np.argmax(phase > np.pi)] * config.box_px * config.pixel_size_A  # in Fourier pixels
    with_ctf = np.abs(np.fft.rfft2(simulation.signal(np.arange(8))))
    plain = simulate(config.model_copy(update={"defocus_min_A": 0.0, "defocus_max_A": 0.0}))
    without = np.abs(np.fft.rfft2(plain.signal(np.arange(8))))
    radius = np.hypot(np.fft.fftfreq(128)[:, None] * 128, np.fft.rfftfreq(128)[None] * 128)
    at_zero, before = np.abs(radius - zero) < 0.3, np.abs(radius - 0.7 * zero) < 0.3
    ratio = with_ctf / without
    assert np.median(ratio[:, at_zero]) < 0.1 * np.median(ratio[:, before])


def test_astigmatism_and_particle_contrast() -> None:
    simulation = simulate(SimulateConfig(n=50, box_px=64, junk_fraction=0, astigmatism_A=2000, seed=2))
    ctf = simulation.ctf(np.arange(50))
    assert ctf is not None and ctf.shape == (50, 64, 33)
    assert np.all(ctf[:, 0, 0] > 0)  # particles stay bright
    row = simulation.table.iloc[0]
    alone = ctf_2d(64, 4.0, row.defocus_u_A, row.defocus_v_A, row.defocus_angle_deg, 300.0, 2.7, 0.1, 0.0)
    assert np.allclose(np.reshape(alone, (64, 33)), ctf[0])
    assert not np.allclose(ctf[0, 10, 0], ctf[0, 0, 10], atol=1e-3)


def test_the_same_seed_gives_the_same_images_in_any_order() -> None:
    config = SimulateConfig(n=300, box_px=32, pixel_size_A=7.0, junk_fraction=0.3)
    first, again = simulate(config), simulate(config)
    images = first.read(np.arange(300))
    assert images.shape == (300, 1, 32, 32) and images.dtype == np.float32
    rows = np.array([299, 3, 3, 150])
    assert np.allclose(again.read(rows), images[rows], atol=1e-5)
    other = simulate(config.model_copy(update={"seed": 1}))
    assert abs(correlation(other.read(rows), images[rows])) < 0.3


def test_junk_is_not_the_molecule() -> None:
    simulation = simulate(SimulateConfig(n=400, box_px=40, pixel_size_A=6.0, snr=1.0, junk_fraction=0.25))
    junk = simulation.table["true_junk"].to_numpy() == 1
    assert junk.mean() == pytest.approx(0.25, abs=0.07)
    images, signal = simulation.read(np.arange(400))[:, 0], simulation.signal(np.arange(400))
    match = np.array([correlation(i, s) for i, s in zip(images, signal, strict=True)])
    assert match[~junk].min() > 0.4 > 0.3 > np.median(match[junk])


def test_star_and_cs_hold_the_same_stack(tmp_path: Path) -> None:
    simulation = write(tmp_path, SimulateConfig(n=270, box_px=32, pixel_size_A=7.0, snr=0.5, seed=5))
    with mrcfile.open(tmp_path / "particles.mrcs", permissive=False) as mrc:
        assert mrc.data.dtype == np.float16 and mrc.data.shape == (270, 32, 32)
        assert mrc.is_image_stack() and float(mrc.voxel_size.x) == pytest.approx(7.0)
        assert np.allclose(mrc.data, simulation.read(np.arange(270))[:, 0], atol=5e-3)
    assert mrcfile.validate(tmp_path / "particles.mrcs")
    star = starfile.read(tmp_path / "particles.star")
    particles, optics = star["particles"], star["optics"]
    assert list(particles["rlnImageName"])[-1] == "000270@particles.mrcs"
    assert not {"rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"} & set(particles)
    pd.testing.assert_frame_equal(particles[TRUTH], simulation.table[TRUTH])
    assert float(optics["rlnImagePixelSize"].iloc[0]) == 7.0
    cs = np.load(tmp_path / "particles.cs", allow_pickle=False)
    assert np.array_equal(cs["blob/idx"], np.arange(270)) and len(np.unique(cs["uid"])) == 270
    assert np.allclose(cs["ctf/df1_A"], particles["rlnDefocusU"], atol=0.01)
    assert np.allclose(np.rad2deg(cs["ctf/df_angle_rad"]), particles["rlnDefocusAngle"], atol=1e-3)


def test_our_own_readers_agree_on_both(tmp_path: Path) -> None:
    simulation = write(tmp_path, SimulateConfig(n=20, box_px=32, pixel_size_A=7.0, seed=5))
    star, cs = read(tmp_path / "particles.star"), read(tmp_path / "particles.cs")
    assert np.array_equal(star.images.read(np.arange(20)), cs.images.read(np.arange(20)))
    assert np.allclose(star.images.read(np.arange(20)), simulation.read(np.arange(20)), atol=5e-3)
    assert np.array_equal(star.table[TRUTH].to_numpy(), simulation.table[TRUTH].to_numpy())
    assert set(star.table["ctf_state"]) == set(cs.table["ctf_state"]) == {"raw"}
    for column in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "voltage_kV", "amplitude_contrast"):
        assert np.allclose(star.table[column], cs.table[column], rtol=1e-6), column
    assert "angle_deg" not in star.table and "angle_deg" not in cs.table


def test_writing_never_replaces_files_unasked(tmp_path: Path) -> None:
    config = SimulateConfig(n=3, box_px=32, pixel_size_A=7.0)
    done: list[float] = []
    write(tmp_path, config, progress=done.append)
    assert done[-1] == 1
    before = (tmp_path / "particles.cs").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path, config.model_copy(update={"seed": 9}))
    assert (tmp_path / "particles.cs").read_bytes() == before
    write(tmp_path, config, overwrite=True)
    assert (tmp_path / "particles.cs").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_px": 16, "pixel_size_A": 4.0}, "box of 16 px of 4 Å"),
        ({"defocus_min_A": 3e4, "defocus_max_A": 1e4}, "largest defocus"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_sentence(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(SimulateConfig(**change))


def limited(snr: float) -> Simulation:
    return simulate(
        SimulateConfig(n=60, box_px=40, pixel_size_A=6.0, snr=snr, shift_sd_px=0.5, junk_fraction=0.1)
    )


def test_the_limit_falls_with_the_signal() -> None:
    grid = {"hinge_step_deg": 3.0, "angle_step_deg": 4.0, "shift_step_px": 0.5}
    easy, hard = limit(limited(2.0), **grid), limit(limited(0.03), **grid)
    assert easy["limit_abs_r"] > 0.985 > 0.9 > hard["limit_abs_r"] > 0.2
    assert easy["n"] == int((limited(2.0).table["true_junk"] == 0).sum())


def test_a_stack_of_nothing_but_junk_can_be_made() -> None:
    simulation = simulate(SimulateConfig(n=5, junk_fraction=1.0))
    assert np.isfinite(simulation.read(np.arange(5))).all()


def test_the_sample_in_the_repository_is_the_one_that_is_made(sample_dir: Path) -> None:
    simulation = simulate(SAMPLE)
    with mrcfile.mmap(sample_dir / "particles.mrcs") as mrc:
        assert mrc.data.shape == (SAMPLE.n, SAMPLE.box_px, SAMPLE.box_px)
        assert np.allclose(mrc.data[:3], simulation.read([0, 1, 2])[:, 0], atol=5e-3)
    star = starfile.read(sample_dir / "particles.star")
    pd.testing.assert_frame_equal(star["particles"][TRUTH], simulation.table[TRUTH])
