"""The class map: 2D classification whose classes lie on a smooth map. The default model.

A decoder turns every node of a latent grid into a class image; every particle gets its posterior over
node × in-plane angle × shift by search: the maximum-likelihood classification of Scheres et al. (2005)
joined with the generative topographic mapping of Bishop, Svensén and Williams (1998), the pose marginalised
by search. `pose_posterior` is that posterior; here it is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, Batches, Step
from particle_explorer.models.layers import fast_products
from particle_explorer.models.neighbours import log_prior, places_among_neighbours
from particle_explorer.models.pose_posterior import PosePosterior, Seen, block, polynomial
from particle_explorer.transforms import (
    FourierBand,
    fourier_radius,
    fourier_resize,
    place,
    real_rows,
    register,
    soft_disc,
    unplace,
)

_ALIGNED_BYTES = 128 * 2**20
"""Images aligned at the start, for the components of the first map, take this much."""
_N_STEPS = 64
"""Steps that a fit takes at least."""
_WIENER = 0.05
"""Added to the mean CTF² when first averages are divided by it."""
_MOST_JUNK = 0.5
"""A map that explains less than this is no map to call others junk by."""
_MOST_NODES = 4096
_N_STEPS_OF_CLASSES, _N_STEPS_OF_DISORDER = 240, 600
"""Steps of a map of classes, with and without a first layout."""
_MOST_OF_DISORDER = 600
"""Nodes of a map without a first layout, which keeps them all; of more, every second along each side."""
_N_STEPS_OF_DRAWING = 250
"""Steps that a decoder takes to draw the first classes."""
_HEAT_OF_DISORDER, _HEAT_OF_NEIGHBOURS = 0.02, 0.5
"""Inverse temperature that a map of classes starts with, without and with a first layout."""
_FEW, _MANY = 100, 6_000
"""Particles that are laid out by their neighbours: no fewer, and no more."""
_CLEAR = 1.5
"""Signal over noise, in the pixels that neighbours are compared in, from which on they say something."""
_FLOOR_OF_CLASSES = 0.25
"""Least noise, as a share of the variance of the signal inside the disc, where classes differ in kind: what
a smooth map cannot show of them is noise to it."""
FITTING = "fitting the map"
"""What `ClassMap.fit` says of its passes."""


class ClassMap(PosePosterior):
    """Exact posterior over map × angle × shift, fitted; see the module's text.

    Memory while training: 2 to 4 bytes per proposal and 4·(latent_dim + 1) per particle of the session.
    """

    learning_rate = 2e-3
    batch_size = 1000
    n_proposals = 16
    max_encode_proposals = 40
    search_every = 2
    """Epochs between searches over all poses; in between the proposals of the last one are kept."""

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.warm_up = config.warm_up
        """Share of the fit in which the posterior is sharpened; 0 for one that starts from a map."""
        if self.classes:  # shapes that have little in common take the decoder many steps
            self.batch_size, self.learning_rate = 500, 4e-3
            self.n_proposals = len(self.angles)
        self.n_epochs = self._epochs_of(_N_STEPS_OF_CLASSES if self.classes else _N_STEPS)
        self._epoch = 0
        self._proposals: Tensor | None = None
        self._proposed_in: Tensor | None = None
        self._last_z: Tensor | None = None
        self._power: Tensor | None = None
        self._signal: Tensor | None = None
        self._centres: Tensor | None = None
        self._grid_is_given = config.nodes_per_dim > 0
        self._first_heat = _HEAT_OF_DISORDER
        self._clearness = 0.0
        """Variance of the signal over that of the noise in a pixel, where classes vary."""
        self._guide: Tensor | None = None
        """`(N, d)` where each particle lies among its neighbours; nan where that is not known yet."""

    def _epochs_of(self, n_steps: int) -> int:
        n, most = self.data.n_particles, 30
        if not self.classes:  # all of a small stack are one step
            most = max(most, math.ceil(n_steps / math.ceil(n / self.batch_size)))
        return max(2, min(most, math.ceil(n_steps * self.batch_size / n)))

    # ---- fitted on the way to something else

    def fit(self, batches: Batches) -> Iterator[Step]:
        """All that training does, without its checkpoints."""
        self.train()
        yield from self.start(batches)
        optimiser = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        n, size = len(batches), min(self.batch_size, len(batches))
        n_steps, step = self.n_epochs * math.ceil(n / size), 0
        for epoch in range(self.n_epochs):
            for index in torch.randperm(n).split(size):
                self.schedule(step / n_steps, epoch)
                for group in optimiser.param_groups:
                    group["lr"] = 0.5 * self.learning_rate * (1 + math.cos(math.pi * step / n_steps))
                losses = self(batches.take(index))
                optimiser.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                optimiser.step()
                step += 1
                yield Step(FITTING, step / n_steps)
        self.zero_grad(set_to_none=True)
        self.eval()
        yield from self.finish(batches)

    # ---- fitting

    def skip_warm_up(self) -> None:
        self.warm_up = 0.0  # softened, a map that is there would be forgotten

    def schedule(self, fraction: float, epoch: int) -> None:
        sharpened = min(1.0, fraction / self.warm_up) if self.warm_up else 1.0
        if self.classes:
            self.heat = self._first_heat ** (1 - sharpened)
        else:
            self.heat = min(1.0, 0.3 + 0.7 * sharpened)
        if epoch != self._epoch and self._power is not None and (self.heat == 1 or not self.classes):
            # what a map does not show of different objects must not pass for noise: it is their shape
            if not self.classes:
                self._set_noise(self._power)
            if self._signal is not None:
                self.signal_power.copy_(self._signal)
        self._epoch = epoch

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        nodes = self.decoder(self.node_z)
        fixed = nodes.detach().requires_grad_()
        with torch.enable_grad():
            graph = self._templates(fixed, self.band)
        templates = graph.detach()
        with torch.no_grad(), fast_products(self.precision):
            due = self._search_is_due(batch.row)
            seen = self._seen(batch, None if due else self._places_of(batch.row))
            versions = self._versions(seen)
            pose = self._propose(versions, batch.row, nodes, due)
            where = self._where(batch.row, seen)
            evidence, gradient, node = self._expect(
                versions.images, versions.transfer, pose, templates, versions.turns, where
            )
        (pulled,) = torch.autograd.grad(graph, fixed, gradient)
        pulled = pulled / len(batch.row)
        self._remember(seen.images, seen.transfer, batch.row, node, nodes.detach())
        # its value is the mean negative log evidence, its gradient that of the posterior
        surrogate = -(nodes * pulled).sum()
        loss = surrogate - surrogate.detach() - evidence.mean()
        return {"negative_log_likelihood": loss}

    def _search_is_due(self, row: Tensor) -> bool:
        if self._proposals is None or self._proposed_in is None:
            n_poses = len(self.angles) * len(self.shifts)
            size = max(self.data.n_particles, int(row.max()) + 1)
            kind = torch.int16 if n_poses < 2**15 else torch.int32
            n_kept = self.n_versions * min(self.n_proposals, n_poses)
            self._proposals = torch.zeros(size, n_kept, dtype=kind, device=row.device)
            self._proposed_in = torch.full((size,), -1, dtype=torch.int32, device=row.device)
            self._centres = torch.zeros(size if self.wide_px else 1, 2, dtype=torch.int16, device=row.device)
        # processes that share a batch keep the same proposals and search at the same steps
        when = self._proposed_in[self.gathered(row)]
        return bool(((when < 0) | (self._epoch - when >= self.search_every)).any())

    def _places_of(self, row: Tensor) -> Tensor:
        """Where the particles of these rows were found last."""
        assert self._centres is not None
        return self._centres[row if self.wide_px else torch.zeros_like(row)].float()

    def _propose(self, seen: Seen, row: Tensor, nodes: Tensor, due: bool) -> Tensor:
        """The poses to score of all versions: those of the last search, or of a new one when it is due."""
        assert self._proposals is not None and self._proposed_in is not None and self._centres is not None
        v = self.n_versions
        if not due:
            return self._proposals[row].long().view(v * len(row), -1)
        templates = self._templates(nodes[self.coarse], self.coarse_band)
        n_best = self._proposals.shape[1] // v
        pose, _ = self._search(
            seen.images, seen.transfer, templates, n_best, per_angle=self.classes, turns=seen.turns
        )
        rows = self.gathered(row)
        self._proposals[rows] = self.gathered(pose.view(len(row), -1)).to(self._proposals.dtype)
        self._proposed_in[rows] = self._epoch
        if self.wide_px:
            self._centres[rows] = self.gathered(seen.centre).to(self._centres.dtype)
        return pose

    @torch.no_grad()
    def _remember(
        self, images: Tensor, transfer: Tensor | None, row: Tensor, node: Tensor, nodes: Tensor
    ) -> None:
        """Keep what the live view and the noise estimate need of this step."""
        node, power_of_images = self.gathered(node), self.gathered(self._radial_power(images))
        rows, z = self.gathered(row), (node @ self.node_z) / node.sum(1, keepdim=True).clamp_min(1e-6)
        if self._guide is not None:  # another process's rows may have no place here
            z = self.about_node(z, torch.where(self._guide[rows].isnan(), z, self._guide[rows]))
        self._show(rows, z)
        # signal and noise are independent: the power of the images is the sum of theirs
        particle = node.sum(1)
        share = particle / particle.sum().clamp_min(1e-6)
        raw = share @ power_of_images
        model = (share @ node / particle.mean().clamp_min(1e-6)) @ self._radial_power(nodes)
        if transfer is not None:
            model = model * (share @ self.gathered(self._ring_mean(transfer.square())))
        power = torch.maximum(raw - model, 0.1 * raw)
        self._power = power if self._power is None else 0.9 * self._power + 0.1 * power
        self._signal = model if self._signal is None else 0.9 * self._signal + 0.1 * model
        if self._with_junk():
            self.junk_share.mul_(0.9).add_(0.1 * (1 - particle.mean())).clamp_(min=1e-3)
            if self.junk_share > _MOST_JUNK:
                self.junk_share.zero_()

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
            "signal": self._signal,
            "centres": self._centres,
            "guide": self._guide,
            "first_heat": self._first_heat,
            "n_epochs": self.n_epochs,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._epoch = int(state["epoch"])
        self._proposals = state["proposals"]
        self._proposed_in = state["proposed_in"]
        self._last_z = state["last_z"]
        self._power = state["power"]
        self._signal = state.get("signal")
        self._centres = state.get("centres")
        self._guide = state.get("guide")
        self._first_heat = state.get("first_heat", _HEAT_OF_DISORDER)
        self.n_epochs = int(state.get("n_epochs", self.n_epochs))

    def agreed(self) -> None:
        self.keep(self.kept)
        self._guide = None  # of this process's own layout

    def latest(self) -> tuple[Tensor, Tensor] | None:
        if self._last_z is None:
            return None
        row = self._last_z[:, 0].isfinite().nonzero()[:, 0]
        return row, self._last_z[row]

    def start(self, batches: Batches) -> Iterator[Step]:
        """Noise, one template by annealed EM, alignment and components, and a decoder that draws them.

        A map that starts at random folds: two of its parts come to describe the same conformation. Where
        classes vary, particles are laid out by their neighbours instead of components.
        """
        if self.wide_px > self.data.box_px // 2:  # refused here, not of runs that are fitted already
            raise UserError(
                f"--model.shift-range-px {self.wide_px:g}: in images of {self.data.box_px} px shifts go up to"
                f" {self.data.box_px // 2} px; choose a smaller range"
            )
        if len(self.node_z) > _MOST_NODES:
            side = round(len(self.node_z) ** (1 / self.latent_dim))
            most = math.floor(_MOST_NODES ** (1 / self.latent_dim) + 1e-6)
            raise UserError(
                f"--model.nodes-per-dim {side}: in {self.latent_dim} dimensions these are {len(self.node_z)}"
                f" classes, of which each particle is compared with every one; choose at most {most}"
            )
        yield from self._start_noise(batches)
        template = yield from self._start_template(batches)
        self._places = ("fixed",), self._round_spectra(template)
        if self.classes:
            # no motion to start from: a round object, and a decoder that is still disorder
            with torch.no_grad():
                self.decoder.base.copy_(self._turned_average(template)[0])
            targets = yield from self._start_kinds(batches, template)
            if targets is None:
                self.n_epochs = self._epochs_of(_N_STEPS_OF_DISORDER)
                if not self._grid_is_given and len(self.grid_z) > _MOST_OF_DISORDER:
                    self.keep(self._every_second())
            else:
                yield from self._start_decoder(targets, _N_STEPS_OF_DRAWING)
            self._places = None
            return
        targets = yield from self._start_components(batches, template)
        yield from self._start_decoder(targets)
        self._places = None

    @torch.no_grad()
    def _start_noise(self, batches: Batches) -> Iterator[Step]:
        yield Step("noise", 0.0)
        some = torch.randperm(len(batches))[:4096]
        blob = torch.exp(-((2.5 * self.radius / self.disc_px) ** 2) / 2).expand(
            1, self.data.n_channels, -1, -1
        )
        self._places = ("fixed",), self._round_spectra(blob)
        images = torch.cat([self._seen(batches.take(part)).images for part in some.split(1024)])
        total = self._radial_power(images).mean(0)
        outside = 1 - soft_disc(self.box, self.disc_px + 2, 2.0, device=images.device)
        share = outside.square().mean()
        if share > 0.05:
            around = self._radial_power(images * outside).mean(0) / share
            total = torch.minimum(total, around)
        if self.classes:
            inside = (images.square().mean(0) * self.mask).sum() / (self.mask.sum() * self.data.n_channels)
            # white noise has one power in all shells, its variance
            beyond = total[len(total) // 2 :].mean()
            self._clearness = float((inside - beyond) / beyond.clamp_min(1e-6 * inside))
            self.noise_floor.copy_(_FLOOR_OF_CLASSES * (inside - beyond).clamp_min(0))
            total = around if share > 0.05 else beyond.expand_as(total)
        self._set_noise(total)

    @torch.no_grad()
    def _start_template(self, batches: Batches) -> Generator[Step, None, Tensor]:
        """One whitened template `(1, c, n, n)` by annealed EM."""
        n_fit = len(batches)
        n, c = self.box, self.data.n_channels
        device = self.node_z.device
        n_steps, size = 60, min(n_fit, 300)
        template = torch.zeros(1, c, n, n, device=device)
        batch = batches.take(torch.randperm(n_fit)[: min(n_fit, 4096)])
        sample, transfer, _, turns = self._versions(self._seen(batch))
        template[0] = sample.mean(0) * self.mask
        for step in range(n_steps):
            heat = min(1.0, 0.05 * 20 ** (step / (0.7 * n_steps)))
            band = self.coarse_band if step < 0.6 * n_steps else self.band
            v = self.n_versions
            chosen = torch.randint(len(sample) // v, (size,))
            chosen = (v * chosen[:, None] + torch.arange(v)).flatten()
            with fast_products(self.precision):
                some = None if transfer is None else transfer[chosen]
                turn = None if turns is None else turns[chosen]
                new = self._one_template_step(sample[chosen], some, template, heat, band, turn)
            keep = 0.0 if step < 5 else 0.7
            template = keep * template + (1 - keep) * new * self.mask
            if step % 5 == 4:
                yield Step("one template", step / n_steps)
        return template

    def _one_template_step(
        self,
        images: Tensor,
        transfer: Tensor | None,
        template: Tensor,
        heat: float,
        band: FourierBand,
        turns: Tensor | None = None,
    ) -> Tensor:
        """The average `(1, c, n, n)` of images brought back by the posterior over poses of one template."""
        templates = self._templates(template, band)[:, 0]
        minus_norm = -0.5 * templates.square().sum(-1).expand(len(images), -1)
        if transfer is not None:
            minus_norm = -0.5 * self._weights_of(transfer, band) @ self._powers(templates, band).T
        prior = self._log_prior_shifts()
        phases = band.phases(-self.shifts)[:, None]
        total = torch.zeros_like(templates)
        v = self.n_versions
        step = v * block(v * len(prior) * templates.shape[1], images.device)
        parts = self._rows(images, band, transfer).split(step)
        prior_of = (None,) * len(parts) if turns is None else turns.split(step)
        for part, norm, turn in zip(parts, minus_norm.split(step), prior_of, strict=True):
            rows = real_rows(part[:, None] * phases).flatten(0, 1)
            scores = (rows @ templates.T).view(len(part), len(prior), -1) + norm[:, None]
            logits = (scores + prior[:, None]) * heat
            if turn is not None:
                logits += turn[:, None]  # what is known of the angles is known from the first step on
            gamma = logits.view(len(part) // v, -1).softmax(1)
            total.addmm_(gamma.view(len(rows), -1).T, rows)
        coefficients = torch.view_as_complex(total.view(len(total), self.data.n_channels, -1, 2))
        unwhitener = self._unwhitener()
        if transfer is not None:
            unwhitener = unwhitener * self._wiener(self._ring_mean(transfer.square()).mean(0))
        unwhitener = unwhitener.flatten()[band.index]
        back = unplace(band.images(coefficients * unwhitener), self.angles, mode="bicubic")
        average = back.sum(0, keepdim=True) / (len(images) // v)
        # the mean is not in the band: what makes the surroundings of the particle 0
        around = (1 - self.mask) * (self.radius < self.box / 2 - 1)
        return average - (average * around).sum((2, 3), keepdim=True) / around.sum().clamp_min(1.0)

    def _wiener(self, ctf_square: Tensor) -> Tensor:
        """`(n, n // 2 + 1)` filter that divides sums over images by their mean CTF² `(n // 2 + 1)`."""
        return (1 / (ctf_square + _WIENER))[self.shell]

    @torch.no_grad()
    def _start_components(self, batches: Batches, template: Tensor) -> Generator[Step, None, Tensor]:
        """Node images `(k, c, n, n)` to start from: mean ± components of images aligned by a template."""
        n_fit = len(batches)
        n, c, d = self.box, self.data.n_channels, self.latent_dim
        with_mean = 1 / self._unwhitener()
        chosen = torch.randperm(n_fit)[: min(n_fit, 16384, _ALIGNED_BYTES // (4 * c * n * n))]
        templates = self._templates(template, self.coarse_band)
        aligned, rows, ctf_squares = [], [], []
        for i, part in enumerate(chosen.split(1024)):
            batch = batches.take(part)
            rows.append(batch.row)
            images, transfer, _, turns = self._versions(self._seen(batch))
            with fast_products(self.precision):
                pose, score = self._search(images, transfer, templates, 1, turns=turns)
            better = score.view(len(part), -1).argmax(1)
            better += self.n_versions * torch.arange(len(part), device=score.device)
            images, pose = images[better], pose[better, 0]
            transfer = None if transfer is None else transfer[better]
            r = len(self.angles)
            angle, move = self.angles[pose % r], self.shifts[pose // r].float()
            factor = with_mean
            if transfer is not None:
                # without the template, whose contrast differs with the defocus: that is no motion
                images = images - self._filter(place(template, angle, move), transfer[:, None])
                factor = with_mean * transfer[:, None]
                ctf_squares.append(self._ring_mean(transfer.square()))
            aligned.append(unplace(self._filter(images, factor), angle, move))
            yield Step("aligning", min(1.0, (i + 1) * 1024 / len(chosen)))
        stack = torch.cat(aligned)
        aligned.clear()
        mean = stack.mean(0)
        flat_mean = mean
        if ctf_squares:
            divide = self._wiener(torch.cat(ctf_squares).mean(0))
            flat_mean = self._filter(template[0], with_mean) + self._filter(mean, divide)
        blur = torch.exp(-2 * (math.pi * 1.0 * fourier_radius(n, stack.device) / n) ** 2)
        blur[0, 0] = 0  # the noise of the background's mean would be the first component
        flat = (self._filter(stack - mean, blur) * self.mask).flatten(1)
        # junk that is brighter than the particles would be the first component
        length = flat.norm(dim=1, keepdim=True)
        flat = flat * (1.3 * length.median() / length.clamp_min(1e-9)).clamp(max=1)
        _, s, v = torch.svd_lowrank(flat, q=min(d + 6, *flat.shape), niter=3)
        s, v = F.pad(s, (0, max(0, d + 1 - len(s)))), F.pad(v, (0, max(0, d - len(s))))
        sd = s / math.sqrt(len(flat))
        sd = (sd[:d] ** 2 - sd[-1] ** 2).clamp_min(1e-6).sqrt()
        # a first map to look at: uniform on ±1 has a standard deviation of 1 / √3
        self._show(torch.cat(rows), (flat @ v[:, :d] / (math.sqrt(3) * sd)).clamp(-1, 1))
        components = v[:, :d].T.reshape(d, c, n, n) * sd[:, None, None, None]
        if ctf_squares:
            components = self._filter(components, divide)
        nodes = flat_mean * self.mask + torch.einsum("kd,dchw->kchw", self.node_z * math.sqrt(3), components)
        return self._filter(nodes, self._unwhitener())

    @torch.no_grad()
    def _start_kinds(self, batches: Batches, template: Tensor) -> Generator[Step, None, Tensor | None]:
        """Node images `(k, c, n, n)` of particles laid out among their neighbours, if those say anything."""
        n, m, n_fit = self.box, self.small_px, len(batches)
        if n_fit < _FEW or self._clearness * (n / m) ** 2 < _CLEAR:
            return None
        chosen = torch.randperm(n_fit)[:_MANY]
        self.centring = self._turned_average(template)
        small, rows = [], []
        for i, part in enumerate(chosen.split(1000)):
            batch = batches.take(part)
            rows.append(batch.row)
            with fast_products(self.precision):
                small.append(self.centred(self._seen(batch)))
            yield Step("centring", min(1.0, (i + 1) * 1000 / len(chosen)))
        disc = soft_disc(m, self.disc_px * m / n, device=template.device)
        seed = int(torch.randint(2**31, (1,)))
        known = torch.cat(small)
        with fast_products(self.precision):
            found = yield from places_among_neighbours(
                known.unflatten(1, (-1, m, m)), disc, self.angles, self.grid_z, 0.5 * (n / m) ** 2, seed
            )
        self.keep(found.kept)
        self.known, self.known_place = known.half(), found.place
        row = torch.cat(rows)
        self._guide_of(int(row.max()))[row] = found.place
        self._show(row, found.place)
        self._first_heat = _HEAT_OF_NEIGHBOURS
        return self._filter(fourier_resize(found.pictures[found.kept], n), self._unwhitener())

    def _every_second(self) -> Tensor:
        side = round(len(self.grid_z) ** (1 / self.latent_dim))
        even = torch.arange(side, device=self.grid_z.device) % 2 == 0
        return torch.cartesian_prod(*[even] * self.latent_dim).view(len(self.grid_z), -1).all(1)

    def _guide_of(self, last_row: int) -> Tensor:
        if self._guide is None:
            size = max(self.data.n_particles, last_row + 1)
            self._guide = torch.full((size, self.latent_dim), torch.nan, device=self.node_z.device)
        return self._guide

    def _where(self, row: Tensor, seen: Seen) -> Tensor | None:
        """`(b, k)` log prior of the nodes by the neighbours of each particle, found once."""
        if not len(self.known):
            return None
        guide = self._guide_of(int(row.max()))
        unknown = guide[row, 0].isnan().nonzero()[:, 0]
        if len(unknown):
            some = Seen._make(None if field is None else field[unknown] for field in seen)
            guide[row[unknown]] = self.among_neighbours(some)
        return log_prior(guide[row], self.node_z, self.spacing)

    def _start_decoder(self, targets: Tensor, n_steps: int = 150) -> Iterator[Step]:
        targets = targets * self.decoder.disc
        scale = (targets - targets.mean(0)).std().clamp_min(1e-3)
        with torch.no_grad():
            self.decoder.base.copy_(targets.mean(0))
        # a subset of a large map per step: the decoder is smooth
        n_nodes = min(len(targets), 64 if self.classes else 36)
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
        terms = polynomial(self.node_z, self.gauge_degree)
        angles = torch.deg2rad(torch.arange(-40.0, 41.0, 4.0, device=raw.device))
        reference = raw[self.node_z.norm(dim=1).argmin()][None]
        n_rounds = 5
        for i in range(n_rounds):
            turn, move = register(
                raw, reference, self.mask, angles=angles, max_shift_px=max(2, self.box // 10)
            )
            value = torch.cat([turn[:, None], move], 1)
            self.gauge.copy_(torch.linalg.lstsq(terms.cpu(), value.cpu()).solution.to(raw.device))
            turn, move = self.frames(self.node_z)
            reference = place(raw, turn, move, mode="bicubic").mean(0, keepdim=True)
            yield Step("gauge", (i + 1) / n_rounds)
        parts = torch.randperm(len(batches))[:2000].split(1000)
        self.heat = 1.0
        found = []
        for i, part in enumerate(parts):
            found.append(self._residuals(batches.take(part)))
            yield Step("noise", (i + 1) / len(parts))
        power, signal, spread, junk = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
        if not self.classes:
            self._set_noise(power)
        self.signal_power.copy_(signal)
        if self._with_junk():
            self.junk_share.copy_(junk.clamp(1e-3, _MOST_JUNK))
        self.shift_sd.copy_(spread.sqrt().clamp(0.3 * self.shift_step, self.spread_px))
        self._choose_proposals(batches.take(parts[0][:500]))
        self._proposals = self._proposed_in = None

    def _choose_proposals(self, batch: Batch) -> None:
        """As many poses per image as hold 99.8 % of the posterior in a search that keeps the most."""
        self.n_encode_proposals.fill_(self.max_encode_proposals)
        with fast_products(self.precision):
            found = self._encode_part(self._seen(batch), self.decoder(self.node_z))
            mass = found["proposal_mass"]
        # one image in ten may need more
        held = mass.cumsum(1).quantile(0.1, dim=0)
        self.n_encode_proposals.fill_(max(6, 1 + int((held < 0.998).sum())))

    def _residuals(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(n // 2 + 1)` radial power of images minus their reconstructions and of these, the mean square of
        a shift, and the share of junk, which is left out of the others."""
        encoding = self.encode(batch)
        assert encoding.angle is not None and encoding.shift is not None
        images, transfer, centre, _ = self._seen(batch)
        drawn = self._window(self.decode(encoding.z, encoding.angle, encoding.shift), centre)
        if transfer is not None:
            drawn = self._filter(drawn, transfer[:, None])
        junk = encoding.extras.get("junk_probability", torch.zeros_like(encoding.z[:, 0]))
        known = (1 - junk) * (1 - encoding.extras.get("mirror_probability", torch.zeros_like(junk)))
        share = known.clamp_min(1e-6) / known.clamp_min(1e-6).sum()
        power = share @ self._radial_power(images - drawn)
        signal = share @ self._radial_power(drawn)
        # pose and z were fitted to the same pixels: give back what they took, where turns and shifts are seen
        shell = torch.arange(len(power), device=power.device, dtype=power.dtype)
        n_values = (2 * math.pi * shell).clamp_min(1) * self.data.n_channels
        grip = shell**2 * signal / power * n_values
        taken = (3 + self.latent_dim) * grip / grip.sum().clamp_min(1e-12)
        power = power * n_values / (n_values - taken).clamp_min(0.5 * n_values)
        squares = (encoding.shift - centre).square().mean(1) + encoding.extras["shift_std"].square()
        return power, signal, share @ squares / self.px_per_px**2, junk.mean()
