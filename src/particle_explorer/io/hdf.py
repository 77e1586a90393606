"""HDF5 files of images: EMAN2's stacks (`/MDF/images/N/image`) and single arrays of images.

Only what lies in the file itself is read: links to other files, data kept in other files and virtual
data sets are refused, so a file that was sent to somebody cannot make him read his own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from particle_explorer.files import UserError
from particle_explorer.io.arrays import image_shape
from particle_explorer.io.decoding import LARGEST_CHUNK_BYTES, LARGEST_DECODED_PX, decoding, needs
from particle_explorer.particles import Images, Rows

SUFFIXES = (".hdf", ".hdf5", ".h5", ".hspy")
_MAGIC = b"\x89HDF\r\n\x1a\n"
_DEEPEST = 8
_MOST_PACKED = 10_000
"""Times that stored data may unpack to; HDF5 promises arrays of any length without storing them."""
_MOST_MEMBERS = 10_000


class HdfFile:
    """Images of an HDF5 file, read image by image."""

    def __init__(self, path: Path | str) -> None:
        self.path = os.path.abspath(path)
        _check_magic(self.path)
        self._h5py = needs("h5py", self.path)
        self.notes: tuple[str, ...] = ()
        self.pixel_size_A = math.nan
        self._names: list[str] = []
        self._array = ""
        self._channels_last = False
        with decoding(self.path, "HDF5 file"), self._open() as file:
            images = self._eman_images(file)
            if images is not None:
                self._take_eman(images)
            else:
                self._take_array(file)

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, c, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        with decoding(self.path, "HDF5 file"), self._open() as file:
            group = self._eman_images(file) if self._names else None
            array = None if self._names else self._own(file, self._array)
            for place, index in enumerate(indices):
                if group is not None:
                    image = self._eman_image(group, self._names[int(index)])[()]
                else:
                    assert array is not None
                    image = array[()] if array.ndim == 2 else array[int(index)]
                if self._channels_last:
                    image = image.transpose(2, 0, 1)
                images[place] = image.reshape(self.shape)
        return images

    def _open(self) -> Any:
        return self._h5py.File(self.path, "r", locking=False)

    # --- EMAN2 ------------------------------------------------------------------------------------

    def _eman_images(self, file: Any) -> Any:
        """The group `/MDF/images`, or None where this is no file of EMAN2's."""
        group = file
        for name in ("MDF", "images"):
            if not isinstance(group, self._h5py.Group) or not group.id.links.exists(name.encode()):
                return None
            group = self._member(group, name)
        return group

    def _take_eman(self, images: Any) -> None:
        self._names = sorted((name for name in images if name.isdigit()), key=int)
        if not self._names:
            raise UserError(f"{self.path} is a file of EMAN2's without images")
        first = self._eman_image(images, self._names[0])
        n, self.shape, _ = image_shape(first.shape, first.dtype, self.path)
        if first.ndim != 2 or n != 1:
            raise UserError(f"{self.path} holds volumes, not particle images")
        self.n_images = len(self._names)
        apix = self._member(images, self._names[0]).attrs.get("EMAN.apix_x", math.nan)
        size = float(np.asarray(apix).reshape(-1)[0]) if np.asarray(apix).size else math.nan
        self.pixel_size_A = size if 0 < size < 1e4 and abs(size - 1) > 1e-6 else math.nan

    def _eman_image(self, images: Any, name: str) -> Any:
        array = self._checked(self._member(self._member(images, name), "image"), f"MDF/images/{name}/image")
        if self._names and hasattr(self, "shape") and tuple(array.shape) != self.shape[1:]:
            raise UserError(
                f"{self.path}: image {name} is {'×'.join(map(str, array.shape))} px and the first one "
                f"{self.shape[1]}×{self.shape[2]}; images of one stack have one size"
            )
        return array

    # --- single arrays ----------------------------------------------------------------------------

    def _take_array(self, file: Any) -> None:
        found: list[tuple[int, str]] = []
        for name, dataset in self._datasets(file, "", _DEEPEST):
            try:
                n, shape, _ = image_shape(dataset.shape, dataset.dtype, self.path)
            except UserError:
                continue
            found.append((n * math.prod(shape), name))
        if not found:
            raise UserError(
                f"{self.path} holds no array of images; they are N×n×n (or n×n, or with 3 colours), or "
                "EMAN2's "
                "MDF/images"
            )
        found.sort(reverse=True)
        self._array = found[0][1]
        array = self._checked(self._own(file, self._array), self._array)
        self.n_images, self.shape, self._channels_last = image_shape(array.shape, array.dtype, self.path)
        if len(found) > 1:
            self.notes = (
                f"{self.path} holds {len(found)} arrays of images; {self._array}, the largest, is read",
            )

    def _datasets(self, group: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        for count, name in enumerate(group):
            if count >= _MOST_MEMBERS:
                return
            if not self._is_own(group, name):
                continue
            member = group[name]
            if isinstance(member, self._h5py.Dataset):
                if member.shape is not None:
                    yield f"{prefix}{name}", member
            elif isinstance(member, self._h5py.Group) and depth > 0:
                yield from self._datasets(member, f"{prefix}{name}/", depth - 1)

    def _own(self, file: Any, name: str) -> Any:
        member = file
        for part in name.split("/"):
            member = self._member(member, part)
        return member

    def _member(self, group: Any, name: str) -> Any:
        if not isinstance(group, self._h5py.Group) or not group.id.links.exists(name.encode()):
            raise UserError(f"{self.path} is damaged: {name} is missing in it")
        if not self._is_own(group, name):
            raise UserError(
                f"{self.path}: {name} is a link to another place, and links are not followed; copy the "
                "data into "
                "one file"
            )
        return group[name]

    def _is_own(self, group: Any, name: str) -> bool:
        """Whether the link leads to an object of this file; asked without following it."""
        kind = group.id.links.get_info(name.encode()).type
        return bool(kind == self._h5py.h5l.TYPE_HARD)

    def _checked(self, dataset: Any, name: str) -> Any:
        """A data set that is whole in this file and whose images can be held."""
        if not isinstance(dataset, self._h5py.Dataset) or dataset.shape is None:
            raise UserError(f"{self.path}: {name} is no array")
        if dataset.is_virtual or dataset.external:
            raise UserError(
                f"{self.path}: the data of {name} lie in other files, which are not followed; copy them "
                "into one "
                "file"
            )
        if max(dataset.shape[1:] or (0,)) > LARGEST_DECODED_PX:
            raise UserError(
                f"{self.path}: {name} says images of {dataset.shape[-1]} px, too large to be particles"
            )
        chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize if dataset.chunks else 0
        if chunk > LARGEST_CHUNK_BYTES:
            raise UserError(
                f"{self.path}: {name} is stored in pieces of {chunk / 2**20:.0f} MiB, too large to read "
                "single "
                "images from; store it with one image a chunk"
            )
        stored, said = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
        if said > _MOST_PACKED * stored:
            raise UserError(
                f"{self.path}: {name} says {dataset.shape[0]} images, {said} bytes, and only {stored} "
                "bytes of "
                "it were ever written"
            )
        return dataset


def _check_magic(path: str) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if start != _MAGIC:
        raise UserError(f"{path} is no HDF5 file")
