"""Pictures as particle images: TIFF stacks, PNG and JPEG files, and folders of them."""

from __future__ import annotations

import math
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from particle_explorer.files import UserError
from particle_explorer.io.arrays import image_shape
from particle_explorer.io.decoding import LARGEST_DECODED_PX, decoding, needs
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.particles import Images, Rows

TIFF_SUFFIXES = (".tif", ".tiff")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = (*TIFF_SUFFIXES, *PICTURE_SUFFIXES)
_FORMATS = ("PNG", "JPEG")
_GREY = {"1": "L", "L": "L", "I;16": "I;16", "I;16B": "I;16B", "I": "I", "F": "F", "LA": "L"}
"""Mode of a grey picture → the mode its pixels are taken in; all others are taken as colours."""
_MOST_PICTURES = 5_000_000
_ANGSTROM = {
    "Å": 1.0,
    "A": 1.0,
    "angstrom": 1.0,
    "nm": 10.0,
    "nanometer": 10.0,
    "µm": 1e4,
    "um": 1e4,
    "micron": 1e4,
}
_DIGITS = re.compile(r"(\d+)")


class PictureFile:
    """A PNG or JPEG file: a stack of one image."""

    n_images = 1
    pixel_size_A = math.nan
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | str) -> None:
        self.path = os.path.abspath(path)
        self._pillow = needs("PIL.Image", self.path)
        with decoding(self.path, "picture"), self._pillow.open(self.path, formats=_FORMATS) as picture:
            width, height = picture.size
            channels = 1 if picture.mode in _GREY else 3
        if width != height:
            raise UserError(f"{self.path} has {width} × {height} px; particle images must be square")
        if not 2 <= width <= LARGEST_DECODED_PX:
            raise UserError(f"{self.path} has a side of {width} px; 2 to {LARGEST_DECODED_PX} px are read")
        self.shape = (channels, height, width)

    def read(self, indices: Rows) -> Images:
        """The image as often as it is asked for → `(k, c, n, n)` float32."""
        with decoding(self.path, "picture"), self._pillow.open(self.path, formats=_FORMATS) as picture:
            channels = 1 if picture.mode in _GREY else 3
            if (channels, picture.size[1], picture.size[0]) != self.shape:
                raise UserError(f"{self.path} has changed since it was opened")
            wanted = _GREY.get(picture.mode, "RGB")
            pixels = np.asarray(picture if picture.mode == wanted else picture.convert(wanted), np.float32)
        image = pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
        return np.repeat(image[None], len(indices), axis=0)


class TiffStack:
    """The pages of a TIFF file as images; also the single page by which ImageJ describes a long stack."""

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None) -> None:
        self.path = os.path.abspath(path)
        self._tifffile = needs("tifffile", self.path)
        self._pool = pool or DescriptorPool()
        self._lock = threading.Lock()
        self._file: Any = None
        self.notes: tuple[str, ...] = ()
        with decoding(self.path, "TIFF file"), self._open() as file:
            first = file.pages[0]
            shape, self._dtype = tuple(int(side) for side in first.shape), np.dtype(first.dtype)
            # a page in colour is one image of an array of one
            n, self.shape, self._channels_last = image_shape(
                (1, *shape) if len(shape) == 3 else shape, self._dtype, self.path
            )
            if n != 1 or len(shape) > 3:
                raise UserError(
                    f"{self.path} has pages of the shape {'×'.join(map(str, shape))}; a page is one square "
                    "image"
                )
            if self.shape[1] > LARGEST_DECODED_PX:
                raise UserError(f"{self.path} says images of {self.shape[1]} px, too large to be particles")
            self.n_images = len(file.pages)
            self._raw_offset = self._contiguous(file, first)
            self.pixel_size_A = _tiff_pixel_size(file, first)

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, c, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        if self._raw_offset:
            n_bytes = math.prod(self.shape) * self._dtype.itemsize
            for place, index in enumerate(indices):
                data = self._pool.pread(self.path, n_bytes, self._raw_offset + int(index) * n_bytes)
                if len(data) < n_bytes:
                    raise UserError(f"{self.path} is shorter than when it was opened")
                images[place] = self._placed(np.frombuffer(data, self._dtype))
            return images
        with self._lock, decoding(self.path, "TIFF file"):
            if self._file is None:
                self._file = self._open()
                weakref.finalize(self, self._file.close)
            try:
                for place, index in enumerate(indices):
                    page = np.asarray(self._file.pages[int(index)].asarray(maxworkers=1))
                    if page.size != math.prod(self.shape):
                        raise UserError(
                            f"{self.path}: page {int(index) + 1} has the shape "
                            f"{'×'.join(map(str, page.shape))} "
                            "and the first another; images of one stack have one size"
                        )
                    images[place] = self._placed(page)
            finally:
                if self.n_images == 1:  # a folder of thousands must not keep thousands open
                    self._file.close()
                    self._file = None
        return images

    def _open(self) -> Any:
        # the metadata of OME and of others name further files, which are not followed
        return self._tifffile.TiffFile(
            self.path, is_ome=False, is_mmstack=False, is_ndtiff=False, _multifile=False
        )

    def _placed(self, page: NDArray[Any]) -> NDArray[Any]:
        c, n, _ = self.shape
        return page.reshape(n, n, c).transpose(2, 0, 1) if self._channels_last else page.reshape(c, n, n)

    def _contiguous(self, file: Any, first: Any) -> int:
        """First byte of a stack that ImageJ wrote as one piece behind a single page; 0 for any other."""
        described = file.imagej_metadata if file.is_imagej else None
        n = described.get("images", 1) if described else 1
        if self.n_images != 1 or not isinstance(n, int) or n <= 1 or not first.is_contiguous:
            return 0
        offset, n_bytes = int(first.dataoffsets[0]), math.prod(self.shape) * self._dtype.itemsize
        size = self._pool.size(self.path)
        if size < offset + n * n_bytes:
            raise UserError(
                f"{self.path} is cut short: it announces {n} images, {offset + n * n_bytes} bytes, and "
                f"has {size}"
            )
        self.n_images = n
        self._dtype = self._dtype.newbyteorder(file.byteorder)
        return offset


def _tiff_pixel_size(file: Any, page: Any) -> float:
    """Å where ImageJ says a unit of length and a resolution in it, else NaN."""
    unit = str((file.imagej_metadata or {}).get("unit", "")) if file.is_imagej else ""
    unit = unit.replace("\\u00B5", "µ").replace("\\u00C5", "Å")
    resolution = page.tags.get("XResolution")
    if unit not in _ANGSTROM or resolution is None:
        return math.nan
    per_unit, denominator = (float(value) for value in resolution.value)
    if not (per_unit > 0 and denominator > 0):
        return math.nan
    size = denominator / per_unit * _ANGSTROM[unit]
    return size if 0 < size < 1e4 else math.nan


def open_folder(folder: Path | str) -> tuple[list[PictureFile | TiffStack], list[str], list[str]]:
    """Pictures of a folder and of the folders in it: (files, the folder of each within it, notes).

    Sorted as people number them. Those that are no square images, or not of the kind of most (grey or in
    colour), are left out with a note.
    """
    folder = os.path.abspath(folder)
    files: list[PictureFile | TiffStack] = []
    places: list[str] = []
    left_out: list[str] = []
    pool = DescriptorPool()
    for path in _pictures(folder):
        try:
            is_tiff = path.lower().endswith(TIFF_SUFFIXES)
            files.append(TiffStack(path, pool) if is_tiff else PictureFile(path))
        except UserError as error:
            left_out.append(str(error))
            continue
        places.append(Path(os.path.relpath(os.path.dirname(path), folder)).as_posix())
    notes: list[str] = []
    if left_out:
        others = f"; so are {len(left_out) - 1} more" if len(left_out) > 1 else ""
        notes.append(f"left out: {left_out[0]}{others}")
    if not files:
        raise UserError(
            left_out[0]
            if len(left_out) == 1
            else f"{folder} holds no pictures that can be read ({', '.join(SUFFIXES)})"
            + (f": {left_out[0]}" if left_out else "")
        )
    kinds = Counter(file.shape[0] for file in files)
    if len(kinds) > 1:
        most = kinds.most_common(1)[0][0]
        kept = [i for i, file in enumerate(files) if file.shape[0] == most]
        words = {1: "grey", 3: "in colour"}
        notes.append(
            f"{len(files) - len(kept)} pictures are not {words[most]} like the others and are left out, for "
            f"instance {next(file.path for file in files if file.shape[0] != most)}"
        )
        files, places = [files[i] for i in kept], [places[i] for i in kept]
    return files, places, notes


def has_pictures(folder: Path | str) -> bool:
    """Whether there is any picture in the folder or those in it."""
    return next(_pictures(os.path.abspath(folder)), None) is not None


def _pictures(folder: str) -> Iterator[str]:
    count = 0
    for here, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_as_numbered)
        for name in sorted(names, key=_as_numbered):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                count += 1
                if count > _MOST_PICTURES:
                    raise UserError(
                        f"{folder} holds more than {_MOST_PICTURES} pictures; write them as one stack"
                    )
                yield os.path.join(here, name)


def _as_numbered(name: str) -> list[tuple[int, str]]:
    """Key that sorts img2 before img10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in _DIGITS.split(name)]
