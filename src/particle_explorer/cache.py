"""The image cache of a session: `images.npy`, how it is made block by block, gone on with, and read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import TypeAdapter

from particle_explorer import __version__, preprocess
from particle_explorer.configs import PreprocessConfig
from particle_explorer.files import Stopped, UserError, replacing, stamp_of, write_json
from particle_explorer.particles import ImageStack

Mask = NDArray[np.bool_]
ProgressCallback = Callable[[str, float], None]

CACHE_HEADER_BYTES = 128
"""Of `images.npy`; numpy pads the header of any such shape to it."""
BLOCK_BYTES = 16 * 2**20
"""Originals preprocessed at once; two threads hold three such blocks at most. Memory of 32 MiB and more is
cleared by the system page by page for every block; of less than 8 MiB the overhead of a block is felt."""
PLAN: TypeAdapter[preprocess.Plan] = TypeAdapter(preprocess.Plan)


class CachedImages:
    """`images.npy` as an array `(N, c, m, m)` of float32 that is never loaded whole.

    Indexing reads just what is asked for, with `os.pread`, from any thread.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise UserError(f"{path} was not written by this package; delete it to have it made again")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if len(shape) != 4 or fortran or dtype != np.float16:
            raise UserError(f"{path} is not an image cache of ours; delete it to have it made again")
        self.shape: tuple[int, int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]))
        self._bytes = 2 * int(np.prod(self.shape[1:]))
        if path.stat().st_size != self._start + self._bytes * self.shape[0]:
            raise UserError(f"{path} is cut short; delete it to have it made again")
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of pixels of all images."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all images as they lie on disk."""
        return self._bytes * self.shape[0]

    def read(self, rows: Any) -> NDArray[np.float32]:
        """`(k,)` rows → `(k, c, m, m)` float32."""
        return self.read_raw(rows).astype(np.float32)

    def read_raw(self, rows: Any) -> NDArray[np.float16]:
        """`(k,)` rows → `(k, c, m, m)` float16, as on disk; neighbouring rows are read in one go."""
        rows = np.asarray(rows, np.intp).ravel()
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"row outside 0 … {self.shape[0] - 1}")
        out = np.empty((len(rows), *self.shape[1:]), np.float16)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if last > first:
                self._fill(out[first:last], int(rows[first]))
        return out

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if first is Ellipsis:
            first, rest = slice(None), (Ellipsis, *rest)
        if isinstance(first, (int, np.integer)):
            row = int(first) + (self.shape[0] if first < 0 else 0)
            images = self.read([row])[0]
            return images[rest] if rest else images
        if isinstance(first, slice):
            rows = np.arange(*first.indices(self.shape[0]))
        else:
            rows = np.asarray(first)
            rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        images = self.read(rows)
        return images[(slice(None), *rest)] if rest else images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("the images of a session are not loaded whole; index them, e.g. images[:100]")

    def _fill(self, out: NDArray[np.float16], row: int) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        offset, done = self._start + row * self._bytes, 0
        while done < len(view):
            if hasattr(os, "preadv"):
                n = os.preadv(self._descriptor, [view[done:]], offset + done)
            else:  # Windows has no positioned read
                with self._lock:
                    os.lseek(self._descriptor, offset + done, os.SEEK_SET)
                    data = os.read(self._descriptor, len(view) - done)
                n = len(data)
                view[done : done + n] = data
            if n == 0:
                raise UserError(f"{self.path} was cut short while it was read")
            done += n


class LeftOut(NamedTuple):
    """Rows that are not taken into a session, and why."""

    mask: Mask
    """`(N,)`"""
    notes: tuple[str, ...]


class Cache:
    """`images.npy` in the making. Rows are known to be good only when all have been read."""

    def __init__(self, path: Path, plan: preprocess.Plan, n_channels: int) -> None:
        self.path = path
        self.plan = plan
        self.image_shape = (n_channels, plan.cached_box_px, plan.cached_box_px)
        self._hash = ""
        self._digest = hashlib.blake2b(digest_size=16)
        self.unfinished = path.with_name(".images-unfinished.npy")
        self.journal = path.with_name(".images-unfinished.jsonl")

    def build(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        config: PreprocessConfig,
        progress: ProgressCallback | None,
        stop: threading.Event | None,
        key: str = "",
    ) -> LeftOut:
        """Prepare all images, write those that are good, and say which are not.

        With a `key` of all that decides the pixels, a preparation of the same key that was stopped or killed
        is gone on with.
        """
        n = len(table)
        bad, statistics = np.zeros(n, bool), np.full((n, 2), np.nan)
        with replacing(self.path) as temporary:
            temporary.unlink()  # its name is used at the end; until then a killed process leaves `unfinished`
            try:
                with self._opened(bad, statistics, key) as (file, journal, begun):
                    found = bad, statistics
                    self._prepare(images, table, config, file, journal, begun, found, progress, stop)
                    left_out = _left_out(table, bad, statistics, config)
                    if left_out.mask.all():
                        raise UserError(f"none of the {n} images can be used: {left_out.notes[0]}")
                    self._finish(file, ~left_out.mask)
                self.unfinished.replace(temporary)
            except BaseException as error:
                if not (isinstance(error, Stopped) and self.is_unfinished):
                    self.forget()
                raise
        self.forget()
        return left_out

    @property
    def is_unfinished(self) -> bool:
        """Whether an earlier preparation ended early and left something to go on with."""
        try:
            return self.journal.is_file() and self.unfinished.stat().st_size > CACHE_HEADER_BYTES
        except FileNotFoundError:
            return False

    def forget(self) -> None:
        """Remove what an earlier preparation has left."""
        self.journal.unlink(missing_ok=True)
        self.unfinished.unlink(missing_ok=True)

    def take_over(self, folder: Path, key: str) -> None:
        """Move what a dead process has prepared in `folder` here, if it was for the same images."""
        left = Cache(folder / self.path.name, self.plan, self.image_shape[0])
        if key and not self.journal.is_file() and left.is_unfinished and left._key() == key:
            left.unfinished.replace(self.unfinished)
            left.journal.replace(self.journal)

    def _key(self) -> str:
        with contextlib.suppress(OSError, ValueError, AttributeError), self.journal.open("rb") as file:
            return str(json.loads(file.readline()).get("key", ""))
        return ""

    @contextlib.contextmanager
    def _opened(
        self, bad: Mask, statistics: NDArray[np.float64], key: str
    ) -> Iterator[tuple[BinaryIO, BinaryIO | None, int]]:
        """The unfinished file at the first row to prepare, its journal (None without `key`), and that row.

        The journal has a line for every block that was written; blocks whose checksum is wrong and all after
        them are prepared again.
        """
        self._digest = hashlib.blake2b(_cache_header(len(bad), self.image_shape), digest_size=16)
        if not (key and self.is_unfinished and self._key() == key):
            self.forget()
        with self.unfinished.open("a+b"):
            pass
        with self.unfinished.open("r+b") as file, contextlib.ExitStack() as stack:
            if not key:
                file.write(bytes(CACHE_HEADER_BYTES))
                yield file, None, 0
                return
            journal = stack.enter_context(self.journal.open("a+b"))
            journal.seek(0)
            head = journal.readline() or json.dumps({"key": key}).encode() + b"\n"
            begun, end = 0, len(head)
            file.seek(CACHE_HEADER_BYTES)
            for line in journal:
                rows = self._rows_of(line, file, begun, bad, statistics)
                if not rows:
                    break
                begun, end = begun + rows, end + len(line)
            if not begun:
                journal.truncate(0)
                journal.write(head)
                file.truncate(0)
                file.write(bytes(CACHE_HEADER_BYTES))
            journal.truncate(end)
            file.seek(CACHE_HEADER_BYTES + begun * 2 * math.prod(self.image_shape))
            file.truncate()
            yield file, journal, begun

    def _rows_of(
        self, line: bytes, file: BinaryIO, begun: int, bad: Mask, statistics: NDArray[np.float64]
    ) -> int:
        """The rows that a line of the journal stands for, 0 where it or its block in `file` is damaged."""
        try:
            entry = json.loads(line)
            rows, crc, broken, numbers = (entry[name] for name in ("rows", "crc32", "bad", "statistics"))
            if not 0 < rows <= len(bad) - begun:
                return 0
            found = file.read(rows * 2 * math.prod(self.image_shape))
            if zlib.crc32(found) != crc or len(found) != rows * 2 * math.prod(self.image_shape):
                return 0
            bad[begun : begun + rows] = np.isin(np.arange(rows), broken)
            if numbers:
                statistics[begun : begun + rows] = numbers
        except (ValueError, KeyError, TypeError):
            return 0
        self._digest.update(found)
        return int(rows)

    def _prepare(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        config: PreprocessConfig,
        file: BinaryIO,
        journal: BinaryIO | None,
        begun: int,
        found: tuple[Mask, NDArray[np.float64]],
        progress: ProgressCallback | None,
        stop: threading.Event | None,
    ) -> None:
        """Prepare and write the rows from `begun` on, and enter each block into the journal."""
        n, done = len(table), begun
        bad, statistics = found
        for block in _preprocessed(images, table, self.plan, self.image_shape, config, begun):
            if stop is not None and stop.is_set():
                kept = f"{done} of {n} are kept, and the same again goes on from there"
                raise Stopped(
                    "stopped before all images were prepared; "
                    + (kept if journal is not None and done else "nothing was kept")
                )
            rows = slice(done, done + len(block.images))
            data = block.images.reshape(-1).view(np.uint8).data
            file.write(data)
            self._digest.update(data)
            bad[rows], statistics[rows] = block.bad, block.statistics
            done = rows.stop
            if journal is not None:
                file.flush()
                numbers = block.statistics.tolist() if config.outlier_sd else []
                entry = {
                    "rows": len(block.images),
                    "crc32": zlib.crc32(data),
                    "bad": np.flatnonzero(block.bad).tolist(),
                    "statistics": numbers,
                }
                journal.write(json.dumps(entry).encode() + b"\n")
                journal.flush()
            if progress is not None:
                progress("preparing images", done / n)

    def record(self, key: str, n: int) -> None:
        """Write `images.json`, by which the cache counts as whole."""
        shape = (n, *self.image_shape)
        content = {"key": key, "shape": shape, "dtype": "float16", "blake2b": self._hash}
        write_json(self.path.with_suffix(".json"), {**content, "stamp": stamp_of(self.path)})

    def _finish(self, file: BinaryIO, good: Mask) -> None:
        """Close the gaps that bad images leave, write the header, and take the hash on the way."""
        n_bytes = 2 * math.prod(self.image_shape)
        header = _cache_header(int(good.sum()), self.image_shape)
        if good.all():  # as it was written, and its hash taken on the way
            file.seek(0)
            file.write(header)
            self._hash = self._digest.hexdigest()
            return
        digest = hashlib.blake2b(header, digest_size=16)
        per_block = max(1, BLOCK_BYTES // n_bytes)
        written = 0
        for start in range(0, len(good), per_block):
            rows = good[start : start + per_block]
            file.seek(CACHE_HEADER_BYTES + start * n_bytes)
            block = np.frombuffer(file.read(len(rows) * n_bytes), np.uint8).reshape(len(rows), n_bytes)
            kept = block[rows].tobytes()
            digest.update(kept)
            if written != start or not rows.all():
                file.seek(CACHE_HEADER_BYTES + written * n_bytes)
                file.write(kept)
            written += int(rows.sum())
        file.truncate(CACHE_HEADER_BYTES + written * n_bytes)
        file.seek(0)
        file.write(header)
        self._hash = digest.hexdigest()


def inputs_key(table: pd.DataFrame, plan: preprocess.Plan, config: PreprocessConfig) -> str:
    """Hash of all that decides what is prepared, the times of the image files included; "" for images of no
    file, which may be others the next time."""
    codes, paths = pd.factorize(table["stack_path"])
    try:
        stamps = [[path, *stamp_of(Path(path))] for path in paths if path]
    except OSError:
        return ""
    if len(stamps) < len(paths):
        return ""
    chosen = [config.bad_images, config.outlier_sd > 0, BLOCK_BYTES, __version__]
    text = json.dumps([PLAN.dump_python(plan, mode="json"), chosen, stamps], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(codes.astype("<i8").tobytes())
    for name in ("stack_index", "box_px", "pixel_size_A", *preprocess.CTF_COLUMNS):
        if name in table:
            digest.update(name.encode() + table[name].to_numpy("<f8").tobytes())
    digest.update(",".join(table["ctf_state"]).encode())
    return digest.hexdigest()


def _cache_header(n: int, image_shape: tuple[int, ...]) -> bytes:
    """The first bytes of `images.npy`."""
    header = io.BytesIO()
    shape = (n, *image_shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    assert header.tell() == CACHE_HEADER_BYTES
    return header.getvalue()


def _left_out(
    table: pd.DataFrame, bad: Mask, statistics: NDArray[np.float64], config: PreprocessConfig
) -> LeftOut:
    notes = []
    if bad.any():
        notes.append(f"{_rows_in_words(table, bad)} blank or broken and left out")
    far = np.zeros(len(bad), bool)
    if config.outlier_sd:
        far = preprocess.outliers(np.where(bad[:, None], np.nan, statistics), config.outlier_sd) & ~bad
        if far.any():
            what = f"more than {config.outlier_sd:g} SD from the others in mean or contrast, and left out"
            notes.append(f"{_rows_in_words(table, far)} {what}")
    return LeftOut(bad | far, tuple(notes))


def _rows_in_words(table: pd.DataFrame, mask: Mask) -> str:
    """`3 images (rows 4, 17 and 80000 of the file) are`"""
    rows = [str(row + 1) for row in table["source_row"].to_numpy()[mask][:10]]
    n = int(mask.sum())
    if n == 1:
        return f"1 image (row {rows[0]} of the file) is"
    return f"{n} images (rows {', '.join(rows)}{' …' if n > len(rows) else ''} of the file) are"


class _Block(NamedTuple):
    images: NDArray[np.float16]
    """`(k, c, m, m)`; zeros where `bad`"""
    bad: Mask
    statistics: NDArray[np.float64]
    """`(k, 2)` mean and standard deviation of the originals, where outliers are looked for"""


def _preprocessed(
    images: ImageStack,
    table: pd.DataFrame,
    plan: preprocess.Plan,
    shape: tuple[int, ...],
    config: PreprocessConfig,
    begun: int = 0,
) -> Iterator[_Block]:
    """Blocks in the order of the rows from `begun` on, two of them worked on ahead of the one taken."""
    box_px = np.asarray(images.box_px)
    per_block = max(1, BLOCK_BYTES // (4 * shape[0] * int(box_px.max()) ** 2))
    starts = iter(range(begun, len(table), per_block))

    def work(start: int) -> _Block:
        rows = np.arange(start, min(start + per_block, len(table)))
        block = _Block(
            np.zeros((len(rows), *shape), np.float16), np.zeros(len(rows), bool), np.zeros((len(rows), 2))
        )
        for box in np.unique(box_px[rows]):  # an image stack is read one box size at a time
            at = np.flatnonzero(box_px[rows] == box)
            originals = images.read(rows[at])
            leave_out = config.bad_images == "leave-out"
            if leave_out and (bad := preprocess.bad_images(originals)).any():
                block.bad[at[bad]] = True
                at, originals = at[~bad], originals[~bad]
            if not len(at):
                continue
            if config.outlier_sd:
                block.statistics[at] = preprocess.statistics(originals)
            whole = len(at) == len(rows)
            of_them = table.iloc[start : start + len(rows)] if whole else table.iloc[rows[at]]
            some = preprocess.apply(originals, of_them, plan, known_good=leave_out)
            _check_range(some, of_them)
            block.images[at] = some
        return block

    with ThreadPoolExecutor(2) as pool:
        ahead: deque[Future[_Block]] = deque()
        try:
            for start in starts:
                ahead.append(pool.submit(work, start))
                if len(ahead) == 3:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _check_range(images: NDArray[np.float32], table: pd.DataFrame) -> None:
    bad = np.flatnonzero(np.abs(images).max(axis=(1, 2, 3)) > np.finfo(np.float16).max)
    if bad.size:
        row = table.iloc[bad[0]]
        raise UserError(
            f"image {int(row['stack_index']) + 1} of {row['stack_path'] or 'the layer'} has grey values too"
            " large for the cache (float16); use --preprocess.background ring"
        )
