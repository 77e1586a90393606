"""STAR files whose text is kept: blocks, labels and numbers are found in it, and edits go back into it.

Re-printing a table changes its numbers, its quotes and its comments. Here a cell that nobody changed stays as
it was, to the letter. Files of a million rows are normal, so everything per row is numpy or pandas.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError

TEXT_LABELS = frozenset(
    "rlnImageName rlnMicrographName rlnMicrographNameNoDW rlnImageOriginalName rlnGroupName "
    "rlnOpticsGroupName "
    "rlnMtfFileName rlnReferenceImage rlnTomoName rlnTomoParticleName rlnParticleName rlnCtfImage "
    "rlnReconstructImageName rlnOddZernike rlnEvenZernike".split()
)
"""Labels whose values are text even where all of them look like numbers."""

_BLANK = np.zeros(256, bool)
_BLANK[[9, 11, 12, 13, 32]] = True
_TOKEN = re.compile(r"""'[^'\n]*'(?=\s|$)|"[^"\n]*"(?=\s|$)|#.*|[^\s#]\S*""")
_QUOTE_OR_COMMENT = re.compile(rb"""[ \t\r\n]['"#]""")
_CHUNK_ROWS = 100_000


@dataclass
class Block:
    """One `data_` block: either label-value pairs or a loop."""

    name: str
    """What follows `data_`."""
    is_loop: bool = False
    labels: list[str] = field(default_factory=list)
    """Without the leading underscore."""
    label_lines: list[int] = field(default_factory=list)
    row_lines: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Line of every row of a loop."""
    values: dict[str, str] = field(default_factory=dict)
    """Values of label-value pairs."""

    @property
    def n_rows(self) -> int:
        return len(self.row_lines) if self.is_loop else min(1, len(self.values))


class StarFile:
    """The text of a star file and where its blocks, labels and rows are. Lines count from 0 here."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.buffer = self.path.read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if b"\0" in self.buffer[:4096]:
            raise UserError(f"{self.path} is no star file: it holds binary data")
        if b"\n" not in self.buffer and b"\r" in self.buffer:
            raise UserError(
                f"{self.path} has the line ends of old Apple computers (CR); RELION reads LF, so convert it"
            )
        self._bytes = np.frombuffer(self.buffer, np.uint8)
        ends = np.flatnonzero(self._bytes == 10)
        if len(self.buffer) and (not len(ends) or ends[-1] != len(self.buffer) - 1):
            ends = np.append(ends, len(self.buffer))
        self._ends = ends.astype(np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), self._ends[:-1] + 1])[: len(ends)]
        self.encoding = "utf-8"
        if not self.buffer.isascii():
            try:
                # one bad byte in a comment must not stop anyone; Latin-1 maps every byte and back again
                self.buffer.decode("utf-8")
            except UnicodeDecodeError:
                self.encoding = "latin-1"
        self.blocks = self._find_blocks()

    @property
    def n_lines(self) -> int:
        return len(self._starts)

    def line(self, number: int) -> str:
        """Text of a line without its end."""
        return self.buffer[self._starts[number] : self._ends[number]].decode(self.encoding).rstrip("\r")

    def block(self, name: str) -> Block | None:
        return next((block for block in self.blocks if block.name == name), None)

    def table(self, block: Block, progress: Callable[[float], None] | None = None) -> pd.DataFrame:
        """The rows of a block: text for the labels known as text, numbers where a column holds only
        numbers. `progress` is told the share of a long table that is read."""
        if not block.is_loop:
            return _typed(pd.DataFrame({label: [value] for label, value in block.values.items()}, dtype=str))
        if not block.labels:
            raise UserError(f"{self.path}: the loop of block data_{block.name} has no labels")
        if block.n_rows == 0:
            return pd.DataFrame({label: pd.Series(dtype=str) for label in block.labels})
        if self.has_quotes(block):
            cells = [self.cells(int(line)) for line in block.row_lines]
            for line, found in zip(block.row_lines, cells, strict=True):
                if len(found) != len(block.labels):
                    raise self._wrong_count(block, int(line), len(found))
            return _typed(
                pd.DataFrame([[unquoted(c) for c in row] for row in cells], columns=block.labels, dtype=str)
            )
        self._check_counts(block)
        try:
            return self._numbers_and_text(block, progress or (lambda share: None))
        except (pd.errors.ParserError, ValueError, OverflowError) as error:
            raise UserError(f"{self.path}: the table data_{block.name} cannot be read: {error}") from error

    def _numbers_and_text(self, block: Block, tell: Callable[[float], None]) -> pd.DataFrame:
        """Block by block of rows: in one go, a million rows would hold up all other threads for a second."""
        lines = block.row_lines
        parts = []
        for first in range(0, block.n_rows, _CHUNK_ROWS):
            parts.append(self._parsed(block, lines[first : first + _CHUNK_ROWS]))
            tell(min(1.0, (first + _CHUNK_ROWS) / block.n_rows))
        if len(parts) == 1:
            return parts[0]
        for label in block.labels:
            kinds = {part[label].dtype for part in parts}
            if len(kinds) > 1 and not kinds <= {np.dtype(np.int64), np.dtype(np.float64)}:
                return self._parsed(block, lines)  # text that begins like numbers: it is text throughout
        return pd.concat(parts, ignore_index=True)

    def _parsed(self, block: Block, lines: NDArray[np.int64]) -> pd.DataFrame:
        return pd.read_csv(
            io.BytesIO(self._body(lines)),
            sep=r"\s+",
            header=None,
            names=block.labels,
            index_col=False,
            quoting=3,
            dtype={label: "str" for label in block.labels if label in TEXT_LABELS},
            keep_default_na=False,
            na_values={
                label: ["nan", "-nan", "NaN", "NAN"] for label in block.labels if label not in TEXT_LABELS
            },
            low_memory=False,
            encoding=self.encoding,
        )

    def has_quotes(self, block: Block) -> bool:
        """Whether any row holds a quoted value or a comment, so that white space alone does not part
        cells."""
        first, last = int(self._starts[block.row_lines[0]]), int(self._ends[block.row_lines[-1]])
        # looking for three bytes first is twenty times faster than the expression, and nearly always enough
        if all(self.buffer.find(mark, first, last) < 0 for mark in (b"'", b'"', b"#")):
            return False
        return _QUOTE_OR_COMMENT.search(b"\n" + self._body(block.row_lines)) is not None

    def line_bounds(self, lines: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte of some lines, and the byte after their last; line ends do not count."""
        begins, ends = self._starts[lines], self._ends[lines]
        return begins, ends - ((ends > begins) & (self._bytes[ends - 1] == ord("\r")))

    def cell_bounds(
        self, block: Block, rows: NDArray[np.int64], has_quotes: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the cells of some rows (ascending) begin and end in the buffer, `(rows, labels)` each."""
        n = len(block.labels)
        within = block.row_lines[rows[0] : rows[-1] + 1]
        if not has_quotes and len(within) == within[-1] - within[0] + 1:
            begins, ends = self._cell_edges(within)
            if len(begins) == n * len(within):
                return begins.reshape(-1, n)[rows - rows[0]], ends.reshape(-1, n)[rows - rows[0]]
        begins = np.empty((len(rows), n), np.int64)
        ends = np.empty((len(rows), n), np.int64)
        for row, line in enumerate(block.row_lines[rows].tolist()):
            text = self.line(line)
            spans = self.cell_spans(text)
            if len(spans) != n:
                raise self._wrong_count(block, line, len(spans))
            # counted in characters; the buffer counts bytes
            begins[row] = [self._starts[line] + len(text[:a].encode(self.encoding)) for _, a, _ in spans]
            ends[row] = [self._starts[line] + len(text[:b].encode(self.encoding)) for _, _, b in spans]
        return begins, ends

    def cells(self, line: int) -> list[str]:
        """The values of a row as they are written, quotes included, a comment left out."""
        return [cell for cell, _, _ in self.cell_spans(self.line(line))]

    @staticmethod
    def cell_spans(text: str) -> list[tuple[str, int, int]]:
        """(value as written, start, end) of every cell of a line."""
        spans = []
        for match in _TOKEN.finditer(text):
            if match[0].startswith("#"):
                break
            spans.append((match[0], match.start(), match.end()))
        return spans

    def _body(self, lines: NDArray[np.int64]) -> bytes:
        """The bytes of some rows; one copy where no comment or blank line lies between them."""
        if len(lines) == lines[-1] - lines[0] + 1:
            return self.buffer[self._starts[lines[0]] : self._ends[lines[-1]]]
        parts = np.split(lines, np.flatnonzero(np.diff(lines) > 1) + 1)
        return b"\n".join(self.buffer[self._starts[part[0]] : self._ends[part[-1]]] for part in parts)

    def _check_counts(self, block: Block) -> None:
        """Every row has as many values as there are labels; pandas would fill or drop silently."""
        n = len(block.labels)
        for first in range(0, block.n_rows, _CHUNK_ROWS):
            lines = block.row_lines[first : first + _CHUNK_ROWS]
            begins, at = self._starts[lines], self._cell_edges(lines)[0]
            if len(at) == n * len(lines):
                by_row = at.reshape(len(lines), n)
                if np.all(by_row[:, 0] >= begins) and np.all(by_row[:, -1] < self._ends[lines]):
                    continue
            counts = np.searchsorted(at, self._ends[lines]) - np.searchsorted(at, begins)
            wrong = np.flatnonzero(counts != n)
            if len(wrong):
                raise self._wrong_count(block, int(lines[wrong[0]]), int(counts[wrong[0]]))

    def _cell_edges(self, lines: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the cells of unquoted rows begin and end, from the first of `lines` to the last."""
        first, last = int(self._starts[lines[0]]), int(self._ends[lines[-1]])
        filled = np.zeros(last - first + 2, bool)
        filled[1:-1] = self._bytes[first:last] > 32
        edges = np.flatnonzero(filled[1:] != filled[:-1]) + first
        return edges[::2], edges[1::2]

    def _wrong_count(self, block: Block, line: int, found: int) -> UserError:
        return UserError(
            f"{self.path}, line {line + 1}: {found} values, but block data_{block.name} has "
            f"{len(block.labels)} columns"
        )

    def _find_blocks(self) -> list[Block]:
        # the first character of every line that is not white; the loop runs as often as the deepest indent
        position = self._starts.copy()
        indented = np.flatnonzero(position < self._ends)
        while len(indented):
            indented = indented[_BLANK[self._bytes[position[indented]]]]
            position[indented] += 1
            indented = indented[position[indented] < self._ends[indented]]
        blank = position >= self._ends
        first = np.zeros(self.n_lines, np.uint8)
        first[~blank] = self._bytes[position[~blank]]
        comment = first == ord("#")
        marked = (first == ord("_")) | (first == ord(";"))
        for word in (b"data_", b"loop_"):
            upper = word.upper()
            like = np.flatnonzero(np.isin(first, [word[0], upper[0]]) & (self._ends - position >= len(word)))
            for offset in range(1, len(word)):
                like = like[np.isin(self._bytes[position[like] + offset], [word[offset], upper[offset]])]
            marked[like] = True
        plain = np.flatnonzero(~(blank | comment | marked))

        blocks: list[Block] = []
        special = np.flatnonzero(marked)
        n_plain_before = np.searchsorted(plain, special)
        upto = np.append(n_plain_before[1:], len(plain))[: len(special)]
        if len(plain) and (not len(special) or n_plain_before[0] > 0):
            raise UserError(
                f"{self.path} is no star file: line {int(plain[0]) + 1} comes before any data_ block"
            )
        for line, begin, end in zip(special.tolist(), n_plain_before.tolist(), upto.tolist(), strict=True):
            self._take(blocks, line, plain[begin:end])
        return blocks

    def _take(self, blocks: list[Block], line: int, rows: NDArray[np.int64]) -> None:
        """Add a line of structure, and the plain lines that follow it up to the next one, to the last
        block."""
        text = self.line(line).strip()
        word = text.split(None, 1)[0]
        block = blocks[-1] if blocks else None
        loop_without_labels = False
        if word.lower().startswith("data_"):
            if (
                block is not None
                and block.is_loop
                and len(block.labels) > 1
                and len(self.cells(line)) == len(block.labels)
            ):
                # a row whose first value merely begins like a block, such as data_set1/stack.mrcs
                block.row_lines = np.concatenate([block.row_lines, [line], rows])
                return
            blocks.append(Block(word[5:]))
        elif block is None:
            raise UserError(f"{self.path} is no star file: line {line + 1} comes before any data_ block")
        elif word.lower() == "loop_":
            if block.labels or block.values:
                raise UserError(f"{self.path}, line {line + 1}: block data_{block.name} holds a second table")
            block.is_loop = loop_without_labels = True
        elif text.startswith(";"):
            raise UserError(
                f"{self.path}, line {line + 1}: text over several lines (;) is not understood here"
            )
        elif block.is_loop and not len(block.row_lines):
            label = word[1:]
            if label in block.labels:
                raise UserError(
                    f"{self.path}, line {line + 1}: the label _{label} stands twice in data_{block.name}"
                )
            block.labels.append(label)
            block.label_lines.append(line)
        elif block.is_loop:
            raise UserError(
                f"{self.path}, line {line + 1}: the label {word} stands after the rows of data_{block.name}"
            )
        else:
            cells = self.cells(line)
            if len(cells) != 2:
                raise UserError(
                    f"{self.path}, line {line + 1}: expected a label and one value, found {len(cells)} words"
                )
            block.values[word[1:]] = unquoted(cells[1])
        if not len(rows):
            return
        block = blocks[-1]
        if not block.is_loop or loop_without_labels:
            raise UserError(f"{self.path}, line {int(rows[0]) + 1}: values outside of a loop with labels")
        block.row_lines = rows


def unquoted(cell: str) -> str:
    """The value without its quotes."""
    if len(cell) >= 2 and cell[0] in "\"'" and cell[-1] == cell[0]:
        return cell[1:-1]
    return cell


def quoted(value: str) -> str:
    """As it must be written in a star file: quoted where it is empty, holds white space or begins like a
    mark."""
    if value and not re.search(r"\s", value) and value[0] not in "\"'#_;":
        return value
    if "\n" in value or ('"' in value and "'" in value):
        raise UserError(f"the text {value!r} cannot be written into a star file")
    return f'"{value}"' if '"' not in value else f"'{value}'"


def format_block(name: str, table: pd.DataFrame, formats: dict[str, str] | None = None) -> str:
    """A loop as RELION writes it, with labels from the columns; `formats` are %-formats per column."""
    lines = ["", "# version 30001", "", f"data_{name}", "", "loop_ "]
    lines += [f"_{label} #{number}" for number, label in enumerate(table.columns, 1)]
    columns = [_cells(table[label], (formats or {}).get(str(label))) for label in table.columns]
    lines += [" ".join(row) for row in zip(*columns, strict=True)]
    return "\n".join(lines) + "\n\n"


def _cells(column: pd.Series, form: str | None) -> list[str]:
    if form is not None:
        return [form % value for value in column.tolist()]
    if pd.api.types.is_integer_dtype(column):
        return [str(value) for value in column.tolist()]
    if pd.api.types.is_float_dtype(column):
        return [f"{value:.6f}" for value in column.tolist()]
    return [quoted(value) for value in column.astype(str).tolist()]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of numbers as numbers, by the rules of the fast path."""
    for label in table.columns:
        if label in TEXT_LABELS:
            continue
        numbers = pd.to_numeric(table[label], errors="coerce")
        text = table[label].str.lower()
        if bool((numbers.notna() | text.isin(["nan", "-nan"])).all()):
            table[label] = numbers
    return table


def numbers(table: pd.DataFrame, label: str, where: Path | str) -> NDArray[np.float64]:
    """A column as float64; a value that is not a number is a `UserError` with its row."""
    column = table[label]
    if not pd.api.types.is_numeric_dtype(column):
        values = pd.to_numeric(column, errors="coerce")
        bad = np.flatnonzero(
            values.isna().to_numpy() & ~column.astype(str).str.lower().isin(["nan", "-nan"]).to_numpy()
        )
        if len(bad):
            raise UserError(
                f'{where}, row {int(bad[0]) + 1}: {label} is "{column.iloc[int(bad[0])]}", which is not a '
                "number"
            )
        column = values
    found = column.to_numpy(dtype=np.float64, na_value=np.nan)
    endless = np.flatnonzero(np.isinf(found))
    if len(endless):
        raise UserError(f"{where}, row {int(endless[0]) + 1}: {label} is infinite")
    return found


def names_of(labels: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of `wanted` that are there."""
    return [label for label in wanted if label in labels]
