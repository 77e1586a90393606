"""The flat class of junk: any image with the power of an image of particles, or with none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.comparison import Comparison


def tells_junk(model: Comparison) -> bool:
    """Whether junk is told apart: not before there is a map to be told from."""
    return bool(model.junk_share > 0) and bool(model.signal_power.any()) and model.heat == 1


def log_junk(model: Comparison, images: Tensor) -> Tensor:
    """`(b,)` log of the share of junk times the likelihood of the flat class over that of noise alone.

    The class is a mixture of three: noise alone, and images as random as noise whose power in each shell
    is that of the noise and once or four times that of images of particles.
    """
    energy, count = band_energy(model, images)
    ratio = model.signal_power / model.noise_power.clamp_min(1e-8)
    parts = [torch.zeros_like(energy[:, 0])]
    for strength in (1.0, 4.0):
        u = strength * ratio
        parts.append(0.5 * (energy @ (u / (1 + u)) - count @ u.log1p()))
    return torch.stack(parts).logsumexp(0) - math.log(len(parts)) + model.junk_share.log()


def band_energy(model: Comparison, images: Tensor) -> tuple[Tensor, Tensor]:
    """`(b, shells)` squares of the whitened images summed over each shell, and of how many numbers."""
    shell = model.band.shell.round().long()
    rows = torch.view_as_real(model.rows(images, model.band)).square().sum((1, 3))
    n_shells = len(model.noise_power)
    energy = rows.new_zeros(len(rows), n_shells).index_add_(1, shell, rows)
    # a coefficient of the half spectrum is two real numbers, and its own mirror image only one
    numbers = torch.where(model.band.scale > 1.2 / model.box, 2.0, 1.0) * model.data.n_channels
    return energy, rows.new_zeros(n_shells).index_add_(0, shell, numbers)
