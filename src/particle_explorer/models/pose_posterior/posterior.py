"""What is said of each particle: where on the map it lies, at which pose, and how sure that is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.models.base import Batch, Encoding
from particle_explorer.models.layers import fast_products
from particle_explorer.models.pose_posterior.cells import FineTemplates, score_cells, spread_of_mode
from particle_explorer.models.pose_posterior.junk import band_energy, log_junk, tells_junk
from particle_explorer.models.pose_posterior.modes import Poses, best_pose, modes
from particle_explorer.models.pose_posterior.older_weights import upgraded
from particle_explorer.models.pose_posterior.pictures import rotated
from particle_explorer.models.pose_posterior.placing import Placing
from particle_explorer.models.pose_posterior.refinement import refine
from particle_explorer.models.pose_posterior.search import search
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.models.pose_posterior.shells import filtered
from particle_explorer.transforms import FourierBand, real_rows, turned_powers, unplace


class PosePosterior(Placing):
    """A map of class images, and what particles say of it and of their poses; see the folder's text.

    Memory: rows of images in blocks of some MB (`blocks`); templates about k·r·c·n²/2 floats, twice.
    """

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.register_buffer("n_encode_proposals", torch.tensor(24))
        self.n_encode_proposals: Tensor
        """Poses of an image that all nodes are scored at."""
        self.all_waves = FourierBand(self.box, self.box)
        """What a decoder of more dimensions draws is compared in all of them."""
        self._fine = FineTemplates()
        self.register_load_state_dict_pre_hook(upgraded)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        found = self.encode_modes(batch, 0)
        for name in ("proposal_mass", "centre"):
            del found[name]
        return Encoding(found.pop("z"), found.pop("z_std"), found.pop("angle"), found.pop("shift"), found)

    @torch.no_grad()
    def encode_modes(self, batch: Batch, n_modes: int) -> dict[str, Tensor]:
        """The fields of `Encoding` by name, and the `n_modes` best poses that are no neighbours, best first.

        `mode_angle` `(b, n_modes)`, `mode_move` `(b, n_modes, 2)` in pixels of the model about `centre`
        `(b, 2)`, `mode_score` (nats; -inf where there is no further mode).
        """
        with fast_products(self.precision):
            nodes = self.decoder(self.node_z)
            parts = []
            for i in range(0, len(batch.images), 1024):
                part = Batch._make(None if field is None else field[i : i + 1024] for field in batch)
                seen = self.seen(part)
                found = self.encode_part(seen, nodes, n_modes)
                if self.n_versions == 2:
                    found |= self._as_mirrored(found, self.encode_part(seen.mirrored(), nodes))
                if tells_junk(self):
                    odds = log_junk(self, seen.images) - (1 - self.junk_share).log()
                    found["junk_probability"] = (odds - found["log_likelihood"]).sigmoid()
                parts.append(found | {"centre": seen.centre})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _as_mirrored(self, plain: dict[str, Tensor], mirrored: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is said beside the pose and position of the images as they are, which stay what they are."""
        evidence = torch.stack([plain["log_likelihood"], mirrored["log_likelihood"]], 1)
        where = {f"mirror_z_{i}": mirrored["z"][:, i] for i in range(self.latent_dim)}
        return where | {
            "mirror_probability": evidence.softmax(1)[:, 1],
            "log_likelihood": evidence.logsumexp(1) - math.log(2),
        }

    def encode_part(self, seen: Seen, nodes: Tensor, n_modes: int = 0) -> dict[str, Tensor]:
        """What is said of each image; with `n_modes` also its `mode_…` as in `encode_modes`."""
        b, n_poses = len(seen.images), len(self.angles) * len(self.shifts)
        p = min(int(self.n_encode_proposals), n_poses)
        pose, _ = search(self, seen, self.templates(nodes[self.coarse], self.coarse_band), p)
        among = where = None
        if len(self.known):
            among = self.among_neighbours(seen)
            where = self.log_prior_nodes(among)
        cells = score_cells(self, seen, nodes, pose, self._fine, where)

        by_node = cells.by_node.logsumexp(1)
        evidence = by_node.logsumexp(1)
        node = by_node.softmax(1)
        z = node @ self.node_z
        z_std = (node @ self.node_z**2 - z**2).clamp_min(0).sqrt()
        if among is not None:
            z = self.about_node(z, among)
        share = cells.by_cell.flatten(1).softmax(1)
        proposal_mass = share.view(b, p, -1).sum(2)
        entropy = -(share * share.clamp_min(1e-30).log()).sum(1)

        # the best cell of each proposal
        cell = cells.best_cell[..., None]
        poses = Poses(
            cells.angle.gather(2, cell)[..., 0],
            cells.move.gather(2, cell[..., None].expand(-1, -1, -1, 2))[:, :, 0],
            cells.best_node,
        )
        images, transfer, centre, _ = seen
        white, white_nodes = self.whitened(images), self.whitened(nodes)
        further = self._reported_modes(white, transfer, white_nodes, poses, cells.best, n_modes)
        best, refined = best_pose(self, white, transfer, white_nodes, poses, cells.best)
        angle_var, shift_var = spread_of_mode(self, cells, share, best.angle, best.move)
        local = torch.linalg.inv(refined.curvature)
        angle_std = torch.maximum(angle_var.clamp_min(0), local[:, 0, 0]).sqrt()
        shift_std = torch.maximum(shift_var, (local[:, 1, 1] + local[:, 2, 2]) / 2).sqrt()

        angle, move = self._reported(refined.angle, refined.move, best.node)
        return further | {
            "z": z, "z_std": z_std, "angle": angle, "shift": centre + move * self.px_per_px,
            "log_likelihood": evidence, "angle_std": angle_std, "shift_std": shift_std * self.px_per_px,
            "pose_entropy": entropy, "residual": refined.residual, "proposal_mass": proposal_mass,
        }  # fmt: skip

    def _reported(self, angle: Tensor, move: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """Poses found with the pictures of nodes → poses in the reported frame."""
        turn, shift = self.frames(self.node_z[node])
        angle = angle - turn
        move = move - rotated(shift, angle)
        return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi, move

    def _reported_modes(
        self,
        whitened: Tensor,
        transfer: Tensor | None,
        nodes: Tensor,
        poses: Poses,
        score: Tensor,
        n_modes: int,
    ) -> dict[str, Tensor]:
        if not n_modes:
            return {}
        found = modes(self, whitened, transfer, nodes, poses, score, n_modes)
        angle, move = zip(*(self._reported(*mode) for mode, _ in found), strict=True)
        values = [value for _, value in found]
        return {
            "mode_angle": torch.stack(angle, 1),
            "mode_move": torch.stack(move, 1),
            "mode_score": torch.stack(values, 1),
        }

    @torch.no_grad()
    def log_density(self, batch: Batch, encoding: Encoding) -> Tensor:
        """`(b,)` log density (nats) of what is compared of each image, junk included, noise and all.

        `log_likelihood` is over noise alone, which every map estimates for itself; densities of different
        maps of the same images can be compared.
        """
        images = self.seen(batch).images
        found = encoding.extras["log_likelihood"]
        if tells_junk(self):
            found = torch.logaddexp(found + (1 - self.junk_share).log(), log_junk(self, images))
        energy, count = band_energy(self, images)
        count[0] = 0  # no mean is compared
        return found - 0.5 * (energy.sum(1) + count @ self.noise_power.clamp_min(1e-8).log())

    # ---- for a decoder of more dimensions, which draws particles in the reported frame

    @torch.no_grad()
    def brought_back(
        self, batch: Batch, centre: Tensor, angle: Tensor, move: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Images brought back from several poses `(b, p)`, `(b, p, 2)`: `(b, p, c, n, n)` whitened, times
        their CTF, and `(b, p, j)` CTF² as it lies over what is drawn, for `norms`."""
        images, transfer, _, _ = self.seen(batch, centre)
        factor = self.whitener() if transfer is None else self.whitener() * transfer[:, None]
        white = filtered(images, factor)
        p = angle.shape[1]
        back = unplace(white.repeat_interleave(p, 0), angle.flatten(), move.flatten(0, 1), mode="bicubic")
        square = None
        if transfer is not None:
            square = self.weights_of(transfer, self.all_waves)[:, None].expand(-1, p, -1)
            square = turned_powers(square.flatten(0, 1), -angle.flatten()).unflatten(0, (-1, p))
        return back.unflatten(0, (-1, p)), square

    def norms(self, whitened: Tensor, ctf_square: Tensor | None) -> Tensor:
        """`(b,)` ‖C m‖² of whitened images, C² `(b, j)` being that of `brought_back`."""
        if ctf_square is None:
            return whitened.square().flatten(1).sum(1)
        return (self.powers(real_rows(self.all_waves(whitened)), self.all_waves) * ctf_square).sum(1)

    @torch.no_grad()
    def refined(
        self, batch: Batch, centre: Tensor, whitened: Tensor, angle: Tensor, move: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Angle, move and mean squared residual, refined against one whitened picture for each image."""
        images, transfer, _, _ = self.seen(batch, centre)
        own = torch.arange(len(images), device=images.device)
        found = refine(self, self.whitened(images), transfer, whitened, own, angle, move)
        return torch.remainder(found.angle + math.pi, 2 * math.pi) - math.pi, found.move, found.residual
