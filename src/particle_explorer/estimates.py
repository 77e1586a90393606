"""What preparing and training will take, before anything is computed."""

from __future__ import annotations

import os
import time

import numpy as np

from particle_explorer import preprocess
from particle_explorer.configs import PreprocessConfig
from particle_explorer.files import UserError
from particle_explorer.io.inspecting import guessed_sign
from particle_explorer.particles import Particles


def requirements(particles: Particles, config: PreprocessConfig) -> list[str]:
    """What preparing and training will take, one fact a line; a few images are prepared to time it."""
    n = len(particles)
    try:
        plan = preprocess.plan(particles.table, config, guessed_sign(particles, config))
    except UserError as error:
        return [f"cannot be prepared as it is: {error}"]
    n_bytes = 2 * n * particles.images.n_channels * plan.cached_box_px**2
    rows = np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int))
    rows = rows[particles.images.box_px[rows] == particles.images.box_px[rows[0]]]
    start = time.perf_counter()
    images = particles.images.read(rows)
    good = ~preprocess.bad_images(images)
    if not good.any():
        return [f"cannot be prepared: the {len(rows)} images looked at are blank or broken"]
    preprocess.apply(images[good], particles.table.iloc[rows[good]], plan)
    seconds = (time.perf_counter() - start) / len(rows) * n
    fit = first_estimate(n, plan.cached_box_px)
    return [
        f"prepared in {plan.cached_box_px} px: {in_words(n_bytes)} on disk and, where free, in memory while "
        f"training; about {_time_in_words(seconds)} to prepare and {_time_in_words(fit)} for a class map"
    ]


def first_estimate(n: int, cached_box_px: int) -> float:
    """Seconds that a class map will take before any was fitted here: rough, by images and pixels."""
    cores = max(1, min(os.cpu_count() or 1, 16))
    return 15 + n * (cached_box_px / 40) ** 2 * 0.006 / cores


def in_words(n_bytes: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{max(1, round(n_bytes / 2**20))} MiB"


def _time_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
