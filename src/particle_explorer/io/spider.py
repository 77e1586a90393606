"""SPIDER image files: single 2-D images and stacks of them.

The header is a record of float32 whose words count from 1 (SPIDER documentation, "SPIDER image file format").
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

SUFFIXES = (".spi", ".stk")
_WORDS = {
    "nslice": 1,
    "nrow": 2,
    "iform": 5,
    "nsam": 12,
    "labrec": 13,
    "labbyt": 22,
    "lenbyt": 23,
    "istack": 24,
    "maxim": 26,
    "pixsiz": 38,
}
_HEADER_BYTES = 256


class SpiderFile:
    """A SPIDER image or stack of images, read image by image."""

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None) -> None:
        self.path = os.path.abspath(path)
        self._pool = pool or DescriptorPool()
        header = self._pool.pread(self.path, _HEADER_BYTES, 0)
        words = _words(header, "<") or _words(header, ">")
        if words is None:
            raise UserError(f"{self.path} is no SPIDER file: its header gives no sizes that make sense")
        order, found = words
        n, n_header = int(found["nsam"]), int(found["labbyt"])
        if found["iform"] == 3:
            raise UserError(
                f"{self.path} is a SPIDER volume ({n} × {int(found['nrow'])} × {int(found['nslice'])}), not "
                "particle images"
            )
        if found["iform"] != 1:
            raise UserError(
                f"{self.path} is a SPIDER file of type {int(found['iform'])}; real 2-D images, type 1, "
                "are read"
            )
        if n != int(found["nrow"]):
            raise UserError(
                f"{self.path} holds images of {n} × {int(found['nrow'])} px; particle images must be square"
            )
        is_stack = found["istack"] > 0
        if found["istack"] < 0:
            raise UserError(f"{self.path} is an indexed SPIDER stack; write it as a plain stack")
        self.n_images = int(found["maxim"]) if is_stack else 1
        self.shape = (1, n, n)
        self._dtype = np.dtype(order + "f4")
        self._header_bytes = n_header
        self._record_bytes = n_header + 4 * n * n
        self._first_byte = n_header if is_stack else 0
        size, expected = self._pool.size(self.path), self._first_byte + self.n_images * self._record_bytes
        if self.n_images < 1 or size < expected:
            raise UserError(
                f"{self.path} is cut short: its header announces {self.n_images} images of {n} px, "
                f"{expected} "
                f"bytes, and the file has {size}"
            )
        pixel_size = float(found["pixsiz"])
        self.pixel_size_A = pixel_size if 0 < pixel_size < 1e4 and abs(pixel_size - 1) > 1e-6 else math.nan
        self.notes: tuple[str, ...] = ()

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, 1, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        wanted = [int(index) for index in indices]
        for place, data in read_images(self._pool, self.path, wanted, self._first_byte, self._record_bytes):
            images[place] = np.frombuffer(data, self._dtype, offset=self._header_bytes).reshape(self.shape)
        return images


def _words(header: bytes, order: str) -> tuple[str, dict[str, float]] | None:
    """The words of the header in this byte order, if they make sense in it."""
    if len(header) < _HEADER_BYTES:
        return None
    values = np.frombuffer(header, order + "f4")
    found = {name: float(values[word - 1]) for name, word in _WORDS.items()}
    if not all(math.isfinite(value) and abs(value) < 1e9 for value in found.values()):
        return None
    sizes = [found[name] for name in ("nsam", "nrow", "labrec", "labbyt", "iform")]
    if any(size != round(size) for size in sizes) or not 2 <= found["nsam"] <= LARGEST_BOX:
        return None
    if not 1 <= found["nrow"] <= LARGEST_BOX:
        return None
    # the header is as many whole lines of an image as 1024 bytes take
    if not 1024 <= found["labbyt"] <= 1024 + 4 * found["nsam"] or found["labbyt"] % 4:
        return None
    return order, found
