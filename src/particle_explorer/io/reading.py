"""One door for every kind of particle file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from particle_explorer.files import UserError
from particle_explorer.io import cryosparc, relion
from particle_explorer.io.arrays import ArrayFile, NpyFile
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.mrc import MrcFile
from particle_explorer.particles import ImageStack, Particles, StackFile, make_uids

SUFFIXES = (".star", ".cs", ".mrcs", ".mrc", ".npy")
"""What `read` opens."""


def read(path: Path | str, *, project_dir: Path | None = None) -> Particles:
    """Particles of a star, cs, mrcs, mrc or npy file; only headers and tables are read.

    `project_dir` is where the stack names of star and cs files start from, if they cannot be found otherwise.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise UserError(f"{path} is a folder; open a particle file ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if suffix == ".star":
        return relion.read_particles(path, project_dir=project_dir)
    if suffix == ".cs":
        return cryosparc.read_particles(path, project_dir=project_dir)
    if suffix in (".mrcs", ".mrc"):
        mrc = MrcFile(path)
        return _bare_stack(mrc, mrc.path, path, "mrc", mrc.pixel_size_A, mrc.notes)
    if suffix == ".npy":
        npy = NpyFile(path)
        return _bare_stack(npy, npy.path, path, "npy", math.nan, ())
    if suffix == ".map":
        raise UserError(f"{path} is a 3-D map; particle images come as {', '.join(SUFFIXES)}")
    if suffix in (".gz", ".bz2"):
        raise UserError(f"{path} is compressed; decompress it first, images are read in place")
    raise UserError(f"{path} is of no kind that is read here; particle images come as {', '.join(SUFFIXES)}")


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
        if not Path(path).is_file():
            raise UserError(f"the image stack {path} is not there any more")
        files.append(NpyFile(path, pool) if str(path).lower().endswith(".npy") else MrcFile(path, pool))
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


def _bare_stack(
    file: StackFile, name: str, source: Path, kind: str, pixel_size_A: float, notes: tuple[str, ...]
) -> Particles:
    """Particles that have nothing but images; identity is file name and index, wherever the file lies."""
    n = file.n_images
    index = np.arange(n)
    table = pd.DataFrame(
        {
            "stack_path": pd.Series([file.path], dtype="str").repeat(n).to_numpy(),
            "stack_index": index,
            "source_row": index,
            "pixel_size_A": np.full(n, pixel_size_A if pixel_size_A > 0 else math.nan),
            "box_px": np.full(n, file.shape[2]),
            "contrast_sign": np.zeros(n, np.int8),
            "ctf_state": pd.Series(["none"], dtype="str").repeat(n).to_numpy(),
        },
        index=pd.Index(make_uids([f"{i + 1}@{Path(name).name}" for i in range(n)]), name="uid"),
    )
    return Particles(ImageStack([file], np.zeros(n, np.int32), index), table, source, kind, notes)
