"""Averages side by side in one picture, each with its caption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QRectF, Qt
from qtpy.QtGui import QColor, QFont, QFontMetrics, QImage, QPainter

from particle_explorer.widgets.job_bar import number

TILE_PX = 168
"""Least side of one picture in the montage, so that its caption can be read."""
CAPTION_PX = 64
LONG = 8
"""Characters of a name that share a line with the number of particles."""


@dataclass(frozen=True)
class Montage:
    """Averages side by side with their captions burnt in."""

    pixels: NDArray[np.float32]
    """`(h, w)` or `(h, w, 3)`, 0 to 1"""
    columns: int
    tile: tuple[int, int]
    """height and width of one picture with its caption, in montage pixels"""

    def index_at(self, row: float, column: float) -> int:
        """The picture at a montage pixel."""
        return int(row // self.tile[0]) * self.columns + int(column // self.tile[1])


def caption_lines(one: dict[str, Any]) -> tuple[str, str]:
    """Class, number of particles, how it was judged, and how far the signal reaches."""
    radius, label = one.get("ssnr_radius_A"), str(one["label"])
    reach = "" if radius is None else f"SSNR {radius:.3g} Å"
    mark, count = str(one.get("mark", "")).upper(), f"N {number(one['n'])}"
    long = len(label) > LONG  # the number on the other line, or all would be written small
    lines = ((label, mark), (count, reach)) if long else ((label, count), (mark, reach))
    first, second = (" · ".join(word for word in line if word) for line in lines)
    return first, second


def montage(images: NDArray[np.floating], captions: list[tuple[str, str]]) -> Montage:
    """`(k, n, n)` or `(k, 3, n, n)` averages → one picture, each average with its own grey scale."""
    k, n = len(images), images.shape[-1]
    factor = max(1, math.ceil(TILE_PX / n))
    side = n * factor
    columns = max(1, math.ceil(math.sqrt(k)))
    rows = math.ceil(k / columns)
    tile = (side + CAPTION_PX, side + 4)
    colour = images.ndim == 4
    pixels = np.zeros((rows * tile[0], columns * tile[1], *((3,) if colour else ())), np.float32)
    made = Montage(pixels, columns, tile)
    for index, (image, lines) in enumerate(zip(images, captions, strict=True)):
        draw_tile(made, index, image, lines)
    return made


def draw_tile(made: Montage, index: int, image: NDArray[np.floating], lines: tuple[str, str]) -> None:
    """Draw one average `(n, n)` or `(3, n, n)` and its caption into its place."""
    row, column = divmod(index, made.columns)
    top, left, side = row * made.tile[0], column * made.tile[1], made.tile[1] - 4
    factor, colour = side // image.shape[-1], image.ndim == 3
    low, high = np.percentile(image, [0.5, 99.8])
    shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    shown = np.moveaxis(shown, 0, -1) if colour else shown
    made.pixels[top : top + side, left : left + side] = shown.repeat(factor, 0).repeat(factor, 1)
    words = written(lines, side, CAPTION_PX)
    made.pixels[top + side : top + made.tile[0], left : left + side] = words[..., None] if colour else words


def written(lines: tuple[str, str], width: int, height: int) -> NDArray[np.float32]:
    """Lines of text as a `(height, width)` picture, 0 to 1."""
    image = QImage(width, height, QImage.Format.Format_Grayscale8)
    image.fill(0)
    painter = QPainter(image)
    painter.setPen(QColor(255, 255, 255))
    # as large as fits: the montage is shown small, and a caption that cannot be read is none
    font, largest = QFont(), height * 7 // 16
    font.setPixelSize(largest)
    widest = max(1, *(QFontMetrics(font).horizontalAdvance(line) for line in lines))
    font.setPixelSize(max(6, min(largest, largest * (width - 4) // widest)))
    painter.setFont(font)
    for row, line in enumerate(lines):
        painter.drawText(QRectF(0, row * height / 2, width, height / 2), Qt.AlignmentFlag.AlignCenter, line)
    painter.end()
    bits = image.constBits()
    if hasattr(bits, "setsize"):  # PyQt gives a pointer without a length
        bits.setsize(image.sizeInBytes())
    data = np.frombuffer(bytes(bits), np.uint8).reshape(height, image.bytesPerLine())
    return data[:, :width].astype(np.float32) / np.float32(255)
