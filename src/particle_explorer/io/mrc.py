"""MRC image stacks: lazily read, checked against the size of the file before anything is allocated.

MRC2014: Cheng et al., J. Struct. Biol. 192 (2015) 146; mode 12 (float16) as RELION and mrcfile write it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from particle_explorer.files import UserError, replacing
from particle_explorer.io.descriptors import DescriptorPool, read_images
from particle_explorer.io.unpacking import MOST_PACKED, compression, first_bytes, unpack
from particle_explorer.particles import Images, Rows

HEADER_BYTES = HEADER_DTYPE.itemsize
DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
"""MRC mode → numpy type."""
LARGEST_BOX = 16_384


class MrcFile:
    """One MRC file as a stack of square images; a single 2-D image is a stack of one.

    Micrographs need not be `square`.

    Tolerated, each with a note: a missing MAP stamp, a damaged byte-order stamp, bytes after the data.
    Anything else that does not fit together is a `UserError`. A file in gzip or bzip2 is unpacked once, after
    its header has been understood.
    """

    def __init__(self, path: Path | str, pool: DescriptorPool | None = None, *, square: bool = True) -> None:
        self.path = os.path.abspath(path)
        self._pool = pool or DescriptorPool()
        notes: list[str] = []
        self._data = self.path
        header = self._pool.pread(self.path, HEADER_BYTES, 0)
        packed = compression(header)
        if packed:
            header = first_bytes(self.path, HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise UserError(
                f"{self.path} is no MRC file: it has {len(header)} bytes, and the header alone takes "
                f"{HEADER_BYTES}"
            )
        if header[208:211] != b"MAP":
            notes.append(
                f'{self.path} lacks the "MAP" stamp of an MRC file; its sizes fit the file, so it is read'
            )
        order = self._byte_order(header, notes)
        fields = _fields(header, order)
        nx, ny, nz, mode = (int(fields[name]) for name in ("nx", "ny", "nz", "mode"))
        n_symbol_bytes = int(fields["nsymbt"])
        if mode not in DTYPES:
            raise UserError(
                f"{self.path} holds data of MRC mode {mode}, which is not a mode of real images; modes 0, 1, "
                "2, 6 and 12 are read"
            )
        if square and nx != ny:
            raise UserError(f"{self.path} holds images of {nx} × {ny} px; particle images must be square")
        if not (2 <= nx <= LARGEST_BOX and 2 <= ny <= LARGEST_BOX) or nz < 1:
            raise UserError(
                f"{self.path} is damaged or no MRC file: its header says {nz} images of {nx} × {ny} px"
            )
        ispg = int(fields["ispg"])
        if ispg > 400:
            raise UserError(f"{self.path} holds 3-D volumes (space group {ispg}), not particle images")
        self._dtype = np.dtype(order + DTYPES[mode])
        self._first_byte = HEADER_BYTES + n_symbol_bytes
        self._image_bytes = nx * ny * self._dtype.itemsize
        expected = self._first_byte + nz * self._image_bytes
        if packed == "gzip" and expected > MOST_PACKED * os.path.getsize(self.path) + (1 << 16):
            raise UserError(
                f"{self.path} is damaged: its header announces {nz} images of {nx} px, more than a gzip "
                "file of "
                "its length can hold"
            )
        if packed and n_symbol_bytes >= 0:
            self._data = unpack(self.path, expected)
            notes.append(f"{self.path} is compressed with {packed} and was unpacked into a temporary file")
        size = self._pool.size(self._data)
        if n_symbol_bytes < 0 or size < expected:
            raise UserError(
                f"{self.path} is cut short: its header announces {nz} images of {nx} px in mode {mode}, "
                f"{expected} bytes, and the file has {size}"
            )
        if size > expected:
            notes.append(f"{self.path} has {size - expected} bytes after its last image; they are ignored")
        if ispg == 1 and nx == nz > 1 and ".mrcs" not in os.path.basename(self.path):
            notes.append(
                f"{self.path} is a cube marked as a volume; if it is a 3-D map, it holds no particle images"
            )
        self.n_images = nz
        self.shape = (1, ny, nx)
        self.pixel_size_A = _pixel_size_A(fields)
        self.notes = tuple(notes)

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based) → `(k, 1, n, n)` float32."""
        images = np.empty((len(indices), *self.shape), np.float32)
        wanted = [int(index) for index in indices]
        if (
            self._dtype == images.dtype
            and len(wanted) > 1
            and wanted == list(range(wanted[0], wanted[0] + len(wanted)))
        ):
            return self._filled(images, wanted[0])
        for place, data in read_images(self._pool, self._data, wanted, self._first_byte, self._image_bytes):
            images[place] = np.frombuffer(data, self._dtype).reshape(self.shape)
        return images

    def _filled(self, images: Images, first: int) -> Images:
        """Neighbours in the numbers of this machine: from the file into place, without a copy between."""
        target = images.reshape(-1).view(np.uint8).data
        read = self._pool.pread_into(self._data, target, self._first_byte + first * self._image_bytes)
        if read < len(target):
            raise UserError(
                f"{self._data} is shorter than when it was opened: image {first + 1} and on cannot be read"
            )
        return images

    def _byte_order(self, header: bytes, notes: list[str]) -> str:
        stamp = header[212:214]
        if stamp in (b"\x44\x44", b"\x44\x41"):
            order = "<"
        elif stamp == b"\x11\x11":
            order = ">"
        else:
            order = "<" if self._plausible(header, "<") or not self._plausible(header, ">") else ">"
            notes.append(
                f"{self.path} has the machine stamp {stamp.hex(' ')}, which means nothing; by its sizes "
                "it is "
                f"{'little' if order == '<' else 'big'}-endian"
            )
        other = ">" if order == "<" else "<"
        if not self._plausible(header, order) and self._plausible(header, other):
            notes.append(f"{self.path} says the wrong byte order; it is read with the one that makes sense")
            return other
        return order

    @staticmethod
    def _plausible(header: bytes, order: str) -> bool:
        fields = _fields(header, order)
        nx, ny, nz, mode = (int(fields[name]) for name in ("nx", "ny", "nz", "mode"))
        return 0 < nx <= 1 << 20 and 0 < ny <= 1 << 20 and 0 < nz <= 1 << 30 and 0 <= mode <= 101


def _fields(header: bytes, order: str) -> np.void:
    """The header by the names of the standard."""
    found: np.void = np.frombuffer(header, HEADER_DTYPE.newbyteorder(order))[0]
    return found


def _pixel_size_A(fields: np.void) -> float:
    """Å, or NaN: 0 and 1.0 are what programs write that do not know."""
    n = int(fields["mx"]) if fields["mx"] > 0 else int(fields["nx"])
    size = float(fields["cella"]["x"]) / n
    if not math.isfinite(size) or size <= 0 or abs(size - 1.0) < 1e-6 or size > 1e4:
        return math.nan
    return float(np.float32(size))


class StackWriter:
    """Writes `n_images` square images one batch after the other into an open file, then the header."""

    def __init__(
        self, file: BinaryIO, n_images: int, box_px: int, pixel_size_A: float, dtype: str = "float32"
    ) -> None:
        self._file = file
        self._n, self._box = n_images, box_px
        self._pixel_size_A = pixel_size_A if math.isfinite(pixel_size_A) and pixel_size_A > 0 else 0.0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if self._dtype.itemsize not in (2, 4) or self._dtype.kind != "f":
            raise ValueError(f"MRC stacks are written as float32 or float16, not {dtype}")
        self._written = 0
        self._sum = self._sum_of_squares = 0.0
        self._least, self._largest = math.inf, -math.inf
        file.write(bytes(HEADER_BYTES))

    def write(self, images: NDArray[Any]) -> None:
        """Append `(k, n, n)`."""
        images = np.asarray(images)
        if images.ndim != 3 or images.shape[1:] != (self._box, self._box):
            raise ValueError(f"images of shape {images.shape} for a stack of {self._box} px")
        values = np.ascontiguousarray(images, dtype=self._dtype)
        self._file.write(values.data)
        self._written += len(values)
        if values.size:
            wide = values.astype(np.float64)
            self._sum += float(wide.sum())
            self._sum_of_squares += float(np.square(wide).sum())
            self._least = min(self._least, float(wide.min()))
            self._largest = max(self._largest, float(wide.max()))

    def finish(self) -> None:
        """Write the header: an image stack (ISPG 0, MZ 1) with statistics and pixel size."""
        if self._written != self._n:
            raise ValueError(f"{self._written} images written, {self._n} announced")
        n, box = self._n, self._box
        pixels = max(1, n * box * box)
        mean = self._sum / pixels
        deviation = math.sqrt(max(0.0, self._sum_of_squares / pixels - mean * mean))
        least, largest = (self._least, self._largest) if n else (0.0, -1.0)
        header = np.zeros((), HEADER_DTYPE)
        header["nx"] = header["ny"] = header["mx"] = header["my"] = box
        header["nz"], header["mz"] = n, 1
        header["mode"] = 2 if self._dtype.itemsize == 4 else 12
        header["cella"] = (box * self._pixel_size_A, box * self._pixel_size_A, self._pixel_size_A)
        header["cellb"] = (90, 90, 90)
        header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
        header["dmin"], header["dmax"], header["dmean"], header["rms"] = least, largest, mean, deviation
        header["nversion"], header["map"], header["machst"] = 20140, b"MAP ", (0x44, 0x44, 0, 0)
        header["nlabl"] = 1
        header["label"][0] = b"napari-particle-explorer"
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()


def write_stack(
    path: Path | str,
    images: NDArray[Any],
    pixel_size_A: float,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> None:
    """Write `(k, n, n)` images as an MRC image stack; pixel size in Å, NaN or 0 where unknown."""
    images = np.asarray(images)
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"a stack of images is (k, n, n), not {images.shape}")
    write_stack_in_batches(
        path, [images], len(images), images.shape[1], pixel_size_A, overwrite=overwrite, dtype=dtype
    )


def write_stack_in_batches(
    path: Path | str,
    batches: Iterable[NDArray[Any]],
    n_images: int,
    box_px: int,
    pixel_size_A: float,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> None:
    """`write_stack` for more images than memory holds: `batches` gives `(k, n, n)` one after the other."""
    with replacing(Path(path), overwrite=overwrite) as temporary, temporary.open("wb") as file:
        writer = StackWriter(file, n_images, box_px, pixel_size_A, dtype)
        for batch in batches:
            writer.write(batch)
        writer.finish()
