"""The class map: 2D classification whose classes lie on a smooth map. The default model.

A decoder turns every node of a latent grid into a class image; every particle gets its posterior over
node × in-plane angle × shift by search: the maximum-likelihood classification of Scheres et al. (2005)
joined with the generative topographic mapping of Bishop, Svensén and Williams (1998), the pose marginalised
by search. With whitened image y, whitened node image m and unit noise,

    log p(y | node, pose) - log p(y | noise alone) = y · m_pose - ½ ‖m_pose‖²

What is compared are windows: the *image* is shifted by whole pixels, the *template* is turned (and shifted
by fractions), so that all scores are matrix products of window rows with template rows. A search over all
angles and shifts with a few nodes proposes poses; all nodes are scored at the proposed poses only. The
gradient of the marginal likelihood with respect to the templates, Σ γ (y - m), is one more product; only
turning and decoding the nodes goes through autograd.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from particle_explorer.configs import CLASS_MAP_WARM_UP, ClassMapConfig, DataSpec
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.layers import SmoothDecoder
from particle_explorer.transforms import (
    FourierBand,
    fourier_radius,
    fourier_resize,
    place,
    pose_gradients,
    radius,
    real_rows,
    register,
    rotation_matrix,
    soft_disc,
    turning_matrix,
    unplace,
)

_BLOCK_BYTES = 8 * 2**20
"""Rows and scores made at a time in a search; small enough to stay in a processor's cache."""
_KEPT_BYTES = 192 * 2**20
"""Finely turned templates are kept between calls of `encode` when they take less."""
_ALIGNED_BYTES = 128 * 2**20
"""Images aligned at the start, for the components of the first map, take this much."""
_MAX_BOX_PX = 96
"""The map is drawn and compared in at most this box; larger images are cropped in Fourier space."""
_N_STEPS = 64
"""Steps that a fit takes at least."""
_DISC_EDGE_PX = 2.0


class _Expectation(NamedTuple):
    log_evidence: Tensor
    """`(b,)` nats over noise alone, under the current temperature"""
    gradient: Tensor
    """`(k, c, n, n)` of the mean of `log_evidence` with respect to the whitened nodes"""
    node: Tensor
    """`(b, k)` posterior of the nodes"""


@contextmanager
def _fast_products(precision: str) -> Iterator[None]:
    """float32 products through bf16 where the hardware has it (sums and results stay float32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _block(floats_per_image: int, device: torch.device, factor: int = 1) -> int:
    """How many images make a block; a GPU wants large ones."""
    n_bytes = factor * _BLOCK_BYTES * (1 if device.type == "cpu" else 32)
    return max(1, n_bytes // (4 * floats_per_image))


class _Turn(torch.autograd.Function):
    """Images `(k, n²)` turned by a sparse matrix `(r·n², n²)`: `(r, k, n²)`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        k, n2 = images.shape
        return (matrix @ images.T.contiguous()).view(-1, n2, k).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        k = gradients[0].shape[1]
        columns = gradients[0].transpose(1, 2).reshape(-1, k)
        return (ctx.transposed @ columns).T, None, None


def _turn(images: Tensor, by: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """`(k, n²)` images turned by every angle: `(r, k, n²)`."""
    if isinstance(by, tuple):
        turned: Tensor = _Turn.apply(images, *by)
        return turned
    n = math.isqrt(images.shape[1])
    return place(images.view(1, -1, n, n), by, mode="bicubic").flatten(2)


def _rotated(shift: Tensor, angle: Tensor) -> Tensor:
    """Shifts `(b, 2)` (y, x) turned by `(b,)` rad."""
    return torch.einsum("bij,bj->bi", rotation_matrix(angle), shift.flip(-1)).flip(-1)


def _polynomial(z: Tensor, degree: int) -> Tensor:
    """`(b, d)` → `(b, m)` monomials of total degree up to `degree`, constant first."""
    if z.shape[1] == 1:
        return z ** torch.arange(degree + 1, device=z.device)
    terms = [z[:, 0] ** i * z[:, 1] ** j for i in range(degree + 1) for j in range(degree + 1 - i)]
    return torch.stack(terms, -1)


class ClassMap(ParticleModel):
    """Exact posterior over map × angle × shift; see the module's text.

    Memory: rows of images in blocks of a few `_BLOCK_BYTES`; templates about k·r·c·n²/2 floats, twice; while
    training 2 to 4 bytes per proposal and 4·(latent_dim + 1) per particle of the session.
    """

    learning_rate = 2e-3
    batch_size = 1000
    gauge_degree = 4
    n_proposals = 16
    max_encode_proposals = 40
    search_every = 2
    """Epochs between searches over all poses; in between the proposals of the last one are kept."""

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        d = config.latent_dim
        n = min(data.box_px, _MAX_BOX_PX)
        self.latent_dim = d
        self.box = n
        self.px_per_px = data.box_px / n
        """Pixels of the batch per pixel of the model: large boxes are cropped in Fourier space."""
        self.n_epochs = max(2, min(30, math.ceil(_N_STEPS * self.batch_size / data.n_particles)))
        side = config.nodes_per_dim or (24 if d == 1 else 12)
        axis = torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)
        node_z = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
        n_coarse = min(side, 8 if d == 1 else 4)
        pick = torch.linspace(0, side - 1, 2 * n_coarse + 1)[1::2].round().long().unique()
        coarse = pick if d == 1 else (pick[:, None] * side + pick).flatten()

        self.disc_px = min(data.diameter_px / self.px_per_px / 2, n / 2 - _DISC_EDGE_PX - 0.5)
        spread = config.shift_range_px / self.px_per_px or max(2.0, round(0.075 * n))
        self.spread_px = spread
        self.shift_step = max(1, round(n / 48))
        n_side = max(1, math.floor(spread / self.shift_step + 1e-6))
        at = torch.arange(-n_side, n_side + 1) * self.shift_step
        shifts = torch.cartesian_prod(at, at)
        shifts = shifts[shifts.float().norm(dim=1) <= n_side * self.shift_step + 0.3 * self.shift_step]
        n_angles = max(12, round(360 / config.angle_step_deg))
        self.angle_step = 2 * math.pi / n_angles

        def constant(name: str, value: Tensor) -> None:
            self.register_buffer(name, value, persistent=False)

        constant("node_z", node_z)
        constant("coarse", coarse)
        constant("angles", torch.arange(n_angles) * self.angle_step)
        constant("shifts", shifts)
        constant("mask", soft_disc(n, self.disc_px + 1, _DISC_EDGE_PX))
        constant("radius", radius(n))
        constant("shell", fourier_radius(n).round().long().clamp(max=n // 2))
        self.register_buffer("noise_power", torch.ones(n // 2 + 1))
        self.register_buffer("shift_sd", torch.tensor(spread / 2))
        n_terms = _polynomial(torch.zeros(1, d), self.gauge_degree).shape[1]
        self.register_buffer("gauge", torch.zeros(n_terms, 3))
        self.node_z: Tensor
        self.coarse: Tensor
        self.angles: Tensor
        self.shifts: Tensor
        self.mask: Tensor
        self.radius: Tensor
        self.shell: Tensor
        self.register_buffer("n_encode_proposals", torch.tensor(24))
        self.n_encode_proposals: Tensor
        self.noise_power: Tensor
        self.shift_sd: Tensor
        self.gauge: Tensor
        # turns of half a step move the rim by this much; shorter waves only blur the search
        rim = self.disc_px * self.angle_step / 2
        self.coarse_band = FourierBand(n, min(n // 2, max(8.0, n / (3 * rim))))
        # beyond 0.4 / px turned templates hold more interpolation error than signal
        self.band = FourierBand(n, 0.4 * n)
        self._matrices: tuple[Tensor, Tensor] | None = None
        self.decoder = SmoothDecoder(d, data.n_channels, n, self.disc_px)
        self.heat = 1.0
        """Inverse temperature of the likelihood while fitting."""
        self._epoch = 0
        self._proposals: Tensor | None = None
        self._proposed_in: Tensor | None = None
        self._last_z: Tensor | None = None
        self._power: Tensor | None = None
        self._fine: dict[int, Tensor] = {}
        self._fine_key: tuple[object, ...] = ()

    # ---- pictures

    def nodes(self) -> Tensor:
        return self.node_z

    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        images = self.decoder(z)
        turn, move = self._gauge_at(z)
        if angle is not None or shift is not None or bool(self.gauge.any()):
            angle = torch.zeros_like(turn) if angle is None else angle
            shift = torch.zeros_like(move) if shift is None else shift / self.px_per_px
            # placing the gauged reference = one turn by the sum of the angles
            moved = _rotated(move, angle)
            images = place(images, angle + turn, moved + shift, mode="bicubic")
        return fourier_resize(images, self.data.box_px)

    def _inside(self, images: Tensor) -> Tensor:
        """Images of a batch in the box of the model; one that is not finite becomes 0."""
        if not bool(images.sum().isfinite()):
            good = images.flatten(1).isfinite().all(1)
            images = torch.where(good[:, None, None, None], images, 0.0)
        return fourier_resize(images, self.box)

    def _gauge_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (rad) and move (px yx) that bring the decoder's frame at `z` into the reported one."""
        terms = _polynomial(z.clamp(-1, 1), self.gauge_degree) @ self.gauge
        return terms[:, 0], terms[:, 1:]

    # ---- whitening

    def _whitener(self) -> Tensor:
        """`(n, n // 2 + 1)` filter that makes the noise white with variance 1.

        It takes the mean of an image away: background normalisation leaves the noise of *its* mean in every
        pixel, many times that of the next shell, and no conformation or pose is told by it.
        """
        return self.noise_power.clamp_min(1e-8).rsqrt()[self.shell] * (self.shell > 0)

    def _unwhitener(self) -> Tensor:
        return self.noise_power.clamp_min(1e-8).sqrt()[self.shell]

    def _filter(self, images: Tensor, factor: Tensor) -> Tensor:
        n = images.shape[-1]
        return torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(n, n))

    def _radial_power(self, images: Tensor) -> Tensor:
        """`(b, c, n, n)` → `(b, n // 2 + 1)` power of each shell; white noise gives its variance."""
        n = images.shape[-1]
        power = torch.fft.rfft2(images).abs().square().mean(1) / n**2
        # the half spectrum counts a column twice where its mirror image is left out
        twice = torch.full((n // 2 + 1,), 2.0, device=images.device)
        twice[0] = 1.0
        if n % 2 == 0:
            twice[-1] = 1.0
        weight = twice.expand(n, -1)
        total = torch.zeros(len(images), n // 2 + 1, device=images.device)
        total.index_add_(1, self.shell.flatten(), (power * weight).flatten(1))
        count = torch.zeros(n // 2 + 1, device=images.device).index_add_(
            0, self.shell.flatten(), weight.flatten()
        )
        return total / count

    def _set_noise(self, power: Tensor) -> None:
        power = power.clamp_min(1e-6)
        padded = F.pad(power[1:].log()[None, None], (1, 1), mode="replicate")
        smooth = F.conv1d(padded, torch.tensor([[[0.25, 0.5, 0.25]]], device=power.device))[0, 0].exp()
        self.noise_power.copy_(torch.cat([smooth[:1], smooth]))

    # ---- rows and templates

    def _rows(self, images: Tensor, band: FourierBand) -> Tensor:
        """`(b, c, n, n)` → `(b, c, q)` coefficients of the whitened images in one band."""
        return band(images) * self._whitener().flatten()[band.index]

    def _templates(self, nodes: Tensor, band: FourierBand) -> Tensor:
        """Node images `(k, c, n, n)` turned by each angle of the search and whitened: `(r, k, px)` rows."""
        k, c, n, _ = nodes.shape
        turned = _turn(nodes.reshape(k * c, n * n), self._turning()).view(-1, k, c, n, n)
        return real_rows(self._rows(turned, band))

    def _turning(self) -> tuple[Tensor, Tensor] | Tensor:
        """The turning matrix and its transpose, or the angles where a device has no sparse products."""
        if self.angles.device.type == "mps":
            return self.angles
        if self._matrices is None or self._matrices[0].device != self.angles.device:
            self._matrices = turning_matrix(self.box, self.angles)
        return self._matrices

    def _log_prior(self, moves: Tensor) -> Tensor:
        """Log of the Gaussian prior of shifts `(..., 2)`, up to its constant."""
        return -(moves.float() ** 2).sum(-1) / (2 * self.shift_sd**2)

    def _log_prior_shifts(self) -> Tensor:
        return self._log_prior(self.shifts).log_softmax(0)

    def _search(self, images: Tensor, templates: Tensor, n_best: int) -> Tensor:
        """The most promising poses of each image: `(b, p)` indices shift · r + angle.

        `templates` `(r, k, px)` of a few nodes in the coarse band; a pose is ranked by its best node.
        """
        r, k, px = templates.shape
        flat = templates.flatten(0, 1)
        minus_norm = -0.5 * flat.square().sum(-1)
        prior = self._log_prior_shifts()
        back = self.coarse_band.phases(-self.shifts)[:, None]
        found = []
        for part in self._rows(images, self.coarse_band).split(
            _block(len(prior) * (px + r * k), images.device)
        ):
            rows = real_rows(part[:, None] * back)
            scores = torch.addmm(minus_norm, rows.flatten(0, 1), flat.T)
            best = scores.view(len(part), len(prior), r, k).amax(-1) + prior[:, None]
            found.append(best.flatten(1).topk(n_best, dim=1).indices)
        return torch.cat(found)

    def _expect(self, images: Tensor, pose: Tensor, templates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score all nodes at proposed poses `(b, p)` in the full band.

        Returns log evidence `(b,)`, the gradient of its sum with respect to `templates` `(r, k, px)`, and the
        posterior of the nodes `(b, k)`.
        """
        r, k, px = templates.shape
        b, p = pose.shape
        minus_norm = -0.5 * templates.square().sum(-1)
        prior = self._log_prior_shifts() - math.log(r * k)
        back = self.band.phases(-self.shifts)[:, None]
        gradient = torch.zeros_like(templates)
        evidence, nodes = [], []
        step = _block(p * (px + 2 * k), images.device, 4)
        for start in range(0, b, step):
            part = pose[start : start + step]
            coefficients = self._rows(images[start : start + step], self.band)
            angle = (part % r).flatten()
            order = angle.argsort(stable=True)
            count = torch.bincount(angle, minlength=r).tolist()
            shift = (part // r).flatten()[order]
            rows = real_rows(coefficients[order // p] * back[shift])
            scores = rows.new_empty(len(order), k)
            for a, (row, score) in enumerate(zip(rows.split(count), scores.split(count), strict=True)):
                if len(row):
                    torch.addmm(minus_norm[a], row, templates[a].T, out=score)
            scores += prior[shift, None]
            by_image = torch.empty_like(scores)
            by_image[order] = scores
            logits = by_image.view(len(part), p * k).mul_(self.heat)
            total = logits.logsumexp(1, keepdim=True)
            gamma = logits.sub_(total).exp_().view(len(part), p, k)
            evidence.append(total[:, 0] / self.heat)
            nodes.append(gamma.sum(1))
            weights = gamma.view(-1, k)[order]
            for a, (row, weight) in enumerate(zip(rows.split(count), weights.split(count), strict=True)):
                if len(row):
                    gradient[a].addmm_(weight.T, row)
                    gradient[a].addcmul_(templates[a], weight.sum(0)[:, None], value=-1)
        return torch.cat(evidence), gradient, torch.cat(nodes)

    # ---- fitting

    def schedule(self, fraction: float, epoch: int) -> None:
        self.heat = min(1.0, 0.3 + 0.7 * fraction / CLASS_MAP_WARM_UP)
        if epoch != self._epoch and self._power is not None:
            self._set_noise(self._power)
        self._epoch = epoch

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        nodes = self.decoder(self.node_z)
        fixed = nodes.detach().requires_grad_()
        with torch.enable_grad():
            graph = self._templates(fixed, self.band)
        templates = graph.detach()
        with torch.no_grad(), _fast_products(self.precision):
            images = self._inside(batch.images)
            pose = self._propose(images, batch.row, nodes)
            evidence, gradient, node = self._expect(images, pose, templates)
        (pulled,) = torch.autograd.grad(graph, fixed, gradient)
        pulled = pulled / len(images)
        self._remember(images, batch.row, node, nodes.detach())
        # its value is the mean negative log evidence, its gradient that of the posterior
        surrogate = -(nodes * pulled).sum()
        loss = surrogate - surrogate.detach() - evidence.mean()
        return {"negative_log_likelihood": loss}

    def _propose(self, images: Tensor, row: Tensor, nodes: Tensor) -> Tensor:
        """The poses to score: those of the last search, or of a new one when it is due."""
        n_poses = len(self.angles) * len(self.shifts)
        p = min(self.n_proposals, n_poses)
        if self._proposals is None or self._proposed_in is None:
            size = max(self.data.n_particles, int(row.max()) + 1)
            kind = torch.int16 if n_poses < 2**15 else torch.int32
            self._proposals = torch.zeros(size, p, dtype=kind, device=row.device)
            self._proposed_in = torch.full((size,), -1, dtype=torch.int32, device=row.device)
        when = self._proposed_in[row]
        if bool(((when < 0) | (self._epoch - when >= self.search_every)).any()):
            pose = self._search(images, self._templates(nodes[self.coarse], self.coarse_band), p)
            self._proposals[row] = pose.to(self._proposals.dtype)
            self._proposed_in[row] = self._epoch
            return pose
        return self._proposals[row].long()

    @torch.no_grad()
    def _remember(self, images: Tensor, row: Tensor, node: Tensor, nodes: Tensor) -> None:
        """Keep what the live view and the noise estimate need of this step."""
        self._show(row, node @ self.node_z)
        # signal and noise are independent: the power of the images is the sum of theirs
        raw = self._radial_power(images).mean(0)
        model = node.mean(0) @ self._radial_power(nodes)
        power = torch.maximum(raw - model, 0.1 * raw)
        self._power = power if self._power is None else 0.9 * self._power + 0.1 * power

    def _show(self, row: Tensor, z: Tensor) -> None:
        """Keep latent positions for the live view."""
        if self._last_z is None:
            size = max(self.data.n_particles, int(row.max()) + 1)
            self._last_z = torch.full((size, self.latent_dim), torch.nan, device=z.device)
        self._last_z[row] = z

    def training_state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "proposals": self._proposals,
            "proposed_in": self._proposed_in,
            "last_z": self._last_z,
            "power": self._power,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._epoch = int(state["epoch"])
        self._proposals = state["proposals"]
        self._proposed_in = state["proposed_in"]
        self._last_z = state["last_z"]
        self._power = state["power"]

    def latest(self) -> tuple[Tensor, Tensor] | None:
        if self._last_z is None:
            return None
        row = self._last_z[:, 0].isfinite().nonzero()[:, 0]
        return row, self._last_z[row]

    def start(self, batches: Batches) -> Iterator[Step]:
        """Noise, one template by annealed EM, alignment and components, and a decoder that draws them.

        A map that starts at random folds: two of its parts come to describe the same conformation.
        """
        yield from self._start_noise(batches)
        template = yield from self._start_template(batches)
        targets = yield from self._start_components(batches, template)
        yield from self._start_decoder(targets)

    @torch.no_grad()
    def _start_noise(self, batches: Batches) -> Iterator[Step]:
        yield Step("noise", 0.0)
        some = torch.randperm(len(batches))[:4096]
        images = torch.cat([self._inside(batches.take(part).images) for part in some.split(1024)])
        total = self._radial_power(images).mean(0)
        outside = 1 - soft_disc(self.box, self.disc_px + 2, 2.0, device=images.device)
        share = outside.square().mean()
        if share > 0.05:
            around = self._radial_power(images * outside).mean(0) / share
            total = torch.minimum(total, around)
        self._set_noise(total)

    @torch.no_grad()
    def _start_template(self, batches: Batches) -> Generator[Step, None, Tensor]:
        """One whitened template `(1, c, n, n)` by annealed EM."""
        n_fit = len(batches)
        n, c = self.box, self.data.n_channels
        device = self.node_z.device
        n_steps, size = 60, min(n_fit, 300)
        template = torch.zeros(1, c, n, n, device=device)
        sample = self._inside(batches.take(torch.randperm(n_fit)[: min(n_fit, 4096)]).images)
        template[0] = sample.mean(0) * self.mask
        for step in range(n_steps):
            heat = min(1.0, 0.05 * 20 ** (step / (0.7 * n_steps)))
            band = self.coarse_band if step < 0.6 * n_steps else self.band
            chosen = torch.randint(len(sample), (size,))
            with _fast_products(self.precision):
                new = self._one_template_step(sample[chosen], template, heat, band)
            keep = 0.0 if step < 5 else 0.7
            template = keep * template + (1 - keep) * new * self.mask
            if step % 5 == 4:
                yield Step("one template", step / n_steps)
        return template

    def _one_template_step(self, images: Tensor, template: Tensor, heat: float, band: FourierBand) -> Tensor:
        """The average `(1, c, n, n)` of images brought back by the posterior over poses of one template."""
        templates = self._templates(template, band)[:, 0]
        minus_norm = -0.5 * templates.square().sum(-1)
        prior = self._log_prior_shifts()
        phases = band.phases(-self.shifts)[:, None]
        total = torch.zeros_like(templates)
        for part in self._rows(images, band).split(_block(len(prior) * templates.shape[1], images.device)):
            rows = real_rows(part[:, None] * phases).flatten(0, 1)
            scores = torch.addmm(minus_norm, rows, templates.T).view(len(part), len(prior), -1)
            gamma = ((scores + prior[:, None]) * heat).flatten(1).softmax(1)
            total.addmm_(gamma.view(len(rows), -1).T, rows)
        coefficients = torch.view_as_complex(total.view(len(total), self.data.n_channels, -1, 2))
        unwhitener = self._unwhitener().flatten()[band.index]
        back = unplace(band.images(coefficients * unwhitener), self.angles, mode="bicubic")
        average = back.sum(0, keepdim=True) / len(images)
        # the mean is not in the band: what makes the surroundings of the particle 0
        around = (1 - self.mask) * (self.radius < self.box / 2 - 1)
        return average - (average * around).sum((2, 3), keepdim=True) / around.sum().clamp_min(1.0)

    @torch.no_grad()
    def _start_components(self, batches: Batches, template: Tensor) -> Generator[Step, None, Tensor]:
        """Node images `(k, c, n, n)` to start from: mean ± components of images aligned by a template."""
        n_fit = len(batches)
        n, c, d = self.box, self.data.n_channels, self.latent_dim
        with_mean = 1 / self._unwhitener()
        chosen = torch.randperm(n_fit)[: min(n_fit, 16384, _ALIGNED_BYTES // (4 * c * n * n))]
        templates = self._templates(template, self.coarse_band)
        aligned, rows = [], []
        for i, part in enumerate(chosen.split(1024)):
            batch = batches.take(part)
            rows.append(batch.row)
            images = self._inside(batch.images)
            with _fast_products(self.precision):
                pose = self._search(images, templates, 1)[:, 0]
            r = len(self.angles)
            whitened = self._filter(images, with_mean)
            aligned.append(unplace(whitened, self.angles[pose % r], self.shifts[pose // r].float()))
            yield Step("aligning", min(1.0, (i + 1) * 1024 / len(chosen)))
        stack = torch.cat(aligned)
        aligned.clear()
        mean = stack.mean(0)
        blur = torch.exp(-2 * (math.pi * 1.0 * fourier_radius(n, stack.device) / n) ** 2)
        blur[0, 0] = 0  # the noise of the background's mean would be the first component
        flat = (self._filter(stack - mean, blur) * self.mask).flatten(1)
        _, s, v = torch.svd_lowrank(flat, q=min(d + 6, *flat.shape), niter=3)
        s, v = F.pad(s, (0, max(0, d + 1 - len(s)))), F.pad(v, (0, max(0, d - len(s))))
        sd = s / math.sqrt(len(flat))
        sd = (sd[:d] ** 2 - sd[-1] ** 2).clamp_min(1e-6).sqrt()
        # a first map to look at: uniform on ±1 has a standard deviation of 1 / √3
        self._show(torch.cat(rows), (flat @ v[:, :d] / (math.sqrt(3) * sd)).clamp(-1, 1))
        components = v[:, :d].T.reshape(d, c, n, n) * sd[:, None, None, None]
        nodes = mean * self.mask + torch.einsum("kd,dchw->kchw", self.node_z * math.sqrt(3), components)
        return self._filter(nodes, self._unwhitener())

    def _start_decoder(self, targets: Tensor) -> Iterator[Step]:
        targets = targets * self.decoder.disc
        scale = (targets - targets.mean(0)).std().clamp_min(1e-3)
        with torch.no_grad():
            self.decoder.base.copy_(targets.mean(0))
        # a subset of a large map per step: the decoder is smooth
        n_nodes = min(len(targets), 36)
        n_steps = 150
        optimizer = torch.optim.Adam(self.decoder.parameters(), lr=4e-3)
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * step / n_steps)) + 1e-5
            chosen = torch.randperm(len(targets), device=targets.device)[:n_nodes]
            loss = ((self.decoder(self.node_z[chosen]) - targets[chosen]) / scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 19:
                yield Step("ordering", (step + 1) / n_steps)
        optimizer.zero_grad()

    @torch.no_grad()
    def finish(self, batches: Batches) -> Iterator[Step]:
        """Bring the canonical frames along the map into register, and take the noise from refined poses."""
        yield Step("gauge", 0.0)
        self.gauge.zero_()
        raw = self.decoder(self.node_z)
        terms = _polynomial(self.node_z, self.gauge_degree)
        angles = torch.deg2rad(torch.arange(-40.0, 41.0, 4.0, device=raw.device))
        reference = raw[self.node_z.norm(dim=1).argmin()][None]
        n_rounds = 5
        for i in range(n_rounds):
            turn, move = register(
                raw, reference, self.mask, angles=angles, max_shift_px=max(2, self.box // 10)
            )
            value = torch.cat([turn[:, None], move], 1)
            self.gauge.copy_(torch.linalg.lstsq(terms.cpu(), value.cpu()).solution.to(raw.device))
            turn, move = self._gauge_at(self.node_z)
            reference = place(raw, turn, move, mode="bicubic").mean(0, keepdim=True)
            yield Step("gauge", (i + 1) / n_rounds)
        parts = torch.randperm(len(batches))[:2000].split(1000)
        powers, spreads = [], []
        for i, part in enumerate(parts):
            power, spread = self._residuals(batches.take(part))
            powers.append(power)
            spreads.append(spread)
            yield Step("noise", (i + 1) / len(parts))
        self._set_noise(torch.stack(powers).mean(0))
        self.shift_sd.copy_(torch.stack(spreads).mean().sqrt().clamp(0.3 * self.shift_step, self.spread_px))
        self._choose_proposals(batches.take(parts[0][:500]).images)
        self._proposals = self._proposed_in = None

    def _choose_proposals(self, images: Tensor) -> None:
        """As many poses per image as hold 99.8 % of the posterior in a search that keeps the most."""
        self.n_encode_proposals.fill_(self.max_encode_proposals)
        with _fast_products(self.precision):
            mass = self._encode_part(self._inside(images), self.decoder(self.node_z))["proposal_mass"]
        # one image in ten may need more
        held = mass.cumsum(1).quantile(0.1, dim=0)
        self.n_encode_proposals.fill_(max(6, 1 + int((held < 0.998).sum())))

    def _residuals(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`(n // 2 + 1)` radial power of images minus their reconstructions, and mean square of a shift."""
        encoding = self.encode(batch)
        assert encoding.angle is not None and encoding.shift is not None
        drawn = self._inside(self.decode(encoding.z, encoding.angle, encoding.shift))
        power = self._radial_power(self._inside(batch.images) - drawn).mean(0)
        # pose and z were fitted to the same pixels: give back what they took, where turns and shifts are seen
        shell = torch.arange(len(power), device=power.device, dtype=power.dtype)
        n_values = (2 * math.pi * shell).clamp_min(1) * self.data.n_channels
        grip = shell**2 * self._radial_power(drawn).mean(0) / power * n_values
        taken = (3 + self.latent_dim) * grip / grip.sum().clamp_min(1e-12)
        power = power * n_values / (n_values - taken).clamp_min(0.5 * n_values)
        squares = encoding.shift.square().mean(1) + encoding.extras["shift_std"].square()
        return power, squares.mean() / self.px_per_px**2

    # ---- encoding

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        with _fast_products(self.precision):
            nodes = self.decoder(self.node_z)
            parts = [self._encode_part(self._inside(part), nodes) for part in batch.images.split(1024)]
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        del whole["proposal_mass"]
        return Encoding(whole.pop("z"), whole.pop("z_std"), whole.pop("angle"), whole.pop("shift"), whole)

    def _encode_part(self, images: Tensor, nodes: Tensor) -> dict[str, Tensor]:
        b, r, k = len(images), len(self.angles), len(nodes)
        p = min(int(self.n_encode_proposals), r * len(self.shifts))
        pose = self._search(images, self._templates(nodes[self.coarse], self.coarse_band), p)

        # each proposed cell is divided: 3 angles × 2 × 2 shifts
        quarter = self.shift_step / 4
        fine_turns = self._fine_turns()
        near = torch.tensor([-quarter, quarter], device=images.device)
        fine_moves = torch.cartesian_prod(near, near)
        turns, moves = fine_turns.repeat_interleave(4), fine_moves.repeat(3, 1)
        n_fine = len(turns)

        coefficients = self._rows(images, self.band)
        back, ahead = self.band.phases(-self.shifts)[:, None], self.band.phases(fine_moves)[:, None, None]
        angle_index = (pose % r).flatten()
        order = angle_index.argsort(stable=True)
        count = torch.bincount(angle_index, minlength=r).tolist()
        shift_index = (pose // r).flatten()[order]
        image = order // p
        node_score = images.new_empty(b * p, k)
        cell_score = images.new_empty(b * p, n_fine)
        best_score = images.new_empty(b * p)
        best_at = order.new_empty(b * p)
        normaliser = self._log_prior(self.shifts).logsumexp(0) + math.log(r * k * n_fine)
        done = 0
        for a, size in enumerate(count):
            if not size:
                continue
            at, shift = order[done : done + size], shift_index[done : done + size]
            row = real_rows(coefficients[image[done : done + size]] * back[shift])
            templates = real_rows(self._fine_rows(nodes, a)[:, None] * ahead).flatten(0, 2)
            score = torch.addmm(-0.5 * templates.square().sum(-1), row, templates.T).view(size, n_fine, k)
            score += (self._log_prior(self.shifts[shift, None] + moves) - normaliser)[..., None]
            top, where = score.flatten(1).max(1)
            weight = score.sub_(top[:, None, None]).exp_()
            node_score[at] = weight.sum(1).log() + top[:, None]
            cell_score[at] = weight.sum(2).log() + top[:, None]
            best_score[at], best_at[at] = top, where
            done += size

        node_score, cell_score = node_score.view(b, p, k), cell_score.view(b, p * n_fine)
        by_node = node_score.logsumexp(1)
        evidence = by_node.logsumexp(1)
        node = by_node.softmax(1)
        z = node @ self.node_z
        z_std = (node @ self.node_z**2 - z**2).clamp_min(0).sqrt()
        cell = cell_score.softmax(1)
        proposal_mass = cell.view(b, p, n_fine).sum(2)
        entropy = -(cell * cell.clamp_min(1e-30).log()).sum(1)

        chosen = best_score.view(b, p).argmax(1)
        pick = torch.arange(b, device=pose.device)
        where = best_at.view(b, p)[pick, chosen]
        best_pose, best_node = pose[pick, chosen], where % k
        angle = self.angles[best_pose % r] + turns[where // k]
        move = self.shifts[best_pose // r] + moves[where // k]
        cell_angle = (self.angles[pose % r][..., None] + turns).flatten(1)
        cell_move = (self.shifts[pose // r][:, :, None] + moves).flatten(1, 2)
        away = torch.remainder(cell_angle - angle[:, None] + math.pi, 2 * math.pi) - math.pi
        inside = (away.abs() <= 2.5 * self.angle_step) & (
            (cell_move - move[:, None]).norm(dim=-1) <= 3 * self.shift_step
        )
        mode = torch.where(inside, cell, 0)
        mode = mode / mode.sum(1, keepdim=True).clamp_min(1e-30)
        angle_var = (mode * away**2).sum(1) - (mode * away).sum(1) ** 2
        centre = torch.einsum("bm,bmi->bi", mode, cell_move)
        shift_var = torch.einsum("bm,bmi->bi", mode, (cell_move - centre[:, None]) ** 2).mean(1)

        whitener = self._whitener()
        angle, move, curvature, residual = self._refine(
            self._filter(images, whitener), self._filter(nodes, whitener), best_node, angle, move
        )
        local = torch.linalg.inv(curvature)
        angle_std = torch.maximum(angle_var.clamp_min(0), local[:, 0, 0]).sqrt()
        shift_std = torch.maximum(shift_var, (local[:, 1, 1] + local[:, 2, 2]) / 2).sqrt()

        turn, shift_gauge = self._gauge_at(self.node_z[best_node])
        angle = angle - turn
        move = move - _rotated(shift_gauge, angle)
        angle = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        return {
            "z": z, "z_std": z_std, "angle": angle, "shift": move * self.px_per_px,
            "log_likelihood": evidence, "angle_std": angle_std, "shift_std": shift_std * self.px_per_px,
            "pose_entropy": entropy, "residual": residual, "proposal_mass": proposal_mass,
        }  # fmt: skip

    def _fine_turns(self) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0], device=self.angles.device) * (self.angle_step / 3)

    def _fine_rows(self, nodes: Tensor, a: int) -> Tensor:
        """All nodes at the fine turns about angle `a`: `(3, k, c, q)`; kept until the weights change."""
        key = (str(nodes.device), *(value._version for value in (*self.parameters(), self.noise_power)))
        if self._fine_key != key:
            self._fine_key, self._fine = key, {}
        if a not in self._fine:
            turned = place(nodes.flatten(0, 1)[None], self.angles[a] + self._fine_turns(), mode="bicubic")
            rows = self._rows(turned.unflatten(1, nodes.shape[:2]), self.band)
            if len(self.angles) * rows.numel() * 8 > _KEPT_BYTES:
                return rows
            self._fine[a] = rows
        return self._fine[a]

    def _refine(
        self, whitened: Tensor, nodes: Tensor, node: Tensor, angle: Tensor, move: Tensor, n_steps: int = 3
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gauss-Newton on angle and shift against each image's own node; only improvements are kept.

        `nodes` are whitened, `node` `(b,)` says which. Returns angle, shift, curvature `(b, 3, 3)` of the log
        posterior and mean squared residual `(b,)`.
        """
        # an image brought back, times every node and its gradients, is one product
        flat = (nodes * self.mask).flatten(1)
        gradients = (pose_gradients(nodes) * self.mask).flatten(2)
        squares = flat.square().sum(1)
        normal = gradients @ gradients.transpose(1, 2)
        along = (gradients @ flat[..., None])[..., 0]
        factors = torch.cat([flat[:, None], gradients], 1).flatten(0, 1).T.contiguous()
        prior = torch.diag(torch.tensor([1e-6, 0.0, 0.0], device=angle.device))
        prior[1, 1] = prior[2, 2] = self.shift_sd**-2
        curvature = normal[node] + prior
        inverse = torch.linalg.inv(normal + prior)[node]
        at = torch.arange(len(node), device=node.device)
        start_angle, start_move = angle, move
        best = torch.full_like(angle, -torch.inf)
        best_angle, best_move, residual = angle, move, torch.zeros_like(angle)
        for step in range(n_steps + 1):
            back = (unplace(whitened, angle, move, mode="bicubic") * self.mask).flatten(1)
            products = (back @ factors).view(len(back), -1, 4)[at, node]
            square = back.square().sum(1) - 2 * products[:, 0] + squares[node]
            score = -0.5 * square + self._log_prior(move)
            better = score > best
            best = torch.where(better, score, best)
            best_angle = torch.where(better, angle, best_angle)
            best_move = torch.where(better[:, None], move, best_move)
            residual = torch.where(better, square, residual)
            if step == n_steps:
                break
            slope = products[:, 1:] - along[node]
            # the prior's pull, in the reference frame
            slope[:, 1:] -= _rotated(move, -angle) / self.shift_sd**2
            delta = (inverse @ slope[..., None])[..., 0]
            angle = start_angle + (angle + delta[:, 0] - start_angle).clamp(-self.angle_step, self.angle_step)
            reach = 1.5 * self.shift_step
            ahead = move + _rotated(delta[:, 1:], angle)
            move = start_move + (ahead - start_move).clamp(-reach, reach)
        return best_angle, best_move, curvature, residual / self.mask.sum() / self.data.n_channels
