"""What happens to images between the file and the cache."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from particle_explorer.configs import PreprocessConfig
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError
from particle_explorer.preprocess import (
    apply,
    background_ring,
    bad_images,
    effective_ctf,
    fourier_crop,
    mask_softly,
    normalise_background,
    original_pixels,
    outliers,
    plan,
    resampling,
    with_pixel_size,
)


def rows(
    n: int = 4, box: int = 96, size: float = 1.5, state: str = "none", **columns: object
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "stack_path": ["/x/stack.mrcs"] * n,
            "stack_index": np.arange(n),
            "source_row": np.arange(n),
            "pixel_size_A": size,
            "box_px": box,
            "contrast_sign": np.int8(0),
            "ctf_state": state,
        }
    )
    if state != "none":
        optics = {"voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}
        defocus = {"defocus_u_A": np.linspace(1e4, 2e4, n), "defocus_v_A": np.linspace(1.1e4, 1.9e4, n)}
        table = table.assign(**defocus, defocus_angle_deg=25.0, **optics)
    return table.assign(**columns)


def blobs(n: int, about: float = 0.0) -> np.ndarray:
    """An asymmetric, smooth image with its parts placed about pixel n // 2, in units of the box."""
    y, x = (np.indices((n, n)) - n // 2) / n
    parts = [(0.1, 0.05, 0.06, 1.0), (-0.12, 0.1, 0.05, 0.7), (0.02, -0.15, 0.07, -0.5)]
    image = sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s * s)) for a, b, s, h in parts)
    return (np.asarray(image) + about).astype(np.float32)


@pytest.mark.parametrize("n", [96, 97, 64, 65])
@pytest.mark.parametrize("m", [48, 49, 64])
def test_fourier_crop_keeps_the_centre_and_the_scale(n: int, m: int) -> None:
    cropped = fourier_crop(blobs(n, 3.0)[None, None], m)[0, 0]
    np.testing.assert_allclose(cropped, blobs(m, 3.0), atol=2e-3)


def test_fourier_crop_to_the_same_box_changes_nothing() -> None:
    image = np.random.default_rng(0).normal(size=(2, 1, 33, 33)).astype(np.float32)
    np.testing.assert_allclose(fourier_crop(image, 33), image, atol=1e-5)


def test_white_noise_keeps_its_spectrum_through_the_crop() -> None:
    """Values keep their scale, so the deviation of white noise falls as the box."""
    noise = np.random.default_rng(0).normal(size=(20, 1, 64, 64)).astype(np.float32)
    assert fourier_crop(noise, 32).std() == pytest.approx(0.5, rel=0.03)


def test_automatic_choices() -> None:
    made = plan(rows(box=97, size=2.0), PreprocessConfig())
    assert (made.box_px, made.cached_box_px) == (97, 64)
    assert made.cached_pixel_size_A == pytest.approx(2.0 * 97 / 64)
    assert made.diameter_px == pytest.approx(0.9 * 64)
    assert (made.sign, made.ctf) == (1, "none")
    assert plan(rows(box=33), PreprocessConfig()).cached_box_px == 32
    given = plan(rows(box=100, size=2.0), PreprocessConfig(diameter_A=100, box_px=50))
    assert given.diameter_px == pytest.approx(25)


def test_unknown_pixel_size_makes_the_diameter_one_in_pixels() -> None:
    made = plan(rows(box=100, size=np.nan), PreprocessConfig(diameter_A=60, box_px=50))
    assert made.diameter_px == pytest.approx(30)
    assert np.isnan(made.cached_pixel_size_A)


def test_a_given_pixel_size_makes_the_diameter_one_in_angstrom() -> None:
    config = PreprocessConfig(diameter_A=60, box_px=50, pixel_size_A=1.5)
    made = plan(rows(box=100, size=np.nan), config)
    assert (made.pixel_size_A, made.cached_pixel_size_A) == (1.5, 3.0)
    assert made.diameter_px == pytest.approx(60 / 1.5 / 2)
    assert any(reason == "pixel size 1.5 Å, as given" for reason in made.reasons)
    assert with_pixel_size(rows(size=np.nan), config)["pixel_size_A"].eq(1.5).all()
    # with the pixel size, the CTF is known
    assert plan(rows(size=np.nan, state="raw"), PreprocessConfig()).ctf == "none"
    assert plan(rows(size=np.nan, state="raw"), PreprocessConfig(pixel_size_A=1.5)).ctf == "flip-raw"


def test_a_given_pixel_size_replaces_another_one_and_says_so() -> None:
    for said in (1.2, [1.2, 1.2, np.nan, 1.2]):
        made = plan(rows(size=np.nan, pixel_size_A=said), PreprocessConfig(pixel_size_A=1.5))
        assert made.pixel_size_A == 1.5
        assert any("although the file says 1.2 Å" in reason for reason in made.reasons)
    same = plan(rows(size=1.5), PreprocessConfig(pixel_size_A=1.5))
    assert not any("although" in reason for reason in same.reasons)


@pytest.mark.parametrize(
    ("table", "config", "said"),
    [
        (rows(box_px=[64, 64, 96, 96], size=np.nan), {}, "--where"),
        (rows(pixel_size_A=[1.0, 1.0, 2.0, 2.0]), {"box_px": 64}, "48 px in the 96 Å"),
        (rows(size=np.nan), {"low_pass_A": 20}, "pixel size is not known"),
        (rows(), {"low_pass_A": 20, "high_pass_A": 10}, "leave nothing"),
        (rows(), {"ctf": "model"}, "no defocus"),
        (rows(pixel_size_A=[1.0, 1.0, np.nan, 2.0]), {}, "unknown"),
        (rows(pixel_size_A=[1.0, 1.0, np.nan, 1.0]), {}, "--preprocess.pixel-size-A 1"),
        (rows(contrast_sign=[1, 1, -1, 1]), {}, "--where"),
        (rows(), {"diameter_A": 1000}, "larger than the box"),
        (rows(), {"box_px": 128}, "larger than the original"),
        (rows().iloc[:0], {}, "no particles"),
        (rows(), {"diameter_A": 2}, "check the diameter"),
        (rows(state="premultiplied"), {"ctf": "phase-flip"}, "flipped again"),
        (rows(state="raw").drop(columns="voltage_kV"), {"ctf": "phase-flip"}, "voltage_kV"),
    ],
)
def test_what_cannot_be_is_one_sentence(table: pd.DataFrame, config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        plan(table, PreprocessConfig(**config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "guessed", "contrast", "sign"),
    [(0, 0, "auto", 1), (0, -1, "auto", -1), (1, -1, "auto", 1), (-1, 1, "auto", -1), (-1, 0, "keep", 1),
     (1, 1, "invert", -1)],
)  # fmt: skip
def test_contrast_comes_from_the_settings_then_the_file_then_the_images(
    said: int, guessed: int, contrast: str, sign: int
) -> None:
    table = rows(contrast_sign=np.int8(said))
    made = plan(table, PreprocessConfig(contrast=contrast, background="none", box_px=96), guessed)
    assert made.sign == sign
    images = np.stack([blobs(96)] * 4)[:, None]
    np.testing.assert_allclose(apply(images, table, made), sign * images, atol=1e-5)


@pytest.mark.parametrize("box", [48, 49, 96])
def test_flipping_makes_every_transfer_positive(box: int) -> None:
    """An image seen through a CTF, flipped, is the image seen through |CTF|: flipping before the crop or on
    the frequencies kept is the same."""
    table = rows(state="raw")
    made = plan(table, PreprocessConfig(box_px=box, background="none"))
    assert made.ctf == "flip-raw"
    ctf = ctf_2d(96, 1.5, table["defocus_u_A"], table["defocus_v_A"], table["defocus_angle_deg"])
    spectrum = np.fft.rfft2(np.random.default_rng(1).normal(size=(96, 96)))
    spectrum[48] = spectrum[:, 48] = 0  # at Nyquist two directions share one number, whose CTFs differ
    seen = np.fft.irfft2(spectrum * ctf, s=(96, 96)).astype(np.float32)
    wanted = np.fft.irfft2(spectrum * np.abs(ctf), s=(96, 96)).astype(np.float32)
    got = apply(seen[:, None], table, made)
    np.testing.assert_allclose(got, fourier_crop(wanted[:, None], box), atol=2e-3)
    # the same through the effective CTF of the cached grid, away from the edge of the band
    effective = effective_ctf(table, made)
    assert effective is not None and effective.shape == (4, box, box // 2 + 1) and effective.min() >= 0
    np.testing.assert_allclose(effective[:, 1, 2], np.abs(ctf[:, 1, 2]), atol=1e-4)


@pytest.mark.parametrize(
    ("state", "config", "action"),
    [("raw", "auto", "flip-raw"), ("phase-flipped", "auto", "keep"), ("premultiplied", "auto", "keep"),
     ("phase-flipped", "phase-flip", "flip-all"), ("raw", "none", "none"), ("none", "auto", "none")],
)  # fmt: skip
def test_ctf_state_is_honoured(state: str, config: str, action: str) -> None:
    table = rows(state=state)
    made = plan(table, PreprocessConfig(ctf=config))
    assert made.ctf == action
    effective = effective_ctf(table, made)
    raw = (
        ctf_2d(64, 1.5 * 96 / 64, table["defocus_u_A"], table["defocus_v_A"], 25.0)
        if state != "none"
        else None
    )
    if action == "none":
        assert effective is None
    elif state == "premultiplied":
        np.testing.assert_allclose(effective, np.square(raw), atol=1e-5)
    else:
        np.testing.assert_allclose(effective, np.abs(raw), atol=1e-5)


def test_missing_microscope_is_said_not_invented() -> None:
    made = plan(rows(state="raw").drop(columns="voltage_kV"), PreprocessConfig())
    assert made.ctf == "none"
    assert any("voltage_kV" in reason for reason in made.reasons)


@pytest.mark.parametrize("n", [32, 33, 64])
def test_the_ring_is_outside_the_particle(n: int) -> None:
    ring = background_ring(n, 0.9 * n)
    y, x = np.indices((n, n)) - n // 2
    assert ring.sum() >= 30
    assert np.hypot(x, y)[ring].min() > 0.45 * n
    assert background_ring(n, n).sum() >= 30


def test_background_becomes_0_and_1_for_images_of_any_gain() -> None:
    rng = np.random.default_rng(0)
    images = (rng.normal(size=(5, 1, 64, 64)) * rng.uniform(1, 9, (5, 1, 1, 1)) + 7).astype(np.float32)
    images[..., 20:44, 20:44] += 3
    normalise_background(images, 50.0)
    outside = images[..., background_ring(64, 50.0)]
    np.testing.assert_allclose(outside.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(outside.std(axis=(1, 2)), 1, atol=1e-4)


def test_a_clean_simulation_is_not_blown_up() -> None:
    clean = np.where(np.abs(blobs(64)) < 1e-3, 0, blobs(64))
    images = np.stack([clean, 2 * clean])[:, None]
    table = rows(2, box=64)
    got = apply(images, table, plan(table, PreprocessConfig()))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[0], got[1], atol=1e-4)
    assert got.std() < 12


def test_batch_is_loop() -> None:
    table = rows(state="raw")
    images = np.random.default_rng(2).normal(size=(4, 1, 96, 96)).astype(np.float32)
    made = plan(table, PreprocessConfig(box_px=40))
    together = apply(images, table, made)
    for i in range(4):
        np.testing.assert_allclose(
            together[i : i + 1], apply(images[i : i + 1], table.iloc[[i]], made), atol=1e-5
        )


def test_colour_channels_share_one_scale() -> None:
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
    images[:, 1] *= 4
    table = rows(2, box=32, size=np.nan)
    got = apply(images, table, plan(table, PreprocessConfig()))
    assert got.shape == (2, 3, 32, 32)
    assert got[:, 1].std() / got[:, 0].std() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, "blank"])
def test_broken_images_are_named_by_row(value: float | str) -> None:
    images = np.random.default_rng(0).normal(size=(4, 1, 96, 96)).astype(np.float32)
    images[2] = 0.5 if value == "blank" else value
    table = rows()
    with pytest.raises(UserError, match=r"row 3 .*image 3 of /x/stack.mrcs.*source_row != 2"):
        apply(images, table, plan(table, PreprocessConfig()))


@pytest.mark.parametrize("n", [96, 97])
@pytest.mark.parametrize("m", [40, 41, 64])
def test_resampling_keeps_centre_and_scale(n: int, m: int) -> None:
    """Also where the fields differ: `m` pixels of 1.3 Å out of `n` of 1 Å."""
    field = m * 1.3 / n
    y, x = (np.indices((m, m)) - m // 2) / m * field
    parts = [(0.1, 0.05, 0.06, 1.0), (-0.12, 0.1, 0.05, 0.7), (0.02, -0.15, 0.07, -0.5)]
    wanted = sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s * s)) for a, b, s, h in parts) + 3.0
    matrix = resampling(n, 1.0, m, 1.3)
    np.testing.assert_allclose(matrix @ blobs(n, 3.0) @ matrix.T, wanted, atol=5e-3)


def test_resampling_to_the_same_field_is_a_fourier_crop() -> None:
    image = np.random.default_rng(0).normal(size=(97, 97)).astype(np.float32)
    matrix = resampling(97, 1.0, 49, 97 / 49)
    np.testing.assert_allclose(
        matrix @ image @ matrix.T, fourier_crop(image[None, None], 49)[0, 0], atol=1e-4
    )


def test_mixed_pixel_sizes_and_boxes_come_to_one() -> None:
    """The same blobs at 1 Å in 96 px, 1.5 Å in 64 px, and 2 Å in 64 px, a wider field."""
    wide = np.zeros((64, 64), np.float32)
    wide[8:56, 8:56] = blobs(48)
    table = rows(3, size=np.nan, pixel_size_A=[1.0, 1.5, 2.0], box_px=[96, 64, 64])
    made = plan(table, PreprocessConfig(background="none", contrast="keep", diameter_A=60))
    assert made.mixed and made.cached_pixel_size_A == pytest.approx(2.0)
    assert any("brought to one pixel size" in reason for reason in made.reasons)
    originals = [blobs(96), blobs(64), wide]
    cached = [apply(image[None, None], table.iloc[[i]], made)[0, 0] for i, image in enumerate(originals)]
    for image in cached:
        np.testing.assert_allclose(image, blobs(48), atol=1e-2)
    np.testing.assert_allclose(original_pixels(table, made), [2, 4 / 3, 1])


def test_the_ctf_of_mixed_images_is_that_of_the_common_pixel_size() -> None:
    table = rows(2, state="raw", size=np.nan, pixel_size_A=[2.0, 3.0], box_px=[96, 64])
    made = plan(table, PreprocessConfig(box_px=48))
    single = plan(rows(2, box=96, size=2.0, state="raw"), PreprocessConfig(box_px=48))
    assert made.cached_pixel_size_A == single.cached_pixel_size_A == 4.0
    np.testing.assert_allclose(effective_ctf(table, made), effective_ctf(table.assign(box_px=96), single))


def test_filters_keep_their_band() -> None:
    x = np.arange(96)
    waves = {length: np.cos(2 * np.pi * x * 1.5 / length) for length in (144.0, 24.0, 6.0)}
    images = np.broadcast_to(sum(waves.values()), (1, 1, 96, 96)).astype(np.float32)
    config = PreprocessConfig(low_pass_A=12, high_pass_A=60, background="none", box_px=96, contrast="keep")
    table = rows(1)
    got = apply(images, table, plan(table, config))[0, 0]
    np.testing.assert_allclose(got, np.broadcast_to(waves[24.0], (96, 96)), atol=0.02)


def test_the_soft_mask_leaves_the_particle_and_takes_the_corners() -> None:
    images = np.ones((2, 1, 64, 64), np.float32)
    mask_softly(images, 40.0)
    radius = np.hypot(*(np.indices((64, 64)) - 32))
    assert np.all(images[:, :, radius <= 20] == 1) and np.all(images[:, :, radius >= 24] == 0)
    assert 0.2 < images[0, 0, 32, 54] < 0.8


def test_a_ctf_left_to_the_model_keeps_its_sign() -> None:
    table = rows(2, state="raw")
    made = plan(table, PreprocessConfig(ctf="model"))
    image = np.random.default_rng(0).normal(size=(2, 1, 96, 96)).astype(np.float32)
    unflipped = plan(table, PreprocessConfig(ctf="none"))
    np.testing.assert_array_equal(apply(image, table, made), apply(image, table, unflipped))
    transfer = effective_ctf(table, made)
    assert transfer is not None and transfer.min() < -0.5


def test_bad_images_and_outliers_are_told_from_good_ones() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(50, 1, 16, 16)).astype(np.float32)
    images[3], images[4, 0, 2, 2], images[5, 0, 0, 0] = 7, np.nan, np.inf
    assert np.flatnonzero(bad_images(images)).tolist() == [3, 4, 5]
    statistics = np.stack([rng.normal(size=50), rng.uniform(0.9, 1.1, 50)], axis=1)
    statistics[7, 0], statistics[9, 1], statistics[11] = 40, 5.0, np.nan
    assert np.flatnonzero(outliers(statistics, 6)).tolist() == [7, 9]


def test_a_first_line_without_content_and_values_whose_sum_overflows_make_no_bad_image() -> None:
    images = np.random.default_rng(0).normal(size=(5, 1, 16, 16)).astype(np.float32)
    images[1, 0, 0] = 2.5  # masked at the border
    images[2] = np.float32(3e38) * (1 + images[2] / 100)
    images[3, 0, 0], images[3, 0, 9, 9] = 0, -np.inf
    images[4] = np.float32(3e38)
    assert np.flatnonzero(bad_images(images)).tolist() == [3, 4]


def test_a_pixel_size_may_be_asked_for_instead_of_a_box() -> None:
    table = rows(1, box_px=256, pixel_size_A=1.1)
    made = plan(table, PreprocessConfig(prepared_pixel_size_A=4.0))
    assert made.cached_box_px == 70 and made.cached_pixel_size_A == pytest.approx(256 * 1.1 / 70)
    for config, said in (
        (PreprocessConfig(prepared_pixel_size_A=4.0, box_px=64), "give only one"),
        (PreprocessConfig(prepared_pixel_size_A=1.0), "finer than the 1.1 Å of the images"),
        (PreprocessConfig(prepared_pixel_size_A=90.0), "too small to see anything"),
    ):
        with pytest.raises(UserError, match=said):
            plan(table, config)
    with pytest.raises(UserError, match="that of the images is not known"):
        plan(table.assign(pixel_size_A=np.nan), PreprocessConfig(prepared_pixel_size_A=4.0))
