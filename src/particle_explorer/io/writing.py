"""Exports: particles as star files that RELION reads or as groups that cryoSPARC reads, averages as image
stacks, tables of numbers. Everything is read back and checked before it gets its name."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from particle_explorer.files import Stopped, UserError, replacing, replacing_all
from particle_explorer.io import cs_writing, relion
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.mrc import MrcFile, write_stack, write_stack_in_batches
from particle_explorer.io.reading import open_stacks
from particle_explorer.io.stacks import MRC_SUFFIXES, open_stack
from particle_explorer.io.star import format_block
from particle_explorer.particles import ImageStack

_CTF_PARTICLE = ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "phase_shift_deg")
_CTF_OPTICS = ("voltage_kV", "spherical_aberration_mm", "amplitude_contrast")
_BATCH = 256
_WATCHED = 20_000
"""Rows between two looks at whether to stop."""


def export_particles(
    out: Path | str,
    *,
    table: pd.DataFrame,
    source: Path | None,
    kind: str,
    class_id: ArrayLike | None = None,
    angle_deg: ArrayLike | None = None,
    shift_yx_px: ArrayLike | None = None,
    further: Mapping[str, ArrayLike] | None = None,
    coordinates_xy_px: ArrayLike | None = None,
    group_file: Path | None = None,
    overwrite: bool = False,
    protected: Iterable[Path] = (),
    check: Check | None = None,
    progress: Callable[[float], None] | None = None,
    stop: Event | None = None,
) -> list[str]:
    """Write particles as a star or cs file; what the user should know comes back as notes, one sentence each.

    Parameters
    ----------
    table
        The particles to write, with the vocabulary of `Particles`; they come out in the order of the source.
    source, kind
        The star or cs file they were read from (or a copy of it) and its kind. A star file is written as its
        own text, edited: same dialect, same columns; a cs file as its own records. Everything else becomes
        a star file of RELION 3.1, or new records.
    class_id
        `(N,)` whole numbers from 1, or None to leave classes as they are.
    angle_deg, shift_yx_px
        `(N,)` and `(N, 2)` in our convention (`pose`; pixels of the original), or None to leave poses as they
        are.
    further
        `(N,)` numbers by name, such as latent coordinates: columns `_explorerName` of a star file, fields
        `explorer/name` of a cs file.
    coordinates_xy_px
        `(N, 2)` new coordinates in the micrograph, for a star file that has them.
    group_file
        For a cs file: the `.csg` of the source, which is written anew beside it with its names and numbers in
        place.
    protected
        Files that must never be replaced, such as the original of `source`. The image stacks and `source`
        never are, also when `out` is a link to one.
    check
        Called with what the written file says of its particles: `angle_deg`, `shift_y_px`, `shift_x_px` and
        `class_id` where it has them, indexed by uid. What it raises keeps the export from its name.
    """
    out = Path(out).absolute()
    if out.suffix.lower() not in (".star", ".cs"):
        raise UserError(f"{out} does not end in .star or .cs; particles are exported as one of these")
    if not len(table):
        raise UserError("there are no particles to export; the selection is empty")
    targets = [out] if out.suffix.lower() == ".star" else list(cs_writing.group_paths(out))
    for target in targets:
        _refuse_originals(target, [*([] if source is None else [source]), *protected], table)
        if target.exists() and not overwrite:
            raise UserError(
                f"{target} exists already; choose another name or allow overwriting (--overwrite)"
            )
    order = np.argsort(table["source_row"].to_numpy(), kind="stable")
    table = table.iloc[order]
    new = _New(
        None if class_id is None else _classes(class_id, order),
        None if angle_deg is None else _finite(angle_deg, "angle", (len(order),))[order],
        None if shift_yx_px is None else _finite(shift_yx_px, "shift", (len(order), 2))[order],
        {name: np.asarray(values, np.float64)[order] for name, values in (further or {}).items()},
        None
        if coordinates_xy_px is None
        else _finite(coordinates_xy_px, "coordinate", (len(order), 2))[order],
    )
    watch = _Watch(len(table), progress, stop)
    if out.suffix.lower() == ".cs":
        return _export_group(
            out, table, source if kind == "cs" else None, group_file, new, overwrite, check, watch
        )
    made: list[Path] = []
    try:
        return _export_star(out, table, source, kind, new, overwrite, check, watch, made)
    except BaseException:
        _take_back(made)
        raise


class Event(Protocol):
    """The part of `threading.Event` that is needed here."""

    def is_set(self) -> bool: ...


Check = Callable[[pd.DataFrame], None]


class _New(NamedTuple):
    """What is set in the export, rows in the order of the source."""

    class_id: NDArray[np.int64] | None
    angle_deg: NDArray[np.float64] | None
    shift_yx_px: NDArray[np.float64] | None
    further: dict[str, NDArray[np.float64]]
    coordinates_xy_px: NDArray[np.float64] | None


class _Watch:
    """Tells how many of `n` rows are done, and ends the work when told to stop."""

    def __init__(self, n: int, progress: Callable[[float], None] | None, stop: Event | None) -> None:
        self.n, self.progress, self.stop = n, progress, stop

    def __call__(self, done: int) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped("stopped; nothing was written")
        if self.progress is not None:
            self.progress(min(1.0, done / self.n))

    def over(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for done, piece in enumerate(pieces):
            if done % _WATCHED == 0:
                self(done)
            yield piece


def _export_star(
    out: Path,
    table: pd.DataFrame,
    source: Path | None,
    kind: str,
    new: _New,
    overwrite: bool,
    check: Check | None,
    watch: _Watch,
    made: list[Path],
) -> list[str]:
    further = {star_label(name): _printed(values) for name, values in new.further.items()}
    if new.coordinates_xy_px is not None:
        for label, column in zip(("rlnCoordinateX", "rlnCoordinateY"), new.coordinates_xy_px.T, strict=True):
            further[label] = [f"{value:.6f}" for value in column.tolist()]
    if kind == "star" and source is not None:
        text, names, values, notes = relion.edited_star(source, table, *new[:3], further)
        notes += _place_note(out, table)
        pieces: Iterable[bytes] = text
    else:
        names, notes = _image_names(out, table, overwrite, made, watch)
        written, values, more = _new_star(table, names, *new[:3], further)
        pieces, notes = [written.encode()], notes + more
    with replacing(out, overwrite=overwrite) as temporary:
        with temporary.open("wb") as file:
            file.writelines(watch.over(pieces))
        if kind == "star" and "rlnImageName" in table and names != table["rlnImageName"].tolist():
            raise UserError(
                f"{source} is not the file that these particles were read from; it has changed since"
            )
        sizes = table["pixel_size_A"].to_numpy(np.float64)
        found = relion.check_written(temporary, names, values, sizes)
        if check is not None:
            check(found.set_axis(table.index))
    return notes


def _export_group(
    out: Path,
    table: pd.DataFrame,
    source: Path | None,
    group_file: Path | None,
    new: _New,
    overwrite: bool,
    check: Check | None,
    watch: _Watch,
) -> list[str]:
    """A `.cs` file, its passthrough where there is one, and the `.csg` of both."""
    notes: list[str] = []
    if source is not None:
        before = cs_writing.filtered(source, table)
    else:
        records, notes = cs_writing.new_records(table, out)
        before = cs_writing.Group(records, None, {})
    group, more = cs_writing.with_poses(
        before,
        class_id=new.class_id,
        angle_deg=new.angle_deg,
        shift_yx_px=new.shift_yx_px,
        own_A=_own_sizes(before, table),
        given_A=table["pixel_size_A"].to_numpy(np.float64),
    )
    notes += more if source is not None else []
    group = cs_writing.with_latents(group, new.further)
    text = cs_writing.group_text(group, source, group_file, out)
    primary, passthrough, listing = cs_writing.group_paths(out)
    targets = [primary, listing, *([passthrough] if group.passed is not None else [])]
    with replacing_all(targets, overwrite=overwrite) as temporaries:
        with temporaries[0].open("wb") as file:
            cs_writing.write_records(file, group.records, watch)
        temporaries[1].write_text(text, encoding="utf-8", newline="\n")
        if group.passed is not None:
            with temporaries[2].open("wb") as file:
                cs_writing.write_records(file, group.passed)
        records = cs_writing.check_written(temporaries[0], group.records, before.records, group.values)
        passed = None
        if group.passed is not None and before.passed is not None:
            passed = cs_writing.check_written(temporaries[2], group.passed, before.passed, group.values)
        if check is not None:
            written = cs_writing.Group(records, passed, {})
            check(cs_writing.poses_of(written, _own_sizes(written, table)).set_axis(table.index))
    notes.append(
        f"in cryoSPARC, Import Result Group with {listing.name}; "
        f"keep {' and '.join(path.name for path in targets)} together"
    )
    if source is not None:
        notes.append("image paths start from the cryoSPARC project folder, as in the source")
    return notes


def _own_sizes(group: cs_writing.Group, table: pd.DataFrame) -> NDArray[np.float64]:
    """Å per pixel by which the reader takes the shifts of these records: theirs, else that of the stacks, NaN
    where neither says it; never a size that was given at import."""
    own = cs_writing.own_sizes(group)
    unsaid = np.isnan(own)
    if unsaid.any():
        codes, paths = pd.factorize(table["stack_path"])
        pool = DescriptorPool()
        try:
            sizes = np.array([open_stack(path, pool).pixel_size_A for path in paths], np.float64)[codes]
        except UserError:  # without the images, what the session took for it is all there is
            sizes = table["pixel_size_A"].to_numpy(np.float64)
        own = np.where(unsaid, sizes, own)
    return own


def star_label(name: str) -> str:
    """The column of a star file for one of our columns: `z_0` → `explorerZ0`."""
    return "explorer" + "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _printed(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]


def _place_note(out: Path, table: pd.DataFrame) -> list[str]:
    """Image names stay as they were written; said where they lead nowhere from the place of the export."""
    if "rlnImageName" not in table:
        return []
    first = table.drop_duplicates("stack_path")
    for name in first["rlnImageName"].tolist():
        stack = relion.split_image_name(str(name))[1]
        if os.path.isabs(stack) or any(os.path.isfile(folder / stack) for folder in out.parents):
            continue
        root = project_root(table)
        where = "the project folder of the source" if root is None else str(root)
        return [
            f"image names start from {where}, as in the source ({stack}), and lead nowhere from "
            f"{out.parent}: run RELION in {where} and import the file there"
        ]
    return []


def project_root(table: pd.DataFrame) -> Path | None:
    """The folder that the image names of a star or cs file start from, by where their stacks were found."""
    column = next((name for name in ("rlnImageName", "blob/path") if name in table), None)
    if column is None:
        return None
    first = table.drop_duplicates("stack_path")
    for name, path in zip(first[column].tolist(), first["stack_path"].tolist(), strict=True):
        # a path in a cs file has no index before it, but perhaps an @ in a folder
        is_star = column == "rlnImageName"
        stack = Path(relion.split_image_name(str(name))[1] if is_star else str(name).removeprefix(">"))
        if stack.is_absolute() or ".." in stack.parts:
            continue
        whole = Path(path)
        if whole.parts[-len(stack.parts) :] == stack.parts:
            return Path(*whole.parts[: -len(stack.parts)])
    return None


def _take_back(made: Sequence[Path]) -> None:
    """Remove links and stacks that were made for an export that did not come about."""
    for path in made:
        path.unlink(missing_ok=True)
    for folder in dict.fromkeys(path.parent for path in made):
        with contextlib.suppress(OSError):  # not empty, so it is not ours alone
            folder.rmdir()


def export_table(out: Path | str, table: pd.DataFrame, *, overwrite: bool = False) -> list[str]:
    """Write a table indexed by uid as `.csv`, `.tsv` or `.parquet`, and read it back."""
    out = Path(out).absolute()
    with replacing(out, overwrite=overwrite) as temporary:
        if out.suffix.lower() == ".parquet":
            table.to_parquet(temporary, compression="zstd")
            back = pd.read_parquet(temporary)
        else:
            separator = "\t" if out.suffix.lower() == ".tsv" else ","
            table.to_csv(temporary, sep=separator, lineterminator="\n")
            back = pd.read_csv(temporary, sep=separator, dtype={"uid": np.uint64}).set_index("uid")
        if not np.array_equal(back.index.to_numpy(np.uint64), table.index.to_numpy(np.uint64)):
            raise RuntimeError(f"{out} does not hold the particles that were to be written")
        for name in table.columns:
            if pd.api.types.is_numeric_dtype(table[name]) and not np.allclose(
                back[name].to_numpy(float), table[name].to_numpy(float), rtol=1e-5, atol=1e-6, equal_nan=True
            ):
                raise RuntimeError(f"{out} does not hold the values of {name} that were to be written")
    return []


def export_indices(out: Path | str, rows: NDArray[np.int64], *, overwrite: bool = False) -> list[str]:
    """Write rows of the source, counted from 0, one a line, and read them back."""
    out = Path(out).absolute()
    with replacing(out, overwrite=overwrite) as temporary:
        temporary.write_text("".join(f"{row}\n" for row in rows.tolist()), encoding="utf-8", newline="\n")
        if not np.array_equal(np.loadtxt(temporary, np.int64, ndmin=1), rows):
            raise RuntimeError(f"{out} does not hold the rows that were to be written")
    return ["rows of the source file, counted from 0"]


def export_averages(
    out: Path | str, images: NDArray[np.floating], pixel_size_A: float, *, overwrite: bool = False
) -> list[str]:
    """Write `(k, n, n)` averages as a float32 MRC image stack and read it back."""
    out = Path(out).absolute()
    if out.suffix.lower() != ".mrcs":
        raise UserError(f"{out} does not end in .mrcs; averages are exported as an image stack")
    write_stack(out, images, pixel_size_A, overwrite=overwrite)
    back = MrcFile(out).read(np.arange(len(images)))[:, 0]
    if not np.array_equal(back, np.asarray(images, np.float32), equal_nan=True):
        raise RuntimeError(f"{out} does not hold the averages that were to be written")
    if math.isfinite(pixel_size_A):
        return []
    return ["the pixel size is not known, so the stack of averages says none"]


def _refuse_originals(out: Path, sources: Sequence[Path], table: pd.DataFrame) -> None:
    """An export never replaces what it was made from, whatever the way to it."""
    if not os.path.lexists(out):
        return
    for original in [*map(str, sources), *table["stack_path"].unique()]:
        if original and (os.path.realpath(original) == os.path.realpath(out) or _same_file(original, out)):
            raise UserError(
                f"{out} is the original {original}, which is never overwritten; choose another name"
            )


def _same_file(a: str, b: Path) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _classes(class_id: ArrayLike, order: NDArray[np.int64]) -> NDArray[np.int64]:
    classes = np.asarray(class_id)
    if classes.shape != order.shape or not np.array_equal(classes, np.round(classes)) or np.any(classes < 1):
        raise ValueError("classes are one whole number from 1 per particle")
    return classes.astype(np.int64)[order]


def _finite(values: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if found.shape != shape:
        raise ValueError(f"{name} of shape {found.shape} for {shape[0]} particles")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))[0])
        raise UserError(
            f"particle {row + 1} of the export has no {name}; export without poses or leave it out"
        )
    return found


def _image_names(
    out: Path, table: pd.DataFrame, overwrite: bool, made: list[Path], watch: _Watch
) -> tuple[list[str], list[str]]:
    """`rlnImageName` of every row, for stacks that may not be named as RELION wants them."""
    paths = table["stack_path"]
    if not bool((paths != "").all()):
        raise UserError(
            "some of the images exist in memory only; save them as a file before exporting particles"
        )
    unique = [str(path) for path in paths.unique()]
    if not all(path.lower().endswith(MRC_SUFFIXES) for path in unique):
        return _copied_stack(out, table, overwrite, made, watch)
    notes = []
    shown: dict[str, str] = {}
    # a name with a space would end at it
    linked = [
        path
        for path in unique
        if not path.lower().endswith(".mrcs") or re.search(r"\s", _shown(Path(path), out.parent))
    ]
    folder = out.parent if len(linked) == 1 else out.parent / f"{re.sub(r'[ ]+', '_', out.stem)}_stacks"
    for path in unique:
        target = Path(path)
        if path in linked:
            target = _link(folder, target, out, made)
        shown[path] = _shown(target, out.parent)
    if linked:
        notes.append(
            "RELION wants stacks named .mrcs, without spaces: "
            f"made {len(linked)} link{'s' * (len(linked) > 1)} in {folder}; "
            f"the images stay where they are"
        )
    if any(not os.path.isabs(name) for name in shown.values()):
        notes.append(
            f"image names start from {out.parent}: run RELION there or import the star file from there"
        )
    index = (table["stack_index"] + 1).tolist()
    return [f"{i:06d}@{shown[path]}" for i, path in zip(index, paths.tolist(), strict=True)], notes


def _shown(stack: Path, folder: Path) -> str:
    return (stack.relative_to(folder) if stack.is_relative_to(folder) else stack).as_posix()


def _link(folder: Path, stack: Path, out: Path, made: list[Path]) -> Path:
    """A relative link named .mrcs to `stack`; an existing one is used again, anything else stays
    untouched, and the name of `out` is left to its averages."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    for attempt in range(1, 1000):
        name = re.sub(r"\s+", "_", stack.stem) + (f"-{attempt}" if attempt > 1 else "") + ".mrcs"
        link = folder / name
        if link == out.with_suffix(".mrcs"):
            continue
        if os.path.lexists(link):
            if os.path.exists(link) and os.path.samefile(link, stack):
                return link
            continue
        try:
            link.symlink_to(os.path.relpath(os.path.realpath(stack), os.path.realpath(folder)))
        except OSError as error:
            raise UserError(
                f"cannot make the link {link}, which RELION needs because {stack} is not named .mrcs: "
                f"{error.strerror}"
            ) from error
        made.append(link)
        return link
    raise UserError(f"no free name for a link to {stack} in {folder}; remove old links there")


def _copied_stack(
    out: Path, table: pd.DataFrame, overwrite: bool, made: list[Path], watch: _Watch
) -> tuple[list[str], list[str]]:
    """Images that are not all in plain MRC files, as a stack beside the star file: a link named .mrcs to
    anything else is read by no program."""
    stack = open_stacks(table)
    if stack.n_channels != 1:
        raise UserError(
            "colour images cannot be exported for RELION, whose particle images have one channel; a table "
            "(.csv, .parquet) or a list of rows (.txt) can"
        )
    boxes = np.unique(stack.box_px)
    if len(boxes) > 1:
        raise UserError(f"images of several boxes ({', '.join(map(str, boxes))} px) cannot share one stack")
    path = out.with_name(f"{out.stem}_images.mrcs")  # NAME.mrcs is what averages beside it are called
    _refuse_originals(path, [], table)
    sizes = table["pixel_size_A"].to_numpy(np.float64)
    was_there = path.exists()
    write_stack_in_batches(
        path, _batches(stack, watch), len(stack), int(boxes[0]), float(sizes[0]), overwrite=overwrite
    )
    made += [] if was_there else [path]
    names = [f"{i:06d}@{path.name}" for i in range(1, len(table) + 1)]
    paths = map(Path, table["stack_path"].unique())
    others = {one.suffix.lower() or one.name for one in paths if one.suffix.lower() not in MRC_SUFFIXES}
    return names, [
        f"the images are not in .mrc or .mrcs files ({', '.join(sorted(others))}), so all {len(table)} were "
        f"written to {path}",
        f"image names start from {out.parent}: run RELION there or import the star file from there",
    ]


def _batches(stack: ImageStack, watch: _Watch) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(stack), _BATCH):
        watch(first)
        yield stack.read(np.arange(first, min(first + _BATCH, len(stack))))[:, 0]


def _new_star(
    table: pd.DataFrame,
    names: list[str],
    class_id: NDArray[np.int64] | None,
    angle_deg: NDArray[np.float64] | None,
    shift_yx_px: NDArray[np.float64] | None,
    further: dict[str, list[str]],
) -> tuple[str, dict[str, list[str]], list[str]]:
    """A star file for particles that did not come from one: (text, new columns, notes).

    RELION 3.1 with an optics table; where the pixel size is not known RELION 3.0, whose origins are in
    pixels. Nothing is invented: what is not known is left out and said.
    """
    notes: list[str] = []
    sizes = table["pixel_size_A"].to_numpy(np.float64)
    in_pixels = not np.isfinite(sizes).all()
    has_ctf = bool((table["ctf_state"] != "none").all())
    carried = _CTF_PARTICLE + (_CTF_OPTICS if in_pixels else ()) if has_ctf else ()
    columns: dict[str, list[str]] = {"rlnImageName": names}
    if "micrograph" in table:
        columns["rlnMicrographName"] = table["micrograph"].astype(str).tolist()
    for name in carried:
        if name in table:
            columns[relion.CTF_COLUMNS[name]] = [f"{value:.6f}" for value in table[name].tolist()]
    optics = ""
    if in_pixels:
        notes.append(
            "the pixel size is not known, so the star file has the older form of RELION 3.0 with origins in "
            "pixels"
        )
    else:
        groups, optics_table = _optics(table, sizes)
        columns["rlnOpticsGroup"] = [str(group) for group in groups.tolist()]
        optics = format_block("optics", optics_table)
    missing = [
        relion.CTF_COLUMNS[name]
        for name in _CTF_OPTICS[:2]
        if not (name in table and np.isfinite(table[name]).all())
    ]
    if missing:
        notes.append(
            f"{' and '.join(missing)} left out, as not known; RELION asks for them, so add them to the file"
        )
    if bool((table["contrast_sign"] == -1).any()):
        notes.append(
            "the particles are dark in these images and RELION expects bright ones: invert them there"
        )

    values: dict[str, list[str]] = {}
    if class_id is None and "class_id" in table:
        class_id = table["class_id"].to_numpy(np.int64)
    if class_id is not None:
        values["rlnClassNumber"] = [str(value) for value in class_id.tolist()]
    if (
        angle_deg is None
        and shift_yx_px is None
        and {"angle_deg", "shift_y_px", "shift_x_px"} <= set(table.columns)
    ):
        angle_deg = table["angle_deg"].to_numpy(np.float64)
        shift_yx_px = table[["shift_y_px", "shift_x_px"]].to_numpy(np.float64)
    values |= relion.pose_columns(angle_deg, shift_yx_px, sizes, in_pixels=in_pixels) | further
    particles = pd.DataFrame({**columns, **values}, dtype=object)
    return optics + format_block("images" if in_pixels else "particles", particles), values, notes


def _optics(table: pd.DataFrame, sizes: NDArray[np.float64]) -> tuple[NDArray[np.int64], pd.DataFrame]:
    """Group of every particle, 1 … N without gaps, and the optics table of RELION 3.1."""
    known = [name for name in _CTF_OPTICS if name in table and np.isfinite(table[name]).all()]
    keys = pd.DataFrame({"pixel_size_A": np.round(sizes, 6), "box_px": table["box_px"].to_numpy()})
    keys["ctf_state"] = table["ctf_state"].to_numpy(str)
    for name in [*known, *(["optics_group"] if "optics_group" in table else [])]:
        keys[name] = table[name].to_numpy()
    codes, unique = pd.factorize(pd.MultiIndex.from_frame(keys), sort=True)
    first = keys.iloc[np.unique(codes, return_index=True)[1]].reset_index(drop=True)
    number = np.arange(1, len(unique) + 1)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": number,
            "rlnOpticsGroupName": [f"opticsGroup{i}" for i in number],
            "rlnImagePixelSize": first["pixel_size_A"],
            "rlnImageSize": first["box_px"],
            "rlnImageDimensionality": 2,
        }
    )
    for name in known:
        optics[relion.CTF_COLUMNS[name]] = first[name]
    for state, label in relion.CTF_FLAGS:
        if bool((first["ctf_state"] == state).any()):
            optics[label] = (first["ctf_state"] == state).astype(int)
    return codes.astype(np.int64) + 1, optics
