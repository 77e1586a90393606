"""Particles: one table row and one lazily read image each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from particle_explorer.files import UserError

Images = NDArray[np.float32]
Rows = NDArray[np.int64]


class StackFile(Protocol):
    """One file of equally sized images, read image by image."""

    @property
    def path(self) -> str:
        """Absolute path, or "" for images that exist only in memory."""

    @property
    def n_images(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, n, n) of every image."""

    @property
    def pixel_size_A(self) -> float:
        """Å by the file's own word, NaN where it does not say."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the file, one sentence each."""

    def read(self, indices: Rows) -> Images:
        """Images `indices` (0-based, any order) → `(k, c, n, n)` float32."""


class ImageStack:
    """N original images over many files, never loaded whole. Safe to read from several threads.

    Boxes may differ between files; what is read together must share one.
    """

    def __init__(self, files: Sequence[StackFile], file_index: ArrayLike, index_in_file: ArrayLike) -> None:
        self._files = list(files)
        self._file_index = np.asarray(file_index, dtype=np.int32)
        self._index_in_file = np.asarray(index_in_file, dtype=np.int64)
        if self._file_index.shape != self._index_in_file.shape or self._file_index.ndim != 1:
            raise ValueError("file_index and index_in_file must be one-dimensional and of one length")
        shapes = np.array([file.shape for file in self._files], dtype=np.int64).reshape(-1, 3)
        self._shapes = shapes[self._file_index]
        self._one_shape = not np.any(shapes != shapes[:1])
        counts = np.array([file.n_images for file in self._files], dtype=np.int64)
        if np.any(self._index_in_file < 0) or np.any(self._index_in_file >= counts[self._file_index]):
            raise ValueError("an image index lies outside its file")

    def __len__(self) -> int:
        return len(self._file_index)

    def __getitem__(self, row: int) -> Images:
        """One image, `(c, n, n)` float32."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} images")
        row = int(row) % len(self)
        return self._files[self._file_index[row]].read(self._index_in_file[row : row + 1])[0]

    def __iter__(self) -> Iterator[Images]:
        return (self[row] for row in range(len(self)))

    def __array__(self, *args: Any, **kwargs: Any) -> NDArray[Any]:
        raise TypeError("an ImageStack may be larger than memory; ask it for rows with read(rows)")

    def read(self, rows: ArrayLike) -> Images:
        """Images of `rows` (any order, repeats allowed; one box size) → `(k, c, n, n)` float32."""
        rows = self._rows(rows)
        if len(rows) == 0:
            shape = self._shapes[0] if len(self) else (1, 0, 0)
            return np.empty((0, *(int(side) for side in shape)), np.float32)
        if not self._one_shape:
            shapes = self._shapes[rows]
            if np.any(shapes != shapes[0]):
                boxes = ", ".join(str(box) for box in np.unique(shapes[:, 2]))
                raise ValueError(f"images of several shapes cannot be read together (boxes {boxes} px)")
        files, places = self._file_index[rows], self._index_in_file[rows]
        if len(self._files) == 1 or np.all(files == files[0]):
            return self._files[files[0]].read(places)
        images = np.empty((len(rows), *(int(side) for side in self._shapes[rows[0]])), np.float32)
        order = np.argsort(files, kind="stable")
        starts = np.flatnonzero(np.diff(files[order], prepend=-1))
        for chosen in np.split(order, starts[1:]):
            images[chosen] = self._files[files[chosen[0]]].read(places[chosen])
        return images

    def take(self, rows: ArrayLike) -> ImageStack:
        """The stack of `rows` (indices or boolean mask) over the same files; reads nothing."""
        rows = self._rows(rows)
        taken = ImageStack.__new__(ImageStack)
        taken._files = self._files
        taken._file_index = self._file_index[rows]
        taken._index_in_file = self._index_in_file[rows]
        taken._shapes = self._shapes[rows]
        taken._one_shape = self._one_shape
        return taken

    @property
    def box_px(self) -> Rows:
        """`(N,)` side of every image."""
        return self._shapes[:, 2]

    @property
    def n_channels(self) -> int:
        """Channels of the images; 1 for an empty stack."""
        return int(self._shapes[0, 0]) if len(self) else 1

    @property
    def paths(self) -> list[str]:
        """Absolute paths of the files used, each once; "" stands for images in memory."""
        return [self._files[i].path for i in np.unique(self._file_index)]

    def _rows(self, rows: ArrayLike) -> Rows:
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise ValueError(f"mask of {rows.shape} for {len(self)} images")
            return np.flatnonzero(rows)
        rows = np.atleast_1d(rows).astype(np.int64)
        if not len(rows):
            return rows
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < -len(self) or highest >= len(self):
            raise IndexError(f"rows outside 0 … {len(self) - 1}")
        return rows if lowest >= 0 else rows % len(self)


@dataclass(frozen=True)
class Particles:
    """What `io.read` gives: N images and their table, row by row.

    `table` is indexed by `uid` (uint64) and always has `stack_path` ("" for images in memory),
    `stack_index` (0-based), `source_row` (row in the source's particle table), `pixel_size_A` (NaN where
    unknown), `box_px`, `contrast_sign` (+1 particle bright, -1 dark, 0 the file does not say) and `ctf_state`
    ("none", "raw", "phase-flipped", "premultiplied"). Where they apply: `micrograph`, `optics_group`,
    `class_id`, the pose `angle_deg`, `shift_y_px`, `shift_x_px` (see `pose`; px of the original),
    `defocus_u_A`, `defocus_v_A`, `defocus_angle_deg`, `voltage_kV`, `spherical_aberration_mm`,
    `amplitude_contrast`, `phase_shift_deg`. The source's own columns stand beside them under their own names.
    """

    images: ImageStack
    table: pd.DataFrame
    source: Path
    kind: str
    """"star", "cs", "mrc", "npy", "npz", "spider", "imagic", "hdf", "tiff", "zarr", "pictures" or "layer\""""
    notes: tuple[str, ...] = ()
    """What the user should know of the source, one sentence each."""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.table):
            raise ValueError(f"{len(self.images)} images for {len(self.table)} rows")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: ArrayLike) -> Particles:
        """The particles of a boolean mask or of row numbers."""
        chosen = np.asarray(rows)
        return replace(self, images=self.images.take(chosen), table=self.table.iloc[chosen])


def random_subset(table: pd.DataFrame, n: int, by: str = "", seed: int = 0) -> Rows:
    """Rows of at most `n` particles taken at random, in their order; with a column `by`, of each of its
    values."""
    rng = np.random.default_rng(seed)
    if by and by not in table.columns:
        raise UserError(
            f'there is no column "{by}" to take particles by; there are {", ".join(table.columns)}'
        )
    groups = table.groupby(by, sort=False).indices.values() if by else [np.arange(len(table))]
    taken = [rng.choice(rows, min(n, len(rows)), replace=False) for rows in groups]
    return np.sort(np.concatenate(taken)).astype(np.int64) if taken else np.zeros(0, np.int64)


_CLAUSE = re.compile(
    r"""\s*(?P<column>`[^`]+`|[^\s=!<>]+)\s*(?P<op>==|!=|<=|>=|<|>)\s*(?P<value>"[^"]*"|'[^']*'|[^\s"']\S*)\s*"""
)
_AND = re.compile(r"and\s+", re.IGNORECASE)
_COMPARE: dict[str, Callable[..., Any]] = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}


def carries_angles(table: pd.DataFrame) -> bool:
    """Whether the file gives an angle in the plane to every particle.

    Files that were never aligned often carry the column with nothing but zeros in it.
    """
    angle = table.get("angle_deg")
    return angle is not None and bool(angle.notna().all() and angle.any())


def where_mask(table: pd.DataFrame, text: str) -> NDArray[np.bool_]:
    """Rows for which `COLUMN OP VALUE [and …]` holds → `(N,)` bool; an empty text takes every row.

    OP is one of `== != < <= > >=`. A value is a number or a text, quoted where it holds spaces; a column
    name with spaces stands in backquotes. Text columns know `==` and `!=` only.
    """
    mask = np.ones(len(table), bool)
    if not text.strip():
        return mask
    position = 0
    while True:
        match = _CLAUSE.match(text, position)
        if match is None:
            raise UserError(
                f'cannot read "{text[position:].strip()}" in the condition "{text}"; write COLUMN OP VALUE, '
                "for "
                f'instance "class_id == 3 and defocus_u_A < 20000", with one of == != < <= > >='
            )
        mask &= _clause_mask(table, match["column"].strip("`"), match["op"], match["value"])
        position = match.end()
        if position == len(text):
            return mask
        joint = _AND.match(text, position)
        if joint is None:
            raise UserError(f'expected "and" before "{text[position:]}" in the condition "{text}"')
        position = joint.end()


def _clause_mask(table: pd.DataFrame, name: str, op: str, value: str) -> NDArray[np.bool_]:
    if name in table.columns:
        column = table[name]
    elif name == table.index.name:
        column = table.index.to_series()
    else:
        known = ", ".join(map(str, table.columns))
        raise UserError(f'there is no column "{name}" to select by; there are {known}')
    quoted = value[0] in "\"'"
    wanted: Any = value[1:-1] if quoted else value
    if pd.api.types.is_bool_dtype(column):
        if str(wanted).lower() not in ("true", "false", "0", "1"):
            raise UserError(f'column "{name}" is true or false; "{wanted}" is neither')
        wanted = str(wanted).lower() in ("true", "1")
    elif pd.api.types.is_numeric_dtype(column):
        wanted = _number(wanted)
        if wanted is None:
            raise UserError(f'column "{name}" holds numbers; {value} is not one')
    elif op not in ("==", "!="):
        raise UserError(f'column "{name}" holds text, which can be compared by == and != only, not by {op}')
    else:
        column = column.astype(str)
    values = column.to_numpy()
    compare = _COMPARE[op]
    return np.asarray(compare(values, wanted), dtype=bool)


def _number(text: str) -> int | float | None:
    """An integer stays one: a uid above 2**53 would not survive a float."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def make_uids(names: Sequence[str]) -> NDArray[np.uint64]:
    """64-bit BLAKE2b of (name as written, how often it came before) → `(N,)` uint64, the same everywhere."""
    seen: dict[str, int] = {}
    digests = bytearray()
    blake2b = hashlib.blake2b
    for name in names:
        occurrence = seen.get(name, 0)
        seen[name] = occurrence + 1
        digests += blake2b(f"{name}\n{occurrence}".encode(errors="surrogateescape"), digest_size=8).digest()
    return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64)
