"""What models are timed beside: spatial-VAE and TARGET-VAE as their papers write them, without a shortcut."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import SpatialVAEConfig, SpeedConfig, TargetVAEConfig

PAPER_TARGET = {
    50: TargetVAEConfig(kernel_px=28, shift_range_px=19),
    64: TargetVAEConfig(kernel_px=64, shift_range_px=32),
    100: TargetVAEConfig(kernel_px=64, shift_range_px=34, layers=6),
}
"""TARGET-VAE P8 with the kernels and shifts of its paper: digits, shapes, recorded particles."""


REFERENCE_WORDS = (
    "The papers' code on another processor, for comparison: images per second (train, encode, decode) of one"
    " core with AVX-512, PyTorch 2.13, float32, good to about 20 %: VAE 40 px 4 300, 59 000, 58 000;"
    " spatial-VAE 40 px 28, 45 000, 66; 64 px 13, 5 300, 41; 100 px 4.5, 2 600, 11;"
    " TARGET-VAE P8 40 px 8.4, 78, 33; 50 px 4.0, 27, 22; 64 px 0.9, 2.8, 12; 100 px and six layers"
    " 0.5, 2.8, 2.4; rotation-invariant autoencoder 40 px 770, 60 000, 3 100."
)


def images_per_s(step: Callable[[], int], seconds: float) -> float:
    """Images per second of a step that returns how many it did; the first is not counted."""
    step()
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        done += step()
    return done / spent


def _training(model: nn.Module, images: Tensor, learning_rate: float) -> Callable[[], int]:
    """A step of training on the same images, which returns how many they are."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)

    def train() -> int:
        optimiser.zero_grad(set_to_none=True)
        model(images).backward()
        optimiser.step()
        return len(images)

    return train


class _PlainVAE(nn.Module):
    """spatial-VAE as its paper writes it: float32, every pixel of every image decoded, no shortcut."""

    def __init__(self, box: int, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(box**2, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2 * (3 + latent_dim)),
        )
        self.coordinates = nn.Linear(2, hidden)
        self.content = nn.Linear(latent_dim, hidden, bias=False)
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        line = torch.linspace(-1, 1, box)
        self.grid = torch.stack(torch.meshgrid(line, -line, indexing="xy"), -1).reshape(-1, 2)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        mean, log_sd = self.encoder(flat).chunk(2, 1)
        sample = mean + log_sd.exp() * torch.randn_like(mean)
        angle, shift, z = sample[:, 0], sample[:, 1:3], sample[:, 3:]
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
        at = self.grid @ turn + shift[:, None]
        drawn = self.decoder(self.coordinates(at) + self.content(z)[:, None])[..., 0]
        kl = (-log_sd + 0.5 * (log_sd * 2).exp() + 0.5 * mean**2 - 0.5).sum(1)
        return (0.5 * (drawn - flat).square().sum(1) + kl).mean()


def time_plain_vae(box: int, config: SpeedConfig) -> dict[str, Any]:
    """The yardstick of spatial-VAE: same widths and batch, plainly written."""
    torch.manual_seed(0)
    ours = SpatialVAEConfig()
    model = _PlainVAE(box, ours.latent_dim, ours.hidden)
    size = config.batch_size or 100
    train = _training(model, torch.randn(size, 1, box, box), 1e-3)
    return {
        "model": "plain spatial-vae",
        "box_px": box,
        "batch": size,
        "train_per_s": round(images_per_s(train, config.seconds), 1),
    }


class _PlainTarget(nn.Module):
    """TARGET-VAE as its paper's code writes it: float32, kernels of pixels resampled for every angle and
    correlated with the image one by one, every pixel of every image decoded."""

    def __init__(self, box: int, like: TargetVAEConfig, kernel_px: int, reach_px: int) -> None:
        super().__init__()
        self.reach, self.n_turns = reach_px, int(like.rotations[1:])
        channels, features, hidden, d = like.channels, like.features, like.hidden, like.latent_dim
        bound = 1 / kernel_px
        self.kernels = nn.Parameter(torch.empty(channels, 1, kernel_px, kernel_px).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mix = nn.Conv3d(channels, channels, 1)
        self.heads = nn.Conv3d(channels, 3 + 2 * d, 1)
        self.waves, self.phases = torch.randn(2, features) * (box - 1) / 2, 2 * math.pi * torch.rand(features)
        self.coordinates = nn.Linear(features, hidden)
        self.content = nn.Linear(d, hidden, bias=False)
        layers: list[nn.Module] = [nn.LeakyReLU()]
        for _ in range(like.layers - 1):
            layers += [nn.Linear(hidden, hidden), nn.LeakyReLU()]
        self.decoder = nn.Sequential(*layers, nn.Linear(hidden, 1))
        line = torch.linspace(-1, 1, box)
        self.grid = torch.stack(torch.meshgrid(line, -line, indexing="xy"), -1).reshape(-1, 2)
        step = torch.arange(-reach_px, reach_px + 1) * 2 / (box - 1)
        self.cells = torch.stack(torch.meshgrid(step, -step, indexing="xy"), -1).reshape(-1, 2)
        self.angles = 2 * math.pi * torch.arange(self.n_turns) / self.n_turns

    def forward(self, images: Tensor) -> Tensor:
        k, r = self.kernels.shape[-1], self.n_turns
        cos, sin = self.angles.cos(), self.angles.sin()
        zero = torch.zeros(r)
        turn = torch.stack([torch.stack([cos, sin, zero], -1), torch.stack([-sin, cos, zero], -1)], 1)
        grid = functional.affine_grid(turn, [r, 1, k, k], align_corners=False)
        bank = functional.grid_sample(self.kernels[:, 0].expand(r, -1, -1, -1), grid, align_corners=False)
        pad = self.reach + -(-(k - images.shape[-1]) // 2)
        padded = functional.pad(images, [pad] * 4)
        maps = functional.conv2d(padded, bank.flatten(0, 1)[:, None], self.bias.repeat(r))
        side = 2 * self.reach + 1
        maps = maps[..., :side, :side].unflatten(1, (r, -1)).transpose(1, 2)
        h = functional.leaky_relu(self.mix(functional.leaky_relu(maps)))
        heads = self.heads(h).flatten(3)  # b, heads, r, cells
        log_q = heads[:, 0].flatten(1).log_softmax(1)
        weight = functional.gumbel_softmax(log_q).unflatten(1, (r, -1))
        mean, log_sd = heads[:, 1:].chunk(2, 1)
        sd = log_sd.exp()
        each = mean + torch.cat([self.angles[:, None].expand_as(mean[0, :1]), torch.zeros_like(mean[0, 1:])])
        mixed = (weight[:, None] * each).sum((2, 3)) + (weight[:, None] * sd).sum((2, 3)) * torch.randn_like(
            each[:, :, 0, 0]
        )
        angle, z, shift = mixed[:, 0], mixed[:, 1:], weight.sum(1) @ self.cells
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
        at = (self.grid - shift[:, None]) @ turned
        drawn = self.decoder(
            self.coordinates(torch.cos(at @ self.waves + self.phases)) + self.content(z)[:, None]
        )
        kl = (log_q.exp().unflatten(1, (r, -1)) * (0.5 * (sd**2 + mean**2) - log_sd).sum(1)).sum((1, 2))
        return (0.5 * (drawn[..., 0] - images.flatten(1)).square().sum(1) + kl).mean()


def time_plain_target(name: str, box: int, config: SpeedConfig) -> dict[str, Any]:
    """The yardstick of TARGET-VAE: the same sizes, plainly written, in small batches that fit memory."""
    torch.manual_seed(0)
    like = PAPER_TARGET[box] if name != "target-vae" else TargetVAEConfig()
    kernel = like.kernel_px or math.ceil(0.8 * box)
    model = _PlainTarget(box, like, kernel, like.shift_range_px or math.ceil(0.15 * box))
    size = min(config.batch_size or 8, 8 if box <= 50 else 2)
    train = _training(model, torch.randn(size, 1, box, box), 2e-4)
    return {
        "model": f"plain {name}",
        "box_px": box,
        "batch": size,
        "train_per_s": round(images_per_s(train, config.seconds), 2),
    }
