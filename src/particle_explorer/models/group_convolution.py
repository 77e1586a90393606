"""Convolutions over shifts and the r turns of a cyclic group, by the convention of `pose`.

Channel i of the group axis answers to content that stands at angle `2 pi i / r`. Turning an image by
`2 pi / r` turns every map and rolls the group axis by one; exactly so for quarter turns about the middle
pixel, up to the interpolation of kernels for the other turns. Kernels are cut to the disc inside their
square, because turned corners would be lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.transforms import radius


def turned_kernels(side: int, order: int) -> Tensor:
    """`(order, side², k)`: the linear map from the k pixels in the inscribed disc to a kernel turned by
    `2 pi i / order`.

    Bilinear inside the disc, nothing outside it; quarter turns only permute pixels.
    """
    if side % 2 == 0:
        raise ValueError(f"a kernel of even side {side} has no middle pixel")
    at = torch.arange(side, dtype=torch.float64) - side // 2
    y, x = at[:, None].expand(side, side), at.expand(side, side)
    inside = (radius(side) <= side / 2).flatten()
    matrices = torch.zeros(order, side * side, side * side, dtype=torch.float64)
    for i in range(order):
        cos, sin = math.cos(2 * math.pi * i / order), math.sin(2 * math.pi * i / order)
        # the turned kernel at x shows the kernel at R(-angle) x; rounding keeps quarter turns whole
        from_x = (cos * x + sin * y).mul(2**20).round().div(2**20) + side // 2
        from_y = (cos * y - sin * x).mul(2**20).round().div(2**20) + side // 2
        low_x, low_y = from_x.floor(), from_y.floor()
        for dy in (0, 1):
            for dx in (0, 1):
                weight = (1 - (from_x - low_x - dx).abs()) * (1 - (from_y - low_y - dy).abs())
                at_y, at_x = low_y + dy, low_x + dx
                there = (at_y >= 0) & (at_y < side) & (at_x >= 0) & (at_x < side) & (weight > 0)
                rows = torch.nonzero(there.flatten())[:, 0]
                columns = (at_y * side + at_x).long().flatten()[rows]
                matrices[i, rows, columns] += weight.flatten()[rows]
    matrices[:, ~inside] = 0
    return matrices[:, :, inside].float()


class GroupConvolution(nn.Module):
    """`(b, c_in, r_in, m, m)` → `(b, c_out, r, m', m')`; `r_in` is 1 for images (lifting), else r.

    Parameters
    ----------
    side
        Odd side of the kernel; with `padding` None maps keep their side (divided by the stride), with 0 and
        the side of the map the layer is fully connected over the plane, tied by the group alone.
    """

    turns: Tensor

    def __init__(
        self,
        c_in: int,
        c_out: int,
        side: int,
        order: int,
        *,
        lifting: bool = False,
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.order, self.stride, self.side = order, stride, side
        self.padding = side // 2 if padding is None else padding
        self.r_in = 1 if lifting else order
        turns = turned_kernels(side, order)
        bound = math.sqrt(6 / (c_in * self.r_in * turns.shape[-1]))  # He et al. 2015, uniform
        self.weight = nn.Parameter((2 * torch.rand(c_out, c_in, self.r_in, turns.shape[-1]) - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.register_buffer("turns", turns, persistent=False)

    def kernels(self) -> Tensor:
        """`(c_out · r, c_in · r_in, side, side)`: the base kernels turned, their input turns rolled."""
        turned = torch.einsum("oisk,rpk->orisp", self.weight, self.turns)
        if self.r_in > 1:
            rolled = [turned[:, i].roll(i, dims=2) for i in range(self.order)]
            turned = torch.stack(rolled, 1)
        c_out = len(self.weight)
        return turned.reshape(c_out * self.order, -1, self.side, self.side)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            kernels = self.kernels()
        bias = self.bias.repeat_interleave(self.order)
        out = functional.conv2d(maps.flatten(1, 2), kernels, bias, stride=self.stride, padding=self.padding)
        return out.unflatten(1, (-1, self.order))


class GroupLinear(GroupConvolution):
    """The same without a plane: `(b, c_in, r)` → `(b, c_out, r)`."""

    def __init__(self, c_in: int, c_out: int, order: int) -> None:
        super().__init__(c_in, c_out, 1, order)

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.kernels().flatten(1)
        out = functional.linear(maps.flatten(1), weight, self.bias.repeat_interleave(self.order))
        return out.unflatten(1, (-1, self.order))


def directions(order: int) -> Tensor:
    """`(order, 2)` unit vectors (x, y) of the group's angles, y down."""
    angle = 2 * math.pi * torch.arange(order, dtype=torch.float64) / order
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def about_middle(maps: Tensor) -> Tensor:
    """Maps with an odd side whose middle pixel is the former `n // 2`: a line of zeros is added if needed."""
    return functional.pad(maps, (0, 1, 0, 1)) if maps.shape[-1] % 2 == 0 else maps
