from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from particle_explorer import pose, transforms

SIZES = [16, 17, 40, 41]


def phantom(n: int) -> Tensor:
    """Smooth blobs that no turn brings onto themselves: `(1, 1, n, n)`."""
    y, x = np.mgrid[:n, :n] - n // 2
    u = n / 16
    image = np.exp(-(y**2 + (x - 2 * u) ** 2) / (2 * (1.5 * u) ** 2))
    image += 0.6 * np.exp(-((y - 3 * u) ** 2 + (x + u) ** 2) / (2 * (1.2 * u) ** 2))
    return torch.from_numpy(image.astype(np.float32))[None, None]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


@pytest.mark.parametrize("n", SIZES)
def test_a_turn_leaves_the_centre_pixel_where_it_is(n: int) -> None:
    dot = torch.zeros(1, 1, n, n)
    dot[..., n // 2, n // 2] = 1
    for mode in ("bilinear", "bicubic"):
        turned = transforms.place(dot.expand(5, -1, -1, -1), torch.linspace(-3, 3, 5), mode=mode)
        assert torch.allclose(turned[..., n // 2, n // 2], torch.ones(5, 1), atol=1e-4)


@pytest.mark.parametrize("n", SIZES)
def test_points_go_where_pose_says(n: int) -> None:
    angle_deg, shift = 35.0, np.array([1.5, -1.0])
    point_xy = np.array([0.2 * n, -0.1 * n])
    y, x = np.mgrid[:n, :n] - n // 2
    blob = np.exp(-((x - point_xy[0]) ** 2 + (y - point_xy[1]) ** 2) / 4).astype(np.float32)
    angle = torch.tensor([math.radians(angle_deg)])
    moved = transforms.place(
        torch.from_numpy(blob)[None], angle, torch.from_numpy(shift).float()[None], mode="bicubic"
    )[0].numpy()
    expected = pose.rotation_matrix(angle_deg) @ point_xy + shift[::-1]
    found = np.array([(moved * x).sum(), (moved * y).sum()]) / moved.sum()
    assert found == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_scipy(n: int) -> None:
    image = phantom(n)
    for angle_deg, shift in ((0.0, (2.0, -1.0)), (25.0, (0.5, 1.0)), (-100.0, (0.0, 0.0))):
        inverse = pose.rotation_matrix(-angle_deg)[::-1, ::-1]  # on (y, x)
        centre = np.array([n // 2, n // 2])
        expected = scipy.ndimage.affine_transform(
            image[0, 0].numpy(), inverse, offset=centre - inverse @ (centre + shift), order=1
        )
        ours = transforms.place(image, torch.tensor([math.radians(angle_deg)]), torch.tensor([shift]))
        inner = slice(2, n - 2)  # scipy stops at the outermost pixel centres, torch fades beyond them
        np.testing.assert_allclose(ours[0, 0, inner, inner], expected[inner, inner], atol=1e-3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "fourier"])
@pytest.mark.parametrize("n", SIZES)
def test_unplace_undoes_place(n: int, mode: transforms.Interpolation) -> None:
    image = phantom(n)
    angle, shift = torch.tensor([0.7]), torch.tensor([[1.3, -0.4]])
    back = transforms.unplace(transforms.place(image, angle, shift, mode), angle, shift, mode)
    assert correlation(back, image) > {"bilinear": 0.98, "bicubic": 0.995, "fourier": 0.999}[mode]


@pytest.mark.parametrize("n", SIZES)
def test_fourier_shift_moves_whole_pixels_exactly(n: int) -> None:
    image = torch.rand(2, 3, n, n)
    moved = transforms.fourier_shift(image, torch.tensor([[2.0, -1.0], [0.0, 3.0]]))
    torch.testing.assert_close(moved[0], image[0].roll((2, -1), (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[1], image[1].roll(3, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", SIZES)
def test_upsampling_keeps_the_pixels(n: int) -> None:
    image = torch.rand(2, n, n)
    torch.testing.assert_close(transforms.upsample(image, 3)[:, ::3, ::3], image, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(40, 24), (41, 25), (40, 25), (41, 24), (24, 40), (25, 40), (24, 41)])
def test_resizing_keeps_the_centre_and_the_brightness(n: int, m: int) -> None:
    image = phantom(n)
    resized = transforms.fourier_resize(image, m)
    at = (torch.arange(m) - m // 2) * (n / m)
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij"), 0) + n // 2
    expected = scipy.ndimage.map_coordinates(image[0, 0].numpy(), grid.numpy(), order=3, mode="nearest")
    inner = slice(2, m - 2)
    np.testing.assert_allclose(resized[0, 0, inner, inner], expected[inner, inner], atol=0.02)


@pytest.mark.parametrize("n", [16, 17])
def test_the_turning_matrix_is_place_and_its_transpose_the_gradient(n: int) -> None:
    images = torch.randn(1, 3, n, n, requires_grad=True)
    angles = torch.tensor([0.0, 0.4, math.pi / 2, -2.0])
    placed = transforms.place(images, angles, mode="bicubic")
    matrix, transposed = transforms.turning_matrix(n, angles)
    ours = (matrix @ images.detach().view(3, -1).T).view(4, n, n, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, placed.detach(), atol=1e-4, rtol=0)
    upstream = torch.randn_like(placed)
    (expected,) = torch.autograd.grad(placed, images, upstream)
    columns = upstream.permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close((transposed @ columns).T.view_as(expected), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [16, 17])
def test_a_full_band_keeps_products_and_shifts(n: int) -> None:
    band = transforms.FourierBand(n, n)
    a, b = torch.randn(4, 2, n, n), torch.randn(3, 2, n, n)
    rows_a, rows_b = transforms.real_rows(band(a)), transforms.real_rows(band(b))
    torch.testing.assert_close(rows_a @ rows_b.T, a.flatten(1) @ b.flatten(1).T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(band.images(band(a)), a, atol=1e-5, rtol=0)
    moved = band.images(band(a) * band.phases(torch.tensor([2.0, -3.0])))
    torch.testing.assert_close(moved, a.roll((2, -3), (-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [32, 33])
def test_pose_gradients_are_those_of_place(n: int) -> None:
    image, step = phantom(n), 0.05
    gradients = transforms.pose_gradients(image)[0]
    turned = transforms.place(image, torch.tensor([step]), mode="fourier")
    down = transforms.place(image, shift=torch.tensor([[step, 0.0]]), mode="fourier")
    right = transforms.place(image, shift=torch.tensor([[0.0, step]]), mode="fourier")
    for gradient, changed in zip(gradients, (turned, down, right), strict=True):
        assert correlation(gradient, (changed - image) / step) > 0.98


@pytest.mark.parametrize("n", [32, 33])
def test_register_finds_turn_and_move(n: int) -> None:
    image = phantom(n)
    turn, move = torch.tensor([0.31, -0.52]), torch.tensor([[1.2, -0.6], [-0.3, 1.7]])
    references = transforms.place(image, turn, move, mode="fourier")
    found_turn, found_move = transforms.register(
        image.expand(2, -1, -1, -1),
        references,
        transforms.soft_disc(n, 0.4 * n),
        angles=torch.deg2rad(torch.arange(-40.0, 41.0, 5.0)),
        max_shift_px=3,
    )
    assert torch.allclose(found_turn, turn, atol=0.01)
    assert torch.allclose(found_move, move, atol=0.05)
