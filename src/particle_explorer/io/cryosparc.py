"""cryoSPARC particle datasets (`.cs`).

A `.cs` file is a NumPy structured array, or, newer, a compressed stream (`csdat`). Fields and conventions:
cryosparc-tools; signs of `alignments2D` as pyem's `cryosparc2` has used them for years.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io import csdat
from particle_explorer.io.arrays import npy_layout
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.paths import resolve_stacks
from particle_explorer.io.stacks import open_stack
from particle_explorer.particles import ImageStack, Particles
from particle_explorer.pose import from_cryosparc

Records = NDArray[Any]

CTF_FIELDS = {
    "defocus_u_A": ("ctf/df1_A", 1.0),
    "defocus_v_A": ("ctf/df2_A", 1.0),
    "defocus_angle_deg": ("ctf/df_angle_rad", 180.0 / np.pi),
    "voltage_kV": ("ctf/accel_kv", 1.0),
    "spherical_aberration_mm": ("ctf/cs_mm", 1.0),
    "amplitude_contrast": ("ctf/amp_contrast", 1.0),
    "phase_shift_deg": ("ctf/phase_shift_rad", 180.0 / np.pi),
}
"""Our name → field and factor to our unit."""


def load(path: Path | str) -> Records:
    """The records of a `.cs` file, without its passthrough file."""
    path = Path(path)
    pool = DescriptorPool(1)
    if pool.pread(str(path), len(csdat.MARK), 0) == csdat.MARK:
        records = csdat.load(path, pool.pread(str(path), pool.size(str(path)), 0))
        if "uid" not in (records.dtype.names or ()):
            raise UserError(f"{path} is no cryoSPARC dataset: it has no field uid")
        return records
    shape, _, dtype, first_byte = npy_layout(str(path), pool)
    if dtype.names is None or len(shape) != 1 or "uid" not in dtype.names:
        raise UserError(f"{path} is a NumPy array but no cryoSPARC dataset: it has no field uid")
    data = pool.pread(str(path), shape[0] * dtype.itemsize, first_byte)
    return np.frombuffer(data, dtype)


class Passthrough(NamedTuple):
    """What a job passed on of its particles, in a file of its own."""

    path: Path | None
    """None where no file fits."""
    records: Records | None
    words: str
    """Why none does, where there are such files; "" where there are none or one fits."""


def passthrough_of(path: Path) -> Path | None:
    """The file beside `path` that cryoSPARC wrote with the fields a job passed on, if there is one."""
    return find_passthrough(path, load(path)["uid"]).path


def find_passthrough(path: Path, uid: NDArray[Any]) -> Passthrough:
    """The passthrough file of `path` among those beside it, which holds all particles `uid`.

    Names vary with the version and the kind of job: that of the same name but for `passthrough` comes first,
    then that of the same name without project, job and iteration (`particles_selected.cs`,
    `P6_J47_passthrough_particles_selected.cs`), then the only one that holds the particles.
    """
    if "passthrough" in path.name:
        return Passthrough(None, None, "")
    beside = sorted(
        other for other in path.parent.glob("*passthrough*.cs") if not _belongs_elsewhere(other, path)
    )
    own = _without_iteration(path.name)
    plain = {other: _without_iteration(_PASSTHROUGH.sub("", other.name, count=1)) for other in beside}
    same = [other for other in beside if plain[other] == own]
    alike = [other for other in beside if other not in same and _bare(plain[other]) == _bare(own)]
    others = [other for other in beside if other not in same and other not in alike]
    for group in (same, alike, others):
        fitting = []
        for other in group:
            try:
                records = load(other)
            except UserError:
                if other in others:  # a damaged file that has perhaps nothing to do with this one
                    continue
                raise
            if _holds(records, uid):
                fitting.append((other, records))
        if len(fitting) == 1:
            return Passthrough(*fitting[0], "")
        if fitting:
            names = ", ".join(other.name for other, _ in fitting)
            words = f"several passthrough files hold the particles of {path.name} ({names}): leave one beside"
            return Passthrough(None, None, words)
    if not beside:
        return Passthrough(None, None, "")
    names = ", ".join(other.name for other in beside[:5]) + ", …" * (len(beside) > 5)
    verb = "do not hold" if len(beside) > 1 else "does not hold"
    return Passthrough(None, None, f"{names} {verb} every particle of {path.name}")


_PASSTHROUGH = re.compile(r"_passthrough|^passthrough_")
_JOB = re.compile(r"^(cryosparc_)?(P\d+_)?J\d+_")


def _without_iteration(name: str) -> str:
    return re.sub(r"_\d{3,}_", "_", name)


def _bare(name: str) -> str:
    return _JOB.sub("", name)


def _belongs_elsewhere(other: Path, path: Path) -> bool:
    """Whether `other` is the passthrough that was written with another file beside it (`NAME_passthrough.cs`
    with `NAME.cs`)."""
    stem = other.stem.removesuffix("_passthrough")
    return stem not in (other.stem, path.stem) and other.with_name(f"{stem}.cs").is_file()


def _holds(records: Records, uid: NDArray[Any]) -> bool:
    """Whether every particle is in `records`, and none twice."""
    own = np.unique(records["uid"])
    return len(own) == len(records) and bool(np.isin(uid, own).all())


def read_particles(path: Path | str, *, project_dir: Path | None = None) -> Particles:
    """Particles of a `.cs` file, joined with its passthrough file on uid; images unread."""
    path = Path(path).absolute()
    records = load(path)
    if not len(records):
        raise UserError(f"{path} lists no particles")
    notes: list[str] = []
    uid = records["uid"].astype(np.uint64)
    if len(np.unique(uid)) != len(uid):
        raise UserError(f"{path} lists a particle twice: its uid values are not unique")
    fields: dict[str, NDArray[Any]] = {name: records[name] for name in records.dtype.names or ()}
    other, passed, words = find_passthrough(path, uid)
    if other is not None and passed is not None:
        place = pd.Index(passed["uid"].astype(np.uint64)).get_indexer(pd.Index(uid))
        fields = {**{name: passed[name][place] for name in passed.dtype.names or ()}, **fields}
        notes.append(f"joined with {other.name}")
    elif words:
        notes.append(words)
    needed = [name for name in ("blob/path", "blob/idx") if name not in fields]
    if needed:
        raise UserError(
            f"{path} names no particle images (no field {' and '.join(needed)}); "
            f"open the particles file, with its passthrough file beside it{f'; {words}' if words else ''}"
        )
    original = flat(fields)

    written = original["blob/path"].tolist()
    codes, unique = pd.factorize(pd.Series([name[1:] if name.startswith(">") else name for name in written]))
    stack_names = [str(name) for name in unique]
    paths = resolve_stacks(stack_names, path, project_dir)
    pool = DescriptorPool()
    files = [open_stack(paths[name], pool) for name in stack_names]
    index = fields["blob/idx"].astype(np.int64)
    n_images = np.array([file.n_images for file in files], np.int64)[codes]
    outside = np.flatnonzero((index < 0) | (index >= n_images))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f"{path}, row {row + 1}: image {int(index[row])} (counted from 0) of "
            f"{files[int(codes[row])].path}, "
            f"which holds {int(n_images[row])}"
        )
    notes += [note for file in files for note in file.notes]
    images = ImageStack(files, codes, index)
    size = np.array([file.pixel_size_A for file in files])[codes]
    if "blob/psize_A" in fields:
        said = fields["blob/psize_A"].astype(np.float64)
        size = np.where(np.isfinite(said) & (said > 0), said, size)

    n = len(uid)
    has_ctf = "ctf/df1_A" in fields
    table = pd.DataFrame(
        {
            "stack_path": pd.Series(np.array([file.path for file in files], object)[codes], dtype="str"),
            "stack_index": index,
            "source_row": np.arange(n),
            "pixel_size_A": size,
            "box_px": images.box_px,
            "contrast_sign": np.sign(fields["blob/sign"]).astype(np.int8)
            if "blob/sign" in fields
            else np.int8(0),
            "ctf_state": pd.Series(["raw" if has_ctf else "none"], dtype="str").repeat(n).to_numpy(),
        }
    )
    table["contrast_sign"] = table["contrast_sign"].astype(np.int8)
    if "location/micrograph_path" in original:
        table["micrograph"] = original["location/micrograph_path"]
    if "ctf/exp_group_id" in fields:
        table["optics_group"] = fields["ctf/exp_group_id"].astype(np.int64)
    if "alignments2D/class" in fields:
        table["class_id"] = fields["alignments2D/class"].astype(np.int64) + 1
    if "alignments2D/pose" in fields and "alignments2D/shift" in fields:
        aligned = (
            fields["alignments2D/psize_A"].astype(np.float64) if "alignments2D/psize_A" in fields else size
        )
        unknown = ~(np.isfinite(size) & np.isfinite(aligned) & (aligned > 0))
        angle, shift = from_cryosparc(
            fields["alignments2D/pose"].astype(np.float64),
            fields["alignments2D/shift"].astype(np.float64),
            np.where(unknown, 1.0, aligned),
            np.where(unknown, 1.0, size),
        )
        table["angle_deg"], table["shift_y_px"], table["shift_x_px"] = angle, shift[:, 0], shift[:, 1]
    if has_ctf:
        for column, (name, factor) in CTF_FIELDS.items():
            if name in fields:
                table[column] = fields[name].astype(np.float64) * factor
        if "defocus_v_A" not in table:
            table["defocus_v_A"] = table["defocus_u_A"]
    table = pd.concat([table, original], axis=1)
    table.index = pd.Index(uid, name="uid")
    return Particles(images, table, path, "cs", tuple(notes))


def flat(fields: dict[str, NDArray[Any]]) -> pd.DataFrame:
    """One column per field, vectors as `name[0]`, `name[1]` …; text decoded; uid is the index and not
    here."""
    columns: dict[str, Any] = {}
    for name, values in fields.items():
        if name == "uid":
            continue
        if values.dtype.kind == "S":
            columns[name] = pd.Series(np.char.decode(values, "utf-8", "replace").astype(object), dtype="str")
        elif values.ndim == 1:
            columns[name] = values.astype(values.dtype.newbyteorder("="))
        else:
            flat = values.reshape(len(values), -1)
            for i in range(flat.shape[1]):
                columns[f"{name}[{i}]"] = flat[:, i].astype(values.dtype.newbyteorder("="))
    return pd.DataFrame(columns)
