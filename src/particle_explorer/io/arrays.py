"""NumPy files, archives of them, and arrays in memory as stacks of images."""

from __future__ import annotations

import ast
import math
import operator
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from particle_explorer.files import UserError
from particle_explorer.io.decoding import decoding
from particle_explorer.io.descriptors import DescriptorPool, read_images
from particle_explorer.io.unpacking import MOST_PACKED, unpacked
from particle_explorer.particles import Images, Rows

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 20


LEAST_BOX = 8
_LARGEST_LABELS = 1 << 30


class Bytes(Protocol):
    """What the start of a file can be read from."""

    def pread(self, path: str, n_bytes: int, offset: int) -> bytes: ...

    def size(self, path: str) -> int: ...


def npy_layout(path: str, pool: Bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
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

    pixel_size_A = math.nan
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None, unpacked: str = "") -> None:
        self.path = os.path.abspath(path)
        self._data = unpacked or self.path
        """Where the bytes lie: for a member of an archive elsewhere than `path`."""
        self._pool = pool or DescriptorPool()
        shape, fortran, self._dtype, self._first_byte = npy_layout(self._data, self._pool)
        if fortran and len(shape) > 1:
            raise UserError(f"{self.path} is stored column by column; save it with numpy.ascontiguousarray")
        self.n_images, self.shape, self._channels_last = image_shape(shape, self._dtype, self.path)
        self._image_bytes = math.prod(self.shape) * self._dtype.itemsize

    def read(self, indices: Rows) -> Images:
        images = np.empty((len(indices), *self.shape), np.float32)
        c, n, _ = self.shape
        wanted = [int(index) for index in indices]
        for place, data in read_images(self._pool, self._data, wanted, self._first_byte, self._image_bytes):
            image = np.frombuffer(data, self._dtype)
            images[place] = (
                image.reshape(n, n, c).transpose(2, 0, 1) if self._channels_last else image.reshape(c, n, n)
            )
        return images


class NpzFile:
    """The largest array of images in an .npz archive; arrays of one number per image are its `labels`."""

    pixel_size_A = math.nan

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None) -> None:
        self.path = os.path.abspath(path)
        with decoding(self.path, ".npz archive"), zipfile.ZipFile(self.path) as archive:
            members = {info.filename: _Member(archive, info) for info in archive.infolist()}
            layouts = {name: self._layout(name, member) for name, member in members.items()}
            found = {
                name: layout
                for name, layout in layouts.items()
                if layout is not None and self._is_stack(layout)
            }
            if not found:
                shapes = ", ".join(
                    f"{name.removesuffix('.npy')} {'×'.join(map(str, layout[0]))}"
                    for name, layout in layouts.items()
                    if layout is not None
                )
                raise UserError(
                    f"{self.path} holds no array of images (N×n×n, or N×n×n×3 in colour): "
                    f"{shapes or 'no arrays'}"
                )
            self.array = max(found, key=lambda name: (math.prod(found[name][0]), name))
            n = found[self.array][0][0]
            self.labels = {
                name.removesuffix(".npy"): self._column(members[name], layout)
                for name, layout in layouts.items()
                if layout is not None and layout[0] == (n,) and layout[1].kind in "biuf"
            }
            member = members[self.array]
            size = member.checked_size()
        data = unpacked(self.path, self.array, size, lambda: _member_stream(self.path, self.array))
        self._file = NpyFile(self.path, pool, data)
        self.n_images, self.shape = self._file.n_images, self._file.shape
        others = sorted(name.removesuffix(".npy") for name in found if name != self.array)
        self.notes: tuple[str, ...] = ()
        if others:
            self.notes = (
                f"{self.path} holds {len(found)} arrays of images; {self.array.removesuffix('.npy')}, the "
                "largest, "
                f"is read, not {', '.join(others[:5])}",
            )

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, c, n, n)` float32."""
        return self._file.read(indices)

    @staticmethod
    def _layout(name: str, member: _Member) -> tuple[tuple[int, ...], np.dtype[Any], int] | None:
        try:
            shape, fortran, dtype, first_byte = npy_layout(name, member)
        except UserError:
            return None
        return None if fortran and len(shape) > 1 else (shape, dtype, first_byte)

    @staticmethod
    def _is_stack(layout: tuple[tuple[int, ...], np.dtype[Any], int]) -> bool:
        """Matrices of rotation are N×3×3 and no images."""
        try:
            return len(layout[0]) > 2 and image_shape(layout[0], layout[1], "")[1][1] >= LEAST_BOX
        except UserError:
            return False

    @staticmethod
    def _column(member: _Member, layout: tuple[tuple[int, ...], np.dtype[Any], int]) -> NDArray[Any]:
        (n,), dtype, first_byte = layout
        if member.checked_size() > _LARGEST_LABELS:
            raise UserError(f"an array of {n} labels is too large to be one per image")
        data = member.pread("", n * dtype.itemsize, first_byte)
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))


class _Member:
    """One file of an archive, as something to read the start of."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._archive, self._info = archive, info

    def pread(self, path: str, n_bytes: int, offset: int) -> bytes:
        with self._archive.open(self._info) as file:
            while offset > 0 and (skipped := file.read(min(offset, 1 << 20))):
                offset -= len(skipped)
            return file.read(n_bytes)

    def size(self, path: str) -> int:
        return self._info.file_size

    def checked_size(self) -> int:
        """Bytes after unpacking, if the archive can hold as much."""
        info = self._info
        if info.file_size > MOST_PACKED * info.compress_size + 4096:
            raise UserError(
                f"{info.filename} claims {info.file_size} bytes in {info.compress_size}, which no archive "
                "can hold"
            )
        return info.file_size


def _member_stream(path: str, name: str) -> BinaryIO:
    with zipfile.ZipFile(path) as archive:
        file: Any = archive.open(name)  # keeps the archive open
        stream: BinaryIO = file
        return stream


class ArrayFile:
    """Images of an array or of anything with `shape`, `dtype` and `[i]`; read image by image all the same."""

    path = ""
    pixel_size_A = math.nan
    notes: tuple[str, ...] = ()

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
