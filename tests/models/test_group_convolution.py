"""Turned in, turned out: group convolutions by the convention of `pose`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer.models.group_convolution import (
    GroupConvolution,
    GroupLinear,
    about_middle,
    directions,
    turned_kernels,
)
from particle_explorer.transforms import place


def placed(maps: Tensor, angle: float, roll: int) -> Tensor:
    """`(b, c, r, m, m)` turned in the plane and rolled along the group."""
    flat = place(maps.flatten(1, 2), torch.full((len(maps),), angle), mode="bicubic")
    return flat.unflatten(1, maps.shape[1:3]).roll(roll, dims=2)


def two_layers(order: int) -> torch.nn.Sequential:
    lift = GroupConvolution(2, 3, 7, order, lifting=True, stride=2)
    return torch.nn.Sequential(lift, torch.nn.SiLU(), GroupConvolution(3, 4, 5, order))


@pytest.mark.parametrize("order", [4, 8, 16])
def test_a_quarter_turn_is_exact(order: int) -> None:
    net, image = two_layers(order), torch.randn(2, 2, 1, 33, 33)
    plain = net(image)
    for quarter in (1, 2, 3):
        turned = net(placed(image, quarter * math.pi / 2, 0))
        expected = placed(plain, quarter * math.pi / 2, quarter * order // 4)
        torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)


def test_an_eighth_turn_is_near_and_of_the_right_sense() -> None:
    net = two_layers(8)
    y, x = np.mgrid[:49, :49] - 24
    image = np.exp(-((x - 7) ** 2 + (y + 4) ** 2) / 40) + 0.5 * np.exp(-((x + 8) ** 2 + (y - 8) ** 2) / 20)
    image = torch.from_numpy(image.astype(np.float32)).expand(1, 2, 1, -1, -1)
    plain, turned = net(image), net(placed(image, math.pi / 4, 0))
    # what does not depend on the angle tells nothing
    plain, turned = (maps - maps.mean((2, 3, 4), keepdim=True) for maps in (plain, turned))
    errors = [
        ((turned - placed(plain, math.pi / 4, roll)).square().mean() / plain.var()).item()
        for roll in range(8)
    ]
    assert np.argmin(errors) == 1 and errors[1] < 0.4 * np.median(errors)


def test_turned_kernels_keep_to_the_disc_and_their_mass() -> None:
    turns = turned_kernels(7, 8)
    assert turns.shape == (8, 49, 37)
    assert ((turns[::2] == 0) | (turns[::2] == 1)).all()  # quarter turns move pixels whole
    mass = turns.sum(1)
    torch.testing.assert_close(mass[::2], torch.ones_like(mass[::2]))
    assert 0.93 < mass.mean() < 1.01


def test_layers_without_a_plane_roll_with_their_input() -> None:
    layer, x = GroupLinear(3, 2, 8), torch.randn(4, 3, 8)
    torch.testing.assert_close(layer(x.roll(3, dims=2)), layer(x).roll(3, dims=2))
    units = directions(8)
    torch.testing.assert_close(units[2], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)  # down: y grows


@pytest.mark.parametrize("n", [6, 7])
def test_the_middle_is_pixel_half_of_n(n: int) -> None:
    image = torch.zeros(1, 1, n, n)
    image[..., n // 2, n // 2] = 1
    odd = about_middle(image)
    assert odd.shape[-1] % 2 == 1 and odd[0, 0, odd.shape[-1] // 2, odd.shape[-1] // 2] == 1
