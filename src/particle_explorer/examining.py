"""Who belongs to a class average, how well, and what the average does not explain.

Every member is moved back by the pose it was averaged at and compared with the average of the *others*: an
image resembles an average that holds it. Images are cropped in Fourier space and their phases flipped where
the CTF is known; the finest detail says little of a single particle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.averaging import Originals
from particle_explorer.ctf import TableCTF, ctf_mode
from particle_explorer.files import Stopped, UserError
from particle_explorer.resampling import AtOneScale
from particle_explorer.spectra import Float, Grid, align, outside_circle, placed
from particle_explorer.summing.work import Event, Images

Floats = NDArray[np.float64]

BOX_PX = 64
"""Side of the images that are compared, where the originals are larger."""
SMALL_PX = 32
"""Side of averages that are compared with mirror images."""
BLOCK = 64
SYMMETRIES = range(2, 9)
MIRRORED = 0.9
"""Correlation of an average with the mirror image of another from which they are spoken of as partners."""
NOISE_QUANTILE = 0.2
"""Of the variance over members, inside the circle: the level of the noise."""
SYMMETRIC = 0.95
"""Correlation of an average with itself, turned by every part of a turn, from which it is symmetric."""


class Examined(NamedTuple):
    """`members` beside the table of a class set, the pictures by its averages."""

    members: pd.DataFrame
    """Rows as given: `correlation` with the average of the other members, `error`: what is left of the image
    when that average is taken away, relative to the median of its class, `distance` from the middle of the
    class on the map, relative to the root mean square (NaN without a map)"""
    variance: Float
    """`(k, m, m)` variance over the members above that of the noise, which a fifth of the pixels are below"""
    residual: Float
    """`(k, m, m)` average less what the model draws there, or less the other half where no model draws"""
    mirror: list[tuple[int, float]]
    """`(partner, correlation)` of every average: which its mirror image resembles most, itself included"""
    symmetry: list[tuple[int, float]]
    """`(fold, correlation)` of every average; fold 1 where it has no symmetry"""


def examine(
    session: Originals,
    members: pd.DataFrame,
    n_classes: int,
    z: Floats | None = None,
    drawn: Float | None = None,
    *,
    progress: Callable[[float], None] | None = None,
    stop: Event | None = None,
) -> Examined:
    """Compare the members of a class set with their averages.

    Parameters
    ----------
    members
        As `StoredClasses.members`: uid, `average`, `weight`, `angle_deg`, `shift_y_px`, `shift_x_px`.
    z
        `(N, d)` positions of all rows of the session on the map.
    drawn
        `(n_classes, s, s)` what the model draws at the middle of each class, in the field of the originals.
    """
    where = pd.Index(session.table.index)
    rows = where.get_indexer(members.index)
    if (rows < 0).any():
        raise UserError("the averages were made of particles that this session does not have")
    boxes = np.unique(session.table["box_px"].to_numpy()[rows])
    if session.scale is None and len(boxes) > 1:
        raise UserError(f"members are compared among images of one box; these have {list(map(int, boxes))}")
    n = int(boxes[0]) if session.scale is None else session.scale.box_px
    m = min(n, BOX_PX)
    average = members["average"].to_numpy(np.int64)
    found = pd.DataFrame(
        {name: np.full(len(members), np.nan) for name in ("correlation", "error", "distance")},
        index=members.index,
    )
    variance, residual = np.zeros((2, n_classes, m, m), np.float32)
    means = np.zeros((n_classes, m, m), np.float32)
    reader = _Reader(session, n, m)
    done = 0
    for i in range(n_classes):
        own = np.flatnonzero(average == i)
        if not len(own):
            continue
        images = np.empty((len(own), m, m), np.float16)
        for start in range(0, len(own), BLOCK):
            if stop is not None and stop.is_set():
                raise Stopped("stopped; nothing was written")
            part = own[start : start + BLOCK]
            images[start : start + BLOCK] = reader.moved_back(rows[part], members.iloc[part])
            done += len(part)
            if progress is not None:
                progress(done / len(members))
        weight = members["weight"].to_numpy(float)[own] if "weight" in members else np.ones(len(own))
        correlation, error, spread, mean, halves = compared(images, weight)
        found.iloc[own, 0], found.iloc[own, 1] = correlation, error
        if z is not None:
            found.iloc[own, 2] = _distances(z[rows[own]])
        variance[i], means[i] = spread, mean
        residual[i] = _left_over(mean, drawn[i]) if drawn is not None else halves
    small = _smaller(means, min(m, SMALL_PX))
    return Examined(found, variance, residual, mirror_partners(small), [symmetry(one) for one in small])


class _Reader:
    """Originals moved back at the size they are compared at, phases flipped, grey scale of the first ones."""

    def __init__(self, session: Originals, n: int, m: int) -> None:
        self.stack: Images = session.originals()
        self.table, self.sign = session.table, session.plan.sign
        self.n, self.grid, self.outside = n, Grid(n, m), outside_circle(n)
        self.grey = 0.0
        wanted = "none" if session.plan.ctf == "none" else "auto"
        table = self.table.assign(ctf_state="raw") if session.plan.ctf == "flip-all" else self.table
        self.ctf = TableCTF(table) if ctf_mode(table, wanted) == "wiener" else None
        size = self.table["pixel_size_A"].to_numpy(float)
        self.ratio = np.ones(len(size))
        if session.scale is not None:
            self.stack = AtOneScale(self.stack, size, session.scale)
            self.ratio = size / session.scale.pixel_size_A
            size = np.full(len(size), session.scale.pixel_size_A)
        self.pixel_size_A = size * n / m

    def moved_back(self, rows: NDArray[np.int64], poses: pd.DataFrame) -> Float:
        """`(b, m, m)`"""
        images = self.stack.read(rows).mean(1, keepdims=True) * np.float32(self.sign)
        images = images - images[..., self.outside].mean(-1)[..., None, None]
        if not self.grey:
            self.grey = max(float(images.std()), 1e-12)
        transfer = None
        if self.ctf is not None:
            signs = np.sign(self.ctf.at(rows, self.pixel_size_A[rows], self.grid.m, 0.0))
            transfer = np.where(self.ctf.premultiplied[rows, None, None], np.float32(1), signs)
        moved = self.grid.sample(
            self.grid.transform(images / np.float32(self.grey)),
            poses["angle_deg"].to_numpy(float),
            poses[["shift_y_px", "shift_x_px"]].to_numpy(float) * self.ratio[rows, None],
            transfer,
        )
        return moved[:, 0]


def compared(images: NDArray[np.float16], weight: Floats) -> tuple[Floats, Floats, Float, Float, Float]:
    """Correlations, errors, variance, mean and difference of the halves of one class `(b, m, m)`."""
    m = images.shape[-1]
    inside = ~outside_circle(m)
    total, square, halves = np.zeros((m, m)), np.zeros((m, m)), np.zeros((2, m, m))
    for i, (image, w) in enumerate(zip(images, weight, strict=True)):
        one = image.astype(np.float64)
        total += w * one
        square += w * one**2
        halves[i % 2] += w * one
    sum_w = max(float(weight.sum()), 1e-12)
    mean = total / sum_w
    correlation, error = np.full(len(images), np.nan), np.full(len(images), np.nan)
    for i, (image, w) in enumerate(zip(images, weight, strict=True)):
        if sum_w - w <= 1e-9:
            continue
        one = image.astype(np.float64)[inside]
        others = ((total - w * image) / (sum_w - w))[inside]
        one, others = one - one.mean(), others - others.mean()
        power = max(float(others @ others), 1e-20)
        correlation[i] = float(one @ others) / max(np.sqrt(power * float(one @ one)), 1e-20)
        error[i] = np.sqrt(np.mean((one - others * float(one @ others) / power) ** 2))
    spread = np.maximum(square / sum_w - mean**2, 0)
    seen = spread[inside & (spread > 0.05 * spread.max())]  # not what a mask has made 0
    spread = np.maximum(spread - (np.quantile(seen, NOISE_QUANTILE) if len(seen) else 0.0), 0)
    shares = [max(float(weight[h::2].sum()), 1e-12) for h in range(2)]
    difference = halves[0] / shares[0] - halves[1] / shares[1]
    middle = np.nanmedian(error) if np.isfinite(error).any() else 1.0
    return (
        correlation,
        error / max(float(middle), 1e-12),
        spread.astype(np.float32),
        mean.astype(np.float32),
        difference.astype(np.float32),
    )


def _distances(z: Floats) -> Floats:
    away = np.linalg.norm(z - np.nanmean(z, axis=0), axis=1)
    return np.asarray(away / max(float(np.sqrt(np.nanmean(away**2))), 1e-12))


def _left_over(mean: Float, drawn: Float) -> Float:
    """An average less what was drawn, brought to its size, grey scale and background."""
    m = mean.shape[-1]
    if drawn.shape[-1] >= m:
        drawn = align(drawn[None, None], [0.0], [(0.0, 0.0)], box_px=m)[0, 0]
    else:
        spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(drawn)))
        before, side = m // 2 - drawn.shape[-1] // 2, drawn.shape[-1]
        padded = np.pad(spectrum, ((before, m - side - before),) * 2)
        drawn = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(padded)).real).astype(np.float32)
    inside = ~outside_circle(m)
    design = np.stack([drawn[inside], np.ones(int(inside.sum()))], 1)
    factor, level = np.linalg.lstsq(design, mean[inside], rcond=None)[0]
    return np.asarray(np.where(inside, mean - factor * drawn - level, 0), np.float32)


def _smaller(images: Float, m: int) -> Float:
    """`(k, m, m)`, cropped in Fourier space."""
    k = len(images)
    return align(images[:, None], np.zeros(k), np.zeros((k, 2)), box_px=m)[:, 0]


def mirror_partners(images: Float) -> list[tuple[int, float]]:
    """For every average `(k, m, m)` the one that its mirror image resembles most, and the correlation."""
    m = images.shape[-1]
    y, x = np.indices((m, m)) - m // 2
    mask = np.hypot(y, x) < 0.45 * m
    # mirrored about the column m // 2
    mirrored = images[..., ::-1] if m % 2 else np.roll(images[..., ::-1], 1, -1)
    partners = []
    for one in mirrored:
        score = [placed(one, other, mask, step_deg=10.0, exact=False).correlation for other in images]
        best = int(np.argmax(score))
        partners.append((best, placed(one, images[best], mask).correlation))
    return partners


def symmetry(image: Float) -> tuple[int, float]:
    """The largest fold by which an average resembles itself turned, and how well; (1, 1) where none does.

    A round average resembles itself at every turn, and is not called symmetric for it.
    """
    m = image.shape[-1]
    y, x = np.indices((m, m)) - m // 2
    mask = np.hypot(y, x) < 0.45 * m
    angles = np.arange(0, 360, 3.0)
    # about the centre of mass of what is bright, which need not be the centre of the box
    bright = np.where(mask, np.maximum(image - np.median(image[mask]), 0), 0.0).astype(np.float64)
    total = max(float(bright.sum()), 1e-12)
    centre = np.array([(bright * y).sum() / total, (bright * x).sum() / total])
    copies = np.broadcast_to(image, (len(angles), 1, m, m))
    middle = align(image[None, None], [0.0], [centre])[0, 0]
    turned = align(copies, angles, np.tile(centre, (len(angles), 1)))[:, 0]
    values = turned[:, mask] - turned[:, mask].mean(1, keepdims=True)
    own = middle[mask] - middle[mask].mean()
    norms = np.linalg.norm(values, axis=1) * max(float(np.linalg.norm(own)), 1e-12)
    correlation = values @ own / np.maximum(norms, 1e-12)
    usual = float(np.median(correlation))
    best = (1, 1.0)
    for fold in SYMMETRIES:
        at = np.interp(np.arange(1, fold) * 360.0 / fold, angles, correlation)
        if at.min() >= SYMMETRIC and at.min() > usual + 0.05:
            best = (fold, float(at.min()))
    return best
