"""Averages do what physics says: noise falls as it must, zeros of the CTF fill, and halves tell the truth."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from particle_explorer import averaging, spectra
from particle_explorer.averaging import average_classes, class_average
from particle_explorer.commands.averaging import apart_words, poses_apart
from particle_explorer.configs import AverageConfig, RefineConfig
from particle_explorer.ctf import TableCTF, ctf_2d, ctf_mode
from particle_explorer.ctf_sums import upright
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import recentre, rotation_matrix
from particle_explorer.refining import compare, refine
from particle_explorer.resampling import Scale, common_scale
from particle_explorer.shears import Turner, quarter_turned
from particle_explorer.spectra import align, frc, ssnr_ring
from particle_explorer.summing import shearing, splines
from particle_explorer.summing.work import Members

PIXEL_A = 3.0


def phantom(
    n: int, angle_deg: Any = 0.0, shift_yx_px: Any = (0.0, 0.0), width_px: float = 1.2
) -> NDArray[np.float64]:
    """`(k, n, n)`: thirty Gaussians without any symmetry, placed exactly, nothing interpolated."""
    rng = np.random.default_rng(5)
    points, weights = rng.uniform(-0.26, 0.26, (30, 2)) * n, rng.uniform(0.3, 1.5, 30)
    angle = np.atleast_1d(angle_deg)
    xy = points @ np.swapaxes(rotation_matrix(angle), -1, -2)
    xy = xy + np.broadcast_to(np.asarray(shift_yx_px, dtype=float), (len(angle), 2))[:, None, ::-1]
    offset = (np.arange(n) - n // 2 - xy[..., None]) / width_px
    profile = np.exp(-0.5 * offset**2)
    return np.einsum("i,kiy,kix->kyx", weights, profile[:, :, 1], profile[:, :, 0])


class Stack:
    """Images in memory that behave like an `ImageStack`, and count what is read."""

    def __init__(self, images: NDArray[Any]) -> None:
        self.images = np.asarray(images, dtype=np.float32).reshape(len(images), -1, *images.shape[-2:])
        self.box_px = np.full(len(images), images.shape[-1])
        self.reads: list[int] = []

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reads.extend(int(row) for row in rows)
        return self.images[rows]


class Originals:
    """The part of a session that averaging needs."""

    def __init__(
        self, images: NDArray[Any], table: pd.DataFrame, sign: int = 1, ctf: str = "flip-raw"
    ) -> None:
        self.stack, self.table = Stack(images), table
        self.plan = SimpleNamespace(sign=sign, ctf=ctf)
        self.scale: Scale | None = None

    def originals(self) -> Stack:
        return self.stack


def make_table(n_rows: int, n: int, **columns: Any) -> pd.DataFrame:
    uid = pd.Index(np.arange(n_rows, dtype=np.uint64) + 2**63, name="uid")
    base = {"pixel_size_A": PIXEL_A, "box_px": n, "contrast_sign": np.int8(1), "ctf_state": "none"}
    return pd.DataFrame({**base, **columns}, index=uid)


def poses(k: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-180, 180, k), rng.uniform(-2, 2, (k, 2))


def disc_share(n: int) -> float:
    """How much of white noise lies inside Nyquist's circle."""
    y, x = np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n))
    return float(np.mean(np.hypot(y, x) < 0.5))


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


@pytest.mark.parametrize("n", [48, 49])
def test_one_interpolation_gives_the_reference_back(n: int) -> None:
    angle, shift = poses(12)
    moved_back = align(phantom(n, angle, shift)[:, None], angle, shift)[:, 0]
    for image in moved_back:
        assert 1 - correlation(image, phantom(n)[0]) < 3e-5


@pytest.mark.parametrize(("n", "m"), [(48, 32), (49, 32), (48, 33), (49, 33)])
def test_a_smaller_box_is_the_same_picture_about_the_same_centre(n: int, m: int) -> None:
    angle, shift = poses(4)
    images = phantom(n, angle, shift, width_px=2.0)[:, None]
    small = align(images, angle, shift, box_px=m)[:, 0]
    # the same Gaussians sampled at m px: positions and widths scale with m / n
    y = (np.arange(m) - m // 2) * n / m + n // 2
    fine = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(phantom(n, width_px=2.0)[0])))
    frequency = (np.arange(n) - n // 2) / n
    wave = np.exp(2j * np.pi * np.outer(y - n // 2, frequency))
    expected = np.real(wave @ fine @ wave.T) / n**2
    for image in small:
        assert 1 - correlation(image, expected) < 1e-4
        np.testing.assert_allclose(image.std(), expected.std(), rtol=2e-3)


def test_noise_keeps_its_level_inside_and_nothing_comes_from_outside() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 1, 32, 32))
    angle, shift = poses(200)
    turned = align(noise, angle, shift)[:, 0]
    y, x = np.indices((32, 32)) - 16
    inside = np.hypot(y, x) < 13
    grid = spectra.Grid(32, 32)
    assert abs(np.mean(turned[:, inside] ** 2) / disc_share(32) - 1) < 0.03
    covered = grid.covered(angle, shift)
    np.testing.assert_allclose((turned == 0).mean((1, 2)), 1 - covered, atol=0.08)
    assert abs((turned == 0).mean() - (1 - covered).mean()) < 0.04


def test_averaging_reaches_the_predicted_ssnr() -> None:
    n, k, sigma, repeats = 40, 300, 4.0, 6
    reference = phantom(n)[0]
    power = np.abs(np.fft.rfft2(reference)) ** 2
    rings = spectra.ring_sums(n)
    predicted = k * (rings @ power.ravel()) / (np.asarray(rings.sum(1)).ravel() * n**2 * sigma**2)
    found, noise = [], []
    for seed in range(repeats):
        angle, shift = poses(k, seed)
        images = phantom(n, angle, shift) + np.random.default_rng(seed).normal(0, sigma, (k, n, n))
        average = class_average(Stack(images), np.arange(k), angle, shift)
        found.append(average.ssnr)
        noise.append((average.image - reference)[~spectra.outside_circle(n)].std())
        assert abs(ssnr_ring(average.ssnr) - ssnr_ring(predicted)) <= 2
        assert np.isnan(average.ssnr_radius_A)  # no pixel size, no Å
    clear = np.flatnonzero(predicted > 3)[2:]
    assert len(clear) > 4
    # one ring holds few numbers and scatters by chance: each within 25 %, all together within 10
    ratio = np.mean(found, 0)[clear] / predicted[clear]
    assert np.all(np.abs(ratio - 1) < 0.25)
    assert abs(np.average(ratio, weights=clear) - 1) < 0.1
    assert abs(np.mean(noise) / (sigma * np.sqrt(disc_share(n) / k)) - 1) < 0.05


def with_ctf(images: NDArray[Any], table: pd.DataFrame, power: int = 1) -> NDArray[np.float64]:
    ctf = ctf_2d(
        images.shape[-1],
        table["pixel_size_A"].to_numpy(),
        table["defocus_u_A"].to_numpy(),
        table["defocus_v_A"].to_numpy(),
        table["defocus_angle_deg"].to_numpy(),
        table["voltage_kV"].to_numpy(),
        table["spherical_aberration_mm"].to_numpy(),
        table["amplitude_contrast"].to_numpy(),
        np.zeros(len(table)),
    )
    return np.fft.irfft2(np.fft.rfft2(images) * ctf**power, s=images.shape[1:])


def microscope(k: int, n: int, state: str, *, astigmatism_A: float = 2000.0, seed: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    defocus = rng.uniform(8000, 24000, k)
    return make_table(
        k,
        n,
        defocus_u_A=defocus + astigmatism_A,
        defocus_v_A=defocus,
        defocus_angle_deg=rng.uniform(0, 180, k),
        voltage_kV=300.0,
        spherical_aberration_mm=2.7,
        amplitude_contrast=0.1,
        ctf_state=state,
    )


@pytest.mark.parametrize("state", ["raw", "phase-flipped", "premultiplied"])
@pytest.mark.parametrize("n", [64, 65])
def test_wiener_fills_the_zeros_of_the_ctf(n: int, state: str) -> None:
    k = 150
    angle, shift = poses(k)
    table = microscope(k, n, state)
    clean = phantom(n, angle, shift)
    images = with_ctf(clean, table) + np.random.default_rng(2).normal(0, 0.3, (k, n, n))
    if state == "premultiplied":
        images = with_ctf(images, table)
    elif state == "phase-flipped":
        one = np.zeros((k, n, n))
        one[:, 0, 0] = 1.0
        sign = np.sign(np.real(np.fft.rfft2(with_ctf(one, table))))
        images = np.fft.irfft2(np.fft.rfft2(images) * sign, s=(n, n))
    average = class_average(Stack(images), np.arange(k), angle, shift, table=table)
    assert average.ctf == "wiener"
    reference = phantom(n)[0]
    assert correlation(average.image, reference) > 0.99
    ring = slice(3, n // 4)
    assert np.all(frc(average.image, reference)[ring] > 0.97)
    # the amplitudes come back, not only the phases
    rings = spectra.ring_sums(n)
    power = [rings @ (np.abs(np.fft.rfft2(x)) ** 2).ravel() for x in (average.image, reference)]
    np.testing.assert_allclose(np.sqrt(power[0] / power[1])[ring], 1.0, atol=0.15)
    # Wiener beats leaving the CTF as it is
    none = AverageConfig(ctf="none")
    plain = class_average(Stack(images), np.arange(k), angle, shift, table=table, config=none)
    assert correlation(plain.image, reference) < correlation(average.image, reference)


def test_astigmatism_is_turned_with_the_image() -> None:
    """One strong astigmatism, turned particles: with the wrong angle, Σ CTF² would not fit Σ CTF·F."""
    n, k = 64, 60
    angle, shift = poses(k)
    table = microscope(k, n, "raw", astigmatism_A=9000.0)
    images = with_ctf(phantom(n, angle, shift), table)
    ctf = TableCTF(table)
    rows, pixel = np.arange(k), np.full(k, PIXEL_A)
    turned = ctf.at(rows, pixel, n, -angle)
    spectrum = np.fft.rfft2(align(images[:, None], angle, shift)[:, 0])
    reference = np.fft.rfft2(phantom(n)[0])
    strong = (np.abs(reference) > 0.02 * np.abs(reference).max()) & (
        np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)) < 0.3
    )

    def misfit(ctf: NDArray[Any]) -> float:
        wrong = (spectrum - ctf * reference)[:, strong]
        return float(np.linalg.norm(wrong) / np.linalg.norm(spectrum[:, strong]))

    wrong = ctf.at(rows, pixel, n, angle)
    assert misfit(turned) < 0.15 < 0.5 < misfit(wrong)


def test_auto_takes_what_the_table_knows() -> None:
    known = microscope(3, 32, "raw")
    mode = ctf_mode
    assert mode(known, "auto") == "wiener" and mode(known, "phase-flip") == "phase-flip"
    assert mode(known.assign(ctf_state="none"), "auto") == "none"
    assert mode(known.assign(defocus_u_A=[1.0, np.nan, 2.0]), "auto") == "none"
    assert mode(make_table(3, 32), "auto") == "none" and mode(None, "auto") == "none"
    assert mode(known, "none") == "none"
    assert mode(known.drop(columns=["amplitude_contrast", "defocus_angle_deg"]), "auto") == "wiener"
    with pytest.raises(UserError, match="defocus"):
        mode(make_table(3, 32), "wiener")


def test_frc_agrees_with_the_published_implementation() -> None:
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("torch_fourier_shell_correlation")
    rng = np.random.default_rng(0)
    for n in (128, 129):
        common = rng.normal(size=(n, n))
        y, x = np.meshgrid(np.fft.fftfreq(n), np.fft.rfftfreq(n), indexing="ij")
        common = 6 * np.fft.irfft2(np.fft.rfft2(common) * np.exp(-((y**2 + x**2) / 0.05)), s=(n, n))
        a, b = common + rng.normal(size=(2, n, n))
        theirs = published.fourier_ring_correlation(torch.tensor(a), torch.tensor(b)).numpy()
        # they share a number between two rings, we give it to the nearer one
        difference = (frc(a, b) - theirs)[3:-1]
        assert np.abs(difference).max() < 0.08 and np.abs(difference.mean()) < 0.005
        assert theirs[5] > 0.9 > 0.3 > theirs[n // 2 - 2]


def test_frc_of_noise_and_of_itself() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 64, 64))
    between = np.mean([frc(x, y) for x, y in zip(a, b, strict=True)], axis=0)
    assert np.all(np.abs(between[4:]) < 0.1)
    np.testing.assert_allclose(frc(a[0], a[0]), 1.0)
    np.testing.assert_array_equal(frc(a[0], np.zeros((64, 64))), 0.0)
    with pytest.raises(ValueError, match="differ in size"):
        frc(a[0], a[0][:32, :32])


def test_halves_of_noise_agree_when_aligned_to_one_template() -> None:
    """The bias that the label warns of: nothing but noise, moved to fit a template, gives a high FRC."""
    rng = np.random.default_rng(0)
    n, k = 32, 1000
    noise = rng.normal(size=(k, n, n)).astype(np.float32)
    template = phantom(n)[0]
    score = np.fft.irfft2(np.fft.rfft2(noise) * np.fft.rfft2(template).conj(), s=(n, n))
    near = np.arange(-5, 6)
    score = score[:, near[:, None] % n, near % n].reshape(k, -1)
    best = near[np.stack(np.unravel_index(score.argmax(1), (11, 11)), -1)]
    biased = class_average(Stack(noise), np.arange(k), np.zeros(k), best)
    control = class_average(Stack(noise), np.arange(k), np.zeros(k), rng.integers(-5, 6, (k, 2)))
    assert biased.frc[2:6].mean() > 0.8 > 0.3 > abs(control.frc[2:6].mean())
    assert not biased.halves_independent and "upper bound" in biased.frc_label
    assert "self-consistency" in biased.frc_label and "resolution" not in biased.frc_label


@pytest.mark.parametrize("state", ["none", "raw"])
def test_all_classes_in_one_pass_equal_each_alone(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 32, 40
    angle, shift = poses(k)
    rng = np.random.default_rng(0)
    table = microscope(k, n, state)
    images = phantom(n, angle, shift) + rng.normal(size=(k, n, n))
    labels = rng.integers(-1, 3, k)
    session = Originals(images, table)
    monkeypatch.setattr(splines, "BLOCK_BYTES", 7 * 4 * n * n)  # seven images at a time
    done: list[float] = []
    together = average_classes(session, labels, angle, shift, progress=done.append)
    # each image once, in the order of the disk
    assert session.stack.reads == list(np.flatnonzero(labels >= 0))
    assert done == sorted(done) and done[-1] == 1.0
    monkeypatch.undo()
    for label, average in enumerate(together):
        rows = np.flatnonzero(labels == label)
        alone = class_average(
            Stack(images), rows, angle[rows], shift[rows], table=table.iloc[rows], label=str(label)
        )
        for name in ("image", "half_a", "half_b", "frc", "ssnr"):
            np.testing.assert_allclose(
                getattr(average, name), getattr(alone, name), rtol=1e-3, atol=2e-4, err_msg=name
            )
        np.testing.assert_array_equal(average.uid, table.index[rows])
        assert average.n == alone.n == len(rows) and average.label == alone.label
        assert average.pixel_size_A == PIXEL_A


def test_without_ctf_an_average_is_the_mean_of_the_aligned_images() -> None:
    n, k = 33, 9
    angle, shift = poses(k)
    images = np.random.default_rng(0).normal(size=(k, n, n))
    average = class_average(Stack(images), np.arange(k), angle, shift)
    outside = spectra.outside_circle(n)
    aligned = align((images - images[:, outside].mean(1)[:, None, None])[:, None], angle, shift)[:, 0]
    for name, members in (("image", aligned), ("half_a", aligned[::2]), ("half_b", aligned[1::2])):
        got, expected = getattr(average, name), members.mean(0)
        np.testing.assert_allclose(got, expected - expected[outside].mean(), atol=1e-5)


def test_weights_count_as_often_as_they_say() -> None:
    n = 32
    angle, shift = poses(4)
    images = phantom(n, angle, shift) + np.random.default_rng(0).normal(size=(4, n, n))
    weighted = class_average(Stack(images), np.arange(4), angle, shift, weights=[2.0, 1.0, 1.0, 0.0])
    again = np.array([0, 1, 2, 0])
    repeated = class_average(Stack(images), again, angle[again], shift[again])
    np.testing.assert_allclose(weighted.image, repeated.image, atol=1e-5)
    assert weighted.n_effective == pytest.approx(16 / 6) and repeated.n_effective == 4


def test_particles_come_out_bright() -> None:
    n, k = 32, 6
    angle, shift = poses(k)
    images = phantom(n, angle, shift)
    sign = np.array([1, -1, 1, -1, 1, -1], dtype=np.int8)
    table = make_table(k, n, contrast_sign=sign)
    average = class_average(Stack(images * sign[:, None, None]), np.arange(k), angle, shift, table=table)
    assert correlation(average.image, phantom(n)[0]) > 0.999
    unsaid = make_table(k, n, contrast_sign=np.int8(0))
    dark = class_average(Stack(-images), np.arange(k), angle, shift, table=unsaid, sign=-1)
    np.testing.assert_allclose(dark.image, average.image, atol=1e-5)
    (planned,) = average_classes(Originals(-images, unsaid, sign=-1), np.zeros(k), angle, shift)
    np.testing.assert_allclose(planned.image, average.image, atol=1e-5)


def test_rows_without_a_pose_are_left_out() -> None:
    n = 32
    session = Originals(phantom(n, np.zeros(5)), make_table(5, n))
    angle = np.array([0.0, np.nan, 0.0, np.nan, 0.0])
    labels = [np.nan, 2, 2, 5, 7]
    averages = average_classes(session, labels, angle, names=["two", "five", "seven"])
    assert [(a.label, list(a.uid)) for a in averages] == [
        ("two", [session.table.index[2]]),
        ("seven", [session.table.index[4]]),
    ]


def test_averages_follow_what_was_said_of_the_ctf_on_import() -> None:
    n, k = 32, 6
    table = microscope(k, n, "phase-flipped")
    images = phantom(n, np.zeros(k))

    def how(plan: str, wanted: Any = "auto") -> str:
        session = Originals(images, table, ctf=plan)
        (average,) = average_classes(session, np.zeros(k), config=AverageConfig(ctf=wanted))
        return average.ctf

    assert how("none") == "none" and how("keep") == "wiener" and how("none", "wiener") == "wiener"
    as_raw, as_flipped = (
        average_classes(Originals(with_ctf(images, table), table, ctf=plan), np.zeros(k))[0].image
        for plan in ("flip-all", "keep")
    )
    assert correlation(as_raw, images[0]) > 0.95 > correlation(as_flipped, images[0])


def test_few_members_and_flat_images_give_numbers() -> None:
    n = 32
    for k, state in ((1, "raw"), (1, "none"), (2, "raw"), (3, "none")):
        for images in (phantom(n, np.zeros(k)), np.zeros((k, n, n))):
            average = class_average(
                Stack(images), np.arange(k), np.zeros(k), np.zeros((k, 2)), table=microscope(k, n, state)
            )
            for name in ("image", "half_a", "half_b", "frc", "ssnr"):
                assert np.isfinite(getattr(average, name)).all(), (k, state, name)
            assert average.ssnr_radius_A > 0


def test_channels_are_averaged_alike() -> None:
    n, k = 32, 5
    angle, shift = poses(k)
    images = phantom(n, angle, shift)[:, None] * np.array([1.0, 2.0, 3.0])[:, None, None]
    average = class_average(Stack(images), np.arange(k), angle, shift)
    assert average.image.shape == (3, n, n)
    np.testing.assert_allclose(average.image[2], 3 * average.image[0], rtol=1e-4, atol=1e-5)


def test_bad_input_is_said_in_a_sentence() -> None:
    images = phantom(32, np.zeros(3))
    stack, zero = Stack(images), np.zeros(3)
    with pytest.raises(UserError, match="larger than the 32 px"):
        class_average(stack, np.arange(3), zero, np.zeros((3, 2)), config=AverageConfig(box_px=64))
    with pytest.raises(UserError, match="no particles"):
        class_average(stack, [], [], np.zeros((0, 2)))
    with pytest.raises(UserError, match="not finite"):
        class_average(Stack(np.where(images > 1, np.nan, images)), np.arange(3), zero, np.zeros((3, 2)))
    with pytest.raises(UserError, match="in any class"):
        average_classes(Originals(images, make_table(3, 32)), [-1, -1, -1])
    stack.box_px[1] = 40
    with pytest.raises(UserError, match="one box and pixel size"):
        class_average(stack, np.arange(3), zero, np.zeros((3, 2)), table=make_table(3, 32))


def test_stopping_makes_nothing() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        class_average(Stack(phantom(32, np.zeros(3))), np.arange(3), np.zeros(3), np.zeros((3, 2)), stop=stop)


@pytest.mark.parametrize("state", ["none", "raw", "phase-flipped", "premultiplied"])
@pytest.mark.parametrize(("n", "m"), [(64, 0), (65, 48), (64, 49)])
def test_three_shears_give_what_splines_give(n: int, m: int, state: str) -> None:
    k = 60
    rng = np.random.default_rng(1)
    angle, shift = rng.uniform(-180, 180, k), rng.uniform(-4, 4, (k, 2))
    table = microscope(k, n, state).assign(contrast_sign=rng.choice([1, -1], k).astype(np.int8))
    images = phantom(n, angle, shift, width_px=1.8)
    if state != "none":
        images = with_ctf(images, table, 2 if state == "premultiplied" else 1)
    images = images * table["contrast_sign"].to_numpy()[:, None, None] + rng.normal(0, 0.5, images.shape)
    weights = rng.uniform(0.5, 2, k)
    modes = ("none",) if state == "none" else ("none", "phase-flip", "wiener")
    for mode in modes:
        exact, fast = (
            class_average(
                Stack(images), np.arange(k), angle, shift, table=table, weights=weights,
                config=AverageConfig(ctf=mode, box_px=m, interpolation=how),  # type: ignore[arg-type]
            )
            for how in ("spline", "shears")
        )  # fmt: skip
        assert fast.settings["interpolation"] == "shears" and fast.ctf == exact.ctf == mode
        side = m or n
        y, x = np.indices((side, side)) - side // 2
        within = np.hypot(y, x) < side / 2 - 3  # at the edge of a turned box half a pixel makes a difference
        for name in ("image", "half_a", "half_b"):
            got, expected = getattr(fast, name) * within, getattr(exact, name) * within
            assert 1 - correlation(got, expected) < (0.01 if mode == "none" else 0.05), (mode, name)
        # turned before the CTF is applied or after it: what it spreads over the edge of the box differs
        rings = slice(2, round((0.3 if mode == "none" else 0.2) * side))
        assert np.all(frc(fast.image * within, exact.image * within)[rings] > 0.97), mode
        reference = align(phantom(n, width_px=1.8)[:, None], [0.0], [(0.0, 0.0)], box_px=side)[0, 0]
        closer = correlation(fast.image, reference) - correlation(exact.image, reference)
        assert closer > -5e-3, mode
        assert fast.image.std() == pytest.approx(exact.image.std(), rel=0.02)
        np.testing.assert_allclose(fast.frc[rings], exact.frc[rings], atol=0.1)
        clear = exact.ssnr[rings] > 3
        ratio = fast.ssnr[rings][clear] / exact.ssnr[rings][clear]
        assert np.abs(ratio - 1).max() < 0.25 and abs(ratio.mean() - 1) < 0.05, mode
        np.testing.assert_array_equal(fast.uid, exact.uid)
        assert fast.n_effective == pytest.approx(exact.n_effective)


@pytest.mark.parametrize("n", [16, 33])
@pytest.mark.parametrize("quarter", range(4))
def test_a_turned_picture_is_stood_upright_with_its_quarter_turn(n: int, quarter: int) -> None:
    turner = Turner(n)
    sums = turner.sums(1)
    sums[:] = np.random.default_rng(0).normal(size=sums.shape)
    found = np.full((n, n), 7, np.float32)
    upright(sums[0], quarter, found)
    np.testing.assert_array_equal(found, quarter_turned(turner.pictures(sums)[0], quarter))


def test_sheared_classes_equal_each_alone_and_may_share_members(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 32, 40
    angle, shift = poses(k)
    rng = np.random.default_rng(0)
    images = phantom(n, angle, shift) + rng.normal(size=(k, n, n))
    session = Originals(images, make_table(k, n))
    row = np.concatenate([np.arange(25), np.arange(10, 40), np.arange(5)])
    which = np.repeat([0, 1, 2], [25, 30, 5])
    members = Members(row, which, rng.uniform(0.2, 1, len(row)))
    monkeypatch.setattr(shearing, "BLOCK_BYTES", 7 * 4 * n * n)
    monkeypatch.setattr(shearing, "STEP_BYTES", 3 * 4 * n * n)
    config = AverageConfig(interpolation="shears")
    names = ["a", "b", "c"]
    for sums in (2**30, 1):  # all together, and one class after the other
        monkeypatch.setattr(shearing, "SUMS_BYTES", sums)
        found = averaging.average_members(session, members, names, angle, shift, config)
        for i, average in enumerate(found):
            own = which == i
            alone = class_average(
                Stack(images), row[own], angle[row[own]], shift[row[own]], table=session.table.iloc[row[own]],
                weights=members.weight[own], config=config,
            )  # fmt: skip
            for name in ("image", "half_a", "half_b", "frc", "ssnr"):
                got, expected = getattr(average, name), getattr(alone, name)
                np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-4, err_msg=name)
            np.testing.assert_array_equal(average.uid, session.table.index[row[own]])
            np.testing.assert_array_equal(average.weight, members.weight[own])
            np.testing.assert_array_equal(average.angle_deg, angle[row[own]])


def test_sheared_colours_and_bad_images() -> None:
    n, k = 32, 5
    angle, shift = poses(k)
    images = phantom(n, angle, shift)[:, None] * np.array([1.0, 2.0, 3.0])[:, None, None]
    config = AverageConfig(interpolation="shears")
    average = class_average(Stack(images), np.arange(k), angle, shift, config=config)
    np.testing.assert_allclose(average.image[2], 3 * average.image[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="not finite"):
        broken = np.where(images > 1, np.nan, images)
        class_average(Stack(broken), np.arange(k), angle, shift, config=config)
    far = class_average(Stack(images), np.arange(k), angle, np.full((k, 2), 500.0), config=config)
    assert np.abs(far.image).max() == 0


# ---------------------------------------------------------------------- refined poses

BOX, K = 64, 100


def _noisy(clean: NDArray[Any], snr: float, seed: int) -> NDArray[Any]:
    noise = np.random.default_rng(seed).normal(size=clean.shape)
    return clean + noise * np.sqrt(clean.var() / snr)


@pytest.mark.parametrize("with_microscope", [False, True])
def test_poses_perturbed_by_10_degrees_and_3_px_come_back_at_a_tenth_of_the_noise(
    with_microscope: bool,
) -> None:
    rng = np.random.default_rng(1)
    angle, shift = poses(K, 4)
    clean = phantom(BOX, angle, shift)
    table = microscope(K, BOX, "raw") if with_microscope else make_table(K, BOX)
    images = _noisy(with_ctf(clean, table) if with_microscope else clean, 0.1, 0)
    wrong = angle + rng.uniform(-10, 10, K), shift + rng.uniform(-3, 3, (K, 2))
    before = compare(angle, shift, *wrong)
    assert before.median_deg > 4 and before.median_px > 1.5
    found = refine(Originals(images, table), np.zeros(K), *wrong)
    after = compare(angle, shift, found.angle_deg, found.shift_yx_px)
    assert after.median_deg < 1 and after.median_px < 0.3 and after.within_10_deg > 0.98
    assert len(found.history) == 3 and found.history[0]["median_deg"] > 4 > found.history[-1]["median_deg"]
    np.testing.assert_allclose(np.median(found.moved_deg), before.median_deg, atol=2.5)


def test_given_references_are_met_in_their_own_frame_and_box() -> None:
    angle, shift = poses(40, 2)
    images = _noisy(phantom(BOX, angle, shift, width_px=2.0), 0.5, 1)
    label = np.arange(40) % 2
    label[3] = -1
    reference = phantom(32, width_px=1.0)[0]  # the same points in half the box
    start = angle + 6.0, shift + 1.0
    references = np.stack([reference, reference])
    config = RefineConfig(n_iterations=1)
    found = refine(Originals(images, make_table(40, BOX)), label, *start, config, references=references)
    assert np.isnan(found.angle_deg[3]) and np.isnan(found.shift_yx_px[3]).all()
    used = label >= 0
    difference = (found.angle_deg - angle + 180) % 360 - 180
    assert np.median(np.abs(difference[used])) < 1.0 and abs(np.median(difference[used])) < 0.5
    assert np.median(np.linalg.norm((found.shift_yx_px - shift)[used], axis=1)) < 0.4
    assert found.correlation[used].min() > 0.2 and found.correlation[used].max() <= 1.0001


def test_a_cropped_search_finds_the_same_poses() -> None:
    angle, shift = poses(30, 2)
    images = _noisy(phantom(BOX, angle, shift, width_px=3.0), 1.0, 1)
    config = RefineConfig(n_iterations=2, box_px=32)
    found = refine(Originals(images, make_table(30, BOX)), np.zeros(30), angle + 4.0, shift - 2.0, config)
    after = compare(angle, shift, found.angle_deg, found.shift_yx_px)
    assert after.median_deg < 1 and after.median_px < 0.4


def test_poses_of_images_of_two_pixel_sizes_are_refined_in_the_pixels_of_each() -> None:
    k = 60
    angle, shift = poses(k, 2)
    size = np.where(np.arange(k) % 2, 2.0, 3.0)
    shift *= 3 / size[:, None]
    images = phantom(64, angle, shift, width_px=2.0)
    fine = size == 2  # the same molecule, closer, of which the box shows less
    images[fine] = phantom(96, angle[fine], shift[fine], width_px=3.0)[:, 16:80, 16:80]
    session = Originals(_noisy(images, 0.5, 1), make_table(k, 64, pixel_size_A=size))
    session.scale = common_scale(session.table["box_px"].to_numpy(), size)
    start = angle + 5.0, shift + 4 / size[:, None]
    found = refine(session, np.zeros(k), *start, RefineConfig(n_iterations=2))
    after = compare(angle, shift * size[:, None], found.angle_deg, found.shift_yx_px * size[:, None])
    assert after.median_deg < 1 and after.median_px < 0.3 * 3
    assert np.nanmedian(found.correlation[fine]) > 0.8 * np.nanmedian(found.correlation[~fine])
    session.scale = None
    session.table["box_px"] = np.where(fine, 96, 64)
    with pytest.raises(UserError, match="one box; these have 64, 96 px"):
        refine(session, np.zeros(k), *start)


def test_a_common_change_of_frame_is_no_difference() -> None:
    angle, shift = poses(200, 3)
    other = recentre(angle, shift, 31.0, np.array([1.5, -2.0]))
    found = compare(angle, shift, *other)
    assert found.n == 200 and found.median_deg < 1e-6 and found.median_px < 1e-6
    assert found.turn_deg == pytest.approx(-31.0)
    label = np.arange(200) % 2
    turned = angle + np.where(label, 40.0, -10.0)
    assert (
        compare(angle, shift, turned, shift, label).median_deg
        < 1e-6
        < 10
        < compare(angle, shift, turned, shift).median_deg
    )
    with pytest.raises(UserError, match="both sets"):
        compare(angle, shift, np.full(200, np.nan), shift)


def test_poses_of_the_file_are_compared_in_pixels_of_one_size() -> None:
    angle, shift = poses(200, 3)
    size = np.where(np.arange(200) % 2, 1.5, 3.0)
    table = make_table(200, 64, pixel_size_A=size, angle_deg=angle)
    table[["shift_y_px", "shift_x_px"]] = shift * 3 / size[:, None]
    run: Any = SimpleNamespace(session=SimpleNamespace(table=table))
    label = np.arange(200) % 3
    turned, moved = recentre(angle + 4.0 * (np.arange(200) % 2), shift, 31.0, np.array([1.5, -2.0]))
    apart = poses_apart(run, (turned, moved * 3 / size[:, None]), "file", label)
    assert apart is not None and apart["median_deg"] == pytest.approx(2.0, abs=0.2)
    assert apart["within_10_deg"] == 1 and apart["median_px"] < 0.2
    assert "particle" not in apart_words("file", apart) and "100% within 10°" in apart_words("file", apart)
    assert poses_apart(run, (None, None), "file", label) is None
    run.session.table = table.drop(columns="angle_deg")
    assert poses_apart(run, (turned, moved), "file", label) is None


def test_stopping_and_bad_input() -> None:
    images = phantom(32, np.zeros(4))
    session = Originals(images, make_table(4, 32))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        refine(session, np.zeros(4), np.zeros(4), np.zeros((4, 2)), stop=stop)
    with pytest.raises(UserError, match="no particle"):
        refine(session, np.full(4, -1), np.zeros(4), np.zeros((4, 2)))
