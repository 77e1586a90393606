"""RELION particle star files, 3.0 (pixels, one table) and 3.1 and later (Å, optics table), in and out.

Conventions: RELION 5 sources `metadata_label.h`, `ctf.h`, `stack_create.cpp`; the pose through
`pose.from_relion`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.paths import resolve_stacks
from particle_explorer.io.stacks import open_stack
from particle_explorer.io.star import Block, StarFile, names_of, numbers, unquoted
from particle_explorer.particles import ImageStack, Particles, make_uids
from particle_explorer.pose import from_relion, to_relion

ANGST_ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
PIXEL_ORIGINS = ("rlnOriginX", "rlnOriginY")
CTF_COLUMNS = {
    "defocus_u_A": "rlnDefocusU",
    "defocus_v_A": "rlnDefocusV",
    "defocus_angle_deg": "rlnDefocusAngle",
    "voltage_kV": "rlnVoltage",
    "spherical_aberration_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
    "phase_shift_deg": "rlnPhaseShift",
}
"""Our name → RELION's; the units are the same."""


CTF_FLAGS = (
    ("phase-flipped", "rlnCtfDataArePhaseFlipped"),
    ("premultiplied", "rlnCtfDataAreCtfPremultiplied"),
)
"""Our `ctf_state` and the label that is 1 in it."""
PRIORS = (
    "rlnAngleRotPrior",
    "rlnAngleTiltPrior",
    "rlnAnglePsiPrior",
    "rlnOriginXPrior",
    "rlnOriginYPrior",
    "rlnOriginXPriorAngst",
    "rlnOriginYPriorAngst",
)
"""Columns that would pull RELION back to the old pose."""
_CHUNK_ROWS = 50_000
ROWS_SHARE = 0.7
"""Of the time that a large file takes, as progress counts it; the rest is for its stacks."""


def particles_block(star: StarFile) -> Block:
    """The block that lists particle images, whatever it is called; else a sentence about what the file is."""
    found = [block for block in star.blocks if "rlnImageName" in block.labels]
    if found:
        if not found[0].n_rows:
            raise UserError(f"{star.path}: block data_{found[0].name} lists no particles")
        return found[0]
    labels = {label for block in star.blocks for label in [*block.labels, *block.values]}
    blocks = ", ".join(f"data_{block.name}" for block in star.blocks) or "no blocks"
    if "rlnImageName" in labels:
        what = "lists one particle as labels with a value each; particles are read from a loop_ of rows"
    elif "rlnReferenceImage" in labels:
        what = "describes a model (its classes), not particles; open the _data.star beside it"
    elif "rlnMicrographName" in labels and "rlnCoordinateX" not in labels:
        what = "lists micrographs, not particle images; open the star file of the extracted particles"
    elif "rlnCoordinateX" in labels:
        what = "lists coordinates, not particle images; extract the particles first"
    else:
        what = f"holds no particle images: no block has the column _rlnImageName (it has {blocks})"
    raise UserError(f"{star.path} {what}")


def optics_block(star: StarFile, particles: Block) -> Block | None:
    """The optics table, if there is one."""
    for block in star.blocks:
        if block is not particles and block.name == "optics":
            return block
    for block in star.blocks:
        names = [*block.labels, *block.values]
        if block is not particles and "rlnOpticsGroup" in names and "rlnImageName" not in names:
            return block
    return None


def is_dialect_30(star: StarFile, particles: Block) -> bool:
    """Whether origins are in pixels and there is no optics table."""
    return optics_block(star, particles) is None and not names_of(
        particles.labels, [*ANGST_ORIGINS, "rlnOpticsGroup", "rlnImagePixelSize"]
    )


def read_particles(
    path: Path | str,
    *,
    project_dir: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Particles:
    """Particles of a star file, images unread; see `resolve_stacks` for how stacks are found."""
    star = StarFile(path)
    block = particles_block(star)
    notes: list[str] = []
    if sum("rlnImageName" in other.labels for other in star.blocks) > 1:
        notes.append(f"several blocks list images; data_{block.name}, the first, is read")
    tell = progress or (lambda share: None)
    original = star.table(block, lambda share: tell(ROWS_SHARE * share))
    optics = optics_block(star, block)
    if optics is not None:
        original = _with_optics(star, original, star.table(optics), notes)
    n = len(original)

    names: list[str] = original["rlnImageName"].tolist()
    stack_names, stack_of, index = _split_image_names(star, names)
    paths = resolve_stacks(stack_names, star.path, project_dir)
    pool = DescriptorPool()
    files = []
    for name in stack_names:
        files.append(open_stack(paths[name], pool))
        tell(ROWS_SHARE + (1 - ROWS_SHARE) * len(files) / len(stack_names))
    n_images = np.array([file.n_images for file in files], np.int64)
    outside = np.flatnonzero(index >= n_images[stack_of])
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f'{star.path}, row {row + 1}: "{names[row]}" asks for image {int(index[row]) + 1}, '
            f"but {files[int(stack_of[row])].path} holds {int(n_images[stack_of[row]])}"
        )
    notes += [note for file in files for note in file.notes]
    images = ImageStack(files, stack_of, index)
    header_size = np.array([file.pixel_size_A for file in files])[stack_of]

    table = pd.DataFrame(
        {
            "stack_path": pd.array([str(file.path) for file in files], dtype="str").take(stack_of),
            "stack_index": index,
            "source_row": np.arange(n),
            "pixel_size_A": _pixel_size(star, original, header_size, notes),
            "box_px": images.box_px,
            "contrast_sign": np.zeros(n, np.int8),
            "ctf_state": _ctf_state(star, original, notes),
        }
    )
    if "rlnMicrographName" in original:
        table["micrograph"] = original["rlnMicrographName"]
    if "rlnOpticsGroup" in original:
        table["optics_group"] = _integers(original, "rlnOpticsGroup", star.path)
    if "rlnClassNumber" in original:
        table["class_id"] = _integers(original, "rlnClassNumber", star.path)
    for column, values in _pose(star, original, table["pixel_size_A"].to_numpy(), notes).items():
        table[column] = values
    if bool((table["ctf_state"] != "none").any()):
        for column, label in CTF_COLUMNS.items():
            if label in original:
                table[column] = numbers(original, label, star.path)
        if "defocus_v_A" not in table:
            table["defocus_v_A"] = table["defocus_u_A"]
    table = pd.concat([table, original], axis=1)
    table.index = pd.Index(make_uids(names), name="uid")
    if not table.index.is_unique:
        raise UserError(
            f"{star.path}: two particles got the same identity by their names; please report this file"
        )
    return Particles(images, table, star.path.absolute(), "star", tuple(notes))


def split_image_name(name: str) -> tuple[str, str]:
    """`000012@stack.mrcs` → ("000012", "stack.mrcs"), at the first @ as RELION does it, since folders may
    have one too; a bare name is image 1."""
    number, at, stack = name.partition("@")
    return (number, stack) if at else ("1", name)


def unknown_group(path: Path, row: int, group: object, known: Iterable[object]) -> UserError:
    """What is wrong where particle `row` (from 0) names an optics group that the file does not list."""
    return UserError(
        f"{path}, row {row + 1}: optics group {group} is not in the optics table, which has "
        f"{', '.join(map(str, known))}"
    )


def _split_image_names(
    star: StarFile, names: Sequence[str]
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """`000012@stack.mrcs` → unique stack names, stack of every row, 0-based index; a bare name is image 1."""
    parts = [split_image_name(name) for name in names]
    try:
        numbers_written = [int(number) for number, _ in parts]
        in_order = all(0 < number < 1 << 62 for number in numbers_written) and all(part[1] for part in parts)
    except ValueError:
        in_order = False
    if not in_order:
        row = next(row for row, part in enumerate(parts) if not _is_place(part[0]) or not part[1])
        raise UserError(
            f'{star.path}, row {row + 1}: the image name "{names[row]}" is not of the form '
            "000001@stack.mrcs, "
            f"with images counted from 1"
        )
    stack_of, stacks = pd.factorize(np.array([part[1] for part in parts], dtype=object))
    return [str(stack) for stack in stacks], stack_of, np.array(numbers_written, np.int64) - 1


def _is_place(number: str) -> bool:
    try:
        return 0 < int(number) < 1 << 62
    except ValueError:
        return False


def _with_optics(star: StarFile, table: pd.DataFrame, optics: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The particle table with the columns of its optics groups; where both have a column, the particle's
    counts, as in RELION's `CTF::readByGroup`."""
    if not len(optics):
        return table
    if "rlnOpticsGroup" not in table:
        if len(optics) > 1:
            raise UserError(
                f"{star.path} has {len(optics)} optics groups, but its particles do not say which they "
                "belong to "
                f"(no column _rlnOpticsGroup)"
            )
        table = table.assign(
            rlnOpticsGroup=optics["rlnOpticsGroup"].iloc[0] if "rlnOpticsGroup" in optics else 1
        )
        notes.append("the particles name no optics group; the only one there is was taken for all")
    if "rlnOpticsGroup" not in optics:
        raise UserError(f"{star.path}: the optics table has no column _rlnOpticsGroup")
    group = pd.Index(_integers(optics, "rlnOpticsGroup", star.path))
    if not group.is_unique:
        raise UserError(f"{star.path}: the optics table lists a group twice")
    place = group.get_indexer(_integers(table, "rlnOpticsGroup", star.path))
    unknown = np.flatnonzero(place < 0)
    if len(unknown):
        row = int(unknown[0])
        raise unknown_group(star.path, row, table["rlnOpticsGroup"].iloc[row], group)
    joined = optics.drop(columns=names_of(list(optics.columns), list(table.columns))).take(place)
    return pd.concat([table, joined.set_axis(table.index)], axis=1)


def _pixel_size(
    star: StarFile, table: pd.DataFrame, header: NDArray[np.float64], notes: list[str]
) -> NDArray[np.float64]:
    """Å per pixel of the images: optics table, then detector pixel / magnification, then MRC header, then
    NaN."""
    size = _own_pixel_size(star, table)
    both = np.isfinite(size) & np.isfinite(header)
    wrong = np.flatnonzero(both & (np.abs(header - size) > 0.01 * np.where(both, size, 1)))
    if len(wrong):
        row = int(wrong[0])
        notes.append(
            f"the star file says {size[row]:.4g} Å per pixel, the header of its stack {header[row]:.4g} Å; "
            f"the star file counts"
        )
    return np.where(np.isfinite(size), size, header)


def _own_pixel_size(star: StarFile, table: pd.DataFrame) -> NDArray[np.float64]:
    """Å per pixel by the star file alone, NaN where it does not say; what its origins in Å are meant by."""
    size = np.full(len(table), np.nan)
    if "rlnImagePixelSize" in table:
        size = numbers(table, "rlnImagePixelSize", star.path).copy()
    if "rlnDetectorPixelSize" in table and "rlnMagnification" in table:
        magnification = numbers(table, "rlnMagnification", star.path)
        detector = numbers(table, "rlnDetectorPixelSize", star.path)
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.where(size > 0, size, detector / magnification * 1e4)
    size[~(np.isfinite(size) & (size > 0))] = np.nan
    return size


def _ctf_state(star: StarFile, table: pd.DataFrame, notes: list[str]) -> pd.Series:
    state = pd.Series(["none"], dtype="str").repeat(len(table)).set_axis(table.index)
    if "rlnDefocusU" not in table:
        return state
    if not np.any(numbers(table, "rlnDefocusU", star.path)):
        notes.append("the defocus is 0 in every row, so the images are taken to carry no CTF")
        return state
    state[:] = "raw"
    for name, label in CTF_FLAGS:
        if label in table:
            state[numbers(table, label, star.path) == 1] = name
    return state


def _pose(
    star: StarFile, table: pd.DataFrame, pixel_size_A: NDArray[np.float64], notes: list[str]
) -> dict[str, NDArray[np.float64]]:
    """Placement angle and shift where the file gives them; RELION takes Å over pixels."""
    pose: dict[str, NDArray[np.float64]] = {}
    n = len(table)
    # of segments of filaments that were only picked, the way of the filament is all that is known
    label = next((name for name in ("rlnAnglePsi", "rlnAnglePsiPrior") if name in table), "")
    psi = numbers(table, label, star.path) if label else np.zeros(n)
    if all(label in table for label in ANGST_ORIGINS):
        x, y = (numbers(table, label, star.path) for label in ANGST_ORIGINS)
        # nothing to rescale where the origins are 0, so the missing pixel size does no harm
        unit = np.where((x == 0) & (y == 0) & ~np.isfinite(pixel_size_A), 1.0, pixel_size_A)
    elif all(label in table for label in PIXEL_ORIGINS):
        x, y = (numbers(table, label, star.path) for label in PIXEL_ORIGINS)
        unit = np.ones(n)
    else:
        x = y = np.zeros(n)
        unit = np.full(n, np.nan)
    angle, shift = from_relion(psi, x, y, unit)
    if label:
        pose["angle_deg"] = angle
    if np.isfinite(unit).all():
        pose["shift_y_px"], pose["shift_x_px"] = shift[:, 0], shift[:, 1]
    elif not np.isnan(unit).all() or all(label in table for label in ANGST_ORIGINS):
        notes.append("the origins are in Å and the pixel size is not known, so the shifts are not used")
    return pose


def _integers(table: pd.DataFrame, label: str, where: Path) -> NDArray[np.int64]:
    values = numbers(table, label, where)
    wrong = np.flatnonzero((values != np.round(values)) | ~(np.abs(values) < 2**53))
    if len(wrong):
        raise UserError(
            f"{where}, row {int(wrong[0]) + 1}: {label} is {values[wrong[0]]}, which is not a whole number"
        )
    return values.astype(np.int64)


@dataclass
class Edit:
    """What changes in the rows that are kept: new values by label, and labels that go."""

    values: dict[str, list[str]]
    dropped: list[str]


def pose_columns(
    angle_deg: NDArray[np.float64] | None,
    shift_yx_px: NDArray[np.float64] | None,
    pixel_size_A: NDArray[np.float64],
    *,
    in_pixels: bool,
) -> dict[str, list[str]]:
    """Our pose as RELION's columns, printed; `in_pixels` for the 3.0 dialect."""
    n = len(pixel_size_A)
    unit = np.ones(n) if in_pixels else pixel_size_A
    if shift_yx_px is not None and not np.isfinite(unit).all():
        raise UserError(
            "the pixel size is not known, and this kind of star file gives shifts in Å; export without poses"
        )
    psi, x, y = to_relion(
        np.zeros(n) if angle_deg is None else angle_deg,
        np.zeros((n, 2)) if shift_yx_px is None else shift_yx_px,
        unit,
    )
    columns = {}
    if angle_deg is not None:
        columns["rlnAnglePsi"] = [f"{value:.6f}" for value in psi.tolist()]
    if shift_yx_px is not None:
        for label, values in zip(PIXEL_ORIGINS if in_pixels else ANGST_ORIGINS, (x, y), strict=True):
            columns[label] = [f"{value:.6f}" for value in values.tolist()]
    return columns


def edited_star(
    source: Path,
    table: pd.DataFrame,
    class_id: NDArray[np.int64] | None,
    angle_deg: NDArray[np.float64] | None,
    shift_yx_px: NDArray[np.float64] | None,
    further: Mapping[str, list[str]] | None = None,
) -> tuple[Iterator[bytes], list[str], dict[str, list[str]], list[str]]:
    """The source's own text with only the rows of `table`, and class, pose and `further` columns in place:
    (text in pieces, image name of every row, the new columns as printed, notes).

    `table` is in the order of the source. Cells that do not change, and all other blocks, stay to the letter;
    line ends become those of UNIX, because RELION stops at others.
    """
    star = StarFile(source)
    block = particles_block(star)
    rows = table["source_row"].to_numpy(np.int64)
    if len(rows) and rows[-1] >= block.n_rows:
        raise UserError(
            f"{source} has {block.n_rows} particles now, and row {rows[-1] + 1} is to be exported"
        )
    notes: list[str] = []
    edit = Edit({}, [])
    if class_id is not None:
        edit.values["rlnClassNumber"] = [str(value) for value in class_id.tolist()]
    in_pixels = is_dialect_30(star, block)
    if angle_deg is not None or shift_yx_px is not None:
        own, sizes = _own_pixel_size(star, table), table["pixel_size_A"].to_numpy(np.float64)
        if shift_yx_px is not None and not in_pixels and np.isnan(own).any() and np.isfinite(sizes).all():
            notes.append(
                "the star file does not say its pixel size, by which RELION reads origins in Å: write "
                f"rlnImagePixelSize {sizes[0]:g} into its optics table"
            )
        sizes = np.where(np.isfinite(own), own, sizes)  # the file keeps its optics table, right or wrong
        edit.values |= pose_columns(angle_deg, shift_yx_px, sizes, in_pixels=in_pixels)
        edit.dropped = names_of(block.labels, PRIORS)
        if edit.dropped:
            notes.append(f"left out the priors of the old poses ({', '.join(edit.dropped)})")
        if shift_yx_px is not None and not in_pixels:
            edit.dropped += names_of(block.labels, PIXEL_ORIGINS)
    if angle_deg is not None:
        out_of_plane = names_of(block.labels, ("rlnAngleRot", "rlnAngleTilt"))
        for label in out_of_plane:
            edit.values[label] = ["0.000000"] * len(rows)
        if out_of_plane:
            notes.append(
                f"set {' and '.join(out_of_plane)} to 0, as the new angle is in the plane of the image"
            )
    edit.values |= further or {}
    names: list[str] = []
    lines = _edited_rows(star, block, rows, edit, names)
    return _joined(star, block, lines, edit), names, edit.values, notes


def _edited_rows(
    star: StarFile, block: Block, rows: NDArray[np.int64], edit: Edit, names: list[str]
) -> Iterator[bytes]:
    """The edited lines of the chosen rows; their image names as written are added to `names` on the way."""
    place = {label: i for i, label in enumerate(block.labels)}
    image, last = place["rlnImageName"], len(block.labels) - 1
    replaced = {place[label]: values for label, values in edit.values.items() if label in place}
    added = [values for label, values in edit.values.items() if label not in place]
    dropped = {place[label] for label in edit.dropped}
    has_quotes = star.has_quotes(block)
    buffer, encoding = star.buffer, star.encoding
    for first in range(0, len(rows), _CHUNK_ROWS):
        chosen = rows[first : first + _CHUNK_ROWS]
        begins, ends = star.cell_bounds(block, chosen, has_quotes)
        spans = zip(begins[:, image].tolist(), ends[:, image].tolist(), strict=True)
        names += [unquoted(buffer[begin:end].decode(encoding)) for begin, end in spans]
        cuts: list[tuple[list[int], list[int], list[str] | None]] = []
        for j in sorted({*replaced, *dropped}):
            cut_from, cut_to = begins[:, j], ends[:, j]
            if j in dropped:  # with the white space that parts it from its neighbour
                cut_from, cut_to = (ends[:, j - 1], cut_to) if j > 0 else (cut_from, begins[:, 1])
            cuts.append((cut_from.tolist(), cut_to.tolist(), replaced.get(j)))
        line_begins, line_ends = star.line_bounds(block.row_lines[chosen])
        last_ends = ends[:, last].tolist()
        for i, (done, line_end) in enumerate(zip(line_begins.tolist(), line_ends.tolist(), strict=True)):
            parts = []
            for cut_begins, cut_ends, values in cuts:
                begin, end = cut_begins[i], cut_ends[i]
                parts.append(buffer[done:begin])
                if values is not None:
                    parts.append(values[first + i].rjust(end - begin).encode())
                done = end
            parts.append(buffer[done : last_ends[i]])
            parts += [f" {values[first + i]}".encode() for values in added]
            parts.append(buffer[last_ends[i] : line_end])
            parts.append(b"\n")
            yield b"".join(parts)


def _joined(star: StarFile, block: Block, lines: Iterator[bytes], edit: Edit) -> Iterator[bytes]:
    first_row, last_row = int(block.row_lines[0]), int(block.row_lines[-1])
    dropped = {block.label_lines[block.labels.index(label)] for label in edit.dropped}
    added = [label for label in edit.values if label not in block.labels]
    labels = set(block.label_lines)
    numbered = "#" in star.line(block.label_lines[-1])
    number = 0
    for line in range(first_row):
        if line not in dropped:
            text = star.line(line)
            if line in labels:
                number += 1
                if edit.dropped:
                    text = re.sub(r"^(\s*\S+\s+#)\d+", rf"\g<1>{number}", text)
            yield text.encode(star.encoding) + b"\n"
        if line == block.label_lines[-1]:
            for extra, label in enumerate(added, number + 1):
                yield (f"_{label} #{extra} \n" if numbered else f"_{label}\n").encode()
    yield from lines
    for line in range(last_row + 1, star.n_lines):
        yield star.line(line).encode(star.encoding) + b"\n"


def check_written(
    path: Path, names: Sequence[str], values: dict[str, list[str]] | None, pixel_size_A: NDArray[np.float64]
) -> pd.DataFrame:
    """Read an export again: rows, images and new columns must be what was meant. Returns what the file says
    of class and pose, in our words and by the file's own pixel size; `pixel_size_A` where it has none."""
    star = StarFile(path)
    block = particles_block(star)
    table = star.table(block)
    if table["rlnImageName"].tolist() != list(names):
        raise RuntimeError(f"{path} does not hold the particles that were to be written")
    for label, wanted in (values or {}).items():
        if not np.allclose(
            numbers(table, label, path), np.array(wanted, float), rtol=0, atol=1e-6, equal_nan=True
        ):
            raise RuntimeError(f"{path} does not hold the values of {label} that were to be written")
    optics = optics_block(star, block)
    if optics is not None:
        table = _with_optics(star, table, star.table(optics), [])
    own = _own_pixel_size(star, table)
    found = _pose(star, table, np.where(np.isfinite(own), own, pixel_size_A), [])
    if "rlnClassNumber" in table:
        found["class_id"] = numbers(table, "rlnClassNumber", path)
    return pd.DataFrame(found, index=range(len(table)))
