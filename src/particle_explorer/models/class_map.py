"""The class map: 2D classification whose classes lie on a smooth map. The default model.

A decoder turns every node of a latent grid into a class image; every particle gets its posterior over
node × in-plane angle × shift by search: the maximum-likelihood classification of Scheres et al. (2005)
joined with the generative topographic mapping of Bishop, Svensén and Williams (1998), the pose marginalised
by search. `pose_posterior` is that posterior; here it is fitted, from `class_map_start` to
`class_map_finish`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.files import UserError
from particle_explorer.models import class_map_finish, class_map_start
from particle_explorer.models.base import Batch, Batches, Step
from particle_explorer.models.layers import fast_products
from particle_explorer.models.pose_posterior.expectation import Expectation, expect
from particle_explorer.models.pose_posterior.junk import tells_junk
from particle_explorer.models.pose_posterior.posterior import PosePosterior
from particle_explorer.models.pose_posterior.search import search
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.models.pose_posterior.shells import radial_power, ring_mean
from particle_explorer.models.pose_posterior.window import turned_average

_N_STEPS = 64
"""Steps that a fit takes at least."""
_MOST_NODES = 4096
_N_STEPS_OF_CLASSES, _N_STEPS_OF_DISORDER = 240, 600
"""Steps of a map of classes, with and without a first layout."""
_MOST_OF_DISORDER = 600
"""Nodes of a map without a first layout, which keeps them all; of more, every second along each side."""
_N_STEPS_OF_DRAWING, _N_STEPS_OF_DRAWING_KINDS = 150, 250
"""Steps that a decoder takes to draw the first classes, along components and of different kinds."""
_HEAT_OF_DISORDER, _HEAT_OF_NEIGHBOURS = 0.02, 0.5
"""Inverse temperature that a map of classes starts with, without and with a first layout."""
_FEW = 100
"""Fewer particles are not laid out by their neighbours."""
_CLEAR = 1.5
"""Signal over noise, in the pixels that neighbours are compared in, from which on they say something."""
FITTING = "fitting the map"
"""What `ClassMap.fit` says of its passes."""


class ClassMap(PosePosterior):
    """Exact posterior over map × angle × shift, fitted; see the module's text.

    Memory while training: 2 to 4 bytes per proposal and 4·(latent_dim + 1) per particle of the session.
    A step takes about seven times its images in float32 (measured: 1.7 MB an image of 256 px); all that grows
    with nodes, angles and shifts is made for blocks of images of a fixed size, so batches are never split.
    """

    learning_rate = 2e-3
    batch_size = 1000
    n_proposals = 16
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
                self.set_noise(self._power)
            if self._signal is not None:
                self.signal_power.copy_(self._signal)
        self._epoch = epoch

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        nodes = self.decoder(self.node_z)
        fixed = nodes.detach().requires_grad_()
        with torch.enable_grad():
            graph = self.templates(fixed, self.band)
        with torch.no_grad(), fast_products(self.precision):
            due = self._search_is_due(batch.row)
            seen = self.seen(batch, None if due else self._places_of(batch.row))
            versions = seen.versions(self.n_versions)
            pose = self._propose(versions, batch.row, nodes, due)
            where = self._where(batch.row, seen)
            found = expect(self, versions, pose, graph.detach(), where)
        (pulled,) = torch.autograd.grad(graph, fixed, found.gradient)
        pulled = pulled / len(batch.row)
        self._remember(seen, batch.row, found, nodes.detach())
        # its value is the mean negative log evidence, its gradient that of the posterior
        surrogate = -(nodes * pulled).sum()
        loss = surrogate - surrogate.detach() - found.log_evidence.mean()
        return {"negative_log_likelihood": loss}

    def _search_is_due(self, row: Tensor) -> bool:
        if self._proposals is None or self._proposed_in is None:
            n_poses = len(self.angles) * len(self.shifts)
            size = max(self.data.n_particles, int(row.max()) + 1)
            kind = torch.int16 if n_poses < 2**15 else torch.int32
            n_kept = self.n_versions * min(self.n_proposals, n_poses)
            self._proposals = torch.zeros(size, n_kept, dtype=kind, device=row.device)
            self._proposed_in = torch.full((size,), -1, dtype=torch.int32, device=row.device)
            self._centres = torch.zeros(
                size if self.window.wide_px else 1, 2, dtype=torch.int16, device=row.device
            )
        # processes that share a batch keep the same proposals and search at the same steps
        when = self._proposed_in[self.gathered(row)]
        return bool(((when < 0) | (self._epoch - when >= self.search_every)).any())

    def _places_of(self, row: Tensor) -> Tensor:
        """Where the particles of these rows were found last."""
        assert self._centres is not None
        return self._centres[row if self.window.wide_px else torch.zeros_like(row)].float()

    def _propose(self, seen: Seen, row: Tensor, nodes: Tensor, due: bool) -> Tensor:
        """The poses to score of all versions: those of the last search, or of a new one when it is due."""
        assert self._proposals is not None and self._proposed_in is not None and self._centres is not None
        v = self.n_versions
        if not due:
            return self._proposals[row].long().view(v * len(row), -1)
        templates = self.templates(nodes[self.coarse], self.coarse_band)
        n_best = self._proposals.shape[1] // v
        pose, _ = search(self, seen, templates, n_best, per_angle=self.classes)
        rows = self.gathered(row)
        self._proposals[rows] = self.gathered(pose.view(len(row), -1)).to(self._proposals.dtype)
        self._proposed_in[rows] = self._epoch
        if self.window.wide_px:
            self._centres[rows] = self.gathered(seen.centre).to(self._centres.dtype)
        return pose

    def _where(self, row: Tensor, seen: Seen) -> Tensor | None:
        """`(b, k)` log prior of the nodes by the neighbours of each particle, found once."""
        if not len(self.known):
            return None
        guide = self._guide_of(int(row.max()))
        unknown = guide[row, 0].isnan().nonzero()[:, 0]
        if len(unknown):
            guide[row[unknown]] = self.among_neighbours(seen.some(unknown))
        return self.log_prior_nodes(guide[row])

    def _guide_of(self, last_row: int) -> Tensor:
        if self._guide is None:
            size = max(self.data.n_particles, last_row + 1)
            self._guide = torch.full((size, self.latent_dim), torch.nan, device=self.node_z.device)
        return self._guide

    @torch.no_grad()
    def _remember(self, seen: Seen, row: Tensor, found: Expectation, nodes: Tensor) -> None:
        """Keep what the live view and the noise estimate need of this step."""
        node = self.gathered(found.node)
        power_of_images = self.gathered(radial_power(seen.images, self.shell))
        rows, z = self.gathered(row), (node @ self.node_z) / node.sum(1, keepdim=True).clamp_min(1e-6)
        if self._guide is not None:  # another process's rows may have no place here
            z = self.about_node(z, torch.where(self._guide[rows].isnan(), z, self._guide[rows]))
        self._show(rows, z)
        # signal and noise are independent: the power of the images is the sum of theirs
        particle = node.sum(1)
        share = particle / particle.sum().clamp_min(1e-6)
        raw = share @ power_of_images
        model = (share @ node / particle.mean().clamp_min(1e-6)) @ radial_power(nodes, self.shell)
        if seen.transfer is not None:
            model = model * (share @ self.gathered(ring_mean(seen.transfer.square(), self.shell)))
        power = torch.maximum(raw - model, 0.1 * raw)
        self._power = power if self._power is None else 0.9 * self._power + 0.1 * power
        self._signal = model if self._signal is None else 0.9 * self._signal + 0.1 * model
        if tells_junk(self):
            self.junk_share.mul_(0.9).add_(0.1 * (1 - particle.mean())).clamp_(min=1e-3)
            if self.junk_share > class_map_finish.MOST_JUNK:
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

    def latest(self) -> tuple[Tensor, Tensor] | None:
        if self._last_z is None:
            return None
        row = self._last_z[:, 0].isfinite().nonzero()[:, 0]
        return row, self._last_z[row]

    # ---- before and after

    def start(self, batches: Batches) -> Iterator[Step]:
        """Noise, one template, first classes along components or among neighbours, and their drawing."""
        self._check_settings()
        clearness = yield from class_map_start.first_noise(self, batches)
        template = yield from class_map_start.first_template(self, batches)
        self.look_for(template)
        if self.classes:
            yield from self._start_kinds(batches, template, clearness)
        else:
            first = yield from class_map_start.along_components(self, batches, template)
            self._show(first.row, first.place)
            yield from class_map_start.draw(self, first.pictures, _N_STEPS_OF_DRAWING)
        self.look_for(None)

    def _start_kinds(self, batches: Batches, template: Tensor, clearness: float) -> Iterator[Step]:
        """Start from the neighbours of particles, if those say anything, else from disorder."""
        # no motion to start from: a round object, and a decoder that is still disorder
        with torch.no_grad():
            self.decoder.base.copy_(turned_average(template)[0])
        if len(batches) < _FEW or clearness * (self.box / self.small_px) ** 2 < _CLEAR:
            self.n_epochs = self._epochs_of(_N_STEPS_OF_DISORDER)
            if not self._grid_is_given and len(self.grid_z) > _MOST_OF_DISORDER:
                self.keep(class_map_start.every_second(self))
            return
        first = yield from class_map_start.among_neighbours(self, batches, template)
        self._guide_of(int(first.row.max()))[first.row] = first.place
        self._show(first.row, first.place)
        self._first_heat = _HEAT_OF_NEIGHBOURS
        yield from class_map_start.draw(self, first.pictures, _N_STEPS_OF_DRAWING_KINDS)

    def _check_settings(self) -> None:
        """Refused before a fit, not of runs that are fitted already."""
        if self.window.wide_px > self.data.box_px // 2:
            raise UserError(
                f"--model.shift-range-px {self.window.wide_px:g}: in images of {self.data.box_px} px shifts"
                f" go up to {self.data.box_px // 2} px; choose a smaller range"
            )
        if len(self.node_z) > _MOST_NODES:
            side = round(len(self.node_z) ** (1 / self.latent_dim))
            most = math.floor(_MOST_NODES ** (1 / self.latent_dim) + 1e-6)
            raise UserError(
                f"--model.nodes-per-dim {side}: in {self.latent_dim} dimensions these are {len(self.node_z)}"
                f" classes, of which each particle is compared with every one; choose at most {most}"
            )

    def finish(self, batches: Batches) -> Iterator[Step]:
        """Frames in register, noise from refined poses."""
        yield from class_map_finish.finish(self, batches)
        self._proposals = self._proposed_in = None
