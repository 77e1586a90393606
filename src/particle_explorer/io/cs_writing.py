"""cryoSPARC particle groups out: a `.cs` file, its passthrough file and the `.csg` that names both.

A selection is the source's own records, filtered by uid, so that every field nobody sets keeps its bytes.
*Import Result Group* reads the `.csg`: YAML with a `metafile` and a `num_items` for every group of fields; a
leading `>` means "beside this file". Fields and their units as in `cryosparc`; poses through
`pose.to_cryosparc`.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io import cryosparc
from particle_explorer.pose import from_cryosparc, to_cryosparc

Records = NDArray[Any]

ALIGNMENTS = (
    ("split", "<u4", ()), ("shift", "<f4", (2,)), ("pose", "<f4", ()), ("psize_A", "<f4", ()),
    ("error", "<f4", ()), ("error_min", "<f4", ()), ("resid_pow", "<f4", ()), ("slice_pow", "<f4", ()),
    ("image_pow", "<f4", ()), ("cross_cor", "<f4", ()), ("alpha", "<f4", ()), ("alpha_min", "<f4", ()),
    ("weight", "<f4", ()), ("pose_ess", "<f4", ()), ("shift_ess", "<f4", ()),
    ("class_posterior", "<f4", ()), ("class", "<u4", ()), ("class_ess", "<f4", ()),
)  # fmt: skip
"""Fields of `alignments2D` as a 2D classification writes them: name, type, shape."""
_ONE = ("alpha", "alpha_min", "weight", "pose_ess", "shift_ess", "class_posterior", "class_ess")
"""Those that are 1 for a particle that is in one class at one pose with full weight; the others are 0."""
_CHUNK_ROWS = 50_000
_LATENTS = "explorer/"


def group_paths(out: Path) -> tuple[Path, Path, Path]:
    """The `.cs` file, its passthrough file and the `.csg` of an export to `out`."""
    return out, out.with_name(f"{out.stem}_passthrough.cs"), out.with_suffix(".csg")


class Group(NamedTuple):
    """What goes into the files of one group; rows in one order, that of the source."""

    records: Records
    passed: Records | None
    """The passthrough, where there is one."""
    values: dict[str, NDArray[Any]]
    """The fields that were set."""


def filtered(source: Path, table: pd.DataFrame) -> Group:
    """The records of `source` for the rows of `table` (in the order of the source), and those of its
    passthrough file, where there is one."""
    records = cryosparc.load(source)
    passed = cryosparc.find_passthrough(source, records["uid"]).records
    uid = table.index.to_numpy(np.uint64)
    records = records[np.isin(records["uid"].astype(np.uint64), uid)]
    if not np.array_equal(records["uid"].astype(np.uint64), uid):
        raise UserError(f"{source} does not hold the particles to be exported; it has changed since")
    if passed is not None:
        passed = passed[np.isin(passed["uid"].astype(np.uint64), uid)]
    return Group(records, passed, {})


def own_sizes(group: Group) -> NDArray[np.float64]:
    """Å per pixel of the images as the records say it, those of the primary file first; NaN where they do
    not."""
    uid = pd.Index(group.records["uid"])
    for records in (group.records, group.passed):
        if records is not None and "blob/psize_A" in (records.dtype.names or ()):
            said = records["blob/psize_A"].astype(np.float64)[pd.Index(records["uid"]).get_indexer(uid)]
            return np.where(np.isfinite(said) & (said > 0), said, np.nan)
    return np.full(len(uid), np.nan)


def with_poses(
    group: Group,
    *,
    class_id: NDArray[np.int64] | None,
    angle_deg: NDArray[np.float64] | None,
    shift_yx_px: NDArray[np.float64] | None,
    own_A: NDArray[np.float64],
    given_A: NDArray[np.float64],
) -> tuple[Group, list[str]]:
    """`alignments2D` set to these classes (from 1) and poses, rows in the order of the records; and notes.

    They go where the fields are, into the records or the passthrough; where there are none, they are added
    to the records. Shifts are in pixels of `alignments2D/psize_A`, which stays as it is where it is known.
    `own_A` is the pixel size by which the records are read (NaN where they do not say it): only its ratio to
    `alignments2D/psize_A` counts, whatever size was `given_A` for the images.
    """
    if class_id is None and angle_deg is None and shift_yx_px is None:
        return group, []
    home, order = group.records, np.arange(len(group.records))
    in_passed = group.passed is not None and not _has_alignments(home) and _has_alignments(group.passed)
    if in_passed:
        assert group.passed is not None
        home = group.passed
        order = pd.Index(group.records["uid"]).get_indexer(pd.Index(home["uid"]))
    had = _has_alignments(home)
    there = set(home.dtype.names or ())
    posed = angle_deg is not None or shift_yx_px is not None
    wanted = {name for name, _, _ in ALIGNMENTS}
    if had:
        wanted = {*(["class"] if class_id is not None else []), *(["shift", "pose", "psize_A"] * posed)}
    own, unit = own_A[order], np.where(np.isfinite(own_A), own_A, given_A)[order]
    if "alignments2D/psize_A" in there:
        said = home["alignments2D/psize_A"].astype(np.float64)
        unit = np.where(np.isfinite(said) & (said > 0), said, unit)
    known = np.isfinite(unit) & (unit > 0)
    if shift_yx_px is not None and not known.all():
        raise UserError(
            "the pixel size is not known, and cryoSPARC's shifts need it; give it at import "
            "(--preprocess.pixel-size-A) or export without poses"
        )
    new = [(name, kind, shape) for name, kind, shape in ALIGNMENTS if name in wanted]
    new = [item for item in new if f"alignments2D/{item[0]}" not in there]
    home = _with_fields(home, [(f"alignments2D/{name}", kind, shape) for name, kind, shape in new])
    for name, _, _ in new:
        home[f"alignments2D/{name}"] = 1 if name in _ONE else 0
    values: dict[str, NDArray[Any]] = {}
    if "psize_A" in wanted:
        values["alignments2D/psize_A"] = np.where(known, unit, 0.0).astype("<f4")
    if class_id is not None:
        values["alignments2D/class"] = (class_id[order] - 1).astype("<u4")
    pose, shift = to_cryosparc(
        np.zeros(len(home)) if angle_deg is None else angle_deg[order],
        np.zeros((len(home), 2)) if shift_yx_px is None else shift_yx_px[order],
        np.where(known, unit, 1.0),
        np.where(np.isfinite(own), own, np.where(known, unit, 1.0)),
    )
    if angle_deg is not None:
        values["alignments2D/pose"] = pose.astype("<f4")
    if shift_yx_px is not None:
        values["alignments2D/shift"] = shift.astype("<f4")
    for name, value in values.items():
        home[name] = value
    notes = [
        "the scores beside the old 2D alignments (alignments2D/error and others) stay as they were"
        if had
        else "the source has no 2D alignments: they were added, with weight 1 and error 0 for every particle"
    ]
    if any(name.startswith("alignments3D/") for name in group.records.dtype.names or ()):
        notes.append("orientations in 3D (alignments3D) stay as they were")
    other = np.isfinite(own_A) & (np.abs(own_A - given_A) > 1e-3 * own_A)
    if posed and other.any():
        row = int(np.flatnonzero(other)[0])
        notes.append(
            f"the file keeps its own pixel size, {own_A[row]:.4g} Å, by which its shifts are meant; the "
            f"session has {given_A[row]:.4g} Å"
        )
    if in_passed:
        return Group(group.records, home, values), notes
    return Group(home, group.passed, values), notes


def _has_alignments(records: Records) -> bool:
    return any(name.startswith("alignments2D/") for name in records.dtype.names or ())


def with_latents(group: Group, latents: Mapping[str, NDArray[Any]]) -> Group:
    """Further columns `explorer/NAME` of the records, which cryoSPARC passes over; those of an earlier export
    are set anew."""
    values = {f"{_LATENTS}{name}": np.asarray(column, "<f4") for name, column in latents.items()}
    records = _with_fields(group.records, [(name, "<f4", ()) for name in values])
    for name, column in values.items():
        records[name] = column
    return Group(records, group.passed, {**group.values, **values})


def _with_fields(records: Records, fields: Sequence[tuple[str, str, tuple[int, ...]]]) -> Records:
    """A copy with more fields, filled with 0; the old ones keep their bytes."""
    dtype = records.dtype
    description = [(name, dtype[name]) for name in dtype.names or ()]
    new = [field for field in fields if field[0] not in (dtype.names or ())]
    wider = np.zeros(len(records), np.dtype([*description, *new]))
    for name, _ in description:
        wider[name] = records[name]
    return wider


def new_records(table: pd.DataFrame, out: Path) -> tuple[Records, list[str]]:
    """Records for particles that did not come from cryoSPARC: images, CTF where known, micrograph.

    Image paths start from the folder of `out` (`>`), as in groups that cryoSPARC exports. Nothing is
    invented: a CTF is written only where all of it is known.
    """
    if bool((table["stack_path"] == "").any()):
        raise UserError(
            "some of the images exist in memory only; save them as a file before exporting particles"
        )
    sizes = table["pixel_size_A"].to_numpy(np.float64)
    if not np.isfinite(sizes).all():
        raise UserError(
            "the pixel size is not known, and a cryoSPARC file cannot do without; give it at import "
            "(--preprocess.pixel-size-A)"
        )
    suffixes = {Path(path).suffix.lower() for path in table["stack_path"].unique()}
    if not suffixes <= {".mrc", ".mrcs"}:
        raise UserError(
            f"cryoSPARC reads images of .mrc and .mrcs files only, not of {', '.join(sorted(suffixes))}; "
            "export a star file, which writes them as .mrcs, and import that"
        )
    notes: list[str] = []
    shown = {
        path: ">" + Path(os.path.relpath(path, out.parent)).as_posix()
        for path in table["stack_path"].unique()
    }
    sign = table["contrast_sign"].to_numpy(np.float64)
    columns: dict[str, NDArray[Any]] = {
        "uid": table.index.to_numpy(np.uint64),
        "blob/path": np.array([shown[path].encode() for path in table["stack_path"]]),
        "blob/idx": table["stack_index"].to_numpy().astype("<u4"),
        "blob/shape": np.repeat(table["box_px"].to_numpy().astype("<u4")[:, None], 2, axis=1),
        "blob/psize_A": sizes.astype("<f4"),
        "blob/sign": np.where(sign == 0, 1.0, sign).astype("<f4"),
        "blob/import_sig": np.zeros(len(table), "<u8"),
    }
    known = [name for name in cryosparc.CTF_FIELDS if name in table and bool(np.isfinite(table[name]).all())]
    if {"defocus_u_A", "defocus_v_A", "voltage_kV", "spherical_aberration_mm"} <= set(known):
        for name in known:
            field, factor = cryosparc.CTF_FIELDS[name]
            columns[field] = (table[name].to_numpy(np.float64) / factor).astype("<f4")
        groups = table["optics_group"].to_numpy() if "optics_group" in table else np.zeros(len(table))
        columns["ctf/exp_group_id"] = groups.astype("<u4")
    else:
        notes.append("the CTF is not known, so the group has none; estimate it in cryoSPARC")
    if "micrograph" in table:
        columns["location/micrograph_path"] = np.array([str(name).encode() for name in table["micrograph"]])
    if bool((table["ctf_state"] == "phase-flipped").any()):
        notes.append("the images are phase-flipped already, which cryoSPARC cannot be told in this file")
    records = np.empty(len(table), [(name, value.dtype, value.shape[1:]) for name, value in columns.items()])
    for name, value in columns.items():
        records[name] = value
    return records, notes


def write_records(file: BinaryIO, records: Records, watch: Any = None) -> None:
    """The NumPy form, block by block; `watch(rows_done)` is called between the blocks."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(records.dtype), "fortran_order": False,
               "shape": records.shape}
    )  # fmt: skip
    for first in range(0, len(records), _CHUNK_ROWS):
        if watch is not None:
            watch(first)
        file.write(records[first : first + _CHUNK_ROWS].tobytes())


def group_file_of(source: Path) -> Path | None:
    """The `.csg` beside `source` that names it, if there is one."""
    return next(
        (path for path in sorted(source.parent.glob("*.csg")) if source.name in named_files(path)), None
    )


def named_files(group_file: Path) -> set[str]:
    """Names of the `.cs` files that a `.csg` lists."""
    found = (_METAFILE.match(line) for line in _lines(group_file))
    return {Path(match[2].lstrip(">")).name for match in found if match}


_METAFILE = re.compile(r"""^(\s*metafile:\s*)['"]?([^'"\n]*)['"]?\s*$""")
_NUM_ITEMS = re.compile(r"^(\s*num_items:\s*)\d+\s*$")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def edited_group(group_file: Path, source: Path, out: Path, n: int, added: Sequence[str] = ()) -> str:
    """The text of a `.csg` with the names of the exported files and their number of particles in place.

    Every other line stays; groups of fields that were added (`alignments2D`) get an entry of their own.
    """
    primary, passthrough, _ = group_paths(out)
    lines = []
    for line in _lines(group_file):
        metafile, items = _METAFILE.match(line), _NUM_ITEMS.match(line)
        if metafile:
            name = Path(metafile[2].lstrip(">")).name
            line = f"{metafile[1]}'>{(primary if name == source.name else passthrough).name}'"
        elif items:
            line = f"{items[1]}{n}"
        lines.append(line)
    for group in added:
        if any(re.match(rf"^\s+{re.escape(group)}:\s*$", line) for line in lines):
            continue
        start = next((i for i, line in enumerate(lines) if line.startswith("results:")), None)
        if start is None:
            raise UserError(f"{group_file} is no result group of cryoSPARC: it has no line results:")
        lines[start + 1 : start + 1] = _entry(group, "particle", primary.name, n)
    return "\n".join(lines) + "\n"


def new_group(kind: str, title: str, files: Mapping[str, Sequence[str]], n: int, created: str) -> str:
    """The text of a `.csg` for groups of fields by the file they are in; `kind` is `particle` or
    `template`."""
    lines = [f"created: '{created}'", "group:", f"  description: {title}", f"  name: {kind}s",
             f"  title: {title}", f"  type: {kind}", "results:"]  # fmt: skip
    entries = {group: name for name, groups in files.items() for group in groups}
    for group in sorted(entries):
        lines += _entry(group, kind, entries[group], n)
    return "\n".join([*lines, "version: v4.0.0"]) + "\n"


def _entry(group: str, kind: str, name: str, n: int) -> list[str]:
    return [f"  {group}:", f"    metafile: '>{name}'", f"    num_items: {n}", f"    type: {kind}.{group}"]


def group_text(group: Group, source: Path | None, group_file: Path | None, out: Path) -> str:
    """The `.csg` of an export: that of the source with names and numbers in place, else a new one."""
    primary, passthrough, _ = group_paths(out)
    n = len(group.records)
    if (
        source is not None
        and group_file is not None
        and (group.passed is not None or named_files(group_file) == {source.name})
    ):
        added = ["alignments2D"] if any(name.startswith("alignments2D/") for name in group.values) else []
        return edited_group(group_file, source, out, n, added)
    files = {primary.name: field_groups(group.records)}
    if group.passed is not None:
        files = {passthrough.name: field_groups(group.passed)} | files  # the primary's fields count
    created = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    return new_group("particle", "Particles selected in particle explorer", files, n, created)


def poses_of(group: Group, own_A: NDArray[np.float64]) -> pd.DataFrame:
    """What the records say of class and pose, in our words; rows in the order of the records. `own_A` is the
    pixel size by which they are read."""
    home = group.records
    order = np.arange(len(home))
    if not _has_alignments(home) and group.passed is not None:
        home = group.passed
        order = pd.Index(home["uid"]).get_indexer(pd.Index(group.records["uid"]))
    fields = {name: home[name][order] for name in home.dtype.names or () if name.startswith("alignments2D/")}
    found: dict[str, NDArray[Any]] = {}
    if "alignments2D/pose" in fields and "alignments2D/shift" in fields:
        aligned = fields.get("alignments2D/psize_A", own_A).astype(np.float64)
        known = np.isfinite(own_A) & np.isfinite(aligned) & (aligned > 0)
        found["angle_deg"], shift = from_cryosparc(
            fields["alignments2D/pose"].astype(np.float64),
            fields["alignments2D/shift"].astype(np.float64),
            np.where(known, aligned, 1.0),
            np.where(known, own_A, 1.0),
        )
        found["shift_y_px"], found["shift_x_px"] = shift[:, 0], shift[:, 1]
    if "alignments2D/class" in fields:
        found["class_id"] = fields["alignments2D/class"].astype(np.int64) + 1
    return pd.DataFrame(found, index=range(len(order)))


def check_written(
    path: Path, wanted: Records, before: Records, values: Mapping[str, NDArray[Any]]
) -> Records:
    """Read an export again: rows, identity, new values, and every other field byte by byte as it was."""
    written = cryosparc.load(path)
    if not np.array_equal(written["uid"], before["uid"]):
        raise RuntimeError(f"{path} does not hold the particles that were to be written")
    for name in before.dtype.names or ():
        if name not in values and written[name].tobytes() != before[name].tobytes():
            raise RuntimeError(f"{path} does not hold {name} as it was")
    for name in wanted.dtype.names or ():
        if written[name].tobytes() != wanted[name].tobytes():
            raise RuntimeError(f"{path} does not hold the values of {name} that were to be written")
    return written


def field_groups(records: Records) -> list[str]:
    """`blob`, `ctf` … of the fields, without our own."""
    groups = {name.partition("/")[0] for name in records.dtype.names or () if "/" in name}
    return sorted(groups - {_LATENTS.rstrip("/")})
