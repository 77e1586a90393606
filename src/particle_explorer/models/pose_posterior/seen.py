"""A batch as it is compared: each image in its window, with its CTF, as it is and mirrored."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.files import UserError


class Seen(NamedTuple):
    """A batch as the model compares it."""

    images: Tensor
    """`(b, c, n, n)` in the box of the model"""
    transfer: Tensor | None
    """`(b, n, n // 2 + 1)` CTF"""
    centre: Tensor
    """`(b, 2)` whole pixels of the batch (y, x) from the centre of the box to that of what is compared"""
    turns: Tensor | None = None
    """`(b, r)` log prior of each angle of the search; None where all are alike"""

    def some(self, index: Tensor) -> Seen:
        """The images at these positions."""
        return Seen._make(None if field is None else field[index] for field in self)

    def mirrored(self) -> Seen:
        """The same images mirrored, x → -x about pixel n // 2; poses found in them are those of mirror
        images."""
        n = self.images.shape[-1]
        images = self.images.flip(-1).roll(1 - n % 2, -1)
        # a CTF has a centre of symmetry: (y, -x) is (-y, x), which the half spectrum holds
        transfer = None if self.transfer is None else self.transfer.flip(-2).roll(1, -2)
        turns = None if self.turns is None else self.turns.flip(1).roll(1, 1)
        return Seen(images, transfer, self.centre, turns)

    def versions(self, n_versions: int) -> Seen:
        """Each image as often as it is looked at, `(b · n_versions, …)`, its versions one after the other."""
        if n_versions == 1:
            return self
        other = self.mirrored()
        transfer = None
        if self.transfer is not None and other.transfer is not None:
            transfer = _by_turns(self.transfer, other.transfer)
        turns = None
        if self.turns is not None and other.turns is not None:
            turns = _by_turns(self.turns, other.turns)
        return Seen(_by_turns(self.images, other.images), transfer, self.centre, turns)


def _by_turns(first: Tensor, second: Tensor) -> Tensor:
    """`(b, ...)` and `(b, ...)` → `(2 b, ...)`: the first of one, the first of the other, and so on."""
    return torch.stack([first, second], 1).flatten(0, 1)


def log_turns(angles: Tensor, pose: Tensor | None, prior_rad: float) -> Tensor:
    """`(b, r)` log prior of the angles: about those that the particles carry, either way round.

    A filament looks alike from both ends when it is picked; RELION's psi prior is bimodal likewise.
    """
    if pose is None:
        raise UserError(
            "--model.psi-prior-deg: not all particles carry an in-plane angle to stay near to"
            " (rlnAnglePsi, rlnAnglePsiPrior, or the pose of a cryoSPARC 2D alignment); leave it at 0"
        )
    away = angles - pose[:, :1]
    away = torch.remainder(away + math.pi / 2, math.pi) - math.pi / 2
    return (-(away**2) / (2 * prior_rad**2)).log_softmax(1)
