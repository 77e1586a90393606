"""One stack file of whatever kind, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from particle_explorer.files import UserError
from particle_explorer.io import hdf, imagic, pictures, spider, zarrs
from particle_explorer.io.arrays import NpyFile, NpzFile
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.hdf import HdfFile
from particle_explorer.io.imagic import ImagicFile
from particle_explorer.io.mrc import MrcFile
from particle_explorer.io.pictures import PictureFile, TiffStack
from particle_explorer.io.spider import SpiderFile
from particle_explorer.io.zarrs import ZarrFolder
from particle_explorer.particles import StackFile

COMPRESSED = (".gz", ".bz2")
MRC_SUFFIXES = (".mrcs", ".mrc")

_Opener = Callable[[str, DescriptorPool], StackFile]
_KINDS: tuple[tuple[str, tuple[str, ...], _Opener], ...] = (
    ("mrc", MRC_SUFFIXES, MrcFile),
    ("npy", (".npy",), NpyFile),
    ("npz", (".npz",), NpzFile),
    ("spider", spider.SUFFIXES, SpiderFile),
    ("imagic", imagic.SUFFIXES, ImagicFile),
    ("hdf", hdf.SUFFIXES, lambda path, pool: HdfFile(path)),
    ("tiff", pictures.TIFF_SUFFIXES, TiffStack),
    ("pictures", pictures.PICTURE_SUFFIXES, lambda path, pool: PictureFile(path)),
    ("zarr", (zarrs.SUFFIX,), lambda path, pool: ZarrFolder(path)),
)
SUFFIXES = tuple(suffix for _, suffixes, _ in _KINDS for suffix in suffixes)
"""What is a stack by itself; .mrcs and .mrc also with .gz or .bz2 behind."""

LEFT_TO_OTHERS = (".npy", ".zarr", *pictures.SUFFIXES)
"""What napari reads itself: the Particles dock opens it, and napari need not ask whom to take."""


def kind_of(path: Path | str) -> str:
    """The kind of stack by the name: "mrc", "npy" …; "" for none of them."""
    stem, suffix = os.path.splitext(str(path).lower())
    if suffix in COMPRESSED:
        return "mrc" if stem.endswith(MRC_SUFFIXES) else ""
    return next((kind for kind, suffixes, _ in _KINDS if suffix in suffixes), "")


def open_stack(path: Path | str, pool: DescriptorPool | None = None) -> StackFile:
    """The stack file `path`; what is named like nothing known is taken for MRC, as RELION takes it."""
    if os.path.isdir(path) and not zarrs.is_zarr(path):
        raise UserError(f"{path} is a folder, not an image stack")
    kind = kind_of(path) or "mrc"
    opener = next(opener for name, _, opener in _KINDS if name == kind)
    return opener(str(path), pool or DescriptorPool())
