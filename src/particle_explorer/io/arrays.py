"""NumPy files and arrays in memory as stacks of images."""

from __future__ import annotations

import ast
import math
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from particle_explorer.files import UserError
from particle_explorer.io.descriptors import DescriptorPool, read_images
from particle_explorer.particles import Images, Rows

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 20


def npy_layout(path: str, pool: DescriptorPool) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, column order, type, first byte) of an .npy file, checked against its size; nothing is
    unpickled."""
    start = pool.pread(path, 12, 0)
    if not start.startswith(_MAGIC) or len(start) < 12:
        raise UserError(f"{path} is no .npy file")
    version = (start[6], start[7])
    length = int.from_bytes(start[8:10] if version == (1, 0) else start[8:12], "little")
    if version not in ((1, 0), (2, 0), (3, 0)) or length > _LONGEST_HEADER:
        raise UserError(f"{path} has a damaged or unknown .npy header")
    first_byte = length + (10 if version == (1, 0) else 12)
    try:
        header = ast.literal_eval(pool.pread(path, length, first_byte - length).decode("latin-1").strip())
        dtype = np.lib.format.descr_to_dtype(header["descr"])
        fortran = bool(header["fortran_order"])
        shape = tuple(operator.index(side) for side in header["shape"])
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} has a damaged .npy header") from error
    if dtype.hasobject:
        raise UserError(
            f"{path} holds pickled Python objects, which are not read; save a plain array of numbers"
        )
    if any(side < 0 for side in shape):
        raise UserError(f"{path} has a damaged .npy header")
    expected = first_byte + math.prod(shape) * dtype.itemsize
    size = pool.size(path)
    if size < expected:
        raise UserError(f"{path} is cut short: {expected} bytes are announced, and the file has {size}")
    return shape, fortran, dtype, first_byte


def image_shape(
    shape: tuple[int, ...], dtype: DTypeLike, name: str
) -> tuple[int, tuple[int, int, int], bool]:
    """(number of images, (c, n, n), channels last) of an array: (n, n), (N, n, n), (N, c, n, n) or (N, n, n,
    3)."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        raise UserError(f"{name} holds values of type {dtype}; images are integers or real numbers")
    if len(shape) == 2 and shape[0] == shape[1]:
        found = 1, (1, shape[0], shape[1]), False
    elif len(shape) == 3 and shape[1] == shape[2]:
        found = shape[0], (1, shape[1], shape[2]), False
    elif len(shape) == 4 and shape[2] == shape[3] and shape[1] in (1, 3):
        found = shape[0], (shape[1], shape[2], shape[3]), False
    elif len(shape) == 4 and shape[1] == shape[2] and shape[3] in (1, 3):
        found = shape[0], (shape[3], shape[1], shape[2]), True
    else:
        raise UserError(
            f"{name} has the shape {'×'.join(map(str, shape))}; particle images are N×n×n, or N×3×n×n or "
            "N×n×n×3 in colour"
        )
    if found[0] == 0 or found[1][1] < 2:
        raise UserError(f"{name} holds no images (shape {'×'.join(map(str, shape))})")
    return found


class NpyFile:
    """An .npy file of images, read image by image."""

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None) -> None:
        self.path = os.path.abspath(path)
        self._pool = pool or DescriptorPool()
        shape, fortran, self._dtype, self._first_byte = npy_layout(self.path, self._pool)
        if fortran and len(shape) > 1:
            raise UserError(f"{self.path} is stored column by column; save it with numpy.ascontiguousarray")
        self.n_images, self.shape, self._channels_last = image_shape(shape, self._dtype, self.path)
        self._image_bytes = math.prod(self.shape) * self._dtype.itemsize

    def read(self, indices: Rows) -> Images:
        images = np.empty((len(indices), *self.shape), np.float32)
        c, n, _ = self.shape
        wanted = [int(index) for index in indices]
        for place, data in read_images(self._pool, self.path, wanted, self._first_byte, self._image_bytes):
            image = np.frombuffer(data, self._dtype)
            images[place] = (
                image.reshape(n, n, c).transpose(2, 0, 1) if self._channels_last else image.reshape(c, n, n)
            )
        return images


class ArrayFile:
    """Images of an array or of anything with `shape`, `dtype` and `[i]`; read image by image all the same."""

    path = ""

    def __init__(self, array: Any, name: str) -> None:
        self._array = array if len(array.shape) > 2 else np.asarray(array)[None]
        self.n_images, self.shape, self._channels_last = image_shape(
            tuple(self._array.shape), self._array.dtype, f"layer {name!r}"
        )

    def read(self, indices: Rows) -> Images:
        images = np.empty((len(indices), *self.shape), np.float32)
        for place, index in enumerate(indices):
            image = np.asarray(self._array[int(index)])
            if self._channels_last:
                image = image.transpose(2, 0, 1)
            images[place] = image.reshape(self.shape)
        return images
