"""What averages of nothing look like: noise through the same inference of poses and the same averaging.

Every member gets a twin: its own image with the phases of its transform drawn at random, so that the power of
every frequency, and nothing of the picture, is left. The model infers a pose for the twin as for any
particle, and the twins of a class are moved back and averaged as its members were. Whatever two halves of
such an average share was put there by the alignment (Grigorieff 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import NDArray

from particle_explorer import averaging
from particle_explorer.averaging import ClassAverage
from particle_explorer.configs import AverageConfig
from particle_explorer.devices import choose_device
from particle_explorer.encoding import encode_prepared, load_model
from particle_explorer.files import UserError
from particle_explorer.particles import Particles
from particle_explorer.preprocess import Plan
from particle_explorer.session import Run
from particle_explorer.summing.work import Event, Members

MEMBERS = 1000
"""Twins of at most so many members of every average: the control needs no more, and takes as long as they."""


class RandomPhases:
    """An image stack whose images keep their amplitudes and nothing else; the same row, the same noise."""

    def __init__(self, stack: Any, seed: int = 0) -> None:
        self.stack, self.seed = stack, seed

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def box_px(self) -> NDArray[Any]:
        """As of the stack."""
        return np.asarray(self.stack.box_px)

    @property
    def n_channels(self) -> int:
        """As of the stack."""
        return int(self.stack.n_channels)

    def read(self, rows: Any) -> NDArray[np.float32]:
        """`(k,)` rows → `(k, c, n, n)`."""
        rows = np.asarray(rows, dtype=np.int64)
        images = np.asarray(self.stack.read(rows), dtype=np.float32)
        n = images.shape[-1]
        for image, row in zip(images, rows, strict=True):
            noise = np.random.default_rng([self.seed, int(row)]).standard_normal((n, n), dtype=np.float32)
            phases = scipy.fft.rfft2(noise)
            phases /= np.maximum(np.abs(phases), 1e-20)
            mean = image.mean((1, 2), keepdims=True)
            spectrum = np.abs(scipy.fft.rfft2(image - mean)) * phases
            image[:] = scipy.fft.irfft2(spectrum, s=(n, n)) + mean
        return images


class _Noise:
    """A session whose originals are noise."""

    def __init__(self, run: Run, stack: RandomPhases) -> None:
        self.table: pd.DataFrame = run.session.table
        self.plan: Plan = run.session.plan
        self.scale = run.session.scale
        self.stack = stack

    def originals(self) -> Any:
        return self.stack


def noise_control(
    run: Run,
    members: Members,
    averages: list[ClassAverage],
    config: AverageConfig | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    tell: Callable[[str, float], None] = lambda what, share: None,
    stop: Event | None = None,
) -> list[ClassAverage]:
    """`averages` of `members` (average `i` made of those with `average == i`), each with its control.

    The control has as many members as the average, at most `MEMBERS`; where it has fewer, its curve is one of
    fewer images, and says so by `control_n`.
    """
    session = run.session
    order = np.random.default_rng(seed).permutation(len(members.row))
    rank = np.empty(len(order), np.int64)
    seen = np.zeros(int(members.average.max()) + 1, np.int64)
    for i in order:
        rank[i] = seen[members.average[i]]
        seen[members.average[i]] += 1
    kept = rank < MEMBERS
    twins = Members(members.row[kept], members.average[kept], members.weight[kept])
    rows = np.unique(twins.row)
    noise = RandomPhases(session.originals(), seed)
    particles = Particles(
        images=_Taken(noise, rows),  # type: ignore[arg-type]
        table=session.table.iloc[rows],
        source=session.original_source,
        kind=session.info.source_kind,
    )
    model = load_model(run, choose_device(device))
    latents = None
    for share, found in encode_prepared(model, particles, session.plan, precision=run.config.train.precision):
        if stop is not None and stop.is_set():
            raise UserError("stopped; nothing was written")
        tell("inferring poses of noise", share)
        latents = found
    if latents is None or latents.angle_deg is None or latents.shift_yx_px is None:
        raise UserError(f"run {run.name} infers no poses, so there is nothing that could align noise")
    angle, shift = np.full(len(session.table), np.nan), np.full((len(session.table), 2), np.nan)
    angle[rows], shift[rows] = latents.angle_deg, latents.shift_yx_px
    names = [str(i) for i in range(len(averages))]
    controls = averaging.average_members(
        _Noise(run, noise),
        twins,
        names,
        angle,
        shift,
        config,
        device=device,
        progress=lambda share: tell("averaging noise", share),
        stop=stop,
    )
    by_name = {int(one.label): one for one in controls}
    result = []
    for i, average in enumerate(averages):
        one = by_name.get(i)
        if one is None:
            result.append(average)
            continue
        result.append(
            replace(
                average, control_frc=one.frc, control_ssnr=one.ssnr, control_image=one.image, control_n=one.n
            )
        )
    return result


class _Taken:
    """Some rows of a noise stack, as `Particles` want them."""

    def __init__(self, stack: RandomPhases, rows: NDArray[np.int64]) -> None:
        self.stack, self.rows = stack, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self.read([i])[0] for i in range(len(self.rows)))

    @property
    def box_px(self) -> NDArray[Any]:
        """Of the chosen rows."""
        return np.asarray(self.stack.box_px[self.rows])

    @property
    def n_channels(self) -> int:
        return self.stack.n_channels

    def read(self, rows: Any) -> NDArray[np.float32]:
        return self.stack.read(self.rows[np.asarray(rows, dtype=np.int64)])
