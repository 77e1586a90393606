"""Averages side by side in one picture, each with its caption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QRectF, Qt
from qtpy.QtGui import QColor, QFont, QFontMetrics, QImage, QPainter
from scipy import ndimage

from particle_explorer.widgets.job_bar import number

TILE_PX = 168
"""Least side of one picture in the montage, so that its caption can be read."""
MANY_PX = 640
"""Side of a montage of many: shown much smaller than it is, letters lose their lines."""
CAPTION = 0.38
"""Height of a caption, as a share of its picture's side; of a name in the corner, a little less."""
MANY = 16
"""Of more pictures only the names are written, into their corners, where no particle is: all room is the
pictures', and the letters can be read although they are small."""
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


def caption_lines(one: dict[str, Any], among: int = 1) -> tuple[str, ...]:
    """Class, number of particles, how it was judged, and how far the signal reaches; of one among many only
    its class and how it was judged."""
    sign = {"good": " ✓", "bad": " ✗"}.get(str(one.get("mark", "")), "")
    label, count = f"{one['label']}{sign}", f"N {number(one['n'])}"
    if among > MANY:
        return (label,)
    radius = one.get("ssnr_radius_A")
    reach = "" if radius is None else f"SSNR {radius:.3g} Å"
    # the number on the other line, or all would be written small
    lines = ((label,), (count, reach)) if len(str(one["label"])) > LONG else ((label, count), (reach,))
    first, second = (" · ".join(word for word in line if word) for line in lines)
    return first, second


def montage(images: NDArray[np.floating], captions: list[tuple[str, ...]]) -> Montage:
    """`(k, n, n)` or `(k, 3, n, n)` averages → one picture, each average with its own grey scale."""
    k, n = len(images), images.shape[-1]
    columns = max(1, math.ceil(math.sqrt(k)))
    rows = math.ceil(k / columns)
    factor = max(1, math.ceil(min(TILE_PX, MANY_PX / columns) / n))
    side = n * factor
    below = 4 if k > MANY else round(CAPTION * side)
    tile = (side + below, side + 4)
    colour = images.ndim == 4
    pixels = np.zeros((rows * tile[0], columns * tile[1], *((3,) if colour else ())), np.float32)
    made = Montage(pixels, columns, tile)
    for index, (image, lines) in enumerate(zip(images, captions, strict=True)):
        draw_tile(made, index, image, lines)
    return made


def draw_tile(made: Montage, index: int, image: NDArray[np.floating], lines: tuple[str, ...]) -> None:
    """Draw one average `(n, n)` or `(3, n, n)` and its caption into its place."""
    row, column = divmod(index, made.columns)
    top, left, side = row * made.tile[0], column * made.tile[1], made.tile[1] - 4
    factor, colour = side // image.shape[-1], image.ndim == 3
    low, high = np.percentile(image, [0.5, 99.8])
    shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    shown = np.moveaxis(shown, 0, -1) if colour else shown
    made.pixels[top : top + side, left : left + side] = shown.repeat(factor, 0).repeat(factor, 1)
    below = made.tile[0] - side
    if len(lines) == 1:
        height = int(0.9 * CAPTION * side)
        words = written(lines, side, height, Qt.AlignmentFlag.AlignLeft)
        # the picture is dark around the letters
        around = ndimage.maximum_filter(words, max(3, height // 8))
        corner = made.pixels[top : top + height, left : left + side]
        words, around = (words[..., None], around[..., None]) if colour else (words, around)
        corner[:] = np.maximum(corner * (1 - around), words)
        return
    words = written(lines, side, below)
    made.pixels[top + side : top + made.tile[0], left : left + side] = words[..., None] if colour else words


def written(
    lines: tuple[str, ...],
    width: int,
    height: int,
    align: Qt.AlignmentFlag = Qt.AlignmentFlag.AlignCenter,
) -> NDArray[np.float32]:
    """Lines of text as a `(height, width)` picture, 0 to 1."""
    image = QImage(width, height, QImage.Format.Format_Grayscale8)
    image.fill(0)
    painter = QPainter(image)
    painter.setPen(QColor(255, 255, 255))
    # as large as fits: the montage is shown small, and a caption that cannot be read is none
    font, line_px = QFont(), height / len(lines)
    largest = int(line_px * 7 / 8)
    font.setPixelSize(largest)
    widest = max(1, *(QFontMetrics(font).horizontalAdvance(line) for line in lines))
    font.setPixelSize(max(6, min(largest, largest * (width - 4) // widest)))
    painter.setFont(font)
    for row, line in enumerate(lines):
        painter.drawText(QRectF(0, row * line_px, width, line_px), align, line)
    painter.end()
    bits = image.constBits()
    if hasattr(bits, "setsize"):  # PyQt gives a pointer without a length
        bits.setsize(image.sizeInBytes())
    data = np.frombuffer(bytes(bits), np.uint8).reshape(height, image.bytesPerLine())
    return data[:, :width].astype(np.float32) / np.float32(255)
