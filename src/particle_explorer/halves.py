"""Averages whose resolution may be believed: two models that never saw each other's particles.

The particles are split at random in two. Each half trains a model of its own, is placed and grouped by that
model alone, and averaged with its poses. Only then is every average of the first half paired with the average
of the second that it resembles, and that one is laid onto it: one turn and one move for all members of a
class. What the two share was in the images, and not put there by an alignment (Grigorieff 2000; Scheres &
Chen 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from particle_explorer import __version__, latents, training
from particle_explorer.averaging import ClassAverage, average_members
from particle_explorer.configs import AverageConfig, ClusterConfig, RunConfig
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import rotation_matrix, wrap_deg
from particle_explorer.session import Run, Session
from particle_explorer.spectra import Placement, cropped, placed
from particle_explorer.summing.work import Event, Members

Tell = Callable[[str, float], None]
HALVES = ("independent-a", "independent-b")
"""Names of the two selections."""
SMALL_PX = 64
"""Side that averages are cropped to, in Fourier space, to be paired and laid onto each other."""


class Paired(NamedTuple):
    """Averages of both halves, and how they were paired."""

    averages: list[ClassAverage]
    """Their halves are those of the two models"""
    matches: list[tuple[int, int, float]]
    """Class of the first half, class of the second, their correlation"""


def split(session: Session, seed: int = 0) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two selections of the session, disjoint and together everything; made once, then read."""
    there = session.selections.names()
    if all(name in there for name in HALVES):
        a, b = (session.selections.mask(name) for name in HALVES)
        if (a ^ b).all():
            return a, b
        raise UserError(
            f"selections {HALVES[0]} and {HALVES[1]} overlap or leave particles out; rename or remove them"
        )
    first = np.zeros(session.n_particles, bool)
    chosen = np.random.default_rng(seed).permutation(session.n_particles)[: session.n_particles // 2]
    first[chosen] = True
    for name, mask in zip(HALVES, (first, ~first), strict=True):
        session.selections.save(name, mask, how="at random, for two independent models")
    return first, ~first


def runs_of_halves(run: Run, tell: Tell, stop: Event | None = None) -> list[Run]:
    """Two runs with the settings of `run`, each fitted to one half; those that are there are taken."""
    session, found = run.session, []
    for number, name in enumerate(HALVES):
        wanted = run.config.model_copy(update={"selection": name, "parent": run.name, "where": ""})
        there = [one for one in session.runs() if one.state == "finished" and _same(one.config, wanted)]
        if there:
            found.append(there[-1])
            continue
        new = session.new_run(wanted.model_copy(update={"version": __version__}))
        for progress in training.fit(new, stop):  # type: ignore[arg-type]
            tell(f"training the {'first' if number == 0 else 'second'} model", progress.fraction)
        if stop is not None and stop.is_set():
            raise Stopped("stopped; no averages were made")
        found.append(new)
    return found


def _same(one: RunConfig, other: RunConfig) -> bool:
    keys = ("model", "train", "data", "selection", "parent")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def independent_averages(
    runs: list[Run],
    n_classes: int,
    config: AverageConfig | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    tell: Tell = lambda what, share: None,
    stop: Event | None = None,
) -> Paired:
    """Averages of two runs that were fitted to disjoint selections, see `runs_of_halves`."""
    session = runs[0].session
    masks = [session.selections.mask(run.config.selection) for run in runs]
    if any(not run.config.selection for run in runs) or (masks[0] & masks[1]).any():
        raise UserError(f"runs {runs[0].name} and {runs[1].name} were fitted to common particles")
    labels, angles, shifts = [], [], []
    for run, mask in zip(runs, masks, strict=True):
        label, angle, shift = _grouped(run, mask, n_classes, seed)
        labels.append(label)
        angles.append(angle)
        shifts.append(shift)
    small_and_side = [
        _averages(session, label, angle, shift, config, device, tell, stop)
        for label, angle, shift in zip(labels, angles, shifts, strict=True)
    ]
    (first, side), (second, _) = small_and_side
    pairs = _paired(first, second, lambda share: tell("laying the averages onto each other", share))
    scale = np.full(session.n_particles, side / first.shape[-1])
    if session.scale is not None:  # shifts are in pixels of each original
        scale *= session.scale.pixel_size_A / session.table["pixel_size_A"].to_numpy(np.float64)
    rows, average, half = [], [], []
    angle, shift = angles[0].copy(), shifts[0].copy()
    for i, (a, b, place) in enumerate(pairs):
        for h, (label, number) in enumerate(zip(labels, (a, b), strict=True)):
            own = np.flatnonzero(label == number)
            rows.append(own)
            average.append(np.full(len(own), i))
            half.append(np.full(len(own), h))
            if h == 1:  # x_img = R(angle) x_b + shift with x_b = R(turn) x_a + move
                turn = rotation_matrix(angles[1][own])
                move = np.array(place.shift_yx_px[::-1])
                angle[own] = wrap_deg(angles[1][own] + place.angle_deg)
                shift[own] = shifts[1][own] + (turn @ move)[:, ::-1] * scale[own, None]
    which, members = np.concatenate(half), np.concatenate(rows)
    made = average_members(
        session,
        Members(members, np.concatenate(average), np.ones(len(members))),
        [str(i + 1) for i in range(len(pairs))],
        angle,
        shift,
        config,
        half=which,
        device=device,
        progress=lambda share: tell("averaging both halves", share),
        stop=stop,
    )
    return Paired(made, [(a, b, place.correlation) for a, b, place in pairs])


def _grouped(
    run: Run, mask: NDArray[np.bool_], k: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Groups of the run's own particles on its own map (-1: the others), and its poses of all rows."""
    found = run.latents()
    if found is None or found.angle_deg is None or found.shift_yx_px is None:
        raise UserError(f"run {run.name} infers no poses; independent halves need a model that does")
    table = found.table.reindex(run.session.table.index)
    z = table[latents.latent_columns(table)].to_numpy(np.float64)
    rows = np.flatnonzero(mask & np.isfinite(z).all(1))
    if len(rows) < 2 * k:
        raise UserError(f"a half has {len(rows)} particles, too few for {k} classes; choose fewer classes")
    label = np.full(len(z), -1, np.int64)
    if z.shape[1] == 1:  # along the map, as many in each
        edges = np.quantile(z[rows, 0], np.arange(1, k) / k)
        label[rows] = np.searchsorted(edges, z[rows, 0])
    else:
        label[rows] = latents.cluster(z[rows], ClusterConfig(n_clusters=k, seed=seed))
    label[rows] = np.unique(label[rows], return_inverse=True)[1].reshape(-1)  # without gaps
    return (
        label,
        table["angle_deg"].to_numpy(np.float64),
        table[["shift_y_px", "shift_x_px"]].to_numpy(np.float64),
    )


def _averages(
    session: Session,
    label: NDArray[np.int64],
    angle: NDArray[np.float64],
    shift: NDArray[np.float64],
    config: AverageConfig | None,
    device: str,
    tell: Tell,
    stop: Event | None,
) -> tuple[NDArray[np.float32], int]:
    """`(k, s, s)` averages of one half, small, and the side they had."""
    rows = np.flatnonzero(label >= 0)
    members = Members(rows, label[rows], np.ones(len(rows)))
    made = average_members(
        session,
        members,
        [str(i) for i in range(int(label.max()) + 1)],
        angle,
        shift,
        config,
        device=device,
        progress=lambda share: tell("averaging either half", share),
        stop=stop,
    )
    images = np.stack([one.image if one.image.ndim == 2 else one.image.mean(0) for one in made])
    n, small = images.shape[-1], min(images.shape[-1], SMALL_PX)
    spectra = cropped(np.fft.rfft2(images), n, small)
    return np.fft.irfft2(spectra, s=(small, small)).astype(np.float32), n


def _paired(
    first: NDArray[np.float32], second: NDArray[np.float32], progress: Callable[[float], None]
) -> list[tuple[int, int, Placement]]:
    """Every class of `first` with one of `second`: the assignment whose correlations add up to most."""
    n = first.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    mask = np.hypot(y, x) < 0.45 * n
    score = np.zeros((len(first), len(second)))
    for i, reference in enumerate(first):
        for j, picture in enumerate(second):
            score[i, j] = placed(picture, reference, mask, exact=False).correlation
        progress((i + 1) / len(first))
    left, right = linear_sum_assignment(-score)
    return [(int(i), int(j), placed(second[j], first[i], mask)) for i, j in zip(left, right, strict=True)]


def summary(averages: list[ClassAverage]) -> str:
    """The resolutions in a sentence."""
    known = [one.resolution_A for one in averages if math.isfinite(one.resolution_A)]
    if not known:
        return "the two halves agree nowhere: there is no resolution to speak of"
    return f"resolutions of independent halves (FRC 0.143): {min(known):.3g} to {max(known):.3g} Å"
