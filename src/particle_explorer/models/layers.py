"""Network pieces that models share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import Likelihood
from particle_explorer.files import UserError
from particle_explorer.models.base import Batches, Step
from particle_explorer.transforms import soft_disc

LEAST_LOG_VARIANCE = -6.0
"""A learned variance stops here; a pixel that is the same in all images would drive it on for ever."""


def exact(device: torch.device) -> torch.autocast:
    """No half precision inside: it would move pixels and poses by a tenth of a pixel."""
    return torch.autocast(device.type, enabled=False)


def gaussian_kl(mean: Tensor, log_sd: Tensor) -> Tensor:
    """KL of N(mean, sd²) from N(0, 1), elementwise."""
    return -log_sd + 0.5 * (torch.exp(2 * log_sd) + mean**2 - 1)


class PixelNoise(nn.Module):
    """How what a network draws is compared with pixels: `(..., c · width)` drawn for `(..., c)` pixels.

    `gaussian` has variance 1, `gaussian-learned` a log-variance after the means (`width` 2), `bernoulli`
    takes what is drawn as logits of grey values from 0 to 1.
    """

    def __init__(self, likelihood: Likelihood, n_channels: int, *, non_negative: bool = False) -> None:
        super().__init__()
        self.likelihood: Likelihood = likelihood
        self.n_channels = n_channels
        self.non_negative = non_negative
        self.n_drawn = n_channels * (2 if likelihood == "gaussian-learned" else 1)

    def mean(self, drawn: Tensor) -> Tensor:
        """The expected pixels `(..., c)`."""
        drawn = drawn[..., : self.n_channels].float()
        if self.likelihood == "bernoulli":
            return torch.sigmoid(drawn)
        return functional.softplus(drawn) if self.non_negative else drawn

    def forward(self, drawn: Tensor, pixels: Tensor) -> Tensor:
        """Minus the log-likelihood of `(..., c)` pixels, without its constant."""
        if self.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(drawn.float(), pixels, reduction="none")
        return self.of_mean(self.mean(drawn), drawn, pixels)

    def of_mean(self, mean: Tensor, drawn: Tensor, pixels: Tensor) -> Tensor:
        """The same for Gaussian noise, of a mean that was changed since it was drawn."""
        squared = (pixels - mean).square()
        if self.likelihood == "gaussian":
            return 0.5 * squared
        log_variance = drawn[..., self.n_channels :].float().clamp_min(LEAST_LOG_VARIANCE)
        return 0.5 * (squared * torch.exp(-log_variance) + log_variance)

    def check(self, batches: Batches) -> Iterator[Step]:
        """Refuse images that the likelihood cannot hold for, before anything is fitted."""
        if self.likelihood != "bernoulli":
            return
        n = len(batches)
        for start in range(0, n, 1000):
            images = batches.take(torch.arange(start, min(start + 1000, n))).images
            low, high = float(images.min()), float(images.max())
            if low < -0.01 or high > 1.01:
                raise UserError(
                    f"--model.likelihood bernoulli is for grey values from 0 to 1, these images go from"
                    f" {low:.3g} to {high:.3g}; choose gaussian, or prepare the images with"
                    " --preprocess.background none if their file has such grey values"
                )
            yield Step("checking grey values", min(1.0, (start + 1000) / n))


def disc_pixels(box_px: int, radius_px: float) -> Tensor:
    """`(p,)` positions, in the flattened image, of the pixels within a radius of pixel n // 2."""
    line = torch.arange(box_px) - box_px // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.nonzero((x**2 + y**2 <= radius_px**2).reshape(-1))[:, 0]


class SmoothDecoder(nn.Module):
    """Latent coordinates to images through a small MLP and transposed convolutions.

    `z` enters plainly (no Fourier features): the smoothness of the network in `z` is the prior that keeps
    neighbours on a map alike. The image is drawn inside a soft disc, on top of one `base` image that all
    of the map share.

    Parameters
    ----------
    latent_dim, n_channels, box_px
        `(b, latent_dim)` → `(b, n_channels, box_px, box_px)`, any even or odd box.
    radius_px
        Radius of the disc; its edge falls to 0 within two further pixels.
    """

    def __init__(
        self,
        latent_dim: int,
        n_channels: int,
        box_px: int,
        radius_px: float,
        hidden: int = 128,
        width: int = 16,
    ) -> None:
        super().__init__()
        n_up = 2 if box_px <= 96 else 3
        small = -(-box_px // 2**n_up)
        self.mlp = nn.Sequential(
            nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 2 * width * small**2), nn.Unflatten(1, (2 * width, small, small)), nn.SiLU(),
        )  # fmt: skip
        convolutions: list[nn.Module] = []
        channels = 2 * width
        for _ in range(n_up):
            convolutions += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.SiLU()]
            channels = width
        self.convolutions = nn.Sequential(*convolutions, nn.Conv2d(channels, n_channels, 3, padding=1))
        self.base = nn.Parameter(torch.zeros(n_channels, box_px, box_px))
        self.box_px = box_px
        self.register_buffer("disc", soft_disc(box_px, radius_px), persistent=False)
        self.disc: Tensor

    def forward(self, z: Tensor) -> Tensor:
        image = self.convolutions(self.mlp(z))
        cut = (image.shape[-1] - self.box_px) // 2
        image = image[..., cut : cut + self.box_px, cut : cut + self.box_px]
        return (image + self.base) * self.disc
