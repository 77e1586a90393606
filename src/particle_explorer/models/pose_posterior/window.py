"""The part of an image that is compared: the box of a batch, the window in it, and the box of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from particle_explorer.configs import DataSpec
from particle_explorer.models.pose_posterior.blocks import block
from particle_explorer.models.pose_posterior.shells import twice
from particle_explorer.transforms import fourier_resize, radius

DISC_EDGE_PX = 2.0
_MAX_BOX_PX = 96
"""The map is drawn and compared in at most this box; larger images are cropped in Fourier space."""
_NARROW = 0.12
"""Shifts within this share of the box are searched at once; beyond, a particle's place is found first."""


@dataclass(frozen=True)
class Window:
    """Sides of what is compared; see the module's text."""

    box_px: int
    """Side of the images of a batch"""
    side_px: int
    """Side of what is cut out about a particle's place, in pixels of the batch"""
    box: int
    """The same in pixels of the model: large boxes are cropped in Fourier space"""
    wide_px: float
    """Range, in pixels of the batch, in which a particle's place is found first; 0 where it is about the
    centre"""

    @classmethod
    def of(cls, data: DataSpec, shift_range_px: float) -> Window:
        """What the settings ask for."""
        wide_px = shift_range_px if shift_range_px > _NARROW * data.box_px else 0.0
        side_px = data.box_px
        if wide_px:
            side_px = min(data.box_px, 2 * math.ceil(data.diameter_px / 2 + 2 * DISC_EDGE_PX))
        return cls(data.box_px, side_px, min(side_px, _MAX_BOX_PX), wide_px)

    @property
    def px_per_px(self) -> float:
        """Pixels of the batch per pixel of the model."""
        return self.side_px / self.box

    def cut(self, images: Tensor, centre: Tensor) -> Tensor:
        """What lies about each particle's place, `(b, 2)` whole pixels (y, x), in the box of the model."""
        if self.wide_px:
            box, size = self.box_px, self.side_px
            at = torch.arange(size, device=images.device) - size // 2 + box // 2
            y, x = ((at + centre[:, i, None].long()).remainder(box) for i in (0, 1))
            image = torch.arange(len(images), device=images.device)[:, None, None]
            images = images.movedim(1, -1)[image, y[:, :, None], x[:, None, :]].movedim(-1, 1)
        return fourier_resize(images, self.box)

    def in_middle(self, images: Tensor) -> Tensor:
        """Images in the box of the model → in the middle of the box of the batch, 0 around."""
        whole = fourier_resize(images, self.side_px)
        low = self.box_px // 2 - self.side_px // 2
        high = self.box_px - self.side_px - low
        return F.pad(whole, (low, high, low, high))

    def transfer(self, ctf: Tensor) -> Tensor:
        """CTF of the box of the batch → `(b, n, n // 2 + 1)` in the box of the model."""
        n, m = ctf.shape[1], self.box
        if n == m == self.side_px:
            return ctf
        if self.side_px != n:  # other frequencies: between those of the batch
            y = torch.fft.fftfreq(m, device=ctf.device) * m / self.side_px * n
            x = torch.fft.rfftfreq(m, device=ctf.device) * m / self.side_px * n
            low_y, low_x = y.floor(), x.floor().clamp(max=n // 2 - 1)
            part_y, part_x = (y - low_y)[:, None], x - low_x
            i, j = low_y.long(), low_x.long()
            below, above = ctf[:, i % n], ctf[:, (i + 1) % n]
            along = (1 - part_y) * below + part_y * above
            return (1 - part_x) * along[:, :, j] + part_x * along[:, :, j + 1]
        rows = torch.cat([torch.arange((m + 1) // 2), torch.arange(n - m // 2, n)])
        return ctf[:, rows.to(ctf.device), : m // 2 + 1]

    def round_spectra(self, images: Tensor) -> Tensor:
        """`(t, c, n, n)` in the box of the model → spectra in the box of the batch, for `places`."""
        return torch.fft.rfft2(torch.fft.ifftshift(self.in_middle(images), dim=(-2, -1)))

    def places(self, images: Tensor, ctf: Tensor | None, spectra: Tensor, whitening: Tensor) -> Tensor:
        """`(b, 2)` whole pixels (y, x) from the centre of the box to where a round picture fits best.

        `spectra` are those of some round pictures, `whitening` is the square of the filter that makes the
        noise white, on the frequencies of the box of the batch.
        """
        box = self.box_px
        found = []
        step = block(4 * len(spectra) * box * box, images.device, 4)
        far = box // 2 - torch.arange(box, device=images.device)
        allowed = far[:, None].square() + far.square() <= self.wide_px**2
        for i in range(0, len(images), step):
            with_ctf = None if ctf is None else ctf[i : i + step, None]
            spectrum = torch.fft.rfft2(images[i : i + step]) * whitening
            norm = spectra.abs().square() * whitening / box**2
            if with_ctf is None:
                norm = twice(norm).sum((1, 2, 3))
            else:
                spectrum = spectrum * with_ctf
                norm = torch.einsum("bcyx,tcyx->bt", with_ctf.square(), twice(norm))
            scores = torch.fft.irfft2((spectrum[:, None] * spectra.conj()).sum(2), s=(box, box))
            best = (scores - 0.5 * norm[..., None, None]).amax(1)
            place_at = torch.where(allowed, best, -torch.inf).flatten(1).argmax(1)
            found.append(torch.stack([place_at // box, place_at % box], -1) - box // 2)
        return torch.cat(found).to(images.dtype)


def turned_average(images: Tensor) -> Tensor:
    """`(t, c, n, n)` averaged over all turns about their centres."""
    n = images.shape[-1]
    ring = radius(n, images.device).round().long().clamp(max=n // 2)
    count = torch.bincount(ring.flatten())
    sums = images.new_zeros(*images.shape[:2], len(count))
    return (sums.index_add_(-1, ring.flatten(), images.flatten(2)) / count)[..., ring]
