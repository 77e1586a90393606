"""Network pieces that models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from particle_explorer.transforms import soft_disc


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
