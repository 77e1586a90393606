"""Small painted widgets: curves and rows of pictures. Plain Qt painting, so they float and undock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPointF, QRectF, QSize, Qt, Signal
from qtpy.QtGui import QColor, QImage, QMouseEvent, QPainter, QPaintEvent, QPalette, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

# Okabe and Ito's colours, told apart by everybody, without black
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")


def grey(
    images: NDArray[np.floating], low: float | None = None, high: float | None = None
) -> NDArray[np.uint8]:
    """`(..., n, n)` to 8 bit between two grey values; by default percentiles of each image."""
    images = np.asarray(images, np.float32)
    if low is None or high is None:
        low_, high_ = np.percentile(images, [1, 99.5], axis=(-2, -1), keepdims=True)
    else:
        low_, high_ = np.float32(low), np.float32(high)
    span = np.maximum(high_ - low_, np.finfo(np.float32).tiny)
    return (np.clip((images - low_) / span, 0, 1) * 255).astype(np.uint8)


def to_qimage(pixels: NDArray[np.uint8]) -> QImage:
    """`(h, w)` grey or `(h, w, 3)` colour to a QImage that owns its memory."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    if pixels.ndim == 2:
        return QImage(pixels.data, width, height, width, QImage.Format.Format_Grayscale8).copy()
    return QImage(pixels.data, width, height, 3 * width, QImage.Format.Format_RGB888).copy()


class ImageRows(QWidget):
    """Rows of small square pictures with a word beside each row, as wide as there is room."""

    clicked = Signal(int, int)
    """row and column of the picture clicked"""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._rows: list[tuple[str, list[QImage]]] = []
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def set_rows(self, rows: Sequence[tuple[str, NDArray[np.floating]]]) -> None:
        """Each row: a word and `(k, n, n)` or `(k, 3, n, n)` images, stretched for contrast one by one."""
        self._rows = [(word, [to_qimage(_shown(image)) for image in images]) for word, images in rows]
        self.setFixedHeight(self.sizeHint().height())
        self.updateGeometry()
        self.update()

    def clear(self) -> None:
        self.set_rows([])

    @property
    def n_images(self) -> int:
        return sum(len(images) for _, images in self._rows)

    def sizeHint(self) -> QSize:
        side, words = self._side(max(self.width(), 280))
        height = 0 if not self._rows else len(self._rows) * (side + words + 4)
        return QSize(280, height)

    def resizeEvent(self, event: object) -> None:
        self.setFixedHeight(self.sizeHint().height())

    def _side(self, width: int) -> tuple[int, int]:
        longest = max((len(images) for _, images in self._rows), default=1) or 1
        return min(72, (width - 2 * (longest - 1)) // longest), self.fontMetrics().height() + 1

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        side, words = self._side(self.width())
        row, rest = divmod(int(event.position().y()), side + words + 4)
        column = int(event.position().x()) // (side + 2)
        if rest >= words and row < len(self._rows) and column < len(self._rows[row][1]):
            self.clicked.emit(row, column)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        side, words = self._side(self.width())
        painter.setPen(self.palette().color(QPalette.ColorRole.WindowText))
        top = 0
        for word, images in self._rows:
            painter.drawText(QRectF(0, top, self.width(), words), Qt.AlignmentFlag.AlignLeft, word)
            for column, image in enumerate(images):
                painter.drawImage(QRectF(column * (side + 2), top + words, side, side), image)
            top += side + words + 4


def _shown(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    if image.ndim == 3 and image.shape[0] == 3:
        return np.ascontiguousarray(np.moveaxis(grey(image, float(image.min()), float(image.max())), 0, -1))
    return grey(image[0] if image.ndim == 3 else image)


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    name: str
    x: NDArray[np.floating]
    y: NDArray[np.floating]
    dashed: bool = False
    faint: bool = False
    """In the colour of the curve before it, thinner"""


class CurveView(QWidget):
    """A few curves on one pair of axes, with the words and units that belong to them."""

    def __init__(
        self,
        parent: QWidget | None = None,
        *,
        x_label: str = "",
        title: str = "",
        empty: str = "",
        height: int = 130,
    ) -> None:
        super().__init__(parent)
        self.x_label, self.title, self.empty = x_label, title, empty
        self.curves: list[Curve] = []
        self.y_range: tuple[float, float] | None = None
        self.levels: tuple[float, ...] = ()
        self.x_as_period = self.log_y = False
        self.setMinimumHeight(height)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)

    def set_curves(
        self,
        curves: Sequence[Curve],
        *,
        y_range: tuple[float, float] | None = None,
        levels: tuple[float, ...] = (),
        x_as_period: bool = False,
        log_y: bool = False,
    ) -> None:
        """Show these curves; `levels` are horizontal lines; `x_as_period` writes x as 1/x (Å from 1/Å).

        With `log_y` the axis is logarithmic; what is not above 0 is left out.
        """
        self.log_y = log_y
        if log_y:
            curves = [replace(curve, y=_log10(curve.y)) for curve in curves]
            y_range = None
        self.curves, self.y_range, self.levels, self.x_as_period = list(curves), y_range, levels, x_as_period
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(300, self.minimumHeight())

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().color(QPalette.ColorRole.WindowText)
        faint = QColor(text)
        faint.setAlphaF(0.3)
        line = self.fontMetrics().height()
        painter.setPen(text)
        painter.drawText(QRectF(0, 0, self.width(), line), Qt.AlignmentFlag.AlignLeft, self.title)
        shown = [curve for curve in self.curves if np.isfinite(curve.y).any()]
        if not shown:
            painter.drawText(QRectF(self.rect()), Qt.AlignmentFlag.AlignCenter, self.empty)
            return
        low, high = self.y_range or _limits([curve.y for curve in shown])
        if not high > low:  # a curve of one value
            low, high = low - 0.5, high + 0.5
        left, right = _limits([curve.x for curve in shown])
        ends = {v: _number(10**v if self.log_y else v) for v in (low, high)}
        margin = max(self.fontMetrics().horizontalAdvance(words) for words in ends.values()) + 8
        named = sum(bool(curve.name) for curve in shown) > 1
        box = QRectF(margin, line + 6 + line * named, self.width() - margin - 8, 0)
        box.setBottom(self.height() - 2 * line - 4)
        to_x = box.width() / (right - left)
        to_y = box.height() / (high - low)

        painter.setPen(QPen(faint, 1))
        painter.drawRect(box)
        for level in self.levels:
            y = box.bottom() - (level - low) * to_y
            painter.drawLine(QPointF(box.left(), y), QPointF(box.right(), y))
        painter.setPen(text)
        for value, y in ((high, box.top()), (low, box.bottom())):
            painter.drawText(
                QRectF(0, y - line / 2, margin - 4, line), Qt.AlignmentFlag.AlignRight, ends[value]
            )
        for fraction, align in ((0.0, "AlignLeft"), (0.5, "AlignHCenter"), (1.0, "AlignRight")):
            value = left + fraction * (right - left)
            words = ("∞" if value <= 0 else _number(1 / value)) if self.x_as_period else _number(value)
            painter.drawText(
                QRectF(box.left(), box.bottom() + 1, box.width(), line),
                getattr(Qt.AlignmentFlag, align),
                words,
            )
        painter.drawText(
            QRectF(box.left(), self.height() - line, box.width(), line),
            Qt.AlignmentFlag.AlignHCenter,
            self.x_label,
        )
        across = box.left()
        painter.setClipRect(QRectF(0, 0, self.width(), self.height()))
        colours = iter(COLOURS * (1 + len(shown) // len(COLOURS)))
        colour = COLOURS[0]
        for curve in shown:
            colour = colour if curve.faint else next(colours)
            tone = QColor(colour)
            tone.setAlphaF(0.35 if curve.faint else 1.0)
            pen = QPen(tone, 1.0 if curve.faint else 1.6)
            if curve.dashed:
                pen.setStyle(Qt.PenStyle.DashLine)
            painter.setPen(pen)
            if named and curve.name:
                words = curve.name
                painter.drawText(QPointF(across, 2 * line), words)
                across += self.fontMetrics().horizontalAdvance(words) + 12
            good = np.isfinite(curve.x) & np.isfinite(curve.y)
            xs = box.left() + (curve.x[good] - left) * to_x
            ys = np.clip(box.bottom() - (curve.y[good] - low) * to_y, box.top(), box.bottom())
            points = QPolygonF([QPointF(float(x), float(y)) for x, y in zip(xs, ys, strict=True)])
            if len(points) == 1:
                painter.drawEllipse(points[0], 2.0, 2.0)
            painter.drawPolyline(points)


def _log10(values: NDArray[np.floating]) -> NDArray[np.floating]:
    positive = np.where(values > 0, values, np.nan)
    return np.asarray(np.log10(positive))


def _limits(values: Sequence[NDArray[np.floating]]) -> tuple[float, float]:
    joined = np.concatenate([np.ravel(v) for v in values])
    joined = joined[np.isfinite(joined)]
    low, high = float(joined.min()), float(joined.max())
    if high <= low:
        pad = abs(low) * 0.01 or 0.5
        return low - pad, high + pad
    return low, high


def _number(value: float) -> str:
    return f"{value:.4g}"
