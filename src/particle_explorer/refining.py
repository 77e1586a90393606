"""Poses refined against class averages, or against decoded references, by a local search.

An image is moved back by its present pose and compared with its reference turned by small angles and moved by
small shifts. The score is the likelihood of white noise: the product of transforms, weighted ring by ring by
what the reference is known to hold (its signal-to-noise ratio), summed over frequencies at each shift of a
window: two small matrix products. The images of either half of a class are compared with the average of the
*other* half: an image compared with an average that holds it finds itself where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray

from particle_explorer.averaging import Originals
from particle_explorer.configs import RefineConfig
from particle_explorer.ctf import TableCTF, ctf_mode
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import rotation_matrix, wrap_deg
from particle_explorer.resampling import AtOneScale
from particle_explorer.spectra import align, cropped, outside_circle
from particle_explorer.summing.work import Event, Images

Floats = NDArray[np.float64]
Float = NDArray[np.float32]

BLOCK = 64
COARSE_PX = 1.0
FINE_PX = 0.25
COARSE_DEG = 2.0
FINE_DEG = 0.5
WORKING_BOX = 80
"""Side that originals are cropped to for the search, in Fourier space, where they are larger."""


class Refined(NamedTuple):
    """Poses after a refinement; arrays of all `N` rows, NaN where a row was in no class."""

    angle_deg: Floats
    shift_yx_px: Floats
    """`(N, 2)`, pixels of the original"""
    moved_deg: Floats
    """How far the angle moved"""
    moved_px: Floats
    correlation: Floats
    """Of the image with its reference at the refined pose, weighted as the score is"""
    history: list[dict[str, float]]
    """Per iteration: median and 95 % of the moves, mean correlation"""


class Difference(NamedTuple):
    """How far two sets of poses of the same particles are apart."""

    n: int
    turn_deg: float
    """Common turn from the first to the second, taken out"""
    median_deg: float
    within_10_deg: float
    """Share of particles whose angles agree within 10°"""
    median_px: float


def compare(
    angle_a: ArrayLike,
    shift_a: ArrayLike,
    angle_b: ArrayLike,
    shift_b: ArrayLike,
    classes: ArrayLike | None = None,
) -> Difference:
    """Two sets of poses after the best common turn and move of the reference, per class where given.

    Angles `(N,)` in degrees, shifts `(N, 2)` in pixels; rows with NaN are left out.
    """
    a, b = np.asarray(angle_a, float), np.asarray(angle_b, float)
    sa, sb = np.asarray(shift_a, float), np.asarray(shift_b, float)
    label = np.zeros(len(a)) if classes is None else np.asarray(classes, float)
    good = np.isfinite(a) & np.isfinite(b) & np.isfinite(sa).all(1) & np.isfinite(sb).all(1) & (label >= 0)
    if not good.any():
        raise UserError("no particle has a pose in both sets")
    turns, angles, shifts = [], [], []
    for one in np.unique(label[good]):
        rows = np.flatnonzero(good & (label == one))
        difference = np.deg2rad(b[rows] - a[rows])
        turn = np.angle(np.exp(1j * difference).mean())
        for _ in range(3):  # the middle of what agrees, not of outliers
            away = np.angle(np.exp(1j * (difference - turn)))
            near = np.abs(away) <= max(np.median(np.abs(away)) * 2, 1e-6)
            turn += away[near].mean()
        turns.append(np.rad2deg(turn))
        angles.append(np.abs(wrap_deg(b[rows] - a[rows] - np.rad2deg(turn))))
        # a reference moved by t moves every image by R(angle) t
        matrix = rotation_matrix(a[rows])
        back = np.einsum("kji,kj->ki", matrix, (sb[rows] - sa[rows])[:, ::-1])
        move = np.median(back, axis=0)
        shifts.append(np.linalg.norm(back - move, axis=1))
    angle, shift = np.concatenate(angles), np.concatenate(shifts)
    return Difference(
        n=len(angle),
        turn_deg=float(np.mean(turns)),
        median_deg=float(np.median(angle)),
        within_10_deg=float((angle < 10).mean()),
        median_px=float(np.median(shift)),
    )


def refine(
    session: Originals,
    labels: ArrayLike,
    angle_deg: ArrayLike,
    shift_yx_px: ArrayLike,
    config: RefineConfig | None = None,
    *,
    references: ArrayLike | None = None,
    progress: Callable[[float], None] | None = None,
    stop: Event | None = None,
) -> Refined:
    """Refine the poses of all particles of classes.

    Parameters
    ----------
    labels
        `(N,)` class of every row, negative for none.
    angle_deg, shift_yx_px
        `(N,)` and `(N, 2)` poses to start from (`pose`), pixels of the originals.
    references
        `(k, m, m)` pictures of the classes 0 … k - 1, decoded by a model in a box that shows the field of the
        originals; by default the averages of the classes, made anew in each iteration.
    """
    config = config or RefineConfig()
    job = _Job(session, labels, angle_deg, shift_yx_px, config, references, stop)
    history = []
    for iteration in range(config.n_iterations):
        done = iteration / config.n_iterations

        def tell(share: float, done: float = done) -> None:
            if progress is not None:
                progress(done + share / config.n_iterations)

        history.append(job.step(tell))
    return job.result(history)


@dataclass
class _Reference:
    """Transforms of one reference turned by all angles of the search."""

    turned: NDArray[np.complex64]
    """`(a, m, h)` conjugated, weighted"""
    norm: Floats
    """`(a,)`"""
    weight: Float
    """`(m, h)` of the score, counting what a half transform leaves out"""


class _Job:
    """The particles of a refinement at their working size."""

    stack: Images

    def __init__(
        self,
        session: Originals,
        labels: ArrayLike,
        angle_deg: ArrayLike,
        shift_yx_px: ArrayLike,
        config: RefineConfig,
        references: ArrayLike | None,
        stop: Event | None,
    ) -> None:
        self.config, self.stop = config, stop
        self.n_all, self.grey = len(session.table), 0.0
        label = np.nan_to_num(np.asarray(labels, float), nan=-1.0).astype(np.int64)
        angle = np.asarray(angle_deg, float)
        shift = np.asarray(shift_yx_px, float)
        good = (label >= 0) & np.isfinite(angle) & np.isfinite(shift).all(1)
        self.rows = np.flatnonzero(good)
        if not len(self.rows):
            raise UserError("no particle of any class has a pose to refine")
        self.table, self.stack = session.table.iloc[self.rows], session.originals()
        sizes, self.ratio = self.table["pixel_size_A"].to_numpy(float), np.ones(len(self.rows))
        if session.scale is not None:
            whole = session.table["pixel_size_A"].to_numpy(float)
            self.stack, self.ratio = (
                AtOneScale(self.stack, whole, session.scale),
                sizes / session.scale.pixel_size_A,
            )
            self.table = self.table.assign(
                pixel_size_A=session.scale.pixel_size_A, box_px=session.scale.box_px
            )
        boxes = np.unique(self.table["box_px"])
        if len(boxes) > 1:
            raise UserError(
                f"poses are refined among images of one box; these have {', '.join(map(str, boxes))} px and "
                "show one field; prepare those of one box by themselves"
            )
        self.n = int(boxes[0])
        self.m = min(self.n, WORKING_BOX) if not config.box_px else min(self.n, config.box_px)
        self.scale = self.m / self.n
        self.label = label[self.rows]
        to_working = (self.ratio * self.scale)[:, None]
        self.start = angle[self.rows].copy(), shift[self.rows] * to_working
        self.angle, self.shift = angle[self.rows].copy(), shift[self.rows] * to_working
        self.correlation = np.full(len(self.rows), np.nan)
        order = np.lexsort((self.rows, self.label))
        rank = np.empty(len(order), np.int64)
        starts = np.searchsorted(self.label[order], np.unique(self.label))
        size = np.diff([*starts, len(order)])
        rank[order] = np.arange(len(order)) - np.repeat(starts, size)
        self.half = rank % 2
        self.given = None if references is None else np.asarray(references, np.float32)
        self._read(session)

    def _read(self, session: Originals) -> None:
        """All images cropped to the working size, in half precision: 20 000 of 80 px take 256 MB."""
        m, table = self.m, self.table
        plan = session.plan
        wanted = "none" if plan.ctf == "none" else "auto"
        mode = ctf_mode(table, wanted)
        if plan.ctf == "flip-all":
            table = table.assign(ctf_state="raw")
        self.ctf = TableCTF(table) if mode == "wiener" else None
        self.pixel_size_A = table["pixel_size_A"].to_numpy(float) / self.scale
        self.images = np.empty((len(self.rows), m, m), np.float16)
        outside = outside_circle(self.n)
        for start in range(0, len(self.rows), BLOCK):
            self._check()
            images = self.stack.read(self.rows[start : start + BLOCK]).mean(1) * np.float32(plan.sign)
            background = images[:, outside]
            images = images - background.mean(1)[:, None, None]
            if self.m < self.n:
                images = scipy.fft.irfft2(cropped(scipy.fft.rfft2(images), self.n, m), s=(m, m))
            if not self.grey:  # of the first images; the averages keep the weights of all others
                self.grey = max(float(images.std()), 1e-12)
            self.images[start : start + BLOCK] = images / self.grey

    def _check(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped("stopped; the poses stay as they were")

    def _aligned(self, rows: NDArray[np.int64]) -> NDArray[np.complex64]:
        """`(b, m, h)` transforms of images moved back by the present poses, times their CTF."""
        images = self.images[rows].astype(np.float32)[:, None]
        back = align(images, self.angle[rows], self.shift[rows])[:, 0]
        spectra = scipy.fft.rfft2(back * self.mask)
        if self.ctf is not None:
            ctf = self.ctf.at(rows, self.pixel_size_A[rows], self.m, -self.angle[rows])
            spectra = np.where(self.ctf.premultiplied[rows, None, None], spectra, spectra * ctf)
        return np.asarray(spectra, np.complex64)

    @property
    def mask(self) -> Float:
        y, x = np.indices((self.m, self.m)) - self.m // 2
        edge = np.clip((self.m / 2 - 1 - np.hypot(y, x)) / 3, 0, 1)
        return edge.astype(np.float32)

    def _angles(self) -> Floats:
        reach = int(np.ceil(self.config.angle_range_deg / FINE_DEG))
        return FINE_DEG * np.arange(-reach, reach + 1, dtype=np.float64)

    def _sums(self, tell: Callable[[float], None]) -> tuple[NDArray[Any], NDArray[Any], Floats]:
        """Σ CTF·F and Σ CTF² of both halves of all classes, and the power of an image ring by ring."""
        k, m = int(self.label.max()) + 1, self.m
        sums = np.zeros((k, 2, m, m // 2 + 1), np.complex64)
        gains = np.zeros((k, 2, m, m // 2 + 1), np.float32)
        power = np.zeros((m, m // 2 + 1))
        for start in range(0, len(self.rows), BLOCK):
            self._check()
            rows = np.arange(start, min(start + BLOCK, len(self.rows)))
            spectra = self._aligned(rows)
            power += (np.abs(spectra) ** 2).sum(0)
            if self.ctf is not None:
                gain = self.ctf.at(rows, self.pixel_size_A[rows], m, -self.angle[rows]) ** 2
            for i, row in enumerate(rows):
                where = self.label[row], self.half[row]
                sums[where] += spectra[i]
                gains[where] += gain[i] if self.ctf is not None else 1.0
            tell(0.3 * (start + len(rows)) / len(self.rows))
        gain_per_image = gains.sum((0, 1)) / len(self.rows)
        noise = power / len(self.rows) / np.maximum(gain_per_image, 1e-3)
        return sums, gains, _ring_mean(noise, _radius(m))

    def step(self, tell: Callable[[float], None]) -> dict[str, float]:
        """One iteration; returns what moved."""
        sums, gains, noise = self._sums(tell)
        if self.given is None and self._join_halves(sums, gains, noise):
            sums, gains, noise = self._sums(tell)
        before = self.angle.copy(), self.shift.copy()
        done = 0
        for label in np.unique(self.label):
            for half in range(2):
                own = np.flatnonzero((self.label == label) & (self.half == half))
                if not len(own):
                    continue
                reference = self._reference(label, half, sums, gains, noise)
                for start in range(0, len(own), BLOCK):
                    self._check()
                    rows = own[start : start + BLOCK]
                    self._search(rows, reference)
                    done += len(rows)
                    tell(0.3 + 0.7 * done / len(self.rows))
        turned = np.abs(wrap_deg(self.angle - before[0]))
        moved = np.linalg.norm(self.shift - before[1], axis=1) / (self.ratio * self.scale)
        return {
            "median_deg": float(np.median(turned)),
            "p95_deg": float(np.quantile(turned, 0.95)),
            "median_px": float(np.median(moved)),
            "p95_px": float(np.quantile(moved, 0.95)),
            "correlation": float(np.nanmean(self.correlation)),
        }

    def _join_halves(self, sums: NDArray[Any], gains: NDArray[Any], noise: Floats) -> bool:
        """Turn the halves of each class onto each other; each looks for the other frame.

        Half of the difference is taken from either. Returns whether anything was moved.
        """
        moved = False
        for label in np.unique(self.label):
            if min(gains[label, half].max() for half in range(2)) <= 0:
                continue
            reference = self._reference(int(label), 1, sums, gains, noise)  # half a
            picture = sums[label, 1] / np.maximum(gains[label, 1], 0.05 * gains[label, 1].mean() + 1e-6)
            turn, move, _ = self._find(picture.astype(np.complex64), reference)
            moved |= abs(turn) > 0.05 or float(np.linalg.norm(move)) > 0.02
            for half, share in ((0, -0.5), (1, 0.5)):
                own = (self.label == label) & (self.half == half)
                self._change(np.flatnonzero(own), share * turn, share * move)
        return moved

    def _change(self, rows: NDArray[np.int64], turn_deg: float, move_yx: Floats) -> None:
        """x_img = R(angle) x_aligned + shift with x_aligned = R(turn) x_ref + move: the pose of x_ref."""
        xy = np.einsum("kij,j->ki", rotation_matrix(self.angle[rows]), move_yx[::-1])
        self.shift[rows] += xy[:, ::-1]
        self.angle[rows] = wrap_deg(self.angle[rows] + turn_deg)

    def _reference(
        self, label: int, half: int, sums: NDArray[Any], gains: NDArray[Any], noise: Floats
    ) -> _Reference:
        m, radius = self.m, _radius(self.m)
        if self.given is not None:
            picture = self.given[label]
            if picture.shape[-1] != m:
                spectrum = scipy.fft.rfft2(picture)
                side = picture.shape[-1]
                picture = (
                    scipy.fft.irfft2(cropped(spectrum, side, m), s=(m, m))
                    if side > m
                    else scipy.fft.irfft2(_padded(spectrum, side, m), s=(m, m))
                )
            ratio = np.full(m // 2 + 2, 1.0)
            spectrum = scipy.fft.rfft2(picture * self.mask)
        else:
            # the other half; where it has no members, this one
            other = 1 - half if gains[label, 1 - half].max() > 0 else half
            total, gain = sums[label, other], gains[label, other]
            both = [sums[label, h] / np.maximum(gains[label, h], 1e-3) for h in range(2)]
            cross = _ring_mean(np.real(both[0] * both[1].conj()), radius)
            scatter = _ring_mean(np.abs(both[0] - both[1]) ** 2, radius) / 2
            ratio = np.clip(cross, 0, None) / np.maximum(scatter, 1e-12)
            ratio = ratio / (1 + ratio)  # a Wiener filter of the reference: what it holds, without its noise
            spectrum = total / np.maximum(gain, 0.05 * gain.mean() + 1e-6)
        ring = np.minimum(np.rint(radius).astype(int), m // 2 + 1)
        inside = (radius > 0.5) & (radius < m / 2 - 1)
        shown = np.minimum(ring, len(ratio) - 1)
        weight = np.where(
            inside, ratio[shown] / np.maximum(noise[np.minimum(ring, len(noise) - 1)], 1e-12), 0.0
        )
        picture = scipy.fft.irfft2(spectrum * np.sqrt(weight), s=(m, m)).astype(np.float32)
        angles = self._angles()
        # the reference turned by +angle: the pose of a picture moved back by -angle
        copies = np.broadcast_to(picture, (len(angles), 1, m, m))
        turned = align(copies, -angles, np.zeros((len(angles), 2)))[:, 0]
        spectra = scipy.fft.rfft2(turned) * np.sqrt(weight)
        twice = _twice(m)
        by = np.where(weight > 0, twice / np.maximum(weight, 1e-30), 0)
        norm = np.sqrt((np.abs(spectra) ** 2 * by).sum((1, 2)))
        conjugate = (spectra.conj() * twice).astype(np.complex64)
        return _Reference(conjugate, norm, (weight * twice).astype(np.float32))

    def _search(self, rows: NDArray[np.int64], reference: _Reference) -> None:
        spectra = self._aligned(rows)
        power = np.sqrt((np.abs(spectra) ** 2 * reference.weight).sum((1, 2)))
        limit = self.config.shift_range_px * self.scale + COARSE_PX
        for row, spectrum, places, size in zip(
            rows, spectra, self._coarse(spectra, reference), power, strict=True
        ):
            turn, move, score = self._fine(spectrum, reference, places)
            if np.linalg.norm(move) <= limit * 1.5:
                self._change(np.array([row]), turn, move)
            self.correlation[row] = score / max(float(size), 1e-12)

    def _find(self, spectrum: NDArray[Any], reference: _Reference) -> tuple[float, Floats, float]:
        return self._fine(spectrum, reference, self._coarse(spectrum[None], reference)[0])

    def _coarse(self, spectra: NDArray[Any], reference: _Reference) -> Floats:
        """`(b, 3)` best angle (index) and shift (y, x) on the coarse grid."""
        angles, reach = self._angles(), np.ceil(self.config.shift_range_px * self.scale)
        coarse = np.arange(-reach, reach + 0.5) * COARSE_PX
        every = round(COARSE_DEG / FINE_DEG)
        waves = _waves(self.m, coarse)
        best, at = np.full(len(spectra), -np.inf), np.zeros((len(spectra), 3))
        for a in np.arange(len(angles) // 2 % every, len(angles), every):
            score = _window(spectra * reference.turned[a], waves) / max(reference.norm[a], 1e-12)
            flat = score.reshape(len(spectra), -1)
            top = flat.argmax(1)
            value = flat[np.arange(len(spectra)), top]
            better = value > best
            best = np.where(better, value, best)
            y, x = np.divmod(top, len(coarse))
            at[better] = np.stack([np.full(len(top), float(a)), coarse[y], coarse[x]], 1)[better]
        return at

    def _fine(self, spectrum: NDArray[Any], reference: _Reference, at: Floats) -> tuple[float, Floats, float]:
        """Turn (°), move (y, x) and score on a finer grid about a place, at the top of a parabola."""
        m, angles = self.m, self._angles()
        every = round(COARSE_DEG / FINE_DEG)
        a = np.arange(max(0, int(at[0]) - every), min(len(angles), int(at[0]) + every + 1))
        near = FINE_PX * np.arange(-4, 5, dtype=np.float64)
        product = spectrum * _ramp(m, at[1], at[2]) * reference.turned[a]
        score = _window(product, _waves(m, near)) / np.maximum(reference.norm[a], 1e-12)[:, None, None]
        top = tuple(int(i) for i in np.unravel_index(int(score.argmax()), score.shape))
        y, x = top[1:]
        lines = (score[:, y, x], score[top[0], :, x], score[top[0], y])
        offset = [_vertex(line, place) for line, place in zip(lines, top, strict=True)]
        turn = float(angles[a[top[0]]] + offset[0] * FINE_DEG)
        move = np.array([at[i] + near[top[i]] + offset[i] * FINE_PX for i in (1, 2)])
        return turn, move, float(score[top])

    def result(self, history: list[dict[str, float]]) -> Refined:
        """Back in pixels of the originals and rows of the session."""
        if self.given is None:
            self._join_halves(*self._sums(lambda _: None))
        angle, shift = np.full(self.n_all, np.nan), np.full((self.n_all, 2), np.nan)
        moved_deg, moved_px, correlation = (np.full(self.n_all, np.nan) for _ in range(3))
        to_working = self.ratio * self.scale
        angle[self.rows], shift[self.rows] = self.angle, self.shift / to_working[:, None]
        moved_deg[self.rows] = np.abs(wrap_deg(self.angle - self.start[0]))
        moved_px[self.rows] = np.linalg.norm(self.shift - self.start[1], axis=1) / to_working
        correlation[self.rows] = self.correlation
        return Refined(angle, shift, moved_deg, moved_px, correlation, history)


def _radius(m: int) -> Floats:
    ky, kx = np.meshgrid(np.fft.fftfreq(m, 1 / m), np.arange(m // 2 + 1), indexing="ij")
    return np.asarray(np.hypot(ky, kx))


def _twice(m: int) -> Float:
    """Every number of a half transform stands for itself and its mirror image, but for the first column."""
    kx = np.arange(m // 2 + 1)
    return np.where((kx == 0) | (2 * kx == m), 1.0, 2.0).astype(np.float32)


def _ring_mean(values: NDArray[Any], radius: Floats) -> Floats:
    ring = np.rint(radius).astype(int).ravel()
    count = np.bincount(ring)
    return np.asarray(np.bincount(ring, np.asarray(values, float).ravel()) / np.maximum(count, 1))


def _ramp(m: int, y: float, x: float) -> NDArray[np.complex64]:
    """Moves a picture by (-y, -x): the place that scores at (y, x) comes to 0."""
    fy, fx = np.fft.fftfreq(m)[:, None], np.fft.rfftfreq(m)
    return np.exp(2j * np.pi * (fy * y + fx * x)).astype(np.complex64)


def _waves(m: int, shifts: Floats) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
    y = np.exp(2j * np.pi * np.outer(shifts, np.fft.fftfreq(m))).astype(np.complex64)
    x = np.exp(2j * np.pi * np.outer(np.fft.rfftfreq(m), shifts)).astype(np.complex64)
    return y, x


def _window(product: NDArray[Any], waves: tuple[NDArray[Any], NDArray[Any]]) -> Floats:
    """`(b, m, h)` → `(b, s, s)`: the inverse transform at a window of shifts alone."""
    y, x = waves
    return np.asarray(np.real(y @ (product @ x)), dtype=np.float64)


def _vertex(values: Floats, top: int) -> float:
    """Where between its neighbours the top of a parabola lies, in steps."""
    if not 0 < top < len(values) - 1:
        return 0.0
    before, here, after = (float(values[top + i]) for i in (-1, 0, 1))
    bend = before - 2 * here + after
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < 0 else 0.0


def _padded(spectrum: NDArray[Any], n: int, m: int) -> NDArray[Any]:
    """`(n, h)` → `(m, …)` for m > n, about the centres n // 2 and m // 2."""
    out = np.zeros((m, m // 2 + 1), spectrum.dtype)
    ky = np.fft.fftfreq(n, 1 / n).astype(int)
    offset = n // 2 - (m // 2) * n / m  # in pixels of n
    ramp = np.exp(2j * np.pi * offset * np.fft.fftfreq(n))[:, None] * np.exp(
        2j * np.pi * offset * np.fft.rfftfreq(n)
    )
    out[ky % m, : n // 2 + 1] = spectrum * ramp * (m / n) ** 2
    return out
