"""Zarr arrays of images in a folder (versions 2 and 3, OME-Zarr included)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from particle_explorer.files import UserError
from particle_explorer.io.arrays import image_shape
from particle_explorer.io.decoding import LARGEST_CHUNK_BYTES, LARGEST_DECODED_PX, decoding, needs
from particle_explorer.particles import Images, Rows

SUFFIX = ".zarr"
_MARKS = ("zarr.json", ".zarray", ".zgroup")


def is_zarr(path: Path | str) -> bool:
    """Whether this folder is a zarr array or group."""
    return any(os.path.isfile(os.path.join(path, mark)) for mark in _MARKS)


class ZarrFolder:
    """Images of a zarr array, read image by image."""

    def __init__(self, path: Path | str) -> None:
        self.path = os.path.abspath(path)
        self.notes: tuple[str, ...] = ()
        self.pixel_size_A = math.nan
        zarr = needs("zarr", self.path)
        if not is_zarr(self.path):
            raise UserError(f"{self.path} is no zarr folder: it has no {' and no '.join(_MARKS)}")
        with decoding(self.path, "zarr array"):
            store = zarr.storage.LocalStore(self.path, read_only=True)
            # metadata gathered in one place may name any path; those in the folders name themselves
            node = zarr.open(store=store, mode="r", use_consolidated=False)
            self._array = node if isinstance(node, zarr.Array) else self._largest(node)
            shape = tuple(int(side) for side in self._array.shape)
            dtype = np.dtype(self._array.dtype)
            self.n_images, self.shape, self._channels_last = image_shape(shape, dtype, self.path)
            self._is_single = len(shape) == 2
            if self.shape[1] > LARGEST_DECODED_PX:
                raise UserError(f"{self.path} says images of {self.shape[1]} px, too large to be particles")
            pieces = getattr(self._array, "shards", None) or self._array.chunks
            piece = math.prod(int(side) for side in pieces) * dtype.itemsize
            last = [(side - 1) // int(part) for side, part in zip(shape, pieces, strict=True)]
            key = self._array.metadata.encode_chunk_key(tuple(last))
            is_whole = os.path.exists(os.path.join(self.path, self._array.path, key))
        if not is_whole:
            raise UserError(
                f"{self.path} says {self.n_images} images, and the last of them was never written"
            )
        if piece > LARGEST_CHUNK_BYTES:
            raise UserError(
                f"{self.path} is stored in pieces of {piece / 2**20:.0f} MiB, too large to read single "
                "images "
                "from; store it with one image a chunk"
            )

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, c, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        with decoding(self.path, "zarr array"):
            for place, index in enumerate(indices):
                image = np.asarray(self._array[...] if self._is_single else self._array[int(index)])
                if self._channels_last:
                    image = image.transpose(2, 0, 1)
                images[place] = image.reshape(self.shape)
        return images

    def _largest(self, group: Any) -> Any:
        found: list[tuple[int, str, Any]] = []
        for name, array in group.arrays():
            try:
                n, shape, _ = image_shape(tuple(array.shape), array.dtype, name)
            except UserError:
                continue
            found.append((n * math.prod(shape), str(name), array))
        if not found:
            raise UserError(f"{self.path} holds no array of images; they are N×n×n, or with 3 colours")
        _, name, array = max(found, key=lambda each: each[:2])
        if len(found) > 1:
            self.notes = (f"{self.path} holds {len(found)} arrays of images; {name}, the largest, is read",)
        return array
