"""One door for every kind of particle file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io import cryosparc, pictures, relion, stacks, zarrs
from particle_explorer.io.arrays import ArrayFile, NpzFile
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.stacks import open_stack
from particle_explorer.particles import ImageStack, Particles, StackFile, make_uids

SUFFIXES = (".star", ".cs", *stacks.SUFFIXES, *stacks.COMPRESSED)
"""What `read` opens, beside folders of pictures."""


def read(
    path: Path | str,
    *,
    project_dir: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Particles:
    """Particles of a star or cs file, of an image stack, or of a folder of pictures; only headers and tables
    are read.

    `project_dir` is where the stack names of star and cs files start from, if they cannot be found otherwise.
    `progress` is told what share of a star file, rows and then stacks, is read.
    """
    path = Path(path).absolute()
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if path.is_dir() and not zarrs.is_zarr(path):
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix == ".star":
        return relion.read_particles(path, project_dir=project_dir, progress=progress)
    if suffix == ".cs":
        return cryosparc.read_particles(path, project_dir=project_dir)
    kind = "zarr" if path.is_dir() else stacks.kind_of(path)
    if kind:
        file = zarrs.ZarrFolder(path) if kind == "zarr" else open_stack(path)
        return _bare_stack(file, file.path, path, kind, file.pixel_size_A, file.notes)
    known = (
        "particle images come as .star, .cs, .mrcs, .mrc, .hdf, .spi, .hed/.img, .tif, .npy, .npz or .zarr"
    )
    if suffix in stacks.COMPRESSED and path.with_suffix("").suffix.lower() not in (".map", ""):
        raise UserError(
            f"{path} is compressed; of compressed files only MRC stacks are read, so unpack it first"
        )
    if suffix in (".map", ".vol") or path.with_suffix("").suffix.lower() == ".map":
        raise UserError(f"{path} is a 3-D map; {known}")
    raise UserError(f"{path} is of no kind that is read here; {known}")


def read_array(array: Any, name: str, pixel_size_A: float = math.nan) -> Particles:
    """Particles of an array in memory, or of a layer of napari: anything with `shape`, `dtype` and `[i]`."""
    return _bare_stack(ArrayFile(array, name), name, Path(name), "layer", pixel_size_A, ())


def open_stacks(table: pd.DataFrame) -> ImageStack:
    """The images of a table again, from its `stack_path` and `stack_index`."""
    codes, unique = pd.factorize(table["stack_path"])
    pool = DescriptorPool()
    files: list[StackFile] = []
    for path in unique:
        if not path:
            raise UserError("some of the images existed in memory only and cannot be opened again")
        if not Path(path).exists():
            raise UserError(f"the image stack {path} is not there any more")
        files.append(zarrs.ZarrFolder(path) if zarrs.is_zarr(path) else open_stack(path, pool))
    index = table["stack_index"].to_numpy(np.int64)
    n_images = np.array([file.n_images for file in files], np.int64)[codes]
    outside = np.flatnonzero((index < 0) | (index >= n_images))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f"{unique[codes[row]]} holds {int(n_images[row])} images now, and image {int(index[row]) + 1} "
            "was asked for"
        )
    return ImageStack(files, codes, index)


def _folder(folder: Path) -> Particles:
    """A folder of pictures; the folder that a picture lies in, if there are several, is a column."""
    try:
        files, places, notes = pictures.open_folder(folder)
    except UserError as error:
        inside = sorted(
            child.name
            for child in folder.iterdir()
            if child.suffix.lower() in SUFFIXES and child.suffix.lower() not in pictures.SUFFIXES
        )
        if not inside or pictures.has_pictures(folder):
            raise
        more = f" or one of {len(inside) - 1} more" if len(inside) > 1 else ""
        raise UserError(f"{folder} is a folder; open a particle file in it: {inside[0]}{more}") from error
    counts = np.array([file.n_images for file in files])
    codes = np.repeat(np.arange(len(files)), counts)
    index = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    names = [Path(os.path.relpath(file.path, folder)).as_posix() for file in files]
    images = ImageStack(files, codes, index)
    table = _bare_table(
        images, np.array([file.path for file in files], object)[codes], index,
        np.array([file.pixel_size_A for file in files])[codes],
        [f"{place + 1}@{names[code]}" for code, place in zip(codes, index, strict=True)],
    )  # fmt: skip
    if len(set(places)) > 1:
        table["folder"] = pd.Series(np.array(places, object)[codes], dtype="str", index=table.index)
    notes += [note for file in files for note in file.notes]
    return Particles(images, table, folder, "pictures", tuple(notes))


def _bare_stack(
    file: StackFile, name: str, source: Path, kind: str, pixel_size_A: float, notes: tuple[str, ...]
) -> Particles:
    """Particles that have nothing but images; identity is file name and index, wherever the file lies."""
    n = file.n_images
    index = np.arange(n)
    short = Path(name).name
    images = ImageStack([file], np.zeros(n, np.int32), index)
    table = _bare_table(
        images, np.array([file.path], object).repeat(n), index, np.full(n, pixel_size_A),
        [f"{i + 1}@{short}" for i in range(n)],
    )  # fmt: skip
    if isinstance(file, NpzFile):
        taken = [label for label in file.labels if label not in table]
        table = table.assign(**{label: file.labels[label] for label in taken})
    return Particles(images, table, source, kind, notes)


def _bare_table(
    images: ImageStack, paths: NDArray[Any], index: NDArray[np.int64], pixel_size_A: NDArray[np.float64],
    names: list[str],
) -> pd.DataFrame:  # fmt: skip
    n = len(images)
    return pd.DataFrame(
        {
            "stack_path": pd.Series(paths, dtype="str").to_numpy(),
            "stack_index": index,
            "source_row": np.arange(n),
            "pixel_size_A": np.where(pixel_size_A > 0, pixel_size_A, math.nan),
            "box_px": images.box_px,
            "contrast_sign": np.zeros(n, np.int8),
            "ctf_state": pd.Series(["none"], dtype="str").repeat(n).to_numpy(),
        },
        index=pd.Index(make_uids(names), name="uid"),
    )
