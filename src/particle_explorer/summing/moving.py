"""Blocks of images moved back by splines and added up, on whatever torch computes on.

What `spectra.Grid` does with one image after the other, done with a block of them: the transform of an image
is cut to the disc inside Nyquist, multiplied by its CTF, padded, divided by the response of the cubic
B-spline, and the spline is read at the turned and shifted positions, in four bilinear readings that weigh
what sixteen taps weigh (Sigg & Hadwiger 2005). Sums are products with a small matrix of weights, so that no
two threads of the device add to one number and a result is the same every time. Nothing here waits for the
device, and all numbers on it are of single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from particle_explorer.ctf import phase_pictures
from particle_explorer.spectra import Grid, outside_circle
from particle_explorer.summing.work import Sums, Work


class Weights(NamedTuple):
    """How much each image of a block counts in some of the sums."""

    where: Tensor
    """`(u,)` which sums, each once"""
    weight: Tensor
    """`(u, b)`"""
    noise: Tensor
    """`(u, b)` weight² times the share of the average that the image covers"""


class Powers(NamedTuple):
    """Which images of a block say how much power their averages hold."""

    some: Tensor
    """`(s,)` of the images"""
    where: Tensor
    """`(v,)` averages, each once"""
    counts: Tensor
    """`(v, s)`"""


class Phase(NamedTuple):
    """The CTFs of a block, see `TableCTF.phase`."""

    in_image: Tensor
    """`(b, 4)`"""
    turned: Tensor
    """`(b, 4)` in the frame of the reference"""
    added: Tensor
    """`(b, 1)`"""
    flipped: Tensor
    """`(b, 1)` 1 where the image carries |CTF|"""
    untouched: Tensor
    """`(b, 1)` 1 where the image was multiplied by its CTF already"""


class Block(NamedTuple):
    """What is known of a block beside its images; in memory that the device can fetch from."""

    rows: NDArray[np.int64]
    """`(b,)` of the session"""
    box: int
    turn: Tensor
    """`(b, 2, 2)` acting on (y, x): a pixel of the average → one of the spline's grid"""
    origin: Tensor
    """`(b, 2)`"""
    sign: Tensor
    """`(b, 1)`"""
    phase: Phase | None
    weights: list[Weights]
    powers: Powers | None
    half: NDArray[np.int64]
    """`(k,)` sums of the members, 2 · average + half"""
    counted: NDArray[np.float64]
    """`(k, 3)` their w, w² and w² · covered"""
    powered: NDArray[np.int64]
    """Averages of the members whose power is taken, with repetition"""


class Mover:
    """Moves blocks of images back and adds them to the sums of the averages `first` … `last - 1`."""

    def __init__(self, work: Work, first: int, last: int, channels: int, device: torch.device) -> None:
        m, n_sums = work.m, 2 * (last - first)
        self.work, self.first, self.channels, self.device = work, first, channels, device
        rings = np.asarray(work.rings.toarray(), dtype=np.float32).T
        self.rings = self._sent(rings)
        self.boxes: dict[int, tuple[Tensor, Tensor]] = {}
        for box in np.unique(work.boxes).tolist():
            grid, outside = Grid(box, m), outside_circle(box).astype(np.float32).reshape(-1)
            inside = grid.disc * np.float32((m / box) ** 2)
            self.boxes[box] = self._sent(outside / max(1.0, outside.sum())), self._sent(inside)
        self.padded_px = p = grid.padded
        self.prefilter = self._sent(grid.prefilter)
        self.pictures = self._sent(phase_pictures(m))
        self.padded = torch.zeros(0, channels, p, p // 2 + 1, dtype=torch.complex64, device=device)
        self.images = torch.zeros(n_sums, channels * m * m, device=device)
        n_gains = n_sums if work.mode == "wiener" else 0
        self.gain = torch.zeros(n_gains, m * (m // 2 + 1), device=device)
        self.noise_gain = torch.zeros_like(self.gain)
        self.power = torch.zeros(last - first, m // 2 + 1, device=device)
        self.power_gain = torch.zeros(2, last - first, m // 2 + 1, device=device)
        self.weight = np.zeros((n_sums, 3))
        self.powered = np.zeros(last - first)

    def _sent(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def add(self, block: Block, images: Tensor) -> Tensor:
        """Add the images `(b, c, n, n)`, which are changed; returns `(b,)` whether they hold NaN or ∞.

        The host waits for nothing here.
        """
        work, m, b = self.work, self.work.m, len(block.rows)
        outside, inside = self.boxes[block.box]
        block = _on(block, self.device)
        images -= (images.flatten(2) @ outside)[..., None, None]
        found = torch.fft.rfft2(images)
        bad = ~torch.isfinite(found[:, :, 0, 0].real).all(1)
        if block.box != m:
            low = found[..., : (m + 1) // 2, : m // 2 + 1]
            found = torch.cat([low, found[..., block.box - m // 2 :, : m // 2 + 1]], -2)
        factors = inside * block.sign[..., None]
        gain = None
        if block.phase is not None:
            phase, pictures = block.phase, self.pictures
            ctf = _ctf(phase.in_image, phase, pictures).view(b, m, -1)
            if work.mode == "wiener":
                gain = _ctf(phase.turned, phase, pictures).square_()
            else:
                ctf = ctf.sign_()
            untouched = phase.untouched[..., None]
            factors = factors * (untouched + (1 - untouched) * ctf)
        if block.powers is not None:
            self._add_powers(block, block.powers, found, inside, gain)
        self._spread(found * (factors * self.prefilter)[:, None])
        coefficients = torch.fft.irfft2(self.padded[:b], s=(self.padded_px, self.padded_px))
        aligned = _read_spline(coefficients, block.turn, block.origin, m).view(b, -1)
        for part in block.weights:
            self.images.index_add_(0, part.where, part.weight @ aligned)
            if gain is not None:
                self.gain.index_add_(0, part.where, part.weight @ gain)
                self.noise_gain.index_add_(0, part.where, part.noise @ gain)
        return bad

    def count(self, block: Block) -> None:
        """What is summed on the host: weights, and whose power was taken."""
        np.add.at(self.weight, block.half, block.counted)
        np.add.at(self.powered, block.powered, 1)

    def _spread(self, found: Tensor) -> None:
        """Lay transforms `(b, c, m, m // 2 + 1)` into the padded ones, of which the rest stays 0."""
        b, m = len(found), self.work.m
        if b > len(self.padded):
            self.padded = self.padded.new_zeros(b, *self.padded.shape[1:])
        upper = (m + 1) // 2
        self.padded[:b, :, :upper, : m // 2 + 1] = found[:, :, :upper]
        self.padded[:b, :, self.padded_px - m // 2 :, : m // 2 + 1] = found[:, :, upper:]

    def _add_powers(
        self, block: Block, powers: Powers, found: Tensor, inside: Tensor, gain: Tensor | None
    ) -> None:
        some = torch.view_as_real(found[powers.some] * inside).square().sum((1, -1))
        self.power.index_add_(0, powers.where, powers.counts @ (some.flatten(1) @ self.rings))
        if gain is None or block.phase is None:
            return
        squared, untouched = gain[powers.some], block.phase.untouched[powers.some]
        held = (untouched * squared**2 + (1 - untouched) * squared, untouched * squared + (1 - untouched))
        for total, one in zip(self.power_gain, held, strict=True):
            total.index_add_(0, powers.where, powers.counts @ (one @ self.rings))

    def sums(self) -> Iterator[Sums]:
        """One average after the other, fetched from the device."""
        m, h = self.work.m, self.work.m // 2 + 1
        power, power_gain = (x.cpu().numpy().astype(np.float64) for x in (self.power, self.power_gain))
        for i in range(len(self.power)):
            one, own = Sums(self.channels, m, False), slice(2 * i, 2 * i + 2)
            one.images = self.images[own].cpu().numpy().reshape(2, self.channels, m, m)
            one.weight = self.weight[own]
            one.power = power[i]
            if self.work.mode == "wiener":
                one.gain = self.gain[own].cpu().numpy().reshape(2, m, h)
                one.noise_gain = self.noise_gain[own].cpu().numpy().reshape(2, m, h)
                one.power_gain = self.channels * power_gain[:, i]
            else:
                counts = np.asarray(self.work.rings.sum(1)).ravel() * self.channels
                one.power_gain = np.broadcast_to(self.powered[i] * counts, (2, h))
            yield one


def _on(block: Block, device: torch.device) -> Block:
    """`block` with its tensors on the device."""

    def sent(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=device.type == "cuda")
        if isinstance(x, list):
            return [sent(one) for one in x]
        return type(x)(*map(sent, x)) if isinstance(x, Weights | Powers | Phase) else x

    return Block(*map(sent, block))


def _ctf(factors: Tensor, phase: Phase, pictures: Tensor) -> Tensor:
    """`(b, m * (m // 2 + 1))`, as the image carries it."""
    ctf = (factors @ pictures).add_(phase.added).sin_()
    return torch.where(phase.flipped > 0, ctf.abs(), ctf)


def _read_spline(coefficients: Tensor, turn: Tensor, origin: Tensor, m: int) -> Tensor:
    """`(b, c, p, p)` coefficients of splines → `(b, c, m, m)`, read at turned positions; 0 outside.

    Beside the edges coefficients are mirrored, as `scipy.ndimage` has them.
    """
    p = coefficients.shape[-1]
    line = torch.arange(m, dtype=torch.float32, device=coefficients.device)
    at = [
        turn[:, i, 0, None, None] * line[:, None]
        + turn[:, i, 1, None, None] * line
        + origin[:, i, None, None]
        for i in range(2)
    ]
    inside = torch.ones_like(at[0], dtype=torch.bool)
    for one in at:
        inside &= (one >= 0) & (one <= p - 1)
    rows, columns = (_two_readings(one, p) for one in at)
    rows = [(share * inside, y) for share, y in rows]
    total: Tensor | None = None
    for share_y, y in rows:
        for share_x, x in columns:
            read = functional.grid_sample(
                coefficients,
                torch.stack([x, y], -1),
                mode="bilinear",
                padding_mode="reflection",
                align_corners=True,
            )
            read *= (share_y * share_x)[:, None]
            total = read if total is None else total.add_(read)
    assert total is not None
    return total


def _two_readings(at: Tensor, p: int) -> list[tuple[Tensor, Tensor]]:
    """Shares and positions of two linear readings that give what the four taps of a cubic B-spline give; of
    p pixels, -1 is the middle of the first and 1 that of the last."""
    whole = at.floor()
    t = at - whole
    first = (1 - t) ** 3 / 6
    last = t**3 / 6
    second = (3 * last - t**2) + 2 / 3
    low = first + second
    high = 1 - low
    scale = 2 / (p - 1)
    return [
        (low, (whole + second / low).mul_(scale).sub_(1 + scale)),
        (high, (whole + last / high).mul_(scale).sub_(1 - scale)),
    ]
