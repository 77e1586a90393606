"""What images are compared by: the noise that whitens them, the poses that are tried, rows and templates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.models.base import Batch
from particle_explorer.models.pose_posterior.pictures import ClassPictures
from particle_explorer.models.pose_posterior.seen import Seen, log_turns
from particle_explorer.models.pose_posterior.shells import filtered, smoothed
from particle_explorer.models.pose_posterior.window import DISC_EDGE_PX, turned_average
from particle_explorer.transforms import (
    FourierBand,
    fourier_radius,
    place,
    radius,
    real_rows,
    soft_disc,
    turning_matrix,
)

_JUNK_AT_FIRST = 0.02


class Comparison(ClassPictures):
    """Class pictures and what they are compared with images by; see the module's text."""

    uses_ctf = True

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        n = self.box
        self.psi_prior = math.radians(config.psi_prior_deg)
        self.uses_pose = self.psi_prior > 0
        self.n_versions = 2 if config.mirror else 1
        """How often each image is looked at: as it is, and mirrored."""
        spread = max(2.0, round(0.075 * n))
        if config.shift_range_px and not self.window.wide_px:
            spread = config.shift_range_px / self.px_per_px
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

        constant("angles", torch.arange(n_angles) * self.angle_step)
        constant("shifts", shifts)
        constant("mask", soft_disc(n, self.disc_px + 1, DISC_EDGE_PX))
        constant("radius", radius(n))
        constant("shell", fourier_radius(n).round().long().clamp(max=n // 2))
        self.register_buffer("noise_power", torch.ones(n // 2 + 1))
        self.register_buffer("noise_floor", torch.tensor(0.0))
        self.register_buffer("signal_power", torch.zeros(n // 2 + 1))
        self.register_buffer("shift_sd", torch.tensor(spread / 2))
        self.register_buffer("with_ctf", torch.tensor(config.use_ctf))
        self.register_buffer("junk_share", torch.tensor(_JUNK_AT_FIRST if config.junk else 0.0))
        self.angles: Tensor
        """`(r,)` rad"""
        self.shifts: Tensor
        """`(t, 2)` px of the model (y, x)"""
        self.mask: Tensor
        self.radius: Tensor
        self.shell: Tensor
        self.noise_power: Tensor
        self.noise_floor: Tensor
        self.signal_power: Tensor
        self.shift_sd: Tensor
        self.with_ctf: Tensor
        self.junk_share: Tensor
        self.heat = 1.0
        """Inverse temperature of the likelihood while fitting."""
        # turns of half a step move the rim by this much; shorter waves only blur the search
        rim = self.disc_px * self.angle_step / 2
        self.coarse_shells = max(8.0, n / (3 * rim))
        self.coarse_band = FourierBand(n, min(n // 2, self.coarse_shells))
        # beyond 0.4 / px turned templates hold more interpolation error than signal
        self.band = FourierBand(n, 0.4 * n)
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._places: tuple[tuple[object, ...], Tensor] | None = None
        """What a particle's place is found by: `(t, c, n, n // 2 + 1)` spectra in the box of the batch."""

    # ---- what is seen of a batch

    def seen(self, batch: Batch, centre: Tensor | None = None) -> Seen:
        """A batch as it is compared, about `centre` if the places of its particles are known already.

        An image that is not finite becomes 0.
        """
        images = batch.images
        ctf = None if batch.ctf is None or not self.with_ctf else batch.ctf
        if not bool(images.sum().isfinite()):
            good = images.flatten(1).isfinite().all(1)
            images = torch.where(good[:, None, None, None], images, 0.0)
        if centre is None:
            centre = self._find_places(images, ctf)
        transfer = None if ctf is None else self.window.transfer(ctf)
        turns = log_turns(self.angles, batch.pose, self.psi_prior) if self.psi_prior else None
        return Seen(self.window.cut(images, centre), transfer, centre, turns)

    @torch.no_grad()
    def _find_places(self, images: Tensor, ctf: Tensor | None) -> Tensor:
        """`(b, 2)` whole pixels from the centre of the box to where a round particle would fit best."""
        if not self.window.wide_px:
            return images.new_zeros(len(images), 2)
        return self.window.places(images, ctf, self._round_particles(), self._whitener_of_box().square())

    def look_for(self, images: Tensor | None) -> None:
        """Find places by these pictures `(t, c, n, n)` while there is no map, and with None by the map."""
        self._places = None if images is None else (("fixed",), self._round_spectra(images))

    def _round_particles(self) -> Tensor:
        """Spectra of the nodes, averaged over all turns: where a particle lies needs no angle."""
        key = (*(value._version for value in self.parameters()), str(self.noise_power.device))
        if self._places is None or self._places[0] not in (key, ("fixed",)):
            with torch.no_grad():
                nodes = self.decoder(self.node_z[self.coarse])
            self._places = key, self._round_spectra(nodes)
        return self._places[1]

    def _round_spectra(self, images: Tensor) -> Tensor:
        return self.window.round_spectra(turned_average(images) * self.mask)

    # ---- whitening

    def whitener(self) -> Tensor:
        """`(n, n // 2 + 1)` filter that makes the noise white with variance 1.

        It takes the mean of an image away: background normalisation leaves the noise of *its* mean in every
        pixel, many times that of the next shell, and no conformation or pose is told by it.
        """
        return self.noise_power.clamp_min(1e-8).rsqrt()[self.shell] * (self.shell > 0)

    def unwhitener(self) -> Tensor:
        return self.noise_power.clamp_min(1e-8).sqrt()[self.shell]

    def _whitener_of_box(self) -> Tensor:
        """`whitener` on the frequencies of the box of the batch; nothing beyond what the model sees."""
        shell = fourier_radius(self.data.box_px, self.noise_power.device) / self.data.box_px
        shell = (shell * self.window.side_px).round().long()
        inside = (shell > 0) & (shell <= 0.4 * self.box)
        return self.noise_power.clamp_min(1e-8).rsqrt()[shell.clamp(max=self.box // 2)] * inside

    def whitened(self, images: Tensor) -> Tensor:
        """Drawn images `(b, c, n, n)` as they are compared."""
        return filtered(images, self.whitener())

    def set_noise(self, power: Tensor) -> None:
        """Whiten by this power `(n // 2 + 1,)` of the noise in each shell."""
        self.noise_power.copy_(smoothed(torch.maximum(power, self.noise_floor).clamp_min(1e-6)))

    # ---- rows and templates

    def rows(self, images: Tensor, band: FourierBand, transfer: Tensor | None = None) -> Tensor:
        """`(b, c, n, n)` → `(b, c, q)` coefficients of the whitened images in one band, times their CTF."""
        rows: Tensor = band(images) * self.whitener().flatten()[band.index]
        return rows if transfer is None else rows * transfer.flatten(1)[:, None, band.index]

    def weights_of(self, transfer: Tensor, band: FourierBand) -> Tensor:
        """`(b, j)` such that ‖C m‖² = weights · `powers` of m, C² being smooth around each shell."""
        return transfer.flatten(1)[:, band.index].square() @ band.power_fit

    def powers(self, templates: Tensor, band: FourierBand) -> Tensor:
        """Real rows `(..., px)` → `(..., j)` power in each shell, and its two- and fourfold waves."""
        power = templates.unflatten(-1, (self.data.n_channels, -1, 2)).square().sum((-3, -1))
        return power @ band.power_basis.T

    def templates(self, nodes: Tensor, band: FourierBand) -> Tensor:
        """Node images `(k, c, n, n)` turned by each angle of the search and whitened: `(r, k, px)` rows."""
        k, c, n, _ = nodes.shape
        turned = _turned(nodes.reshape(k * c, n * n), self._turning()).view(-1, k, c, n, n)
        return real_rows(self.rows(turned, band))

    def _turning(self) -> tuple[Tensor, Tensor] | Tensor:
        """The turning matrix and its transpose, or the angles where a device has no sparse products."""
        if self.angles.device.type == "mps":
            return self.angles
        if self._matrices is None or self._matrices[0].device != self.angles.device:
            self._matrices = turning_matrix(self.box, self.angles)
        return self._matrices

    # ---- priors

    def log_prior(self, moves: Tensor) -> Tensor:
        """Log of the Gaussian prior of moves `(..., 2)`, up to its constant."""
        return -(moves.float() ** 2).sum(-1) / (2 * self.shift_sd**2)

    def log_prior_shifts(self) -> Tensor:
        return self.log_prior(self.shifts).log_softmax(0)


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


def _turned(images: Tensor, by: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """`(k, n²)` images turned by every angle: `(r, k, n²)`."""
    if isinstance(by, tuple):
        turned: Tensor = _Turn.apply(images, *by)
        return turned
    n = math.isqrt(images.shape[1])
    return place(images.view(1, -1, n, n), by, mode="bicubic").flatten(2)
