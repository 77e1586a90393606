"""Filters, and the power of images in the shells of Fourier space: what noise is measured and whitened by.

`shell` `(n, n // 2 + 1)` says of each frequency of the half spectrum which shell it is in, 0 to n // 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def filtered(images: Tensor, factor: Tensor) -> Tensor:
    """`(..., n, n)` images, their half spectra times `factor`."""
    n = images.shape[-1]
    return torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(n, n))


def twice(half: Tensor) -> Tensor:
    """`(..., n, n // 2 + 1)` with what stands for its mirror image too counted twice."""
    n = half.shape[-2]
    factor = torch.full((n // 2 + 1,), 2.0, device=half.device)
    factor[0] = 1.0
    if n % 2 == 0:
        factor[-1] = 1.0
    return half * factor


def radial_power(images: Tensor, shell: Tensor) -> Tensor:
    """`(b, c, n, n)` → `(b, n // 2 + 1)` power of each shell; white noise gives its variance."""
    return ring_mean(torch.fft.rfft2(images).abs().square().mean(1) / images.shape[-1] ** 2, shell)


def ring_mean(power: Tensor, shell: Tensor) -> Tensor:
    """`(b, n, n // 2 + 1)` → `(b, n // 2 + 1)` mean of each shell."""
    total = torch.zeros(len(power), shell.shape[1], device=power.device)
    total.index_add_(1, shell.flatten(), twice(power).flatten(1))
    return total / in_shell(shell)


def in_shell(shell: Tensor) -> Tensor:
    """`(n // 2 + 1,)` frequencies in each shell of the whole spectrum."""
    ones = torch.ones(shell.shape, device=shell.device)
    count = torch.zeros(shell.shape[1], device=shell.device)
    return count.index_add_(0, shell.flatten(), twice(ones).flatten())


def smoothed(power: Tensor) -> Tensor:
    """`(n // 2 + 1,)` power over neighbouring shells; the first, of the mean alone, is that of the next."""
    padded = F.pad(power[1:].log()[None, None], (1, 1), mode="replicate")
    smooth = F.conv1d(padded, torch.tensor([[[0.25, 0.5, 0.25]]], device=power.device))[0, 0].exp()
    return torch.cat([smooth[:1], smooth])
