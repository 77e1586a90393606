"""What a stack holds and what preparing it will do, read and computed in threads."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from particle_explorer.configs import PreprocessConfig
from particle_explorer.io.paths import StacksMissing
from particle_explorer.widgets.job_bar import number

if TYPE_CHECKING:
    import pandas as pd

    from particle_explorer.particles import Particles
    from particle_explorer.preprocess import Plan
    from particle_explorer.session import Session

N_PREVIEW = 9
WORKER_START_S = 3.0
LAYER_BLOCK = 256
"""Images of a layer that are written at once."""
OUTLIER_SAMPLE_BYTES = 32 * 2**20
MAX_CHOICES = 60
"""Values of a column that are offered in the subset row; more are typed."""


@dataclass(frozen=True)
class Found:
    """What was found in a stack, read in a thread."""

    particles: Particles
    lines: list[str]
    columns: dict[str, list[str]]
    """Columns of the table, with their values where there are few"""
    unit: str
    """Å where the pixel size is known, px otherwise"""
    pixel_size_known: bool
    """Of all particles"""
    diameter: float
    """0.9 of the box, in `unit`"""
    folder: Path
    """Proposed for the session"""
    mixed_views: bool
    """Several classes, or 3-D poses"""
    existing: Path | None
    """A session that was made of this file before"""
    project_dir: Path | None = None
    """Where the stack names were said to start from"""


@dataclass(frozen=True)
class Preview:
    """A few particles before and after preparing."""

    before: NDArray[np.float32]
    after: NDArray[np.float32]
    words: str
    seconds: float
    """What preparing all of them will take"""
    outliers: NDArray[np.float32]
    """Some that would be left out as outliers, as recorded"""


def look(path: Path, project_dir: Path | None = None, tell: Callable[[float], None] | None = None) -> Found:
    """Read a particle file and say what is in it."""
    from particle_explorer.io.reading import read

    particles = read(path, project_dir=project_dir, progress=tell)
    return replace(_found(particles, path), project_dir=project_dir)


def look_or_miss(
    path: Path, project_dir: Path | None, tell: Callable[[float], None] | None = None
) -> Found | StacksMissing:
    """The same; stacks that are missing are an answer, which can be mended."""
    try:
        return look(path, project_dir, tell)
    except StacksMissing as missing:
        return missing


def look_at_joined(paths: list[Path], project_dir: Path | None) -> Found | StacksMissing:
    """The same for several star files."""
    from particle_explorer.io.joining import joined
    from particle_explorer.session import default_path

    out = default_path(paths[0]).with_name(f"{paths[0].stem}_joined.star")
    try:
        with joined(paths, out, project_dir) as (path, notes):
            found = look(path, project_dir)
    except StacksMissing as missing:
        return missing
    return replace(found, lines=[f"joined into {path}", *notes, *found.lines])


def look_at_layer(data: Any, name: str, scale: list[float], units: list[str]) -> Found:
    """Take the images of a layer; their pixel size is known when the layer is measured in ångström."""
    from particle_explorer.io.reading import read_array

    in_angstrom = bool(units) and units[-1].lower() in ("å", "angstrom", "ångström")
    size = scale[-1] if in_angstrom else float("nan")
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "layer"
    return _found(read_array(data, safe, size), Path.cwd() / f"{safe}.npy")


def save_layer(particles: Particles, beside: Path) -> Path:
    """Write the images of a layer as NAME.npy beside a session; a worker process cannot see a layer."""
    from particle_explorer.files import replacing

    path, n = beside.parent / f"{particles.source.stem}.npy", 1
    while path.exists():
        n += 1
        path = path.with_name(f"{particles.source.stem}-{n}.npy")
    images = particles.images
    box, channels = int(images.box_px[0]), images.n_channels
    shape = (len(images), box, box) if channels == 1 else (len(images), box, box, channels)
    with replacing(path, overwrite=False) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, len(images), LAYER_BLOCK):
            block = images.read(np.arange(start, min(start + LAYER_BLOCK, len(images))))
            file.write(np.ascontiguousarray(np.moveaxis(block, 1, -1), "<f4").tobytes())
    return path


def _found(particles: Particles, path: Path) -> Found:
    from particle_explorer.estimates import requirements
    from particle_explorer.io.inspecting import summarise
    from particle_explorer.plugin import plugin_setting
    from particle_explorer.session import Session, default_path

    table, summary = particles.table, summarise(particles)
    pixel_size = float(np.nanmedian(table["pixel_size_A"])) if table["pixel_size_A"].notna().any() else 0.0
    box = float(np.median(table["box_px"]))
    proposed = default_path(path)
    if plugin_setting("session_folder"):
        proposed = Path(plugin_setting("session_folder")).expanduser() / proposed.name
    return Found(
        particles=particles,
        lines=[*summary.lines(), *requirements(particles, PreprocessConfig())],
        columns={str(name): _choices(table[name]) for name in table.columns},
        unit="Å" if pixel_size else "px",
        pixel_size_known=bool(table["pixel_size_A"].notna().all()),
        diameter=float(f"{0.9 * box * (pixel_size or 1.0):.3g}"),
        folder=free_folder(proposed),
        mixed_views=summary.n_classes > 1 or summary.is_3d,
        existing=proposed if Session.is_session(proposed) else None,
    )


def free_folder(folder: Path) -> Path:
    """This folder, or the first of NAME-2, NAME-3 … that is not there yet."""
    free, n = folder, 1
    while free.exists() and (not free.is_dir() or any(free.iterdir())):
        n += 1
        free = folder.with_name(f"{folder.name}-{n}")
    return free


def _choices(column: pd.Series) -> list[str]:
    if column.dtype.kind == "f" and not np.array_equal(column, np.round(column)):
        return []
    values = column.dropna().unique()
    return [str(value) for value in sorted(values)] if len(values) <= MAX_CHOICES else []


def preview(
    particles: Particles, config: PreprocessConfig, where: str, sample: int = 0, sample_by: str = ""
) -> Preview:
    """Prepare a few particles, taken at random, and time it."""
    from particle_explorer import preprocess
    from particle_explorer.estimates import in_words
    from particle_explorer.files import UserError
    from particle_explorer.io.inspecting import guessed_sign
    from particle_explorer.particles import random_subset, where_mask

    table = particles.table
    rows = np.flatnonzero(where_mask(table, where)) if where else np.arange(len(table))
    if rows.size == 0:
        raise UserError(f"no particle has {where}")
    if sample:
        rows = rows[random_subset(table.iloc[rows], sample, sample_by)]
    plan = preprocess.plan(table.iloc[rows], config, guessed_sign(particles, config))
    boxes = table["box_px"].to_numpy()[rows]
    sizes, counts = np.unique(boxes, return_counts=True)
    alike = rows[boxes == sizes[np.argmax(counts)]]
    rng = np.random.default_rng(0)  # the same nine while settings are tried
    looked_at = _looked_at(int(sizes[np.argmax(counts)])) if config.outlier_sd else 3 * N_PREVIEW
    few = np.sort(rng.permutation(alike)[:looked_at])
    originals = particles.images.read(few)
    good = ~preprocess.bad_images(originals)
    words, far = "", np.zeros(len(few), bool)
    if config.outlier_sd:
        of_good = preprocess.statistics(np.where(good[:, None, None, None], originals, 0)).astype(np.float64)
        of_good[~good] = np.nan
        far = preprocess.outliers(of_good, config.outlier_sd) & good
        words = f" Of {number(len(few))} looked at, {number(int(far.sum()))} would be left out as outliers."
    outlying = originals[far][:N_PREVIEW]
    kept = np.flatnonzero(good & ~far if config.bad_images == "leave-out" else ~far)
    shown = np.sort(rng.permutation(kept if kept.size else np.arange(len(few)))[:N_PREVIEW])
    before, few = originals[shown], few[shown]
    start = time.perf_counter()
    particles.images.read(few)
    after = preprocess.apply(before, table.iloc[few], plan)
    seconds = (time.perf_counter() - start) * rows.size / few.size
    part = f"{number(rows.size)} of {number(len(table))} particles. " if rows.size < len(table) else ""
    n_bytes = 2 * rows.size * particles.images.n_channels * plan.cached_box_px**2
    words = f"{part}{plan_words(plan)}{words} {in_words(n_bytes)} on disk."
    return Preview(before, after, words, WORKER_START_S + seconds, outlying)


def _looked_at(box_px: int) -> int:
    """Images that tell what an outlier is, in a moment and little memory."""
    return int(np.clip(OUTLIER_SAMPLE_BYTES // (4 * box_px**2), 64, 512))


def in_short(lines: list[str]) -> list[str]:
    """The first facts in one line, no figures in brackets, no folders; hovering shows them all."""
    bare = [re.sub(r" \([^()]{12,}\)", "", line) for line in lines]
    bare = [re.sub(r"/(?:[^\s/]+/)+", "", line) for line in bare]
    bare = [re.sub(r"(\d) (Å|px|µm)", "\\1\u00a0\\2", line) for line in bare]  # a number keeps its unit
    return [_sentence(line) for line in (" · ".join(bare[:3]), *bare[3:])]


def _sentence(line: str) -> str:
    """With a capital, unless it begins with the name of a file."""
    return line[:1].upper() + line[1:] if re.match(r"[a-z]+(?![.\w])", line) else line


def plan_words(plan: Plan) -> str:
    """What will be done to the images, in plain words."""
    size = plan.cached_pixel_size_A
    pixel = f", {size:.3g} Å per pixel" if np.isfinite(size) else ""
    return f"Box {plan.box_px} → {plan.cached_box_px} px{pixel}; " + "; ".join(plan.reasons) + "."


def session_lines(session: Session) -> list[str]:
    """What is open, in plain words."""
    info, plan = session.info, session.plan
    where = f" with {info.where}" if info.where else ""
    known = np.isfinite(plan.cached_pixel_size_A)
    size = f", {plan.cached_pixel_size_A:.3g} Å per pixel" if known else ""
    diameter = plan.diameter_px * (plan.cached_pixel_size_A if known else 1.0)
    return [
        f"{number(info.n)} particles of {Path(info.source).name}{where}",
        f"Prepared in {plan.cached_box_px} px{size}, diameter {diameter:.3g} {'Å' if known else 'px'}",
        f"Session {session.path}",
    ]


def is_number(text: str) -> bool:
    """Whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
