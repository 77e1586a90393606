"""spatial-VAE: Bepler, Zhong, Kelley, Brignole & Berger, NeurIPS 2019 (`tbepler/spatial-VAE`).

An encoder MLP infers angle, shift and content of an image as a diagonal Gaussian; a decoder MLP, shared by
all pixels, draws the image at the coordinates that the pose gives each pixel. The objective is the paper's
evidence bound with unit-variance Gaussian pixels (our images have noise of variance about 1; a variance
drawn with the mean, and Bernoulli pixels, are options), a mean-free prior on the angle, content held at zero
for the first epochs, and a random turn of what the encoder sees.

Where we differ from the published code:

- the rotation centre is pixel `n // 2`, as in cryo-EM files, instead of the middle of the box;
- only pixels inside the particle's disc count, and each step draws a random share of them (rescaled: the
  gradient stays unbiased); the encoder sees that disc only, so turned corners never reach it;
- the turn is one warp of the whole batch on its device;
- the shift is inferred in the frame of the image that the encoder sees, not of the reference, where an error
  of the angle would move the molecule; the prior is isotropic, so the generative model is the same;
- in the first half of the epochs without content there is no shift either;
- pose is first learned for a short time from several random starts, and the one of the best evidence bound
  goes on: a start in some ends with the particle drawn over its own half-turned copy, which costs evidence;
- the decoder's first layer starts with larger weights (`EDGE_PX`), so that it can draw detail from the start;
- the decoder may draw the particle free of the CTF, which is then applied to the whole picture, astigmatism
  included (the code: a kernel in real space without it);
- reported angle and content are means of the posterior, taken over `TURNS` turned copies of the image
  (unit-vector mean of the angles), not one random sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from particle_explorer.configs import DataSpec, SpatialVAEConfig
from particle_explorer.devices import autocast, images_at_once
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.layers import (
    PixelNoise,
    disc_pixels,
    exact,
    fast_products,
    gaussian_kl,
    random_pixels,
)
from particle_explorer.transforms import place, rotation_matrix

TURNS = 8
"""Turned copies of each image that `encode` averages over."""
IMAGES_IN_A_FIT = 800_000
"""Images, counted as often as they are seen, that the default number of epochs comes to."""
FREEZE_SHARE = 0.05
"""Least share of the training without content, so that a small stack's pose is learned first too."""
TRIAL_IMAGES, TRIAL_EPOCHS = 24_000, 8
"""What one of several starts sees: this many images, but no image more often than this."""
TRIAL_SCORED = 2000
"""Images by which starts are compared"""
ANGLE_PRIOR_SD = math.pi
EDGE_PX = 3.0
"""Width of the edges that the decoder's first layer draws before training."""
_ROWS_AT_ONCE = 65_536
"""Pixels decoded at a time outside training; bounds the memory."""


def mean_free_kl(log_sd: Tensor, prior_sd: float) -> Tensor:
    """The same from N(·, prior_sd²) with a uniform prior on the mean, elementwise."""
    return -log_sd + math.log(prior_sd) + 0.5 * (torch.exp(2 * log_sd) / prior_sd**2 - 1)


class CoordinateDecoder(nn.Module):
    """One MLP for all pixels: coordinates and content in, channels out.

    Its first layer is split: the coordinate half is linear in the pose, so pose and content enter as one
    2 × hidden matrix and one hidden vector per image.
    """

    def __init__(self, latent_dim: int, hidden: int, layers: int, n_channels: int, edge: float) -> None:
        super().__init__()
        self.coordinates = nn.Linear(2, hidden)
        self.content = nn.Linear(latent_dim, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, n_channels)
        with torch.no_grad():
            # ridges of width `edge` (half-images), their places spread over the image
            direction = torch.randn(hidden, 2)
            direction /= direction.norm(dim=1, keepdim=True)
            self.coordinates.weight.copy_(direction / edge * torch.rand(hidden, 1))
            self.coordinates.bias.copy_((2 * torch.rand(hidden) - 1) * self.coordinates.weight.norm(dim=1))

    def forward(self, pixels: Tensor, angle: Tensor, move: Tensor, z: Tensor) -> Tensor:
        """Channels `(b, p, c)` at pixels `(b, p, 2)` of images turned by `angle` and then moved by `move`.

        Coordinates and moves `(b, 2)` are (x, y) in half-images, y up; z `(b, d)`.
        """
        dtype = pixels.dtype
        if torch.is_autocast_enabled(pixels.device.type):
            dtype = torch.get_autocast_dtype(pixels.device.type)
        with exact(pixels.device):
            weight = self.coordinates.weight.T
            # the paper's x' = x R(theta) + dx with row vectors and y up, its R the transpose of ours
            placed = rotation_matrix(angle).mT @ weight
            offset = -(move[:, None] @ placed)[:, 0] + self.coordinates.bias + self.content(z)
            first = torch.baddbmm(offset[:, None], pixels, placed).to(dtype)
        h = torch.tanh(first)
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        return self.out(h)


class SpatialVAE(ParticleModel):
    """See the module; latent order of the encoder: angle, shift (x, y), content; means, then log sds."""

    disc: Tensor
    """`(p,)` positions, in the flattened image, of the pixels that count."""
    pixels: Tensor
    """`(n * n, 2)` coordinates (x, y) of all pixels: half-images about pixel `n // 2`, y up."""

    _half_image_yx: Tensor
    """`(2,)` what our shifts (y, x) in px are multiplied with to become coordinates."""

    autocast = True
    learning_rate = 1e-3
    batch_size = 32

    def __init__(self, config: SpatialVAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.settings = config
        self.latent_dim = config.latent_dim
        self.noise = PixelNoise(config.likelihood, data.n_channels, non_negative=config.non_negative)
        self.n_epochs = min(400, max(10, round(IMAGES_IN_A_FIT / data.n_particles)))
        n = data.box_px
        self.shift_sd_px = config.shift_sd_px or 0.05 * n
        reach = 2 * self.shift_sd_px if config.infer_shift else 0.0
        self.radius_px = min(n / 2, data.diameter_px / 2 + reach)
        line = torch.arange(n) - n // 2
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("disc", disc_pixels(n, self.radius_px), persistent=False)
        units = torch.stack([x, -y], -1).reshape(-1, 2) * (2 / (n - 1))
        self.register_buffer("pixels", units, persistent=False)
        scale = torch.tensor([-1.0, 1.0]) * (2 / (n - 1))
        self.register_buffer("_half_image_yx", scale, persistent=False)
        self.n_pose = 3 if config.infer_shift else 1
        self.encoder, self.decoder = self._networks()
        self.uses_ctf = config.apply_ctf
        if config.apply_ctf and config.likelihood == "bernoulli":
            raise UserError(
                "--model.apply-ctf does not go with --model.likelihood bernoulli: grey values from 0 to 1"
                " have no CTF; choose gaussian"
            )
        drawn = len(self.disc) * (1 if config.apply_ctf else config.pixel_fraction)
        self.step_bytes_per_image = round(4 * drawn * config.hidden * 2 * (config.layers + 1))
        self.content_frozen = self.shift_frozen = False
        self.chosen = False
        """Whether pose was learned from several starts already, the shift with it"""
        self.is_warm = False
        self.schedule(0.0, 0)

    def _networks(self) -> tuple[nn.Sequential, CoordinateDecoder]:
        """Encoder and decoder with new random weights."""
        config = self.settings
        widths = [len(self.disc) * self.data.n_channels] + [config.hidden] * config.layers
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.Tanh()]
        n_out = 2 * (self.n_pose + config.latent_dim)
        edge = EDGE_PX * 2 / (self.data.box_px - 1)
        return (
            nn.Sequential(*layers, nn.Linear(widths[-1], n_out)),
            CoordinateDecoder(config.latent_dim, config.hidden, config.layers, self.noise.n_drawn, edge=edge),
        )

    def start(self, batches: Batches) -> Iterator[Step]:
        """Learn pose alone from several random starts, and go on with that of the best evidence bound."""
        yield from self.noise.check(batches)
        n, n_starts = len(batches), self.settings.starts
        if n_starts == 1:
            return
        size = min(self.batch_size, n)
        n_steps = max(1, min(TRIAL_IMAGES, TRIAL_EPOCHS * n) // size)
        scored = torch.randperm(n)[:TRIAL_SCORED].split(TRIAL_SCORED // 8)
        at_once = images_at_once(self.step_bytes_per_image, TRIAL_SCORED // 8, self.disc.device)
        best, weights = math.inf, self.state_dict()
        for trial in range(n_starts):
            if trial:
                # into the same parameters: optimisers hold them already
                for network, drawn in zip((self.encoder, self.decoder), self._networks(), strict=True):
                    network.load_state_dict(drawn.state_dict())
            optimiser = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
            self.content_frozen = True
            for step in range(n_steps):
                self.shift_frozen = 2 * step < n_steps
                optimiser.zero_grad(set_to_none=True)
                for batch, weight in self.in_parts(batches, torch.randint(n, (size,)), at_once):
                    with autocast(self, batch.images.device, self.precision):
                        losses = self(batch)
                    (torch.stack([loss.float() for loss in losses.values()]).sum() * weight).backward()
                optimiser.step()
                if step % 10 == 0:
                    done = (trial * n_steps + step) / (n_starts * n_steps)
                    yield Step(f"learning pose, start {trial + 1} of {n_starts}", done)
            with torch.no_grad(), fast_products(self.precision):
                bounds = [self._bound(batches, some, at_once) for some in scored]
            bound = float(torch.stack(bounds).mean())
            if bound < best:
                best, weights = bound, {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(weights)
        self.chosen = True

    def _bound(self, batches: Batches, index: Tensor, at_once: int) -> Tensor:
        """The negative evidence bound per image, of these images together."""
        parts = self.in_parts(batches, index, at_once)
        return torch.stack(
            [torch.stack(list(self(part).values())).sum() * weight for part, weight in parts]
        ).sum()

    def training_state(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.chosen = bool(state.get("chosen", False))

    def skip_warm_up(self) -> None:
        self.is_warm = self.chosen = True

    def schedule(self, fraction: float, epoch: int) -> None:
        """Hold the content at zero in the first epochs, so that pose is learned first, angle before shift.

        Learned at once, angle and shift end with the molecule drawn over its own half-turned copy.
        """
        n_frozen = 0 if self.is_warm else self.settings.content_freeze_epochs
        share = FREEZE_SHARE if n_frozen else 0.0
        self.content_frozen = epoch < n_frozen or fraction < share
        self.shift_frozen = not self.chosen and (2 * epoch < n_frozen or 2 * fraction < share)

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and log deviations `(b, pose + d)`; shifts in units of their prior."""
        seen = images.flatten(2)[:, :, self.disc].flatten(1)
        mean, log_sd = self.encoder(seen).float().chunk(2, 1)
        return mean, log_sd

    def _turned(self, images: Tensor, turn: Tensor) -> Tensor:
        with exact(images.device):
            return place(images, turn, mode="bicubic")

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """The negative evidence bound per image, in its four terms (nats)."""
        images = batch.images
        turn = torch.zeros(len(images), device=images.device)
        if self.settings.augment_rotation:
            turn = self.drawn(torch.rand, len(images), device=images.device) * (2 * math.pi)
            mean, log_sd = self.infer(self._turned(images, turn))
        else:
            mean, log_sd = self.infer(images)
        sample = mean + torch.exp(log_sd) * self.normal_like(mean)
        angle = sample[:, 0] - turn  # the turned image stands at angle + turn
        move, z = self._move(sample, turn), sample[:, self.n_pose :]
        if self.shift_frozen:
            move = move * 0
        if self.content_frozen:
            z = z * 0
        losses = {
            "reconstruction": self._reconstruction(batch, angle, move, z),
            "kl_angle": mean_free_kl(log_sd[:, 0], ANGLE_PRIOR_SD).mean(),
            "kl_content": gaussian_kl(mean[:, self.n_pose :], log_sd[:, self.n_pose :]).sum(1).mean(),
        }
        if self.settings.infer_shift:
            losses["kl_shift"] = gaussian_kl(mean[:, 1:3], log_sd[:, 1:3]).sum(1).mean()
        return losses

    def _move(self, latents: Tensor, turn: Tensor) -> Tensor:
        """Shifts in the latents of images turned by `turn` → moves of the unturned ones, in half-images."""
        if not self.settings.infer_shift:
            return latents.new_zeros(len(latents), 2)
        with exact(latents.device):
            move = (latents[:, None, 1:3] @ rotation_matrix(turn).mT)[:, 0]
        return move * (self.shift_sd_px * 2 / (self.data.box_px - 1))

    def _reconstruction(self, batch: Batch, angle: Tensor, move: Tensor, z: Tensor) -> Tensor:
        """Minus the log-likelihood over the disc, estimated from a share of its pixels, per image."""
        images = batch.images
        seen_through = self.uses_ctf and batch.ctf is not None  # each pixel then takes all the others
        share = 1.0 if seen_through else self.settings.pixel_fraction
        chosen = random_pixels(self.disc, len(images), share, self.drawn)
        target = images.flatten(2).gather(2, chosen[:, None].expand(-1, images.shape[1], -1)).mT
        drawn = self.decoder(self.pixels[chosen], angle, move, z)
        if seen_through:
            loss = self.noise.of_mean(self._through_ctf(self.noise.mean(drawn), batch.ctf), drawn, target)
        else:
            loss = self.noise(drawn, target)
        return loss.sum((1, 2)).mean() * (len(self.disc) / chosen.shape[1])

    def _through_ctf(self, mean: Tensor, ctf: Tensor | None) -> Tensor:
        """Pixels `(b, p, c)` of the disc as the microscope shows them; nothing is outside the disc."""
        assert ctf is not None
        n = self.data.box_px
        with exact(mean.device):
            planes = mean.new_zeros(len(mean), mean.shape[2], n * n)
            planes = planes.index_copy(2, self.disc, mean.mT).unflatten(2, (n, n))
            seen = torch.fft.irfft2(torch.fft.rfft2(planes) * ctf[:, None], s=(n, n))
            return seen.flatten(2)[:, :, self.disc].mT

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        """Posterior means; with turned training, averaged over turned copies of each image."""
        n_turns = TURNS if self.settings.augment_rotation else 1
        angles, moves, zs, stds = [], [], [], []
        for i in range(n_turns):
            turn = torch.full((len(batch.images),), 2 * math.pi * i / n_turns, device=batch.images.device)
            mean, log_sd = self.infer(self._turned(batch.images, turn) if i else batch.images)
            angles.append(mean[:, 0] - turn)
            moves.append(self._move(mean, turn))
            zs.append(mean[:, self.n_pose :])
            stds.append(torch.exp(log_sd))
        each = torch.stack(angles)
        cos, sin = torch.cos(each).mean(0), torch.sin(each).mean(0)
        angle, std = torch.atan2(sin, cos), torch.stack(stds).mean(0)
        shift, extras = None, {"angle_std": std[:, 0]}
        if self.settings.infer_shift:
            shift = torch.stack(moves).mean(0).flip(-1) / self._half_image_yx
            extras["shift_std"] = std[:, 1:3].mean(1) * self.shift_sd_px
        return Encoding(torch.stack(zs).mean(0), std[:, self.n_pose :], angle, shift, extras)

    @torch.no_grad()
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`(b, d)` → `(b, c, n, n)` at our pose; zero outside the disc that was trained, with a soft edge."""
        n, b = self.data.box_px, len(z)
        angle = torch.zeros(b, device=z.device) if angle is None else angle
        shift = torch.zeros(b, 2, device=z.device) if shift is None else shift
        move = (shift * self._half_image_yx).flip(-1)
        with exact(z.device):
            canonical = (self.pixels - move[:, None]) @ rotation_matrix(angle).mT
        radius = canonical.norm(dim=-1) * ((n - 1) / 2)
        window = (0.5 + (self.radius_px - 1 - radius) / 2).clamp(0, 1)
        images = torch.zeros(b, n * n, self.data.n_channels, device=z.device)
        wanted = torch.nonzero((window > 0).any(0))[:, 0]
        per_block = max(1, _ROWS_AT_ONCE // max(1, len(wanted)))
        for first in range(0, b, per_block):
            part = slice(first, first + per_block)
            pixels = self.pixels[wanted].expand(len(z[part]), -1, -1)
            mean = self.noise.mean(self.decoder(pixels, angle[part], move[part], z[part]))
            images[part, wanted] = mean * window[part][:, wanted, None]
        return images.mT.reshape(b, self.data.n_channels, n, n)
