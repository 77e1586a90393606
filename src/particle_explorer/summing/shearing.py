"""Many images, moved back by three shears (`shears`): some microseconds each."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from particle_explorer.ctf import phase_pictures
from particle_explorer.files import Stopped
from particle_explorer.spectra import Float, cropped
from particle_explorer.summing.work import (
    BLOCK_BYTES,
    POWER_MEMBERS,
    Progress,
    Sums,
    Work,
    not_finite,
    powers_of,
    shares_told,
)

if TYPE_CHECKING:
    from particle_explorer.shears import Turner

TORCH_PIXELS = 2e8
SUMS_BYTES = 384 * 2**20
"""Sums of averages held at once."""
TRANSFORMS = 16
"""Images transformed in one go."""
STEP_BYTES = 2 * 2**20
"""Images read and sheared in one go, by one of two threads: what stays in the cache of a core."""


class ShearSums(Sums):
    """Running sums of one average of sheared images of n px.

    Without CTF the pictures are summed, by quarter turn, and cut to m px at the end; else their transforms.
    """

    def __init__(
        self, turner: Turner, m: int, turned: Float, transforms: NDArray[np.complex64], gains: Float
    ) -> None:
        self.n, self.m = turner.n, m
        self.turner = turner
        self.turned = turned
        """`(2, 4, c, ...)` of `Turner.sums`; empty where transforms are summed."""
        self.transforms = transforms
        """`(2, c, m, m // 2 + 1)`; empty where pictures are summed."""
        # `gains`: of the signal and of the noise, `(2, 2, m, m // 2 + 1)`, or empty
        self.gain = gains[0] if gains.size else None
        self.noise_gain = gains[1] if gains.size else None
        self.weight = np.zeros((2, 3))
        self.power = np.zeros(m // 2 + 1)
        self.power_gain = np.zeros((2, m // 2 + 1))

    def merge(self, other: ShearSums) -> None:
        """Add what another thread has summed."""
        for name in ("turned", "transforms", "gain", "noise_gain", "weight", "power", "power_gain"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine += theirs

    def spectra(self) -> NDArray[np.complex128]:
        from particle_explorer.shears import quarter_turned, transfer

        if self.turned.size:
            upright = self.turner.pictures(self.turned).astype(np.float64)
            pictures = sum(quarter_turned(upright[:, q], q) for q in range(4))
            found = cropped(scipy.fft.rfft2(pictures), self.n, self.m)
        else:
            found = self.transforms.astype(np.complex128)
        ky, kx = np.meshgrid(np.fft.fftfreq(self.m, 1 / self.m), np.arange(self.m // 2 + 1), indexing="ij")
        radius = np.hypot(ky, kx)
        left = np.interp(radius / self.n, np.linspace(0, math.sqrt(0.5), self.n + 1), transfer(self.n))
        return np.asarray(found * ((radius < self.m / 2) / left))


def shear_sums(work: Work, progress: Progress | None) -> Iterator[Sums]:
    """Images moved back by three shears, in two threads with sums of their own; one average after the other.

    Averages are taken in groups whose sums fit into `SUMS_BYTES`, each in one pass over its images.
    """
    n, m = int(work.boxes[0]), work.m
    channels = int(work.stack.read(work.rows[:1]).shape[1])
    each = 4 * channels * (18 * n * n if work.mode == "none" else 4 * m * m + 4 * m * m)
    per_group = max(1, SUMS_BYTES // each)
    tell = shares_told(progress, len(work.members.row))
    for first in range(0, len(work.sizes), per_group):
        sums = _group(work, first, min(first + per_group, len(work.sizes)), channels, tell)
        while sums:  # whoever is done with the last of them has the memory for the next group
            yield sums.pop(0)


def _group(work: Work, first: int, last: int, channels: int, tell: Callable[[int], None]) -> list[ShearSums]:
    adders = [_Adder(work, first, last, channels) for _ in range(2)]
    for added in _add_group(work, adders):
        tell(added)
    for one, other in zip(adders[0].sums, adders[1].sums, strict=True):
        one.merge(other)
    return adders[0].sums


class _Block(NamedTuple):
    """Images that are neighbours in the stack, and the members that show them."""

    rows: NDArray[np.int64]
    """`(b,)` of the session, rising"""
    chosen: NDArray[np.int64]
    """`(k,)` of the members"""
    at: NDArray[np.int64]
    """`(k,)` which of the images, rising"""


def _blocks_of_group(work: Work, first: int, last: int) -> Iterator[_Block]:
    size = max(1, BLOCK_BYTES // int(4 * work.boxes[0] ** 2))
    average = work.members.average
    own = np.flatnonzero((average >= first) & (average < last))
    rows = work.rows[work.members.row[own]]
    order = np.argsort(rows, kind="stable")
    own, rows = own[order], rows[order]
    wanted, where = np.unique(rows, return_inverse=True)
    starts = np.arange(0, len(wanted), size)
    bounds = np.searchsorted(where, [*starts, len(wanted)])
    for start, low, high in zip(starts, bounds[:-1], bounds[1:], strict=True):
        yield _Block(wanted[start : start + size], own[low:high], where[low:high] - start)


def _add_group(work: Work, adders: list[_Adder]) -> Iterator[int]:
    """Have every adder take its share of the blocks, by turns, so that sums do not depend on the timing."""
    blocks = list(_blocks_of_group(work, adders[0].first, adders[0].last))
    counts: SimpleQueue[int] = SimpleQueue()
    halt = threading.Event()

    def run(k: int) -> None:
        try:
            for block in blocks[k :: len(adders)]:
                if halt.is_set():
                    return
                if work.stop is not None and work.stop.is_set():
                    raise Stopped("stopped before all images were averaged; nothing was kept")
                adders[k].add(block)
                counts.put(len(block.chosen))
        except BaseException:
            halt.set()
            raise
        finally:
            counts.put(0)

    with ThreadPoolExecutor(len(adders)) as pool:
        running = [pool.submit(run, k) for k in range(len(adders))]
        try:
            ended = 0
            while ended < len(adders):
                added = counts.get()
                if added:
                    yield added
                else:
                    ended += 1
        finally:
            halt.set()
        for future in running:
            future.result()


class _Adder:
    """Adds images to the averages `first` … `last - 1`, one block after the other; its sums serve one
    thread."""

    def __init__(self, work: Work, first: int, last: int, channels: int) -> None:
        from particle_explorer.shears import Turner

        n = int(work.boxes[0])
        self.work, self.first, self.last, self.n = work, first, last, n
        self.turner = Turner(n)
        plain, m, k = work.mode == "none", work.m, last - first
        # two halves of each average; empty where there is nothing to sum
        self.turned = self.turner.sums(2 * k if plain else 0, 4, channels)
        self.transforms = np.zeros((0 if plain else 2 * k, channels, m, m // 2 + 1), dtype=np.complex64)
        rows = m if work.mode == "wiener" else 0
        self.gains = np.zeros((2, 2 * k, rows, m // 2 + 1), dtype=np.float32)
        if not plain:
            turned = np.empty((TRANSFORMS, channels, n, n), dtype=np.float32)
            self.buffers = self.turner.sums(TRANSFORMS, channels), turned
        halves = [slice(2 * i, 2 * i + 2) for i in range(k)]
        self.sums = [
            ShearSums(self.turner, m, self.turned[own], self.transforms[own], self.gains[:, own])
            for own in halves
        ]
        self.stride = np.maximum(1, work.sizes // POWER_MEMBERS)
        self.transform = _fast_transform(0.0 if plain else len(work.rows) * float(n) ** 2)
        self.step = max(1, STEP_BYTES // (4 * channels * n * n)) if plain else TRANSFORMS

    def add(self, block: _Block) -> None:
        from particle_explorer.shears import covered, split_angle

        work, chosen = self.work, block.chosen
        row, average, half = work.members.row[chosen], work.members.average[chosen], work.half[chosen]
        weight = work.members.weight[chosen]
        quarter, angle = split_angle(work.angle_deg[row])
        shift = np.ascontiguousarray(work.shift_yx_px[row])
        share = covered(self.n, angle, shift)  # a quarter turn of a square is the square
        counts = np.stack([weight, weight**2, weight**2 * share], 1)
        for i in np.unique(average):
            for h in range(2):
                self.sums[i - self.first].weight[h] += counts[(average == i) & (half == h)].sum(0)
        signed = (weight * work.signs[row]).astype(np.float32)
        place = ((average - self.first) * 2 + half) * 4 + quarter
        # of some of the members, evenly spread, the power: their mean is known well from a few hundred
        powered = work.rank[chosen] // 2 % self.stride[average] == 0
        edges = np.arange(0, len(block.rows) + self.step, self.step)
        bounds = np.searchsorted(block.at, edges).tolist()
        at, some_powered = block.at % self.step, powered.any()
        turned = self.turned.reshape(-1, *self.turned.shape[2:])
        for start, low, high in zip(edges[:-1].tolist(), bounds[:-1], bounds[1:], strict=True):
            rows, some = block.rows[start : start + self.step], slice(low, high)
            images = np.ascontiguousarray(work.stack.read(rows), dtype=np.float32)
            background = np.zeros(images.shape[:2], dtype=np.float32)
            if not turned.size:
                for begin in range(low, high, TRANSFORMS):
                    part = slice(begin, min(begin + TRANSFORMS, high))
                    self._add_transforms(
                        images, background, chosen[part], at[part], angle[part], quarter[part], share[part]
                    )
            else:
                self.turner.add(
                    images, background, at[some], angle[some], shift[some], signed[some], place[some], turned
                )
            finite = np.asarray(np.isfinite(background).all(1))
            if not finite.all():
                raise not_finite(rows, finite)
            if some_powered and powered[some].any():
                self._add_powers(images, background, chosen[some][powered[some]], at[some][powered[some]])

    def _add_transforms(
        self,
        images: Float,
        background: Float,
        chosen: NDArray[np.int64],
        at: NDArray[np.int64],
        angle: NDArray[np.float64],
        quarter: NDArray[np.int64],
        share: NDArray[np.float64],
    ) -> None:
        from particle_explorer.ctf_sums import add_all_through_ctf, all_upright

        work, row, n, m = self.work, self.work.members.row[chosen], self.n, self.work.m
        # turned into memory that is in the cache, not into new
        sums, turned = self.buffers[0][: len(chosen)], self.buffers[1][: len(chosen)]
        sums[:] = 0
        signed = work.signs[row].astype(np.float32)
        shift = np.ascontiguousarray(work.shift_yx_px[row])
        self.turner.add(images, background, at, angle, shift, signed, np.arange(len(chosen)), sums)
        all_upright(sums, quarter, turned)
        spectra = np.ascontiguousarray(cropped(self.transform(turned), n, m)).view(np.float32)
        ctf, weight = work.ctf, work.members.weight[chosen]
        assert ctf is not None
        # the frame turns by R(-angle) with the image, and so does its astigmatism
        factors, added = ctf.phase(row, work.pixel_size_A[row], -work.angle_deg[row])
        place = 2 * (work.members.average[chosen] - self.first) + work.half[chosen]
        add_all_through_ctf(
            spectra,
            phase_pictures(m).reshape(4, m, m // 2 + 1),
            factors,
            added,
            ctf.flipped[row],
            ctf.premultiplied[row],
            work.mode == "phase-flip",
            weight.astype(np.float32),
            (weight**2 * share).astype(np.float32),
            place,
            np.empty(m // 2 + 1, dtype=np.float32),
            self.transforms.view(np.float32),
            *self.gains,
        )

    def _add_powers(
        self, images: Float, background: Float, chosen: NDArray[np.int64], at: NDArray[np.int64]
    ) -> None:
        work = self.work
        for start in range(0, len(chosen), TRANSFORMS):
            part = slice(start, start + TRANSFORMS)
            plain = images[at[part]] - background[at[part]][..., None, None]
            spectra = cropped(self.transform(plain), self.n, work.m)
            powers, gains = powers_of(spectra, work.members.row[chosen[part]], work, None)
            for average, power, gain in zip(work.members.average[chosen[part]], powers, gains, strict=True):
                self.sums[average - self.first].power += power
                self.sums[average - self.first].power_gain += gain


def _fast_transform(pixels: float) -> Callable[[Float], NDArray[np.complex64]]:
    """`rfft2` of many images; torch's is three times as fast, and worth its import for large stacks."""
    if pixels < TORCH_PIXELS:
        return lambda images: np.asarray(scipy.fft.rfft2(images))
    import torch

    return lambda images: np.asarray(torch.fft.rfft2(torch.from_numpy(images)).numpy())
