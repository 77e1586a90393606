"""What is to be summed, and what comes out: the part that all ways of moving images back share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy import sparse

from particle_explorer.ctf import TableCTF
from particle_explorer.files import UserError
from particle_explorer.spectra import Float, disc

Progress = Callable[[float], None]

POWER_MEMBERS = 64
"""At least as many members of either half say how much power an image has, where images are many."""
BLOCK_BYTES = 16 * 2**20
"""Original images read at once; with transforms and two threads about ten times this much is in memory."""


def shares_told(progress: Progress | None, n: int) -> Callable[[int], None]:
    """Called with how many of `n` were done since, it tells `progress` the share that is done."""
    done = 0

    def tell(added: int) -> None:
        nonlocal done
        done += added
        if progress is not None:
            progress(done / n)

    return tell


class Images(Protocol):
    """The part of `ImageStack` that is needed here."""

    @property
    def box_px(self) -> NDArray[Any]: ...

    def read(self, rows: NDArray[np.int64]) -> Float: ...


class Event(Protocol):
    """The part of `threading.Event` that is needed here."""

    def is_set(self) -> bool: ...


class Members(NamedTuple):
    """Which particle weighs how much in which average; a particle may be in several."""

    row: NDArray[np.int64]
    """`(M,)` rows of the session"""
    average: NDArray[np.int64]
    """`(M,)` 0 …"""
    weight: NDArray[np.float64]
    """`(M,)` above 0"""


class Work(NamedTuple):
    """What is to be summed; arrays of `rows`, and members sorted by average and row."""

    stack: Images
    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    members: Members
    rank: NDArray[np.int64]
    """`(M,)` place of a member in its average"""
    half: NDArray[np.int64]
    """`(M,)` 0 for half a, 1 for half b"""
    sizes: NDArray[np.int64]
    """`(k,)` members of every average"""
    angle_deg: NDArray[np.float64]
    shift_yx_px: NDArray[np.float64]
    signs: NDArray[np.float32]
    ctf: TableCTF | None
    pixel_size_A: NDArray[np.float64]
    m: int
    mode: str
    rings: sparse.csr_matrix
    stop: Event | None


class Part(NamedTuple):
    """What one block of images contributes."""

    images: Float
    """`(b, c, m, m)`, aligned, CTF applied where it must be."""
    gain: Float | None
    """`(b, m, m // 2 + 1)` how much of the signal, and of the power of the noise, each image contributes, in
    the frame of the reference; None where that is 1."""
    covered: NDArray[np.float64]
    """`(b,)` how much of the average each image covers with its noise."""
    power: NDArray[np.float64]
    """`(b, k)` power of the images, ring by ring."""
    power_gain: NDArray[np.float64]
    """`(b, 2, k)` how much signal and noise that power holds."""


class Sums:
    """Running sums of one average; halves first."""

    def __init__(self, channels: int, m: int, with_ctf: bool) -> None:
        half = (2, m, m // 2 + 1)
        self.images = np.zeros((2, channels, m, m), dtype=np.float32)
        self.gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.noise_gain = np.zeros(half, dtype=np.float32) if with_ctf else None
        self.weight = np.zeros((2, 3))
        """Σ w, Σ w² and Σ w² · covered of each half."""
        self.power = np.zeros(m // 2 + 1)
        self.power_gain = np.zeros((2, m // 2 + 1))

    def add(self, half: int, weight: float, part: Part, i: int) -> None:
        if weight == 1.0:
            self.images[half] += part.images[i]
        else:
            self.images[half] += np.float32(weight) * part.images[i]
        if self.gain is not None and self.noise_gain is not None:
            assert part.gain is not None
            self.gain[half] += np.float32(weight) * part.gain[i]
            self.noise_gain[half] += np.float32(weight**2 * part.covered[i]) * part.gain[i]
        self.weight[half] += weight, weight**2, weight**2 * part.covered[i]
        self.power += part.power[i]
        self.power_gain += part.power_gain[i]

    def spectra(self) -> NDArray[np.complex128]:
        """`(2, c, m, m // 2 + 1)`"""
        return np.asarray(scipy.fft.rfft2(self.images.astype(np.float64)))


def powers_of(
    spectra: NDArray[np.complex64], rows: NDArray[np.int64], work: Work, squared: Float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(b, k)` power of images ring by ring, and `(b, 2, k)` how much signal and noise it holds.

    `squared` `(b, m, m // 2 + 1)` are their CTFs squared, where they were computed already.
    """
    flat = (len(rows), spectra.shape[-2] * spectra.shape[-1])
    power = (np.abs(spectra) ** 2).sum(1, dtype=np.float64).reshape(flat) * disc(work.m).ravel()
    power_rings = np.asarray((work.rings @ power.T).T)
    if work.mode != "wiener" or work.ctf is None:
        counts = np.asarray(work.rings.sum(1)).ravel() * spectra.shape[1]
        return power_rings, np.broadcast_to(counts, (len(rows), 2, len(counts)))
    if squared is None:
        squared = work.ctf.at(rows, work.pixel_size_A[rows], work.m, 0.0) ** 2
    untouched = work.ctf.premultiplied[rows, None, None]
    held = [np.where(untouched, squared**2, squared), np.where(untouched, squared, np.float32(1))]
    gain = np.stack([np.asarray((work.rings @ x.reshape(flat).T).T) for x in held], 1)
    return power_rings, gain * spectra.shape[1]


def not_finite(rows: NDArray[np.int64], good: NDArray[np.bool_]) -> UserError:
    """What to say of the first image, of those of `rows` of the session, that is not good."""
    first = int(rows[int(np.argmin(good))]) + 1
    return UserError(
        f"the image of particle {first} holds numbers that are not finite; leave it out or repair the stack"
    )
