"""Pieces that models share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from particle_explorer.models.layers import LiftingConvolution, disc_pixels, random_pixels
from particle_explorer.transforms import place


def blobs(n: int, n_channels: int = 1) -> Tensor:
    """A smooth image without symmetry, well inside the box."""
    y, x = np.mgrid[:n, :n] - n // 2
    r = n / 24
    image = np.exp(-0.5 * ((y - r) ** 2 + x**2) / (2.5 * r) ** 2)
    image += 1.3 * np.exp(-0.5 * ((y - 2 * r) ** 2 + (x - 4 * r) ** 2) / (1.8 * r) ** 2)
    image -= 0.7 * np.exp(-0.5 * ((y + 4 * r) ** 2 + (x - 2 * r) ** 2) / (1.5 * r) ** 2)
    return torch.from_numpy(image.astype(np.float32)).expand(1, n_channels, n, n)


def lifting(n: int, n_channels: int = 1, n_turns: int = 8, reach: int = 3, by_spectrum: bool = False):
    torch.manual_seed(0)
    kernel = 3 * n // 4
    return LiftingConvolution(n, n_channels, 6, kernel, n_turns, reach, 40, by_spectrum=by_spectrum)


@pytest.mark.parametrize("n", [16, 24, 25])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_both_ways_give_the_correlation_with_the_functions(n: int, n_channels: int) -> None:
    direct, spectral = lifting(n, n_channels), lifting(n, n_channels, by_spectrum=True)
    images = torch.randn(4, n_channels, n, n)
    torch.testing.assert_close(direct.responses(images), spectral.responses(images), atol=1e-4, rtol=1e-4)
    # the functions as images about their middle, met with torch's own correlation
    half = direct._where.shape[1] and (3 * n // 4) // 2
    line = torch.arange(-half, half + 1)
    pixels = torch.cartesian_prod(line, line)
    pixels = pixels[pixels.square().sum(1) < (3 * n // 4 / 2) ** 2]
    functions = torch.zeros(direct.n_functions, 2 * half + 1, 2 * half + 1)
    functions[:, pixels[:, 0] + half, pixels[:, 1] + half] = direct._basis.T
    maps = functional.conv2d(images.flatten(0, 1)[:, None], functions[:, None], padding=half + n)
    at = direct.shifts + n + n // 2
    expected = maps[:, :, at[:, 0], at[:, 1]].mT.unflatten(0, (4, n_channels)).movedim(1, 2).flatten(2)
    torch.testing.assert_close(direct.responses(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [24, 25])
def test_turning_the_image_rolls_the_responses(n: int) -> None:
    layer, image = lifting(n, n_turns=8, reach=3), blobs(n)
    middle = int((layer.shifts == 0).all(1).nonzero())
    with torch.no_grad():
        upright = layer(image)
        for i in range(8):
            turned = layer(place(image, torch.tensor([2 * math.pi * i / 8]), mode="fourier"))
            expected = upright[:, middle].roll(i, 1)
            assert (turned[:, middle] - expected).abs().max() < 0.03 * expected.abs().max()
        for i in range(8):  # the other sense would not fit
            other = upright[:, middle].roll(-i, 1)
            turned = layer(place(image, torch.tensor([2 * math.pi * i / 8]), mode="fourier"))
            assert i in (0, 4) or (turned[:, middle] - other).abs().max() > 0.1 * other.abs().max()


def test_moving_the_image_moves_the_responses() -> None:
    layer, image = lifting(24), blobs(24)
    with torch.no_grad():
        upright, moved = layer(image), layer(place(image, shift=torch.tensor([[1.0, -2.0]])))
    where = {tuple(shift): i for i, shift in enumerate(layer.shifts.tolist())}
    pairs = [(i, where[y + 1, x - 2]) for (y, x), i in where.items() if (y + 1, x - 2) in where]
    at, to = (torch.tensor(part) for part in zip(*pairs, strict=True))
    torch.testing.assert_close(moved[:, to], upright[:, at], atol=1e-4, rtol=1e-4)


def test_no_angle_is_favoured() -> None:
    """A kernel on a square would lose its corners at odd multiples of 45°."""
    layer, noise = lifting(32, reach=0), torch.randn(4000, 1, 32, 32)
    with torch.no_grad():
        variance = (layer(noise) - layer.bias).var(0)[0]
    assert (variance / variance.mean(0)).sub(1).abs().max() < 0.15
    weight = layer.turned()
    torch.testing.assert_close(weight.square().sum(-1), weight[:1].square().sum(-1).expand(8, -1))


def test_a_random_share_of_pixels_favours_none() -> None:
    disc = disc_pixels(16, 6.0)
    assert len(disc) == 113  # whole points within a radius of 6
    counts = torch.zeros(256)
    for _ in range(200):
        chosen = random_pixels(disc, 20, 0.2)
        assert chosen.shape == (20, 23) and all(len(set(row.tolist())) == 23 for row in chosen[:2])
        counts += torch.bincount(chosen.flatten(), minlength=256)
    assert counts[disc].sum() == counts.sum()
    share = counts[disc] / (200 * 20)
    assert (share - 23 / 113).abs().max() < 0.05
    assert torch.equal(random_pixels(disc, 3, 1.0), disc.expand(3, -1))
