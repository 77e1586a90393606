"""The VAE and β-VAE baselines of the papers (Kingma & Welling 2014; Higgins et al. 2017), without any pose.

Encoder and decoder are the MLPs of the spatial-VAE paper's baseline: tanh layers from the pixels to the
coordinates, and back with one output unit per pixel. The objective is the evidence bound with β on the
divergence. Only pixels inside the particle's disc enter and leave, as in the other networks here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from particle_explorer.configs import DataSpec, VAEConfig
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.layers import PixelNoise, disc_pixels, gaussian_kl
from particle_explorer.transforms import place

IMAGES_IN_A_FIT = 3_200_000
"""Images, counted as often as they are seen, that the default number of epochs comes to."""
REACH = 0.1
"""How far, in parts of the box, particles may lie from the centre and still be drawn whole."""


def mlp(widths: list[int], n_out: int) -> nn.Sequential:
    """Linear layers with tanh between them, none after the last."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_out))


class VAE(ParticleModel):
    """See the module; the encoder gives means, then log standard deviations."""

    disc: Tensor
    """`(p,)` positions, in the flattened image, of the pixels that count."""

    autocast = True
    learning_rate = 1e-3
    batch_size = 100

    def __init__(self, config: VAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.settings = config
        self.latent_dim = config.latent_dim
        self.n_epochs = min(400, max(10, math.ceil(IMAGES_IN_A_FIT / data.n_particles)))
        n = data.box_px
        radius = min(n / 2, data.diameter_px / 2 + REACH * n)
        self.register_buffer("disc", disc_pixels(n, radius), persistent=False)
        hidden = [config.hidden] * config.layers
        self.noise = PixelNoise(config.likelihood, data.n_channels)
        # measured: the images, what is seen and drawn of them, and what the backward pass keeps of those
        self.step_bytes_per_image = 4 * (
            2 * data.n_channels * n * n
            + 3 * len(self.disc) * (data.n_channels + self.noise.n_drawn)
            + 4 * config.hidden * config.layers
        )
        self.encoder = mlp([len(self.disc) * data.n_channels, *hidden], 2 * config.latent_dim)
        self.decoder = mlp([config.latent_dim, *hidden], len(self.disc) * self.noise.n_drawn)

    def start(self, batches: Batches) -> Iterator[Step]:
        yield from self.noise.check(batches)

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and log deviations `(b, d)`."""
        seen = images.flatten(2)[:, :, self.disc].flatten(1)
        mean, log_sd = self.encoder(seen).float().chunk(2, 1)
        return mean, log_sd

    def _drawn(self, z: Tensor) -> Tensor:
        """What the decoder says of the pixels `(b, p, c · width)` in the disc."""
        drawn: Tensor = self.decoder(z).unflatten(1, (len(self.disc), -1))
        return drawn

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """The negative evidence bound per image in two terms (nats), the second times β."""
        mean, log_sd = self.infer(batch.images)
        z = mean + torch.exp(log_sd) * self.normal_like(mean)
        pixels = batch.images.flatten(2)[:, :, self.disc].mT
        return {
            "reconstruction": self.noise(self._drawn(z), pixels).sum((1, 2)).mean(),
            "kl_content": self.settings.beta * gaussian_kl(mean, log_sd).sum(1).mean(),
        }

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        """Posterior means and deviations; no pose, because this model has none."""
        mean, log_sd = self.infer(batch.images)
        return Encoding(mean, torch.exp(log_sd), None, None, {})

    @torch.no_grad()
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`(b, d)` → `(b, c, n, n)`, zero outside the disc; a pose turns and shifts the picture."""
        n, c = self.data.box_px, self.data.n_channels
        images = torch.zeros(len(z), c, n * n, device=z.device)
        images[:, :, self.disc] = self.noise.mean(self._drawn(z)).mT
        images = images.unflatten(2, (n, n))
        if angle is None and shift is None:
            return images
        return place(images, angle, shift, mode="bicubic")
