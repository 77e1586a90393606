"""What a session gives to other programs: particles, averages, tables; chosen, written, checked.

Every export of poses is averaged again from what the written file says before it gets its name: a wrong
sign, axis or unit cannot leave this program unnoticed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.averaging import average_classes
from particle_explorer.class_sets import StoredClasses, kept_classes
from particle_explorer.configs import AverageConfig
from particle_explorer.files import UserError, replacing, umask
from particle_explorer.io import cs_writing, joining, writing
from particle_explorer.io.class_files import ROOT, ClassSet, class_numbers, write_relion, write_templates
from particle_explorer.movies import contact_sheet
from particle_explorer.particles import ImageStack, Particles
from particle_explorer.pose import wrap_deg
from particle_explorer.preprocess import Plan
from particle_explorer.report import png_file
from particle_explorer.session import Run, Session
from particle_explorer.summing.work import Event

PARTICLE_SUFFIXES = (".star", ".cs")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SUFFIXES = (*PARTICLE_SUFFIXES, *TABLE_SUFFIXES, ".txt")
"""What `export` writes; .txt is a list of rows."""
PICTURE_SUFFIXES = (".mrcs", ".png")
"""What `export_pictures` writes."""

CHECKED_PARTICLES = 2000
"""As many particles, or the smallest class, are averaged again from an exported file."""
MOST_CHECKED = 10 * CHECKED_PARTICLES
"""A larger class is not averaged whole, but some of it at the poses that were meant and at those written."""
AGREEMENT = 0.99
_SAME_DEG, _SAME_PX = 1e-3, 1e-2
"""What the printing of numbers may take from a pose."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Chosen:
    """What is exported of a session: which rows, with which classes and poses."""

    session: Session
    rows: NDArray[np.int64]
    """Rows of the session, in the order of the source."""
    class_id: NDArray[np.int64] | None = None
    """`(k,)` from 1, of those rows; so are all below."""
    angle_deg: NDArray[np.float64] | None = None
    shift_yx_px: NDArray[np.float64] | None = None
    further: Mapping[str, NDArray[np.float64]] | None = None
    every_column: bool = False
    """Tables hold all columns of the source too."""

    @property
    def table(self) -> pd.DataFrame:
        """The rows of the session's table."""
        return self.session.table.iloc[self.rows]


def choose(
    session: Session,
    mask: NDArray[np.bool_],
    *,
    class_id: NDArray[np.int64] | None = None,
    angle_deg: NDArray[np.float64] | None = None,
    shift_yx_px: NDArray[np.float64] | None = None,
    further: pd.DataFrame | None = None,
    every_column: bool = False,
) -> Chosen:
    """The rows of `mask` `(N,)`; classes, poses and further columns are given for all `N` rows."""
    rows = np.flatnonzero(mask)
    rows = rows[np.argsort(session.table["source_row"].to_numpy()[rows], kind="stable")]
    return Chosen(
        session,
        rows,
        None if class_id is None else class_id[rows],
        None if angle_deg is None else angle_deg[rows],
        None if shift_yx_px is None else shift_yx_px[rows],
        None if further is None else {str(name): further[name].to_numpy(float)[rows] for name in further},
        every_column,
    )


def latent_columns(run: Run) -> pd.DataFrame:
    """Coordinates, spreads and scores of a run by the rows of its session, without the pose."""
    latents = run.latents()
    if latents is None:
        raise UserError(f"run {run.name} has no latents yet; its state is {run.state!r}")
    table = latents.table.reindex(run.session.table.index)
    return table.drop(columns=["angle_deg", "shift_y_px", "shift_x_px"], errors="ignore")


@dataclass(frozen=True)
class Averaged:
    """The particles of class averages, at the classes and poses that they were averaged at."""

    chosen: Chosen
    shown: dict[int, NDArray[np.float32]] | None
    """Class number → average, where it is nothing but the mean of its particles."""
    config: AverageConfig


def averaged(
    session: Session,
    stored: StoredClasses,
    *,
    good: bool = False,
    further: pd.DataFrame | None = None,
    every_column: bool = False,
) -> Averaged:
    """What is behind averages of a session; with `good` of those only that were not marked away."""
    number = class_numbers([str(one["label"]) for one in stored.classes])
    members = _members(session, stored.members, number)
    if good:
        kept = number[kept_classes([str(one.get("mark", "")) for one in stored.classes])]
        members = members[members["class_id"].isin(kept)]
        if not len(members):
            raise UserError(f"no particle is left of {stored.name}: every class is marked bad")
    uid = pd.Index(session.uid)
    mask = np.asarray(uid.isin(members.index))
    mine = members.loc[uid[mask]]
    chosen = choose(
        session,
        mask,
        class_id=_full(mask, mine["class_id"].to_numpy(np.int64)),
        angle_deg=_full(mask, mine["angle_deg"].to_numpy(float)),
        shift_yx_px=_full(mask, mine[["shift_y_px", "shift_x_px"]].to_numpy(float)),
        further=further,
        every_column=every_column,
    )
    weight = stored.members.get("weight", pd.Series([1.0]))
    plain = bool((weight == 1).all()) and stored.images.ndim == 3 and not stored.members.index.has_duplicates
    shown = dict(zip(number.tolist(), stored.images, strict=True)) if plain else None
    return Averaged(chosen, shown, AverageConfig.model_validate(stored.how.get("config", {})))


def export_pictures(out: Path, stored: StoredClasses, *, overwrite: bool = False) -> list[str]:
    """Write averages as an image stack (.mrcs) or side by side as a picture (.png); returns notes."""
    suffix = out.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise UserError(f"{out} has none of the endings for averages: {', '.join(PICTURE_SUFFIXES)}")
    grey = stored.images if stored.images.ndim == 3 else stored.images.mean(1)  # an MRC stack has no colours
    if suffix == ".mrcs":
        return writing.export_averages(out, grey, stored.pixel_size_A, overwrite=overwrite)
    picture = contact_sheet([grey], math.ceil(math.sqrt(len(grey))))
    with replacing(out, overwrite=overwrite) as temporary:
        temporary.write_bytes(png_file(picture))
    return [f"averages of {stored.name} by rows: {', '.join(str(one['label']) for one in stored.classes)}"]


def export(
    out: Path,
    chosen: Chosen,
    *,
    average: AverageConfig | None = None,
    shown: Mapping[int, NDArray[np.float32]] | None = None,
    coordinates_xy_px: NDArray[np.float64] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[str]:
    """Write the chosen particles in the form that the ending of `out` names; returns notes.

    `shown` are the averages that the particles must give again, see `check_poses`.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{out} has none of the endings that are exported: {', '.join(SUFFIXES)}")
    session = chosen.session
    if not len(chosen.rows):
        raise UserError("there are no particles to export; the selection is empty")
    if suffix == ".txt":
        return writing.export_indices(out, chosen.table["source_row"].to_numpy(np.int64), overwrite=overwrite)
    if suffix in TABLE_SUFFIXES:
        return writing.export_table(out, as_table(chosen), overwrite=overwrite)
    said: list[str] = []

    def check(found: pd.DataFrame) -> None:
        if coordinates_xy_px is not None:  # poses of images that are yet to be extracted
            same_poses(found, chosen.angle_deg, chosen.shift_yx_px)
        elif chosen.angle_deg is not None:
            said.append(check_poses(chosen, found, average or AverageConfig(), progress, stop, shown))

    notes = writing.export_particles(
        out,
        table=chosen.table,
        source=session.source_path,
        kind=session.info.source_kind,
        class_id=chosen.class_id,
        angle_deg=chosen.angle_deg,
        shift_yx_px=chosen.shift_yx_px,
        further=chosen.further,
        coordinates_xy_px=coordinates_xy_px,
        group_file=session.group_file,
        overwrite=overwrite,
        protected=[session.original_source],
        check=check,
        progress=None if progress is None else lambda done: progress("writing", done),
        stop=stop,
    )
    return [*notes, *said]


def export_classes(
    folder: Path,
    session: Session,
    name: str,
    *,
    project_dir: Path | None = None,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[str]:
    """Write the averages `name` of a session and their particles into a new folder, for RELION's class
    display and as templates of cryoSPARC; returns notes. The folder appears at once, complete.

    `project_dir` is the folder that RELION runs in, from which names in the files start; by default that of
    the source, where `folder` lies in it.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose a new folder for the class averages")
    stored = session.classes.read(name)
    images = stored.images if stored.images.ndim == 3 else stored.images.mean(1)
    number = class_numbers([str(one["label"]) for one in stored.classes])
    members = _members(session, stored.members, number)
    classes = _class_set(images, number, members, stored)
    root = project_dir.absolute() if project_dir is not None else writing.project_root(session.table)
    notes: list[str] = []
    if root is not None and folder.is_relative_to(root):
        shown = folder.relative_to(root).as_posix() + "/"
        notes.append(f"run relion_display in {root}: names in the files start from there")
    else:
        shown = folder.as_posix() + "/"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write into {folder.parent}: {error.strerror}") from error
    try:
        notes += _write_classes(new, session, stored, classes, shown, progress, stop)
        new.chmod(0o777 & ~umask())
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; nothing of it was kept") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return [note.replace(str(new), str(folder)) for note in notes]


def _write_classes(
    new: Path,
    session: Session,
    stored: StoredClasses,
    classes: ClassSet,
    shown: str,
    progress: Progress | None,
    stop: Event | None,
) -> list[str]:
    write_relion(new, classes, shown)
    notes = [f"{int(classes.chosen.sum())} of {len(stored.classes)} classes are chosen"]
    notes.append("averages are in this program's own grey scale: RELION's autopicking wants them rescaled")
    if math.isfinite(classes.pixel_size_A):
        write_templates(new, classes)
    else:
        notes.append("the pixel size is not known, so there are no templates for cryoSPARC")
    filled = classes.images[classes.counts > 0]
    picture = contact_sheet([filled], math.ceil(math.sqrt(len(filled))))
    (new / "montage.png").write_bytes(png_file(picture))
    behind = averaged(session, stored)
    chosen = behind.chosen
    said: list[str] = []

    def check(found: pd.DataFrame) -> None:
        said.append(check_poses(chosen, found, behind.config, progress, stop, behind.shown))

    notes += writing.export_particles(
        new / f"{ROOT}_data.star",
        table=chosen.table,
        source=session.source_path,
        kind=session.info.source_kind,
        class_id=chosen.class_id,
        angle_deg=chosen.angle_deg,
        shift_yx_px=chosen.shift_yx_px,
        check=check,
        progress=None if progress is None else lambda done: progress("writing", done),
        stop=stop,
    )
    return notes + said


def _full(mask: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[Any]:
    full = np.zeros((len(mask), *values.shape[1:]), values.dtype)
    full[mask] = values
    return full


def _members(session: Session, members: pd.DataFrame, number: NDArray[np.int64]) -> pd.DataFrame:
    """One row per particle, by uid: `class_id` and the pose it was averaged at. A particle of several
    averages belongs to that in which it counts most."""
    if not {"angle_deg", "shift_y_px", "shift_x_px"} <= set(members):
        raise UserError("these averages were made by an older version, without poses; average again")
    table = members.assign(class_id=number[members["average"].to_numpy(np.int64)])
    weight = table["weight"].to_numpy(float) if "weight" in table else np.ones(len(table))
    table = table.iloc[np.argsort(-weight, kind="stable")]
    table = table[~table.index.duplicated()]
    return table[table.index.isin(session.uid)]


def _class_set(
    images: NDArray[np.float32], number: NDArray[np.int64], members: pd.DataFrame, stored: StoredClasses
) -> ClassSet:
    """The averages at the rows of their numbers; a number without an average is an empty class."""
    k = int(number.max())
    every = np.zeros((k, *images.shape[1:]), np.float32)
    every[number - 1] = images
    counts = np.bincount(members["class_id"].to_numpy(np.int64) - 1, minlength=k)
    resolution = np.full(k, np.nan)
    # halves that share an alignment say nothing of a resolution
    found = [one.get("resolution_A") if one["halves_independent"] else None for one in stored.classes]
    resolution[number - 1] = [math.nan if value is None else float(value) for value in found]
    chosen = np.zeros(k, bool)
    chosen[number - 1] = kept_classes([one.get("mark", "") for one in stored.classes])
    chosen &= counts > 0
    if not chosen.any():
        raise UserError(f"every class of {stored.name} is marked bad; mark those to export good")
    return ClassSet(every, counts, resolution, chosen, stored.pixel_size_A)


def recentred(chosen: Chosen, micrograph_pixel_size_A: float = 0.0) -> tuple[Chosen, NDArray[np.float64]]:
    """Poses as they will be after particles are extracted again where they are, and `(k, 2)` coordinates
    (x, y) to extract them at, in whole pixels of the micrograph away from the old.

    A particle at +shift from the middle of its box lies at coordinate + shift (RELION: `rlnCoordinate -=
    rlnOrigin`); what the whole pixels leave stays in the shift.
    """
    table = chosen.table
    if chosen.shift_yx_px is None:
        raise UserError("there are no shifts to recentre particles by; choose poses")
    if not {"rlnCoordinateX", "rlnCoordinateY"} <= set(table):
        raise UserError(
            "the particle file has no coordinates rlnCoordinateX and Y to recentre; for cryoSPARC export "
            "poses and extract with 'Recenter using aligned shifts'"
        )
    size = joining.micrograph_pixel_size(table, micrograph_pixel_size_A)
    scale = table["pixel_size_A"].to_numpy(float) / size
    if not np.isfinite(scale).all():
        raise UserError(
            "the pixel size of the micrographs is not known (no rlnMicrographPixelSize): give it by "
            "--micrograph-pixel-size-A"
        )
    whole = np.round(chosen.shift_yx_px * scale[:, None])
    coordinates = table[["rlnCoordinateX", "rlnCoordinateY"]].to_numpy(float) + whole[:, ::-1]
    return replace(chosen, shift_yx_px=chosen.shift_yx_px - whole / scale[:, None]), coordinates


def transfer(
    out: Path,
    chosen: Chosen,
    other: Particles,
    *,
    tolerance_px: float = 2.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> list[str]:
    """Write those particles of another extraction that lie where the chosen ones do, with their classes and
    poses; `tolerance_px` in pixels of the micrograph. Returns notes.

    Shifts keep their length in Å; where a particle was extracted at another coordinate, they change by that.
    """
    session, table = chosen.session, chosen.table
    if session.info.source_kind != other.kind:
        raise UserError(
            f"{other.source} is a .{other.kind} file and the session was made of a "
            f".{session.info.source_kind} file; coordinates are compared within one kind only, as their "
            "axes differ"
        )
    place = joining.match(table, other.table, tolerance_px, (str(session.path), str(other.source)))
    here = np.flatnonzero(place >= 0)
    if not len(here):
        raise UserError(
            f"no particle of {other.source} lies within {tolerance_px:g} px of one of the session's; are "
            "they of the same micrographs?"
        )
    theirs = other.table.iloc[place[here]]
    notes: list[str] = []
    shift = None
    if chosen.shift_yx_px is not None:
        my_size = table["pixel_size_A"].to_numpy(float)[here]
        their_size = theirs["pixel_size_A"].to_numpy(float)
        if not np.isfinite(my_size * their_size).all():
            raise UserError("the pixel size of one of the extractions is not known, and shifts need it")
        moved = joining.places(theirs, "")[1] - joining.places(table.iloc[here], "")[1]
        micrograph = joining.micrograph_pixel_size(theirs)
        if np.any(moved) and not np.isfinite(micrograph).all():
            notes.append(
                "coordinates differ a little, and the pixel size of the micrographs is not known: shifts "
                "were not corrected for that"
            )
            moved = np.zeros_like(moved)
        moved_A = np.where(np.isfinite(micrograph), micrograph, 0.0)[:, None] * moved[:, ::-1]
        shift = (chosen.shift_yx_px[here] * my_size[:, None] - moved_A) / their_size[:, None]
    classes = None if chosen.class_id is None else chosen.class_id[here]
    angle = None if chosen.angle_deg is None else chosen.angle_deg[here]
    order = np.argsort(theirs["source_row"].to_numpy(), kind="stable")

    def check(found: pd.DataFrame) -> None:
        same_poses(found, None if angle is None else angle[order], None if shift is None else shift[order])

    notes += writing.export_particles(
        out,
        table=theirs,
        source=other.source,
        kind=other.kind,
        class_id=classes,
        angle_deg=angle,
        shift_yx_px=shift,
        group_file=cs_writing.group_file_of(other.source) if other.kind == "cs" else None,
        overwrite=overwrite,
        check=check,
        progress=None if progress is None else lambda done: progress("writing", done),
        stop=stop,
    )
    return [f"{len(here)} of {len(chosen.rows)} particles found in {other.source}", *notes]


def as_table(chosen: Chosen) -> pd.DataFrame:
    """One row per particle, indexed by uid: where its image is, class, pose, latent coordinates."""
    names = [name for name in ("rlnImageName", "blob/path", "blob/idx") if name in chosen.table]
    kept = (
        list(chosen.table)
        if chosen.every_column
        else ["source_row", *(names or ["stack_path", "stack_index"])]
    )
    table = chosen.table[kept].copy()
    if chosen.class_id is not None:
        table["class_id"] = chosen.class_id
    if chosen.angle_deg is not None:
        table["angle_deg"] = chosen.angle_deg
    if chosen.shift_yx_px is not None:
        table["shift_y_px"], table["shift_x_px"] = chosen.shift_yx_px.T
    for name, values in (chosen.further or {}).items():
        table[name] = values
    return table


class _Written:
    """Some particles of a session, to be averaged at the poses that a file says they have."""

    def __init__(self, session: Session, rows: NDArray[np.int64], images: ImageStack) -> None:
        self.plan: Plan = session.plan
        self.scale = session.scale
        self.table = session.table.iloc[rows]
        self._images = images.take(rows)

    def originals(self) -> ImageStack:
        return self._images


def check_poses(
    chosen: Chosen,
    found: pd.DataFrame,
    config: AverageConfig,
    progress: Progress | None = None,
    stop: Event | None = None,
    shown: Mapping[int, NDArray[np.float32]] | None = None,
) -> str:
    """Compare the poses that the written file says (`found`, rows as chosen) with those that were meant, and
    average particles by them.

    With `shown` (class number → average of all its members) that is what must come out; else the averages
    by the poses that were meant. A wrong file is a `RuntimeError`; a right one a sentence.
    """
    n = len(chosen.rows)
    classes = np.ones(n, np.int64) if chosen.class_id is None else chosen.class_id
    if chosen.class_id is not None and not np.array_equal(found["class_id"].to_numpy(np.int64), classes):
        raise RuntimeError("the written file does not hold the classes that were meant")
    # a blob turned the wrong way still looks alike, so every pose is compared, with the originals or without
    same_poses(found, chosen.angle_deg, chosen.shift_yx_px)
    try:
        images = chosen.session.originals()
    except UserError as error:
        return f"not checked by averaging, because {error}"
    if shown and min(np.unique(classes, return_counts=True)[1]) > MOST_CHECKED:
        shown = None
    # what is averaged together has one scale; with averages to compare with it has that anyway
    scales = pd.factorize(pd.MultiIndex.from_frame(chosen.table[["box_px", "pixel_size_A"]].round(6)))[0]
    parts = [_to_check(classes, shown)] if shown else _some_of_each(scales, classes)
    meant = _poses(chosen.angle_deg, chosen.shift_yx_px, n)
    written = _poses(
        found["angle_deg"].to_numpy(float) if "angle_deg" in found else None,
        found[["shift_y_px", "shift_x_px"]].to_numpy(float) if "shift_y_px" in found else None,
        n,
    )
    worst = 1.0
    for i, part in enumerate(parts):
        where = _Written(chosen.session, chosen.rows[part], images)

        def averages(
            poses: tuple[NDArray[np.float64], NDArray[np.float64]],
            first: int = i,
            part: NDArray[np.int64] = part,
            where: _Written = where,
        ) -> dict[int, NDArray[np.float32]]:
            made = average_classes(
                where,
                classes[part],
                poses[0][part],
                poses[1][part],
                config,
                progress=lambda done: progress("checking", (first + done) / len(parts)) if progress else None,
                stop=stop,
            )
            return {int(average.label): average.image for average in made}

        again = averages(written)
        wanted = shown or averages(meant)
        worst = min(worst, *(_correlation(again[label], wanted[label]) for label in again))
    if not worst > AGREEMENT:
        raise RuntimeError(f"averages by the written poses are not those that were meant (r {worst:.3f})")
    total = sum(map(len, parts))
    return f"checked: {total} particles averaged again from what was written, r {worst:.4f}"


def same_poses(
    found: pd.DataFrame, angle_deg: NDArray[np.float64] | None, shift_yx_px: NDArray[np.float64] | None
) -> None:
    """Every pose that a written file says is the one that was meant, or a `RuntimeError`."""
    turn, moved = np.zeros(len(found)), np.zeros(len(found))
    if angle_deg is not None:
        turn = np.abs(wrap_deg(found["angle_deg"].to_numpy(float) - angle_deg))
    if shift_yx_px is not None:
        moved = np.abs(found[["shift_y_px", "shift_x_px"]].to_numpy(float) - shift_yx_px).max(axis=1)
    off = np.flatnonzero(~((turn <= _SAME_DEG) & (moved <= _SAME_PX)))
    if len(off):
        raise RuntimeError(
            f"{len(off)} of the written poses are not those that were meant; the first is particle "
            f"{int(off[0]) + 1}, {turn[off[0]]:.3g}° and {moved[off[0]]:.3g} px off"
        )


def _poses(
    angle_deg: NDArray[np.float64] | None, shift_yx_px: NDArray[np.float64] | None, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        np.zeros(n) if angle_deg is None else angle_deg,
        np.zeros((n, 2)) if shift_yx_px is None else shift_yx_px,
    )


def _some_of_each(scales: NDArray[np.int64], classes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows to average again, some of the largest classes of every scale."""
    parts = []
    for scale in np.unique(scales):
        rows = np.flatnonzero(scales == scale)
        labels, counts = np.unique(classes[rows], return_counts=True)
        largest = labels[np.argsort(-counts, kind="stable")][:20]
        each = max(1, CHECKED_PARTICLES // len(largest))
        parts.append(
            np.sort(
                np.concatenate([rows[np.flatnonzero(classes[rows] == label)[:each]] for label in largest])
            )
        )
    return parts


def _to_check(classes: NDArray[np.int64], shown: Mapping[int, NDArray[np.float32]]) -> NDArray[np.int64]:
    """Rows of whole classes, the smallest first, as many as may be; at least one class."""
    labels, counts = np.unique(classes, return_counts=True)
    taken: list[int] = []
    total = 0
    for label, count in sorted(zip(labels.tolist(), counts.tolist(), strict=True), key=lambda one: one[1]):
        if label in shown and (not taken or total + count <= CHECKED_PARTICLES):
            taken.append(label)
            total += count
    return np.flatnonzero(np.isin(classes, taken))


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 1.0
