"""Network pieces that models share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.special import jn_zeros, jv
from torch import Tensor, nn
from torch.nn import functional

from particle_explorer.configs import Likelihood
from particle_explorer.files import UserError
from particle_explorer.models.base import Batches, Step
from particle_explorer.transforms import soft_disc

DIRECT_NS, SPECTRUM_NS = 0.02, 9.0
"""What a function costs per pixel and shift, and per pixel of its Fourier transform, on one core."""
LEAST_LOG_VARIANCE = -6.0
"""A learned variance stops here; a pixel that is the same in all images would drive it on for ever."""


def exact(device: torch.device) -> torch.autocast:
    """No half precision inside: it would move pixels and poses by a tenth of a pixel."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def fast_products(precision: str) -> Iterator[None]:
    """float32 products through bf16 where the hardware has it (sums and results stay float32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gaussian_kl(mean: Tensor, log_sd: Tensor) -> Tensor:
    """KL of N(mean, sd²) from N(0, 1), elementwise."""
    return -log_sd + 0.5 * (torch.exp(2 * log_sd) + mean**2 - 1)


class PixelNoise(nn.Module):
    """How what a network draws is compared with pixels: `(..., c · width)` drawn for `(..., c)` pixels.

    `gaussian` has variance 1, `gaussian-learned` a log-variance after the means (`width` 2), `bernoulli`
    takes what is drawn as logits of grey values from 0 to 1.
    """

    def __init__(self, likelihood: Likelihood, n_channels: int, *, non_negative: bool = False) -> None:
        super().__init__()
        self.likelihood: Likelihood = likelihood
        self.n_channels = n_channels
        self.non_negative = non_negative
        self.n_drawn = n_channels * (2 if likelihood == "gaussian-learned" else 1)

    def mean(self, drawn: Tensor) -> Tensor:
        """The expected pixels `(..., c)`."""
        drawn = drawn[..., : self.n_channels].float()
        if self.likelihood == "bernoulli":
            return torch.sigmoid(drawn)
        return functional.softplus(drawn) if self.non_negative else drawn

    def forward(self, drawn: Tensor, pixels: Tensor) -> Tensor:
        """Minus the log-likelihood of `(..., c)` pixels, without its constant."""
        if self.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(drawn.float(), pixels, reduction="none")
        return self.of_mean(self.mean(drawn), drawn, pixels)

    def of_mean(self, mean: Tensor, drawn: Tensor, pixels: Tensor) -> Tensor:
        """The same for Gaussian noise, of a mean that was changed since it was drawn."""
        squared = (pixels - mean).square()
        if self.likelihood == "gaussian":
            return 0.5 * squared
        log_variance = drawn[..., self.n_channels :].float().clamp_min(LEAST_LOG_VARIANCE)
        return 0.5 * (squared * torch.exp(-log_variance) + log_variance)

    def check(self, batches: Batches) -> Iterator[Step]:
        """Refuse images that the likelihood cannot hold for, before anything is fitted."""
        if self.likelihood != "bernoulli":
            return
        n = len(batches)
        for start in range(0, n, 1000):
            images = batches.take(torch.arange(start, min(start + 1000, n))).images
            low, high = float(images.min()), float(images.max())
            if low < -0.01 or high > 1.01:
                raise UserError(
                    f"--model.likelihood bernoulli is for grey values from 0 to 1, these images go from"
                    f" {low:.3g} to {high:.3g}; choose gaussian, or prepare the images with"
                    " --preprocess.background none if their file has such grey values"
                )
            yield Step("checking grey values", min(1.0, (start + 1000) / n))


def disc_pixels(box_px: int, radius_px: float) -> Tensor:
    """`(p,)` positions, in the flattened image, of the pixels within a radius of pixel n // 2."""
    line = torch.arange(box_px) - box_px // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.nonzero((x**2 + y**2 <= radius_px**2).reshape(-1))[:, 0]


def random_pixels(
    disc: Tensor, n_images: int, share: float, drawn: Callable[..., Tensor] | None = None
) -> Tensor:
    """`(b, p)` members of `disc`, a share of them for each image, all equally likely.

    Each image has its own window of one shuffled order. `drawn` is `ParticleModel.drawn`.
    """

    def places(*size: int, device: torch.device | None) -> Tensor:
        return torch.randint(len(disc), size, device=device)

    count = max(1, math.ceil(share * len(disc)))
    if count == len(disc):
        return disc.expand(n_images, -1)
    order = disc[torch.randperm(len(disc), device=disc.device)]
    start = (places if drawn is None else partial(drawn, places))(n_images, 1, device=disc.device)
    return order[(start + torch.arange(count, device=disc.device)) % len(disc)]


def exponential(*size: int, device: torch.device | None) -> Tensor:
    """Exponential random numbers, for `ParticleModel.drawn`."""
    return torch.empty(*size, device=device).exponential_()


# ---------------------------------------------------------------------- group convolution


def bessel_zeros(radius_px: float, n_functions: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Orders (m ≥ 0) and zeros of the lowest Fourier-Bessel functions that a disc of pixels can hold.

    At least one and at most `n_functions` real functions: one of m = 0, two (cosine and sine) of m > 0.
    """
    # a little below the Nyquist frequency; about x²/4 functions have zeros below x
    highest = min(0.9 * np.pi * radius_px, 2 * math.sqrt(n_functions) + 10)
    orders, zeros = [], []
    for m in range(int(highest) + 1):
        found = jn_zeros(m, int(highest / np.pi) + 2)
        found = found[found <= highest]
        orders += [m] * len(found)
        zeros += list(found)
    by_frequency = np.argsort(zeros, kind="stable")
    order, zero = np.asarray(orders)[by_frequency], np.asarray(zeros)[by_frequency]
    fits = np.cumsum(np.where(order == 0, 1, 2)) <= max(1, n_functions)
    return order[fits], zero[fits]


class LiftingConvolution(nn.Module):
    """Images → responses of turned kernels at whole-pixel shifts: the first layer of a group convolution.

    A kernel is a sum of Fourier-Bessel functions on a disc, band-limited and 0 at its edge. To turn it by any
    angle is to turn each pair of coefficients, exactly, so no kernel is resampled and no corner is lost. The
    image meets the functions, which are few and fixed, and the turned kernels meet those responses: one
    product instead of a correlation per kernel and turn, and no gradient ever passes a correlation.

    Parameters
    ----------
    box_px, n_channels
        Images are `(b, c, n, n)`.
    kernel_px
        Diameter of the disc, at most the box.
    n_turns
        Kernels are placed at the angles 2 pi i / n_turns.
    shift_range_px
        Shifts are the whole pixels within this radius, `shifts` `(s, 2)` (y, x).
    by_spectrum
        Whether responses are found by Fourier transforms; None takes the faster way.
    """

    shifts: Tensor
    angles: Tensor
    _basis: Tensor
    """`(p, f)` functions on the pixels of the disc, each of length 1"""
    _spectrum: Tensor
    """the same as conjugate Fourier transforms `(f, N, N // 2 + 1)`; empty where it is not the faster way"""
    _where: Tensor
    """`(s, p)` pixels of the padded image under the disc at each shift; empty where spectra are used"""
    _cell: Tensor
    """`(s,)` positions of the shifts in the flattened `(N, N)` correlation"""
    _partner: Tensor
    _cos: Tensor
    _sin: Tensor

    def __init__(
        self,
        box_px: int,
        n_channels: int,
        n_kernels: int,
        kernel_px: int,
        n_turns: int,
        shift_range_px: int,
        n_functions: int,
        by_spectrum: bool | None = None,
    ) -> None:
        super().__init__()
        self.box_px, self.n_turns, self.shift_range_px = box_px, n_turns, shift_range_px
        line = torch.arange(-shift_range_px, shift_range_px + 1)
        cells = torch.cartesian_prod(line, line)
        self.register_buffer("shifts", cells[cells.square().sum(1) <= (shift_range_px + 0.5) ** 2], False)
        self.register_buffer("angles", 2 * math.pi * torch.arange(n_turns) / n_turns, False)
        pixels, basis, order, is_sine = _fourier_bessel(kernel_px, n_functions)
        self.n_functions = basis.shape[1]
        n_in = n_channels * self.n_functions
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(
            torch.empty(n_kernels, n_channels, self.n_functions).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(n_kernels).uniform_(-bound, bound))
        # a cos m φ + b sin m φ turned by α has (a cos m α - b sin m α, a sin m α + b cos m α)
        partner = torch.arange(self.n_functions) + torch.where(order == 0, 0, torch.where(is_sine, -1, 1))
        turn = self.angles[:, None] * order
        self.register_buffer("_partner", partner, False)
        self.register_buffer("_cos", turn.cos(), False)
        self.register_buffer("_sin", torch.where(is_sine, turn.sin(), -turn.sin()), False)
        self.register_buffer("_basis", basis, False)
        reach = int(pixels.abs().max()) + shift_range_px
        n_fft = next_fast_len(max(box_px, box_px // 2 + reach + 1), real=True)
        direct = len(self.shifts) * len(pixels) * DIRECT_NS
        self.by_spectrum = direct > n_fft**2 * SPECTRUM_NS if by_spectrum is None else by_spectrum
        self._pad = max(0, reach - (box_px - 1) // 2)
        side = box_px + 2 * self._pad
        where = torch.zeros(0, len(pixels), dtype=torch.int64)
        spectrum = torch.zeros(0)
        if not self.by_spectrum:  # all shifts times all pixels are gigabytes in a large box
            flat = torch.tensor([side, 1])
            first = (self.shifts + box_px // 2 + self._pad) @ flat
            where = first[:, None] + pixels @ flat
        else:
            functions = torch.zeros(self.n_functions, n_fft, n_fft)
            functions[:, pixels[:, 0] % n_fft, pixels[:, 1] % n_fft] = basis.T
            spectrum = torch.fft.rfft2(functions).conj().resolve_conj()
        self.register_buffer("_where", where, False)
        self.register_buffer("_spectrum", spectrum, False)
        self.n_fft = n_fft
        centre = self.shifts + box_px // 2
        self.register_buffer("_cell", (centre[:, 0] % n_fft) * n_fft + centre[:, 1] % n_fft, False)

    @torch.no_grad()
    def responses(self, images: Tensor) -> Tensor:
        """Inner products `(b, s, c · f)` of the images with the functions at every shift."""
        b, c = images.shape[:2]
        planes = images.flatten(0, 1)
        if self.by_spectrum:
            with exact(images.device):
                size = self.n_fft, self.n_fft
                spectrum = torch.fft.rfft2(planes.float(), s=size)
                maps = (torch.fft.irfft2(one * self._spectrum, s=size) for one in spectrum)
                every = [correlation.flatten(1)[:, self._cell] for correlation in maps]
            found = torch.stack(every).mT
        else:
            dtype = images.dtype
            if torch.is_autocast_enabled(images.device.type):
                dtype = torch.get_autocast_dtype(images.device.type)
            padded = functional.pad(planes, [self._pad] * 4).flatten(1).to(dtype)
            found = padded[:, self._where] @ self._basis.to(dtype)
        return found.unflatten(0, (b, c)).movedim(1, 2).flatten(2)

    def turned(self) -> Tensor:
        """The kernels' coefficients at every angle, `(r, k, c · f)`."""
        cos, sin = self._cos[:, None, None], self._sin[:, None, None]
        return (self.weight * cos + self.weight[..., self._partner] * sin).flatten(2)

    def forward(self, images: Tensor) -> Tensor:
        """`(b, c, n, n)` → `(b, s, r, k)`."""
        weight = self.turned().flatten(0, 1)
        bias = self.bias.repeat(self.n_turns)
        return functional.linear(self.responses(images), weight, bias).unflatten(2, (self.n_turns, -1))


def _fourier_bessel(kernel_px: int, n_functions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels `(p, 2)` (y, x) of a disc about its centre, functions `(p, f)` on them, their orders `(f,)` and
    whether they are sines. The polar angle turns as poses do, from x towards y (down)."""
    radius = kernel_px / 2
    line = torch.arange(-(kernel_px // 2), kernel_px // 2 + 1)
    pixels = torch.cartesian_prod(line, line)
    pixels = pixels[pixels.square().sum(1) < radius**2]
    y, x = pixels.double().numpy().T
    phi = np.arctan2(y, x)
    # Bessel functions take their time, and eight pixels or more share a radius
    r, of_pixel = np.unique(np.hypot(x, y) / radius, return_inverse=True)
    columns, orders, sines = [], [], []
    for m, zero in zip(*bessel_zeros(radius, n_functions), strict=True):
        radial = jv(m, zero * r)[of_pixel]
        for wave in (np.cos, np.sin)[: 1 if m == 0 else 2]:
            column = radial * wave(m * phi)
            columns.append(column / np.linalg.norm(column))
            orders.append(int(m))
            sines.append(wave is np.sin)
    basis = torch.from_numpy(np.stack(columns, 1)).float()
    return pixels, basis, torch.tensor(orders), torch.tensor(sines)


class SmoothDecoder(nn.Module):
    """Latent coordinates to images through a small MLP and transposed convolutions.

    `z` enters plainly (no Fourier features): the smoothness of the network in `z` is the prior that keeps
    neighbours on a map alike. The image is drawn inside a soft disc, on top of one `base` image that all
    of the map share.

    Parameters
    ----------
    latent_dim, n_channels, box_px
        `(b, latent_dim)` → `(b, n_channels, box_px, box_px)`, any even or odd box.
    radius_px
        Radius of the disc; its edge falls to 0 within two further pixels.
    """

    def __init__(
        self,
        latent_dim: int,
        n_channels: int,
        box_px: int,
        radius_px: float,
        hidden: int = 128,
        width: int = 16,
    ) -> None:
        super().__init__()
        n_up = 2 if box_px <= 96 else 3
        small = -(-box_px // 2**n_up)
        self.mlp = nn.Sequential(
            nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 2 * width * small**2), nn.Unflatten(1, (2 * width, small, small)), nn.SiLU(),
        )  # fmt: skip
        convolutions: list[nn.Module] = []
        channels = 2 * width
        for _ in range(n_up):
            convolutions += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.SiLU()]
            channels = width
        self.convolutions = nn.Sequential(*convolutions, nn.Conv2d(channels, n_channels, 3, padding=1))
        self.base = nn.Parameter(torch.zeros(n_channels, box_px, box_px))
        self.box_px = box_px
        self.register_buffer("disc", soft_disc(box_px, radius_px), persistent=False)
        self.disc: Tensor

    def forward(self, z: Tensor) -> Tensor:
        image = self.convolutions(self.mlp(z))
        cut = (image.shape[-1] - self.box_px) // 2
        image = image[..., cut : cut + self.box_px, cut : cut + self.box_px]
        return (image + self.base) * self.disc
