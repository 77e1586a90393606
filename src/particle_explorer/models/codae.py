"""CODAE: Cha, Park, Pinilla, Morris, Allen, Wilkinson & Thiyagalingam, Nat. Mach. Intell. 7, 307-314 (2025).

As published: a group-equivariant trunk splits into a branch of fully connected layers on the maps that
are not pooled, which finds centroid and orientation, and a branch behind a group max-pooling, which finds
everything else. A decoder draws the aligned image from the second alone; shift and turn are applied to its
output only, which gives the exact view. Content passes the Euler encoding of the authors' earlier work (Cha
& Thiyagalingam, ICML 2023). A loss on image moments leads the pose at first; its weight is reduced.

Our own choices, because neither text nor code states them (docs/decisions.md has the ablations):

- the group is C8; layers, widths and strides below; no normalisation, which would take brightness away;
- fully connected layers of the pose branch are tied by the group: a turned image gives a turned answer. The
  angle is one of the group's angles, chosen by a score each, plus an offset within its sector. A vector
  would vanish on particles with a symmetry;
- training draws the aligned image at all angles of the group; their likelihoods teach the scores, and the
  gradient of the reconstruction takes one of them, drawn by its posterior. This also settles the half turn
  that second moments leave open, and angles of particles whose second moments are round;
- the moments are those of the low-passed image above its background, beside the *predicted pose*; the
  angle's term counts by the anisotropy; the weight falls linearly;
- max and mean over the plane follow the max over the group, so that content does not move with the particle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import CODAEConfig, DataSpec
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.group_convolution import (
    GroupConvolution,
    GroupLinear,
    about_middle,
    directions,
)
from particle_explorer.models.layers import SmoothDecoder
from particle_explorer.transforms import place, soft_disc

IMAGES_IN_A_FIT = 400_000
"""Images, counted as often as they are seen, that the default number of epochs comes to."""
SMALLEST_MAP_PX = 9
"""Maps are halved until they are no larger than this."""
N_POWER = 512
"""Particles from which the power of the signal is estimated."""
SPAN = 0.01
"""Part of a turn that a content coordinate spans at the start."""
MOMENTUM = 0.99
_LEAST_RANGE = 1e-2
"""Least range of a content coordinate that is stretched: one particle has none."""
_EPS = 1e-6


class EulerEncoding(nn.Module):
    """Content coordinates `(b, d)` → points on d circles `(b, 2 d)`: stretch, noise, cosine and sine.

    The stretch brings each coordinate to 0 … 1 over the batch (running values outside training), times a
    learned span in turns. In training each particle is moved by noise with the standard deviation of the
    distance to its nearest neighbour in the batch.
    """

    low: Tensor
    range: Tensor
    importance: Tensor
    seen: Tensor

    def __init__(self, d: int, importance: float) -> None:
        super().__init__()
        self.span = nn.Parameter(torch.full((d,), SPAN))
        self.middle = nn.Parameter(torch.full((d,), 0.5))
        self.register_buffer("importance", importance ** torch.arange(d).float(), persistent=False)
        self.register_buffer("low", torch.zeros(d))
        self.register_buffer("range", torch.ones(d))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def stretch(self, raw: Tensor, *, follow: bool = True) -> Tensor:
        """`(b, d)` network outputs → turns from the middle; running values `follow` a batch once."""
        raw = raw.float()
        if self.training:
            low, span = self._reach(raw)
            if follow:
                self.follow(raw)
        else:
            low, span = self.low, self.range
        return ((raw - low) / span - 0.5) * self.span * self.importance

    def _reach(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        low = raw.amin(0)
        return low, (raw.amax(0) - low).clamp_min(_LEAST_RANGE)

    @torch.no_grad()
    def follow(self, raw: Tensor) -> None:
        """Move the running range towards that of a batch."""
        low, span = self._reach(raw.float())
        keep = MOMENTUM if self.seen else 0.0
        self.low.lerp_(low, 1 - keep)
        self.range.lerp_(span, 1 - keep)
        self.seen += 1

    @torch.no_grad()
    def noise(self, turns: Tensor) -> Tensor:
        """Normal noise, its standard deviation the distance to the nearest other value in the batch."""
        if len(turns) < 2:
            return torch.zeros_like(turns)
        ordered, order = turns.sort(0)
        other, edge = ordered.diff(dim=0) > 0, torch.full_like(ordered[:1], torch.inf)
        # the next value that is another one, upwards and downwards
        above = torch.cat([torch.where(other, ordered[1:], torch.inf), edge])
        below = torch.cat([-edge, torch.where(other, ordered[:-1], -torch.inf)])
        above, below = above.flip(0).cummin(0).values.flip(0), below.cummax(0).values
        nearest = torch.minimum(above - ordered, ordered - below)
        nearest = torch.where(nearest.isfinite(), nearest, 0.0)
        return torch.empty_like(turns).scatter_(0, order, nearest) * torch.randn_like(turns)

    def forward(self, turns: Tensor) -> Tensor:
        angle = 2 * math.pi * (turns + self.middle)
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(1)


class _Ahead(NamedTuple):
    """Of a batch that is taken in parts."""

    content: Tensor
    """`(b, d)` raw, without gradient"""
    row: Tensor
    """`(e,)` where the lowest and the highest of each coordinate are"""
    images: Tensor
    """`(e, c, n, n)` of those, which the range has its gradient from"""


class CODAE(ParticleModel):
    """See the module."""

    autocast = True
    learning_rate = 1e-3
    batch_size = 64

    unit: Tensor
    angles: Tensor
    power: Tensor
    disc: Tensor
    blur: Tensor

    def __init__(self, config: CODAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.settings = config
        self.latent_dim = d = config.latent_dim
        self.n_epochs = min(400, max(10, round(IMAGES_IN_A_FIT / data.n_particles)))
        n, r, w = data.box_px, config.group_order, config.width
        side = n + 1 - n % 2
        layers: list[GroupConvolution] = [
            GroupConvolution(data.n_channels, w, 7, r, lifting=True, stride=2),
            GroupConvolution(w, w, 5, r),
            GroupConvolution(w, 2 * w, 5, r),
            GroupConvolution(2 * w, 2 * w, 5, r),
        ]
        side = _halved(side)
        while (side - 1) // 2 ** (len(layers) - 1) > SMALLEST_MAP_PX:
            layers.append(GroupConvolution(2 * w, 2 * w, 5, r))
        for layer in layers[1:]:
            if side > SMALLEST_MAP_PX:
                layer.stride, side = 2, _halved(side)
        self.trunk = nn.ModuleList(layers)
        # fully connected over plane and group, tied by the group
        self.pose_plane = GroupConvolution(2 * w, 4 * w, side, r, padding=0)
        self.pose_pooled = GroupLinear(4 * w, 4 * w, r)
        self.pose = nn.Sequential(GroupLinear(4 * w, 4 * w, r), nn.SiLU(), GroupLinear(4 * w, 4, r))
        self.content = nn.Sequential(nn.Linear(4 * w, 128), nn.SiLU(), nn.Linear(128, d, bias=False))
        self.euler = EulerEncoding(d, config.importance) if config.euler_encoding else None
        self.decoder = SmoothDecoder(2 * d if self.euler else d, data.n_channels, n, data.diameter_px / 2)
        self.register_buffer("unit", directions(r), persistent=False)
        self.register_buffer("angles", 2 * math.pi / r * torch.arange(r), persistent=False)
        self.register_buffer("disc", soft_disc(n, n / 2 - 2), persistent=False)
        sigma = max(1.0, n / 32)
        reach = math.ceil(2.5 * sigma)
        blur = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        self.register_buffer("blur", blur / blur.sum(), persistent=False)
        self.register_buffer("power", torch.tensor(float(n)))
        # measured at 64 to 255 px: the encoder, and a view at each angle of the group
        self.step_bytes_per_image = 4 * n * n * (80 + 2 * w + 13 * r + 18 * data.n_channels)
        self._ahead: _Ahead | None = None
        self.moment_weight = 0.0
        self.is_warm = False
        self.schedule(0.0, 0)

    def start(self, batches: Batches) -> Iterator[Step]:
        """Estimate the power of the signal, the unit of the reconstruction's error."""
        yield Step("looking at the images", 0.0)
        spread = torch.linspace(0, len(batches) - 1, min(len(batches), N_POWER)).round().long()
        smooth = self._low_pass(batches.take(spread).images)
        self.power.copy_(smooth.square().sum((1, 2, 3)).mean().clamp_min(_EPS))

    def skip_warm_up(self) -> None:
        self.is_warm = True  # pose is found already: the moments would only pull at it

    def schedule(self, fraction: float, epoch: int) -> None:
        """Reduce the weight of the moments."""
        share = 0.0 if self.is_warm else self.settings.moment_share
        left = max(0.0, 1 - fraction / share) if share else 0.0
        self.moment_weight = self.settings.moment_weight * left

    # -- the encoder

    def features(self, images: Tensor) -> Tensor:
        """`(b, c, n, n)` → equivariant maps `(b, 2 w, r, m, m)` about the middle pixel."""
        maps = about_middle(images)[:, :, None]
        for layer in self.trunk:
            if layer.stride == 2:
                maps = _smoothed(maps) if maps.shape[2] > 1 else maps
                maps = _centred(maps)
            maps = functional.silu(layer(maps))
        return maps

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score and angle (rad) per sector `(b, r)`, shift `(b, 2)` px yx, raw content `(b, d)`."""
        maps = self.features(images)
        pooled = torch.cat([maps.amax((-2, -1)), maps.mean((-2, -1))], 1)
        hidden = functional.silu(self.pose_plane(maps)[..., 0, 0] + self.pose_pooled(pooled))
        score, offset, *at = self.pose(hidden).float().unbind(1)
        r = self.settings.group_order
        angle = self.angles + (math.pi / r) * offset
        # components along and across each direction of the group add up to a vector that turns along
        across = torch.stack([-self.unit[:, 1], self.unit[:, 0]], -1)
        xy = (at[0] @ self.unit + at[1] @ across) / self.settings.group_order
        # never out of the box, where nothing would bring it back
        length = xy.norm(dim=1, keepdim=True).clamp_min(_EPS)
        xy = xy * (torch.tanh(length) / length) * (self.data.box_px / 2)
        over_group = maps.amax(2)
        content = torch.cat([over_group.amax((-2, -1)), over_group.mean((-2, -1))], 1)
        return score, angle, xy.flip(-1), self.content(content).float()

    def coordinates(self, raw: Tensor) -> Tensor:
        """Raw content → the coordinates that are reported and drawn from, `(b, d)`."""
        return self.euler.stretch(raw) if self.euler else raw

    def aligned(self, z: Tensor) -> Tensor:
        """`(b, d)` → `(b, c, n, n)`: the aligned image."""
        code = self.euler(z) if self.euler else z
        return self.decoder(code).float()

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        score, angle, shift, raw = self.infer(batch.images)
        chosen = angle.gather(1, score.argmax(1, keepdim=True))[:, 0]
        log_p = score.log_softmax(1)
        extras = {"pose_entropy": -(log_p.exp() * log_p).sum(1)}
        return Encoding(self.coordinates(raw), None, chosen, shift, extras)

    @torch.no_grad()
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`(b, d)` → `(b, c, n, n)`: the aligned image, or, with a pose, the exact view."""
        image = self.aligned(z)
        return image if angle is None and shift is None else place(image, angle, shift)

    # -- losses

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        images = batch.images
        score, angle, shift, raw = self.infer(images)
        image = self.aligned(self._drawn_from(raw))
        log_p = score.log_softmax(1)
        with torch.no_grad():
            error = self._errors(images, image, angle, shift)
            posterior = (log_p - error).softmax(1)
            dice = self.drawn(torch.rand, len(images), 1, device=images.device)
            chosen = (posterior.cumsum(1) < dice).sum(1, keepdim=True).clamp_max(len(self.angles) - 1)
        view = place(image, angle.gather(1, chosen)[:, 0], shift)
        losses = {
            "reconstruction": 0.5 * (images - view).square().sum((1, 2, 3)).mean() / self.power,
            "turn": -(posterior * log_p).sum(1).mean(),
        }
        if self.settings.moment_weight and self.settings.moment_share:
            moments = (
                self._moment_loss(images, log_p, angle, shift) if self.moment_weight else log_p.new_zeros(())
            )
            losses["moments"] = self.moment_weight * moments
        return losses

    def _drawn_from(self, raw: Tensor) -> Tensor:
        """Coordinates `(b, d)` to draw from in training, in the range of the whole batch."""
        if self.euler is None:
            return raw
        if self._ahead is None or self.share is None:
            z = self.coordinates(self.gathered(raw))
            return self.own(z + self.euler.noise(z), len(raw))
        content, row, images = self._ahead
        first, end = self.share.first, self.share.first + len(raw)
        # the range is of particles in other parts too, and so is its gradient
        others = (row < first) | (row >= end)
        whole = torch.cat([content[:first], raw, content[end:]])
        if others.any():
            whole = whole.index_copy(0, row[others], self.infer(images[others])[3])
        z = self.euler.stretch(whole, follow=False)
        return (z + self.euler.noise(z))[first:end]

    @torch.no_grad()
    def look_ahead(self, parts: Iterable[Batch]) -> None:
        """Content of the whole batch, for its range."""
        self._ahead = None
        if self.euler is None:
            return
        seen = [(self.infer(part.images)[3], part.images) for part in parts]
        if seen:
            content = torch.cat([raw for raw, _ in seen])
            row = torch.cat([content.argmin(0), content.argmax(0)]).unique()
            every = torch.cat([images for _, images in seen])
            self._ahead = _Ahead(content, row, every[row])
            if self.training:
                self.euler.follow(content)

    def _moment_loss(self, images: Tensor, log_p: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
        centre, axis = self.moments(images)
        size = axis.norm(dim=1)[:, None]
        double = torch.stack([(2 * angle).cos(), (2 * angle).sin()], -1)
        away = (double * size[..., None] - axis[:, None]).square().sum(-1) / size.clamp_min(_EPS)
        off = ((shift - centre) / (self.data.diameter_px / 4)).square().sum(1)
        # the scores choose among sectors as they are, the nearest one moves; else all would leave theirs
        return (off + (log_p.exp() * away.detach()).sum(1) + away.amin(1)).mean()

    def _errors(self, images: Tensor, aligned: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
        """Half the squared error of the aligned image placed at each angle `(b, r)` of the group."""
        b, r = angle.shape
        views = place(aligned.repeat_interleave(r, 0), angle.flatten(), shift.repeat_interleave(r, 0))
        return 0.5 * (images[:, None] - views.unflatten(0, (b, r))).square().sum((2, 3, 4))

    def _low_pass(self, images: Tensor) -> Tensor:
        """The mean of the channels, blurred: `(b, 1, n, n)`."""
        mean, reach = images.mean(1, keepdim=True), len(self.blur) // 2
        rows = functional.conv2d(mean, self.blur[None, None, :, None], padding=(reach, 0))
        return functional.conv2d(rows, self.blur[None, None, None, :], padding=(0, reach))

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Centre of mass `(b, 2)` px yx from pixel n // 2, and the long axis `(b, 2)`.

        The axis is `e (cos 2 phi, sin 2 phi)`, with phi its angle and e the anisotropy, 0 (round) to 1.
        Mass is what the blurred image has above its background: the median and twice the spread about it.
        """
        with torch.autocast(images.device.type, enabled=False):
            n, smooth = self.data.box_px, self._low_pass(images.float())[:, 0]
            flat = smooth.flatten(1)
            median = flat.median(1, keepdim=True).values
            spread = 1.4826 * (flat - median).abs().median(1, keepdim=True).values
            mass = (smooth - (median + 2 * spread)[..., None]).clamp_min(0) * self.disc
            mass = mass / mass.sum((1, 2), keepdim=True).clamp_min(_EPS)
            at = torch.arange(n, device=images.device, dtype=mass.dtype) - n // 2
            y, x = mass.sum(2) @ at, mass.sum(1) @ at
            dy, dx = at[None, :, None] - y[:, None, None], at[None, None, :] - x[:, None, None]
            xx, yy = (mass * dx**2).sum((1, 2)), (mass * dy**2).sum((1, 2))
            axis = torch.stack([xx - yy, 2 * (mass * dx * dy).sum((1, 2))], 1)
            return torch.stack([y, x], 1), axis / (xx + yy).clamp_min(_EPS)[:, None]


def _halved(side: int) -> int:
    """Side of a map of odd side after `_centred` and a stride of 2."""
    half = (side - 1) // 2
    return half + 1 + half % 2


def _centred(maps: Tensor) -> Tensor:
    """Zeros around maps whose middle pixel a stride of 2 would miss."""
    return functional.pad(maps, (1, 1, 1, 1)) if (maps.shape[-1] - 1) // 2 % 2 else maps


def _smoothed(maps: Tensor) -> Tensor:
    """`(b, c, r, m, m)` blurred by (1, 2, 1) / 4 per axis, so that a stride of 2 does not alias."""
    planes = functional.pad(maps.flatten(1, 2), (1, 1, 1, 1))
    rows = 0.25 * (planes[..., :-2, :] + 2 * planes[..., 1:-1, :] + planes[..., 2:, :])
    smooth = 0.25 * (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:])
    return smooth.unflatten(1, maps.shape[1:3])
