"""Rotation-invariant autoencoder with a discriminator (`kobybibas/CryoEM_rotation_invariant`, about 2021).

An encoder infers content and angle of a turned image, a decoder draws the unturned image from the content
alone, and a discriminator tells drawn images from true ones. It is a supervised method: each example is a
turned image, its angle and its upright target. Here they come from the pose that a particle carries
(`poses="file"`), or, without one, from the particle itself taken as upright (`"self"`): then turns are undone
relative to it, and no angle is reported, since none is known. Where particles lie at all angles a turn cannot
be told from how a particle lay, and the best drawing is the mean over all turns.

As in the published code, the autoencoder's loss is a quarter of the sum of absolute error, squared error
(means over pixels), the angle's error, the discriminator's term, and, beside what the paper says, that a
separate reader of angles should read 0 from what is drawn. Both nets take Adam with betas (0.5, 0.999).

Where we differ:

- any box: the encoder reads the pixels of a disc, and only there is anything drawn and compared (a turned
  image knows nothing of its corners); the decoder grows from a small map, the discriminator pools;
- angles are unit vectors and their error is the squared distance, so that nothing jumps at half a turn; the
  published `exp(error) - 1` is steepest for images taken for half a turn off, and hardly learned;
- the reader's answers are compared with their own targets (broadcast to all pairs, they learned the mean);
- a Wasserstein critic is held to a slope of 1 by a gradient penalty (Gulrajani et al. 2017); the published
  clipping had no effect. It takes one step for several of the autoencoder, with that step's gradient alone;
- its term has a weight, which the published sum lacks: a critic that works outweighs the pixels' errors. So
  has the angle's: errors of pixels are means of small numbers, and the encoder learned little else. The
  discriminator and the reader see every fourth image of a batch, an unbiased estimate;
- the decoder normalises every image by itself (group norm), so that answers depend on no other image, a
  batch may be one particle, and several devices agree; the encoder, twice as wide as published, does without.
  The published batch norms have 0.8 where their epsilon is;
- the decoder has no input for an angle that is always 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import DataSpec, RotationAEConfig
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.spatial_vae import exact
from particle_explorer.transforms import place, radius, soft_disc, unplace

IMAGES_IN_A_FIT = 1_500_000
"""Images, counted as often as they are seen, that the default number of epochs comes to."""
SLOPE_WEIGHT = 10.0
ANGLE_WEIGHT = 0.02
"""Of the angle's error beside those of the pixels."""
JUDGED_EVERY = 4
"""The discriminator and the reader see one image of so many."""
_SLANT = 0.2


class RotationAE(ParticleModel):
    """See the module."""

    autocast = True
    uses_pose = True
    betas = (0.5, 0.999)
    learning_rate = 1e-3
    batch_size = 256

    seen: Tensor
    disc: Tensor
    supervised: Tensor

    def __init__(self, config: RotationAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.settings = config
        self.latent_dim = config.latent_dim
        self.n_epochs = min(400, max(10, round(IMAGES_IN_A_FIT / data.n_particles)))
        n, c = data.box_px, data.n_channels
        self.register_buffer("seen", (radius(n) <= n / 2).flatten().nonzero()[:, 0], persistent=False)
        self.register_buffer("disc", soft_disc(n, n / 2 - 1, edge_px=1.0), persistent=False)
        self.register_buffer("supervised", torch.tensor(config.poses == "file"))
        widths = [c * len(self.seen), 1024, 512, 256]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.LeakyReLU(_SLANT)]
        self.encoder = nn.Sequential(*layers, nn.Linear(widths[-1], config.latent_dim + 2))
        self.decoder = _Decoder(config.latent_dim, c, n)
        self.critic = _Judge(c, 1)
        self.reader = _Judge(c, 2)
        self._n_asked = 0
        # measured at 64 to 255 px: the decoder's 64 to 16 small maps, and turned and upright images
        self.step_bytes_per_image = 4 * n * n * (38 + 2 * c)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The autoencoder; the discriminator and the reader of angles."""
        return {
            "model": [*self.encoder.parameters(), *self.decoder.parameters()],
            "critic": [*self.critic.parameters(), *self.reader.parameters()],
        }

    def start(self, batches: Batches) -> Iterator[Step]:
        """See whether the particles carry poses, and say what is learned from."""
        carried = batches.take(torch.zeros(1, dtype=torch.int64)).pose is not None
        if self.settings.poses == "file" and not carried:
            raise UserError(
                "--model.poses file: not all particles carry an in-plane angle (rlnAnglePsi, or the pose of "
                "a cryoSPARC 2D alignment); align them there first, or choose --model.poses self"
            )
        self.supervised.fill_(carried and self.settings.poses != "self")
        what = "the angles that the particles carry" if self.supervised else "random turns of each particle"
        yield Step(f"learning from {what}", 1.0)

    # -- what the networks say

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Content `(b, d)`, and `(b, 2)` cosine and sine of the angle, of any length."""
        out = self.encoder(images.flatten(2)[..., self.seen].flatten(1)).float()
        return out[:, :-2], out[:, -2:]

    def drawn_upright(self, z: Tensor) -> Tensor:
        """`(b, d)` → `(b, c, n, n)`, 0 beyond the disc."""
        image = self.decoder(z).float()
        return self.disc * (image.sigmoid() if self.settings.pixels == "sigmoid" else image)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        z, direction = self.infer(batch.images)
        angle = torch.atan2(direction[:, 1], direction[:, 0])
        return Encoding(z, None, angle if self.supervised else None, None, {})

    @torch.no_grad()
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        image = self.drawn_upright(z)
        return image if angle is None and shift is None else place(image, angle, shift)

    # -- losses

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        if part == "critic":
            due = self._n_asked % self.settings.critic_every == 0
            last = self.share is None or sum(self.share.now) == self.share.total
            if last or not due:  # of a batch that is sat out nobody asks for the other parts
                self._n_asked += 1
            if self.settings.adversarial == "none" or not due:
                return {}
        turned, angle, target = self._examples(batch)
        if part == "critic":
            return self._critic_losses(turned, angle, target)
        z, direction = self.infer(turned)
        image = self.drawn_upright(z)
        off = image - target
        losses = {
            "absolute": 0.25 * off.abs().mean(),
            "squared": 0.25 * off.square().mean(),
            "angle": 0.25 * ANGLE_WEIGHT * _angle_loss(direction, angle).mean(),
        }
        if self.settings.adversarial == "none" or self.settings.adversarial_weight == 0:
            return losses
        weight = 0.25 * self.settings.adversarial_weight
        judged, share = self._judged(image)
        with exact(image.device):
            score = self.critic(image[judged])[:, 0]
            wasserstein = self.settings.adversarial == "wasserstein"
            told = -score if wasserstein else functional.softplus(-score)
            losses["adversarial"] = weight * share * told.sum()
            if self.supervised:
                read = self.reader(image[judged])
                losses["upright"] = weight * share * _angle_loss(read, torch.zeros_like(angle[judged])).sum()
        return losses

    def _judged(self, images: Tensor) -> tuple[slice, float]:
        """Which rows the discriminator sees, and what each counts in their mean.

        Counted from the start of the whole batch: its parts, some of which may see none, add up to what the
        whole would find.
        """
        rows = len(images)
        first, total = (0, rows) if self.share is None else self.share[:2]
        return slice(-first % JUDGED_EVERY, None, JUDGED_EVERY), total / (
            rows * math.ceil(total / JUDGED_EVERY)
        )

    def _examples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Turned images, their angles, and the upright targets."""
        images, pose = batch.images, batch.pose
        if pose is None or not self.supervised:
            pose = images.new_zeros(len(images), 3)
        reach = math.radians(self.settings.turn_range_deg)
        turn = reach * (2 * self.drawn(torch.rand, len(images), device=images.device) - 1)
        # turned about the middle, a placed particle is placed at the sum of both angles
        turned = self._in_range(place(images, turn, mode="bicubic"))
        upright = self._in_range(unplace(images, pose[:, 0], pose[:, 1:], mode="bicubic")) * self.disc
        return turned, pose[:, 0] + turn, upright

    def _in_range(self, images: Tensor) -> Tensor:
        """Images from 0 to 1 stay there: interpolation exceeds it, which no image to encode does."""
        return images.clamp(0, 1) if self.settings.pixels == "sigmoid" else images

    def _critic_losses(self, turned: Tensor, angle: Tensor, target: Tensor) -> dict[str, Tensor]:
        judged, share = self._judged(turned)
        at = self.drawn(torch.rand, len(turned), 1, 1, 1, device=turned.device)[judged]
        turned, angle, true = turned[judged], angle[judged], target[judged]
        with torch.no_grad():
            fake = self.drawn_upright(self.infer(turned)[0])
        with exact(true.device):
            on_true, on_fake = self.critic(true)[:, 0], self.critic(fake)[:, 0]
            if self.settings.adversarial == "wasserstein":
                losses = {
                    "discriminator": 0.25 * share * (on_fake - on_true).sum(),
                    "slope": SLOPE_WEIGHT * share * (self.slope(true, fake, at) - 1).square().sum(),
                }
            else:
                told = functional.softplus(-on_true) + functional.softplus(on_fake)
                losses = {"discriminator": 0.25 * share * told.sum()}
            losses["reader"] = 0.5 * share * _angle_loss(self.reader(turned * self.disc), angle).sum()
        return losses

    def slope(self, true: Tensor, fake: Tensor, at: Tensor) -> Tensor:
        """`(b,)` how steep the critic is `at` `(b, 1, 1, 1)`, 0 to 1, between drawn and true images."""
        between = (at * true + (1 - at) * fake).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return (gradient.square().sum((1, 2, 3)) + 1e-12).sqrt()

    def training_state(self) -> dict[str, Any]:
        return {"n_asked": self._n_asked}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._n_asked = int(state["n_asked"])


class _Decoder(nn.Module):
    """`(b, d)` → `(b, c, n, n)`: 64 small maps, doubled and halved in number until they are large enough.

    The last doubling draws the four pixels of each place at once, which is a transposed convolution of 6 px
    as the published one and several times faster than a convolution of the large maps.
    """

    def __init__(self, latent_dim: int, n_channels: int, box_px: int) -> None:
        super().__init__()
        n_up = max(2, round(math.log2(box_px / 4)))
        small = math.ceil(box_px / 2**n_up)
        self.box_px = box_px
        self.seed = nn.Sequential(nn.Linear(latent_dim, 64 * small**2), nn.Unflatten(1, (64, small, small)))
        layers: list[nn.Module] = []
        width = 64
        for _ in range(n_up - 1):
            less = max(16, width // 2)
            layers += [nn.ConvTranspose2d(width, less, 4, stride=2, padding=1), nn.GroupNorm(4, less)]
            layers.append(nn.LeakyReLU(_SLANT))
            width = less
        self.grow = nn.Sequential(*layers, nn.Conv2d(width, 4 * n_channels, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, z: Tensor) -> Tensor:
        image = self.grow(self.seed(z))
        cut = (image.shape[-1] - self.box_px) // 2
        return image[..., cut : cut + self.box_px, cut : cut + self.box_px]


class _Judge(nn.Module):
    """Images `(b, c, n, n)` → `(b, n_out)`: three strided convolutions, pooled to 4 × 4."""

    def __init__(self, n_channels: int, n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise([n_channels, 8, 16, 32]):
            layers += [nn.Conv2d(i, o, 5, stride=2, padding=2), nn.LeakyReLU(_SLANT)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, n_out))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images)
        return out


def _angle_loss(direction: Tensor, angle: Tensor) -> Tensor:
    """`(b,)` squared distance of `(b, 2)` directions, of any length, from those of `(b,)` angles, rad."""
    return (direction - torch.stack([angle.cos(), angle.sin()], 1)).square().sum(1)
