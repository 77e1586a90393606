"""cryoSPARC's compressed datasets: a header, a block of bytes for every field, then all texts.

After the mark stand the length of the header (u32, little-endian) and the header, JSON with `length` (rows),
`dtype` (name and NumPy type of every field, of vectors the shape too) and `compressed_fields`. A field is its
length (u32) and its values, for a compressed field as one bare block of LZ4. A field of texts (`|O`) holds
places (u64) in the rest of the file, where every text ends with a zero byte. A dataset without rows has no
blocks. (cryosparc-tools 5, `Dataset.stream`)
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from particle_explorer.files import UserError

MARK = b"\x95CSDAT"
_MOST_OUT_OF_ONE = 255
"""Bytes that a byte of an LZ4 block can stand for."""
_LONGEST_TEXT = 4096
"""Paths are not longer; a longer text is a damaged place."""


def load(path: Path, data: bytes) -> NDArray[Any]:
    """The records in `data`, the whole content of `path`; texts are bytes, as in the NumPy form."""
    try:
        names, columns = _columns(memoryview(data))
        types = [(name, column.dtype, column.shape[1:]) for name, column in zip(names, columns, strict=True)]
        records = np.empty(len(columns[0]), np.dtype(types))
    except (_Damaged, ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"{path} is a damaged cryoSPARC dataset: {error}") from error
    for name, column in zip(names, columns, strict=True):
        records[name] = column
    return records


class _Damaged(Exception):
    """What is wrong, in words."""


def _columns(data: memoryview) -> tuple[list[str], list[NDArray[Any]]]:
    at = len(MARK)
    header_bytes, at = _block(data, at, "header")
    header = json.loads(bytes(header_bytes))
    n = header["length"]
    if not isinstance(n, int) or n < 0 or not isinstance(header["dtype"], list) or not header["dtype"]:
        raise _Damaged("its header says neither its length nor its fields")
    compressed = set(header["compressed_fields"])
    names: list[str] = []
    columns: list[NDArray[Any]] = []
    texts: list[int] = []
    for name, kind, *rest in header["dtype"]:
        shape = tuple(int(side) for side in rest[0]) if rest else ()
        is_text = kind == "|O"
        dtype = np.dtype("<u8" if is_text else kind)
        if dtype.kind not in "biufc" or any(side < 0 for side in shape):
            raise _Damaged(f"its field {name} is of type {kind}")
        wanted = n * dtype.itemsize * math.prod(shape)
        block, at = _block(data, at, name) if n else (memoryview(b""), at)
        values = _inflated(block, wanted, name) if name in compressed and n else block
        if len(values) != wanted:
            raise _Damaged(f"its field {name} holds {len(values)} bytes instead of {wanted}")
        names.append(str(name))
        columns.append(np.frombuffer(values, dtype).reshape(n, *shape))
        if is_text:
            texts.append(len(names) - 1)
    heap = bytes(data[at:])
    for i in texts:
        columns[i] = _texts(columns[i], heap, names[i])
    return names, columns


def _block(data: memoryview, at: int, name: str) -> tuple[memoryview, int]:
    """The bytes whose length (u32) stands at `at`, and where they end."""
    (length,) = struct.unpack_from("<I", data, at)
    end = at + 4 + length
    if end > len(data):
        raise _Damaged(f"it ends within its field {name}")
    return data[at + 4 : end], end


def _inflated(block: memoryview, wanted: int, name: str) -> Any:
    if wanted > _MOST_OUT_OF_ONE * len(block):
        raise _Damaged(f"its field {name} is too short for its rows")
    try:
        return pa.Codec("lz4_raw").decompress(pa.py_buffer(block), wanted)
    except OSError as error:
        raise _Damaged(f"its field {name} cannot be unpacked") from error


def _texts(places: NDArray[Any], heap: bytes, name: str) -> NDArray[Any]:
    """`(n, …)` places → texts as bytes; each that is there is looked up once."""
    unique, inverse = np.unique(places, return_inverse=True)
    found = []
    for place in unique.tolist():
        end = heap.find(b"\0", place) if place < len(heap) else -1
        if end < 0 or end - place > _LONGEST_TEXT:
            raise _Damaged(f"its field {name} leads outside its texts")
        found.append(heap[place:end])
    return np.array(found or [b""], dtype=bytes)[inverse].reshape(places.shape)
