"""Star files joined into one, and the particles of one extraction found in another."""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from particle_explorer.files import UserError, replacing
from particle_explorer.io import relion
from particle_explorer.io.paths import resolve_stacks
from particle_explorer.io.star import Block, StarFile, format_block, quoted, unquoted

_CHUNK_ROWS = 50_000
_WATCHED_ROWS = 1_000


@contextlib.contextmanager
def joined(
    sources: Sequence[Path], out: Path, project_dir: Path | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Several star files as one file `out`, and notes; no file that is there is written to.

    Where `out` is taken, a file of the same content is used again, else NAME-2, NAME-3 … is written. A
    block that fails takes the new file with it.
    """
    for source in sources:
        if source.suffix.lower() != ".star":
            raise UserError(f"{source} is no star file; of several files opened together all must be")
    out, taken, number = out.absolute(), [], 1
    name = out
    while name.exists():
        taken.append(name)
        number += 1
        name = out.with_name(f"{out.stem}-{number}{out.suffix}")
    notes = merge_stars(sources, name, project_dir=project_dir)
    same = next((path for path in taken if path.is_file() and filecmp.cmp(path, name, shallow=False)), None)
    if same is not None:
        name.unlink()
    try:
        yield same or name, notes
    except BaseException:
        if same is None:
            name.unlink(missing_ok=True)
        raise


def merge_stars(
    sources: Sequence[Path],
    out: Path,
    *,
    project_dir: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Write the particles of several star files into one; returns notes.

    Cells keep their characters but for `rlnOpticsGroup`, which is counted anew, and image names that lead
    elsewhere from `out`, which become absolute. Columns that one of the files lacks are left out, and
    particles that came before are passed over.
    """
    out = Path(out).absolute()
    sources = [Path(source).absolute() for source in sources]
    if len(sources) < 2:
        raise UserError("give two star files or more to merge")
    if out.suffix.lower() != ".star":
        raise UserError(f"{out} does not end in .star")
    if any(source.exists() and out.exists() and os.path.samefile(source, out) for source in sources):
        raise UserError(
            f"{out} is one of the files to merge, which is never overwritten; choose another name"
        )
    stars = [StarFile(source) for source in sources]
    blocks = [relion.particles_block(star) for star in stars]
    old = [relion.is_dialect_30(star, block) for star, block in zip(stars, blocks, strict=True)]
    if len(set(old)) > 1:
        raise UserError(
            f"{sources[old.index(True)]} has the form of RELION 3.0 and {sources[old.index(False)]} that of "
            "3.1; convert the older with relion_convert_star first"
        )
    labels = [label for label in blocks[0].labels if all(label in block.labels for block in blocks)]
    lost = sorted({label for block in blocks for label in block.labels} - set(labels))
    notes = [f"left out, as not in every file: {', '.join(lost)}"] if lost else []
    optics, numbers = (None, [{} for _ in stars]) if old[0] else _merged_optics(stars, blocks)
    if optics is not None and "rlnOpticsGroup" not in labels:
        raise UserError("the particles of one of the files name no optics group (_rlnOpticsGroup)")
    seen: dict[str, None] = {}
    n = twice = 0
    whole = sum(block.n_rows for block in blocks)
    with replacing(out, overwrite=overwrite) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            if optics is not None:
                file.write(format_block("optics", optics))
            head = [f"_{label} #{i}" for i, label in enumerate(labels, 1)]
            name = "images" if old[0] else "particles"
            file.write("\n".join(["", "# version 30001", "", f"data_{name}", "", "loop_ ", *head]) + "\n")
            for star, block, number in zip(stars, blocks, numbers, strict=True):
                shown = _shown_names(star, block, out, project_dir, notes)
                for row, cells in enumerate(_rows(star, block, labels)):
                    if progress is not None and (n + twice) % _WATCHED_ROWS == 0:
                        progress((n + twice) / whole)
                    place = labels.index("rlnImageName")
                    image = unquoted(cells[place])
                    stack = relion.split_image_name(image)[1]
                    if stack in shown:
                        image = image.removesuffix(stack) + shown[stack]
                        cells[place] = quoted(image)
                    if image in seen:
                        twice += 1
                        continue
                    seen[image] = None
                    if number:
                        group = labels.index("rlnOpticsGroup")
                        cells[group] = _renumbered(star.path, row, unquoted(cells[group]), number)
                    file.write(" ".join(cells) + "\n")
                    n += 1
            file.write("\n")
        back = StarFile(temporary)
        found = back.table(relion.particles_block(back))["rlnImageName"]
        if n + twice != whole or found.tolist() != list(seen):
            raise RuntimeError(f"{out} does not hold the particles that were to be written")
    if twice:
        notes.append(f"{twice} particles are in more than one file and were taken once")
    return [*notes, f"{n} particles of {len(stars)} files"]


def _renumbered(path: Path, row: int, group: str, number: Mapping[int, int]) -> str:
    """The new number of the optics group that particle `row` (from 0) names."""
    try:
        return str(number[int(float(group))])
    except (KeyError, OverflowError, ValueError):
        raise relion.unknown_group(path, row, group, number) from None


def _rows(star: StarFile, block: Block, labels: Sequence[str]) -> Iterator[list[str]]:
    """The cells of a block as they are written, some columns of every row."""
    columns = [block.labels.index(label) for label in labels]
    quotes = star.has_quotes(block)
    for first in range(0, block.n_rows, _CHUNK_ROWS):
        rows = np.arange(first, min(first + _CHUNK_ROWS, block.n_rows))
        begins, ends = star.cell_bounds(block, rows, quotes)
        for begin, end in zip(begins[:, columns].tolist(), ends[:, columns].tolist(), strict=True):
            yield [star.buffer[a:b].decode(star.encoding) for a, b in zip(begin, end, strict=True)]


def _merged_optics(
    stars: Sequence[StarFile], blocks: Sequence[Block]
) -> tuple[pd.DataFrame, list[dict[int, int]]]:
    """One optics table with groups 1 … N, and for every file old number → new. Groups that agree in all but
    number are one; others of one name get a name of their own."""
    tables = []
    for star, block in zip(stars, blocks, strict=True):
        found = relion.optics_block(star, block)
        if found is None:
            raise UserError(f"{star.path} has no optics table")
        tables.append(star.table(found))
    common = [name for name in tables[0] if all(name in table for table in tables)]
    if "rlnOpticsGroup" not in common:
        raise UserError("an optics table has no column _rlnOpticsGroup")
    rows: list[dict[str, object]] = []
    numbers: list[dict[int, int]] = []
    for table in tables:
        number: dict[int, int] = {}
        for row in table[common].to_dict("records"):
            own = int(row.pop("rlnOpticsGroup"))
            known = next((i for i, other in enumerate(rows) if _without_number(other) == row), None)
            if known is None:
                if "rlnOpticsGroupName" in row:
                    names = {other["rlnOpticsGroupName"] for other in rows}
                    if row["rlnOpticsGroupName"] in names:
                        row["rlnOpticsGroupName"] = f"opticsGroup{len(rows) + 1}"
                known = len(rows)
                rows.append({"rlnOpticsGroup": known + 1, **row})
            number[own] = known + 1
        numbers.append(number)
    return pd.DataFrame(rows, columns=common), numbers


def _without_number(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != "rlnOpticsGroup"}


def _shown_names(
    star: StarFile, block: Block, out: Path, project_dir: Path | None, notes: list[str]
) -> dict[str, str]:
    """Stack names that must be written anew, because from the place of `out` they lead elsewhere."""
    names = {relion.split_image_name(unquoted(cells[0]))[1] for cells in _rows(star, block, ["rlnImageName"])}
    found = resolve_stacks(sorted(names), star.path, project_dir)
    shown = {}
    for name, path in found.items():
        if os.path.isabs(name):
            continue
        first = next((folder / name for folder in out.parents if os.path.isfile(folder / name)), None)
        if first is None or not os.path.samefile(first, path):
            shown[name] = path
    if shown:
        notes.append(f"image names of {star.path} became absolute, as they lead elsewhere from {out.parent}")
    return shown


def places(table: pd.DataFrame, what: str) -> tuple[pd.Series, NDArray[np.float64]]:
    """Micrograph of every particle, and its `(n, 2)` coordinates (x, y) in pixels of the micrograph."""
    if "micrograph" not in table:
        raise UserError(f"{what} does not say which micrographs its particles come from")
    names = table["micrograph"].astype(str)
    if {"rlnCoordinateX", "rlnCoordinateY"} <= set(table):
        return names, table[["rlnCoordinateX", "rlnCoordinateY"]].to_numpy(np.float64)
    cs = ["location/center_x_frac", "location/center_y_frac", "location/micrograph_shape[1]",
          "location/micrograph_shape[0]"]  # fmt: skip
    if set(cs) <= set(table):
        values = table[cs].to_numpy(np.float64)
        return names, values[:, :2] * values[:, 2:]
    raise UserError(f"{what} does not say where in their micrographs its particles lie")


def match(
    table: pd.DataFrame, other: pd.DataFrame, tolerance_px: float, names: tuple[str, str]
) -> NDArray[np.int64]:
    """`(n,)` row of `other` at the place of every particle of `table`, -1 where there is none.

    Micrographs are the same where their file names are; two particles are where each is the nearest of the
    other within `tolerance_px` of the micrograph.
    """
    (mine, my_xy), (theirs, their_xy) = (
        places(one, name) for one, name in zip((table, other), names, strict=True)
    )
    mine, theirs = (name.str.rpartition("/")[2].reset_index(drop=True) for name in (mine, theirs))
    found = np.full(len(table), -1, np.int64)
    groups = theirs.groupby(theirs).indices
    for name, rows in mine.groupby(mine).indices.items():
        there = groups.get(name)
        if there is None:
            continue
        distance, nearest = cKDTree(their_xy[there]).query(my_xy[rows])
        back = cKDTree(my_xy[rows]).query(their_xy[there])[1]
        same = (distance <= tolerance_px) & (back[nearest] == np.arange(len(rows)))
        found[rows[same]] = there[nearest[same]]
    return found


def micrograph_pixel_size(table: pd.DataFrame, given_A: float = 0.0) -> NDArray[np.float64]:
    """Å per pixel of the micrographs, as given, else as the file says; NaN where neither is known."""
    if given_A > 0:
        return np.full(len(table), given_A)
    for name in ("rlnMicrographPixelSize", "location/micrograph_psize_A", "rlnMicrographOriginalPixelSize"):
        if name in table:
            return table[name].to_numpy(np.float64)
    return np.full(len(table), np.nan)
