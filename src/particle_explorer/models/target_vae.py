"""TARGET-VAE: Nasiri & Bepler, NeurIPS 2022 (`SMLC-NYSBC/TARGET-VAE`).

A group-convolutional encoder gives every angle and shift of a grid a probability, an offset of the angle
and a content; a decoder MLP, shared by all pixels, draws the image from random Fourier features of the
coordinates that the pose gives each pixel. The objective is the paper's evidence bound: angle and shift are
a categorical variable over the grid, the offset and the content are Gaussian in each of its cells. In
training a soft Gumbel-softmax of temperature 1 weighs the cells.

Where we differ from the published code:

- kernels are band-limited functions on a disc, turned exactly (`layers.LiftingConvolution`), so that no angle
  of the grid is worth more than another; the grid of shifts is a disc too;
- the rotation centre is pixel `n // 2`, as in cryo-EM files, instead of the middle of the box;
- the prior of the shift is a setting in pixels, and the grid reaches as far as it (the code fixes 0.1 of half
  the box and takes the grid from the sizes of kernel and padding);
- a Gaussian prior of angles (`angle_sd_deg`) is wrapped and is that of the angle as a whole: it is in the
  offset within each turn too (the code has it in the turns alone, which widens it by the offset's);
- angles are averaged as unit vectors;
- only pixels inside the particle's disc count, and each step draws a random share of them (rescaled: the
  gradient stays unbiased);
- reported numbers carry no noise: angle, shift and content are means over the cells about the most probable
  one, so a second mode far away does not move them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import DataSpec, TargetVAEConfig
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.layers import (
    LiftingConvolution,
    PixelNoise,
    disc_pixels,
    exact,
    exponential,
    gaussian_kl,
    random_pixels,
)
from particle_explorer.transforms import rotation_matrix

IMAGES_IN_A_FIT = 800_000
"""Images, counted as often as they are seen, that the default number of epochs comes to."""
NEAR_PX, NEAR_TURNS = 2.5, 1
"""The mode that is reported: shifts and turns of the grid this near to the most probable one."""
SLOPE = 0.01
"""Of the LeakyReLUs on their negative side."""
_ROWS_AT_ONCE = 65_536
"""Pixels decoded at a time outside training; bounds the memory."""
_CELLS_AT_ONCE = 400_000
"""Cells of the grid encoded at a time outside training."""


def angle_prior(n_turns: int, sd: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities `(r,)` of the turns; mean and sd (rad) of the offset from each.

    A turn is a Gaussian window of π / r about its angle, and windows overlap to the same height everywhere.
    So of an angle from the wrapped N(0, sd²) Bayes' rule says which turn it is in, and where in it.
    An sd of 0 stands for a uniform prior.
    """
    window = math.pi / n_turns
    if not sd:
        return torch.zeros(n_turns), torch.zeros(n_turns), torch.full((n_turns,), window)
    around = 2 * math.pi * torch.arange(-2, 3, dtype=torch.float64)
    at = 2 * math.pi / n_turns * torch.arange(n_turns, dtype=torch.float64)[:, None] + around
    both = sd**2 + window**2
    log_p = -at.square() / (2 * both)
    means = -at * (window**2 / both)
    share = log_p.softmax(1)  # the turn at π is reached either way round
    mean = (share * means).sum(1)
    variance = (sd * window) ** 2 / both + (share * (means - mean[:, None]).square()).sum(1)
    log_p = log_p.logsumexp(1)
    return (log_p - log_p.logsumexp(0)).float(), mean.float(), variance.sqrt().float()


class Posterior(nn.Module):
    """The encoder: `(b, c, n, n)` → a logit, angle offset, contents and log deviations of each cell."""

    def __init__(self, lifting: LiftingConvolution, n_kernels: int, latent_dim: int) -> None:
        super().__init__()
        self.lifting = lifting
        self.mix = nn.Linear(n_kernels, n_kernels)
        self.heads = nn.Linear(n_kernels, 3 + 2 * latent_dim)

    def forward(self, images: Tensor) -> Tensor:
        """`(b, s, r, 3 + 2 d)`: logit, offset, content; log sd of offset, of content."""
        h = functional.leaky_relu_(self.lifting(images), SLOPE)
        h = functional.leaky_relu_(self.mix(h), SLOPE)
        heads: Tensor = self.heads(h)
        return heads.float()


class FourierDecoder(nn.Module):
    """One MLP for all pixels: random Fourier features of coordinates (px) and content in, channels out."""

    waves: Tensor
    """`(2, f)` in rad per px, (x, y)"""
    phases: Tensor

    def __init__(self, latent_dim: int, features: int, hidden: int, layers: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(2, features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.coordinates = nn.Linear(features, hidden)
        self.content = nn.Linear(latent_dim, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, n_out)

    def forward(self, pixels: Tensor, angle: Tensor, shift: Tensor, z: Tensor) -> Tensor:
        """Channels `(b, p, c)` at pixels `(b, p, 2)` (x, y) of images placed by `angle` and `shift`.

        Shifts `(b, 2)` are (x, y) px here; z `(b, d)`.
        """
        dtype = pixels.dtype
        if torch.is_autocast_enabled(pixels.device.type):
            dtype = torch.get_autocast_dtype(pixels.device.type)
        with exact(pixels.device):
            # canonical = R(-angle) (pixel - shift): turning the pixel is turning the waves back
            turned = rotation_matrix(angle) @ self.waves
            offset = self.phases - (shift[:, None] @ turned)[:, 0]
            features = torch.cos(torch.baddbmm(offset[:, None], pixels, turned)).to(dtype)
        h = functional.leaky_relu(self.coordinates(features) + self.content(z)[:, None], SLOPE)
        for layer in self.hidden:
            h = functional.leaky_relu_(layer(h), SLOPE)
        return self.out(h)


class TargetVAE(ParticleModel):
    """See the module."""

    disc: Tensor
    """`(p,)` positions, in the flattened image, of the pixels that count"""
    pixels: Tensor
    """`(n * n, 2)` coordinates (x, y) of all pixels in px about pixel `n // 2`"""
    log_prior: Tensor
    """`(s, r)` of the cells of the grid"""
    offset_mean: Tensor
    """`(r,)` of the prior of the angle within each turn, rad"""
    offset_sd: Tensor

    autocast = True
    learning_rate = 1e-3
    batch_size = 64

    def __init__(self, config: TargetVAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.settings = config
        self.latent_dim = config.latent_dim
        self.n_epochs = min(400, max(10, round(IMAGES_IN_A_FIT / data.n_particles)))
        n = data.box_px
        self.n_turns = int(config.rotations[1:])
        self.shift_sd_px = config.shift_sd_px or 0.05 * n
        reach = config.shift_range_px or math.ceil(3 * self.shift_sd_px)
        if config.kernel_px > n:
            raise UserError(
                f"--model.kernel-px {config.kernel_px}: the images have {n} px; choose a kernel of at most"
                f" {n} px, or 0 for the particle diameter"
            )
        if reach > n // 2:
            raise UserError(
                f"--model.shift-range-px {reach}: in images of {n} px shifts go up to {n // 2} px; choose a"
                " smaller range or spread of shifts"
            )
        kernel = config.kernel_px or min(n, max(3, math.ceil(data.diameter_px)))
        self.radius_px = min(n / 2, data.diameter_px / 2 + 2 * self.shift_sd_px)
        self.register_buffer("disc", disc_pixels(n, self.radius_px), persistent=False)
        line = torch.arange(n) - n // 2
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("pixels", torch.stack([x, y], -1).reshape(-1, 2).float(), persistent=False)
        self.noise = PixelNoise(config.likelihood, data.n_channels)
        lifting = LiftingConvolution(
            n, data.n_channels, config.channels, kernel, self.n_turns, reach, config.kernel_functions
        )
        self.encoder = Posterior(lifting, config.channels, config.latent_dim)
        self.decoder = FourierDecoder(
            config.latent_dim, config.features, config.hidden, config.layers, self.noise.n_drawn
        )
        log_prior = -lifting.shifts.square().sum(1) / (2 * self.shift_sd_px**2)
        log_turns, offset_mean, offset_sd = angle_prior(self.n_turns, math.radians(config.angle_sd_deg))
        log_prior = log_prior[:, None] + log_turns
        log_prior = log_prior - log_prior.logsumexp((0, 1))
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.register_buffer("offset_mean", offset_mean, persistent=False)
        self.register_buffer("offset_sd", offset_sd, persistent=False)
        cells = self.log_prior.numel()
        drawn = math.ceil(config.pixel_fraction * len(self.disc))
        # what the backward pass keeps in float32, its own copies, and the responses
        self.step_bytes_per_image = 4 * (
            cells * (4 * config.channels + 12 * (2 + config.latent_dim))
            + 2 * len(lifting.shifts) * lifting.n_functions * data.n_channels
            + drawn * (4 * config.features + 3 * config.hidden * (config.layers + 1))
        )

    def start(self, batches: Batches) -> Iterator[Step]:
        yield from self.noise.check(batches)

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(b, s, r)` log q(t, r); `(b, s, r, 1 + d)` means, log deviations of angle offset and content."""
        heads = self.encoder(images)
        logits = heads[..., 0] + self.log_prior
        log_q = logits - logits.logsumexp((1, 2), keepdim=True)
        mean, log_sd = heads[..., 1:].chunk(2, -1)
        return log_q, mean, log_sd

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """The negative evidence bound per image, in its terms (nats)."""
        images = batch.images
        log_q, mean, log_sd = self.infer(images)
        q = log_q.exp()
        gumbel = -self.drawn(exponential, *log_q.shape, device=log_q.device).log()
        weight = (log_q + gumbel).flatten(1).softmax(1).unflatten(1, log_q.shape[1:])
        with exact(images.device):
            angle, shift, latents = self._weighed(weight, mean)
            sd = torch.einsum("bsr,bsrd->bd", weight, log_sd.exp())
        noise = sd * self.normal_like(sd)
        angle, z = angle + noise[:, 0], latents + noise[:, 1:]
        off = (mean[..., 0] - self.offset_mean) / self.offset_sd
        offset_kl = gaussian_kl(off, log_sd[..., 0] - self.offset_sd.log())
        content_kl = gaussian_kl(mean[..., 1:], log_sd[..., 1:]).sum(-1)
        return {
            "reconstruction": self._reconstruction(images, angle, shift, z),
            "kl_pose": (q * (log_q - self.log_prior)).sum((1, 2)).mean(),
            "kl_angle": (q * offset_kl).sum((1, 2)).mean(),
            "kl_content": (q * content_kl).sum((1, 2)).mean(),
        }

    def _weighed(self, weight: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Angle `(b,)`, shift (x, y) `(b, 2)` and content `(b, d)` as means over the cells."""
        each = self.encoder.lifting.angles + mean[..., 0]
        sin, cos = ((weight * part).sum((1, 2)) for part in (each.sin(), each.cos()))
        shift = weight.sum(2) @ self.encoder.lifting.shifts.flip(-1).float()
        return torch.atan2(sin, cos + 1e-9), shift, torch.einsum("bsr,bsrd->bd", weight, mean[..., 1:])

    def _reconstruction(self, images: Tensor, angle: Tensor, shift: Tensor, z: Tensor) -> Tensor:
        """Minus the log-likelihood over the disc, estimated from a share of its pixels, per image."""
        chosen = random_pixels(self.disc, len(images), self.settings.pixel_fraction, self.drawn)
        target = images.flatten(2).gather(2, chosen[:, None].expand(-1, images.shape[1], -1)).mT
        drawn = self.decoder(self.pixels[chosen], angle, shift, z)
        return self.noise(drawn, target).sum((1, 2)).mean() * (len(self.disc) / chosen.shape[1])

    @torch.no_grad()
    def pose_posterior(self, batch: Batch) -> Tensor:
        """q(t, r) `(b, r, m, m)`: the probability of every turn 2 pi r / R and shift (y, x), as images.

        Row and column m // 2 are no shift; cells that are not weighed (outside the range) are 0.
        """
        lifting = self.encoder.lifting
        reach = lifting.shift_range_px
        side = 2 * reach + 1
        q = torch.cat([log_q.exp() for log_q, _, _ in self._inferred(batch.images)])
        image = q.new_zeros(len(q), self.n_turns, side * side)
        at = lifting.shifts + reach
        image[:, :, at[:, 0] * side + at[:, 1]] = q.mT
        return image.unflatten(2, (side, side))

    def _inferred(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`infer` in parts that fit into memory."""
        at_once = max(1, _CELLS_AT_ONCE // self.log_prior.numel())
        for some in images.split(at_once):
            yield self.infer(some)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        """Means over the cells about the most probable one, without noise."""
        parts = []
        for inferred in self._inferred(batch.images):
            with exact(batch.images.device):
                parts.append(self._reported(*inferred))
        z, z_std, angle, shift, angle_std, shift_std, entropy = (
            torch.cat(values) for values in zip(*parts, strict=True)
        )
        extras = {"angle_std": angle_std, "shift_std": shift_std, "pose_entropy": entropy}
        return Encoding(z, z_std, angle, shift, extras)

    def _reported(self, log_q: Tensor, mean: Tensor, log_sd: Tensor) -> tuple[Tensor, ...]:
        lifting = self.encoder.lifting
        best = log_q.flatten(1).argmax(1)
        at_shift, at_turn = best // self.n_turns, best % self.n_turns
        apart = lifting.shifts[at_shift][:, None] - lifting.shifts
        turns = (torch.arange(self.n_turns, device=best.device) - at_turn[:, None]).remainder(self.n_turns)
        turns = torch.minimum(turns, self.n_turns - turns)
        near = (apart.square().sum(-1) <= NEAR_PX**2)[:, :, None] & (turns <= NEAR_TURNS)[:, None]
        weight = log_q.masked_fill(~near, -torch.inf).flatten(1).softmax(1).unflatten(1, log_q.shape[1:])
        angle, shift, z = self._weighed(weight, mean)
        variance = torch.einsum("bsr,bsrd->bd", weight, (2 * log_sd).exp())
        spread = torch.einsum("bsr,bsrd->bd", weight, (mean[..., 1:] - z[:, None, None]).square())
        off = lifting.angles + mean[..., 0] - angle[:, None, None]
        off = torch.atan2(off.sin(), off.cos()).square()
        angle_std = ((weight * off).sum((1, 2)) + variance[:, 0]).sqrt()
        away = (lifting.shifts.flip(-1) - shift[:, None]).square().sum(-1) / 2  # per axis
        shift_std = (weight.sum(2) * away).sum(1).sqrt()
        entropy = -(log_q.exp() * log_q).sum((1, 2))
        return z, (variance[:, 1:] + spread).sqrt(), angle, shift.flip(-1), angle_std, shift_std, entropy

    @torch.no_grad()
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`(b, d)` → `(b, c, n, n)` at our pose; zero outside the disc that was trained, with a soft edge."""
        n, b = self.data.box_px, len(z)
        angle = torch.zeros(b, device=z.device) if angle is None else angle
        move = torch.zeros(b, 2, device=z.device) if shift is None else shift.flip(-1)
        radius = (self.pixels - move[:, None]).norm(dim=-1)
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
