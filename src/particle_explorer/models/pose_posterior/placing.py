"""Places among known particles: what a map of different objects knows beside its classes.

Some of the particles that were fitted are kept, centred and small, with the places where they were laid out.
A particle lies where those lie that are most like it at any turn; the map's own posterior then says which
node near there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.models.neighbours import log_prior, place_among
from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.models.pose_posterior.shells import filtered
from particle_explorer.transforms import fourier_resize, real_rows, soft_disc, unplace

_SOFTENED = 0.3
"""Inverse temperature at which a particle is centred to be compared with others."""


class Placing(Comparison):
    """A comparison that may know some particles; see the module's text."""

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        n, c = self.box, data.n_channels
        self.small_px = min(n, max(16, 2 * math.ceil(1.25 * self.coarse_shells)))
        """Side of the images that neighbours are compared in."""
        self.register_buffer("known", torch.zeros(0, c * self.small_px**2, dtype=torch.float16))
        self.register_buffer("known_place", torch.zeros(0, self.latent_dim))
        self.register_buffer("centring", torch.zeros(0, c, n, n))
        self.known: Tensor
        """`(q, px)` some of the particles that were fitted, centred, in the pixels that neighbours are
        compared in; none where the map goes by no neighbours."""
        self.known_place: Tensor
        """`(q, d)` where they were laid out."""
        self.centring: Tensor
        """`(1, c, n, n)` round picture that they were centred by."""

    def centred(self, seen: Seen) -> Tensor:
        """`(b, px)` images as neighbours are compared: whitened, centred by a round picture, and small.

        Its mean position under a softened posterior turns with the image; that of a picture that is not round
        depends on how it happens to fit.
        """
        rows = self.rows(seen.images, self.coarse_band, seen.transfer)
        picture = real_rows(self.rows(self.centring, self.coarse_band))[0]
        back = self.coarse_band.phases(-self.shifts)
        score = torch.stack([real_rows(rows * phase) @ picture for phase in back], 1)
        move = (_SOFTENED * score + self.log_prior_shifts()).softmax(1) @ self.shifts.float()
        factor = 1 / self.unwhitener()
        if seen.transfer is not None:
            factor = factor * seen.transfer[:, None]
        images = unplace(filtered(seen.images, factor), None, move, mode="bicubic")
        return fourier_resize(images * self.mask, self.small_px).flatten(1)

    def among_neighbours(self, seen: Seen) -> Tensor:
        """`(b, d)` where images lie among the known ones that are most like them at any turn."""
        disc = soft_disc(self.small_px, self.disc_px * self.small_px / self.box, device=self.known.device)
        small = self.centred(seen).unflatten(1, (-1, *disc.shape))
        return place_among(small, disc, self.angles, self.known.float(), self.known_place, self.spacing)

    def log_prior_nodes(self, among: Tensor) -> Tensor:
        """`(b, k)` log prior of the nodes, against an even one, for images that lie there `(b, d)`."""
        return log_prior(among, self.node_z, self.spacing)

    def about_node(self, z: Tensor, among: Tensor) -> Tensor:
        """Positions `(b, d)` of which the posterior says the node, and the neighbours where about it."""
        return z + (among - z).clamp(-self.spacing / 2, self.spacing / 2)
