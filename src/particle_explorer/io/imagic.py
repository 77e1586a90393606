"""IMAGIC-5 stacks: 1024 bytes of header per image in `.hed`, the pixels in `.img` beside it.

Word numbers of the header (from 1) as in the IMAGIC-5 manual, "The header".
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from particle_explorer.files import UserError
from particle_explorer.io.descriptors import DescriptorPool, read_images
from particle_explorer.io.mrc import LARGEST_BOX
from particle_explorer.particles import Images, Rows

SUFFIXES = (".hed", ".img")
_RECORD_BYTES = 1024
_TYPES = {b"REAL": "f4", b"INTG": "i2", b"PACK": "u1", b"LONG": "i4"}


class ImagicFile:
    """An IMAGIC stack, named by either of its two files; `path` is the pixels' (.img)."""

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None) -> None:
        header_path, self.path = _pair(os.path.abspath(path))
        self._pool = pool or DescriptorPool()
        header = self._pool.pread(header_path, _RECORD_BYTES, 0)
        if len(header) < _RECORD_BYTES:
            raise UserError(
                f"{header_path} is no IMAGIC header: it has {len(header)} bytes, not 1024 per image"
            )
        kind = header[56:60]
        if kind not in _TYPES:
            raise UserError(
                f"{header_path} is no IMAGIC header of real images: its type is {kind.decode('latin-1')!r}; "
                "REAL, INTG, PACK and LONG are read"
            )
        order = "<" if _plausible(header, "<") else ">"
        if not _plausible(header, order):
            raise UserError(f"{header_path} is no IMAGIC header: it gives no sizes that make sense")
        words = np.frombuffer(header, order + "i4")
        n_lines, n_columns = int(words[12]), int(words[13])
        if n_lines != n_columns:
            raise UserError(
                f"{self.path} holds images of {n_columns} × {n_lines} px; particle images must be square"
            )
        # the headers are one per image, and unlike the count in them they cannot be forgotten
        self.n_images = self._pool.size(header_path) // _RECORD_BYTES
        self._dtype = np.dtype(order + _TYPES[kind])
        self.shape = (1, n_lines, n_columns)
        self._image_bytes = n_lines * n_columns * self._dtype.itemsize
        size, expected = self._pool.size(self.path), self.n_images * self._image_bytes
        if size < expected:
            raise UserError(
                f"{self.path} is cut short: {header_path} has headers of {self.n_images} images of {n_lines} "
                f"px, {expected} bytes, and the file has {size}"
            )
        announced = int(words[1]) + 1
        self.notes: tuple[str, ...] = ()
        if announced != self.n_images:
            self.notes = (
                f"{header_path} announces {announced} images and has headers of {self.n_images}, which "
                "are read",
            )
        self.pixel_size_A = math.nan

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, 1, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        wanted = [int(index) for index in indices]
        for place, data in read_images(self._pool, self.path, wanted, 0, self._image_bytes):
            images[place] = np.frombuffer(data, self._dtype).reshape(self.shape)
        return images


def _pair(path: str) -> tuple[str, str]:
    """Header and pixel file of a stack, whichever of them is named."""
    stem, suffix = os.path.splitext(path)
    other = {".hed": ".img", ".img": ".hed"}.get(suffix.lower(), "")
    beside = stem + (other.upper() if suffix.isupper() else other)
    if not other or not os.path.isfile(beside):
        raise UserError(
            f"{path} is one half of an IMAGIC stack, and the other half, {os.path.basename(beside)}, is not "
            "beside it"
        )
    return (path, beside) if suffix.lower() == ".hed" else (beside, path)


def _plausible(header: bytes, order: str) -> bool:
    words = np.frombuffer(header, order + "i4")
    return all(2 <= int(words[word - 1]) <= LARGEST_BOX for word in (13, 14))
