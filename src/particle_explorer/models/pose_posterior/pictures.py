"""The map as pictures: a grid of nodes, the decoder that draws them, and the frame they are reported in."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.models.base import ParticleModel
from particle_explorer.models.layers import SmoothDecoder
from particle_explorer.models.pose_posterior.window import DISC_EDGE_PX, Window
from particle_explorer.transforms import fourier_resize, place, rotation_matrix

_SIDE = {1: 24, 2: 12, 3: 7}
_SIDE_OF_CLASSES = {1: 24, 2: 18, 3: 11}
"""Nodes along each side by the dimensions of the map, where the settings leave it open."""
_COARSE_SIDE = {1: 8, 2: 4, 3: 3}
"""Of these, nodes along each side that a search over all poses goes by."""


def rotated(shift: Tensor, angle: Tensor) -> Tensor:
    """Shifts `(b, 2)` (y, x) turned by `(b,)` rad."""
    return torch.einsum("bij,bj->bi", rotation_matrix(angle), shift.flip(-1)).flip(-1)


def polynomial(z: Tensor, degree: int) -> Tensor:
    """`(b, d)` → `(b, m)` monomials of total degree up to `degree`, constant first."""
    if z.shape[1] == 1:
        return z ** torch.arange(degree + 1, device=z.device)
    powers = torch.tensor(
        [e for e in itertools.product(range(degree + 1), repeat=z.shape[1]) if sum(e) <= degree],
        device=z.device,
    )
    return (z[:, None] ** powers).prod(-1)


class ClassPictures(ParticleModel):
    """Class images on a grid, drawn in the box of the model or in that of the batch."""

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.latent_dim = d = config.latent_dim
        self.window = Window.of(data, config.shift_range_px)
        self.box = n = self.window.box
        self.px_per_px = self.window.px_per_px
        self.disc_px = min(data.diameter_px / self.px_per_px / 2, n / 2 - DISC_EDGE_PX - 0.5)
        self.classes = config.varies == "classes"
        self.gauge_degree = 4 if d <= 2 else 3
        side = config.nodes_per_dim or (_SIDE_OF_CLASSES if self.classes else _SIDE)[d]
        axis = torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)
        grid_z = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
        n_coarse = min(side, _COARSE_SIDE[d])
        pick = torch.linspace(0, side - 1, 2 * n_coarse + 1)[1::2].round().long().unique()
        coarse = torch.cartesian_prod(*[pick] * d).reshape(-1, d) @ side ** torch.arange(d - 1, -1, -1)
        self.register_buffer("grid_z", grid_z, persistent=False)
        self.register_buffer("coarse_z", grid_z[coarse], persistent=False)
        self.register_buffer("node_z", grid_z, persistent=False)
        self.register_buffer("coarse", coarse, persistent=False)
        self.register_buffer("kept", torch.ones(len(grid_z), dtype=torch.bool))
        n_terms = polynomial(torch.zeros(1, d), self.gauge_degree).shape[1]
        self.register_buffer("gauge", torch.zeros(n_terms, 3))
        self.grid_z: Tensor
        self.coarse_z: Tensor
        self.kept: Tensor
        """`(side^d,)` which points of the grid have a class."""
        self.node_z: Tensor
        """`(k, d)` those that have."""
        self.coarse: Tensor
        """Of these, the ones that a search over all poses goes by."""
        self.gauge: Tensor
        """`(m, 3)` turn and move of the frame along the map, by its `polynomial`."""
        self.decoder = SmoothDecoder(d, data.n_channels, n, self.disc_px)
        self.register_load_state_dict_post_hook(_kept_as_loaded)

    def keep(self, kept: Tensor) -> None:
        """Leave out the classes at the points of the grid that are not `kept` `(side^d,)`."""
        self.kept.copy_(kept)
        self.node_z = self.grid_z[self.kept]
        self.coarse = torch.cdist(self.coarse_z, self.node_z).argmin(1).unique()

    @property
    def spacing(self) -> float:
        """From one point of the grid to the next."""
        return 2 / max(1.0, len(self.grid_z) ** (1 / self.latent_dim) - 1)

    def nodes(self) -> Tensor:
        return self.node_z

    def frames(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (rad) and move (px yx) that bring the decoder's frame at `z` into the reported one."""
        terms = polynomial(z.clamp(-1, 1), self.gauge_degree) @ self.gauge
        return terms[:, 0], terms[:, 1:]

    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.in_box(self.decoder(z), *self.frames(z), angle, shift)

    def in_box(
        self, images: Tensor, turn: Tensor, move: Tensor, angle: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """Drawn images `(b, c, n, n)` in the box of the batch, brought into the reported frame by `turn` and
        `move` (px of the model), at the pose `angle` and `shift` (px of the batch)."""
        if self.window.wide_px:  # a particle may lie anywhere in the box, not only in the window
            whole = self.window.in_middle(images)
            angle = torch.zeros_like(turn) if angle is None else angle
            moved = rotated(move * self.px_per_px, angle)
            return place(whole, angle + turn, moved if shift is None else moved + shift, mode="bicubic")
        if angle is not None or shift is not None or bool(turn.any()) or bool(move.any()):
            angle = torch.zeros_like(turn) if angle is None else angle
            shift = torch.zeros_like(move) if shift is None else shift / self.px_per_px
            # placing the gauged reference = one turn by the sum of the angles
            moved = rotated(move, angle)
            images = place(images, angle + turn, moved + shift, mode="bicubic")
        return fourier_resize(images, self.data.box_px)


def _kept_as_loaded(model: ClassPictures, _: object) -> None:
    model.keep(model.kept)
