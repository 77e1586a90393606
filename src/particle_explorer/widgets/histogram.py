"""The histogram of the colour column: handles set the range of the colours, a brush or numbers select."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPointF, QRectF, QSize, Qt, Signal
from qtpy.QtGui import QColor, QFontMetricsF, QMouseEvent, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QHBoxLayout, QLabel, QLineEdit, QSizePolicy, QToolButton, QVBoxLayout, QWidget

from particle_explorer.state import Mask
from particle_explorer.widgets.colours import Colouring, number
from particle_explorer.widgets.plot_frame import LOOKS, Look

N_BINS = 60
SAMPLE = 200_000
"""Values that decide how far the histogram reaches; all are counted."""
REACH_PX = 6.0
"""How near a handle has to be taken."""


class Counts(NamedTuple):
    """How many particles have which value."""

    edges: NDArray[np.float64]
    """`(k + 1,)`; of categories, whole numbers half a step off"""
    n: NDArray[np.int64]
    """`(k,)`"""
    selected: NDArray[np.int64]
    """`(k,)` of them are selected"""
    bin: NDArray[np.int16]
    """`(N,)` bin of every particle, -1 for those without a value"""


def count(colouring: Colouring, mask: Mask) -> Counts:
    """Count the values of a column; values beyond the ends are in the bins at the ends. A thread's work."""
    if colouring.kind == "category":
        k = len(colouring.labels)
        edges = np.arange(k + 1, dtype=np.float64) - 0.5
        level = colouring.level.astype(np.int32)
        index = np.where(level < k, level, -1).astype(np.int16)
    else:
        assert colouring.values is not None
        values = np.asarray(colouring.values, float)
        low, high = -180.0, 180.0
        if colouring.kind == "cyclic":
            values = np.mod(values + 180.0, 360.0) - 180.0
        else:
            sample = values[:: max(1, values.size // SAMPLE)]
            sample = sample[np.isfinite(sample)]
            low, high = (
                (float(v) for v in np.percentile(sample, (0.02, 99.98))) if sample.size else (0.0, 1.0)
            )
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        edges = np.linspace(low, high, N_BINS + 1)
        known = np.isfinite(values)
        share = np.where(known, (values - low) * (N_BINS / (high - low)), 0.0)
        index = np.where(known, np.clip(share, 0, N_BINS - 1), -1).astype(np.int16)
        k = N_BINS
    return Counts(edges, _per_bin(index, k), _per_bin(index[mask], k), index)


def recount(counts: Counts, mask: Mask) -> Counts:
    """The same values with another selection."""
    return counts._replace(selected=_per_bin(counts.bin[mask], counts.n.size))


def _per_bin(index: NDArray[np.int16], k: int) -> NDArray[np.int64]:
    return np.bincount(index.astype(np.int32) + 1, minlength=k + 1)[1 : k + 1]


def within(colouring: Colouring, low: float, high: float) -> Mask:
    """`(N,)` particles whose value lies from `low` to `high`, ends included.

    Of angles, `low` above `high` means the way round over ±180°; of categories the numbers are positions in
    `labels`.
    """
    if colouring.kind == "category":
        level = colouring.level
        return np.asarray(
            (level >= math.ceil(low)) & (level <= math.floor(high)) & (level < len(colouring.lut))
        )
    assert colouring.values is not None
    values = np.asarray(colouring.values, float)
    if colouring.kind != "cyclic":
        return np.asarray((values >= low) & (values <= high))
    turned = np.mod(values + 180.0, 360.0) - 180.0
    if low <= high:
        return np.asarray((turned >= low) & (turned <= high))
    return np.asarray((turned >= low) | (turned <= high))


class Histogram(QWidget):
    """Bars in the colours of the map; what is selected stands out in each."""

    brushing = Signal(float, float, object)
    """lowest and highest value of what is being brushed over, and the keys held down"""
    brushed = Signal(float, float, object)
    """the same, when the hand lets go"""
    limits_moved = Signal(float, float)
    """range of the colours, while a handle is moved"""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.look: Look = LOOKS["dark"]
        self.counts: Counts | None = None
        self.colouring: Colouring | None = None
        self._drag: Literal["", "brush", "low", "high"] = ""
        self._brush: tuple[float, float] | None = None
        self.setMouseTracking(True)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setFixedHeight(72)
        self.setAccessibleName("Histogram of the colour column")
        self.setToolTip(
            "Brush over values to select the particles that have them\n"
            "(Shift adds, Alt or Ctrl takes away).\n"
            "The two handles below set the range of the colours."
        )

    def sizeHint(self) -> QSize:
        return QSize(380, 72)

    def show_counts(self, counts: Counts | None, colouring: Colouring | None) -> None:
        self.counts, self.colouring = counts, colouring
        self.update()

    @property
    def has_handles(self) -> bool:
        """Categories and angles have colours of their own, without a range."""
        return self.colouring is not None and self.colouring.kind == "continuous"

    # geometry

    def plot(self) -> QRectF:
        line = QFontMetricsF(self.font()).height()
        return QRectF(8, 2, max(self.width() - 16.0, 10.0), max(self.height() - line - 11.0, 10.0))

    def to_x(self, value: float) -> float:
        """Value → pixels."""
        assert self.counts is not None
        plot, edges = self.plot(), self.counts.edges
        share = (value - edges[0]) / (edges[-1] - edges[0])
        return float(plot.left() + np.clip(share, 0, 1) * plot.width())

    def to_value(self, x: float) -> float:
        """Pixels → value."""
        assert self.counts is not None
        plot, edges = self.plot(), self.counts.edges
        share = min(max((x - plot.left()) / plot.width(), 0.0), 1.0)
        return float(edges[0] + share * (edges[-1] - edges[0]))

    # painting

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        try:
            self._paint(painter)
        finally:
            painter.end()

    def _paint(self, painter: QPainter) -> None:
        plot, look = self.plot(), self.look
        painter.fillRect(plot, QColor(look.plot))
        if self.counts is None or self.colouring is None or not self.counts.n.size:
            painter.setPen(QColor(look.text))
            words = "Choose a column to colour by: its histogram appears here."
            painter.drawText(QRectF(self.rect()), Qt.AlignmentFlag.AlignCenter, words)
            return
        counts, colouring = self.counts, self.colouring
        top = max(int(counts.n.max()), 1)
        some = bool(counts.selected.any())
        ring = QColor(look.ring)
        for i, (n, mine) in enumerate(zip(counts.n, counts.selected, strict=True)):
            left, right = self.to_x(counts.edges[i]), self.to_x(counts.edges[i + 1])
            gap = 0.0 if colouring.kind != "category" else min(1.5, (right - left) / 6)
            height = plot.height() * float(n) / top
            bar = QRectF(left + gap, plot.bottom() - height, right - left - 2 * gap, height)
            colour = self._colour(i)
            if some:
                colour.setAlphaF(0.35)
            painter.fillRect(bar, colour)
            if mine:
                height = plot.height() * float(mine) / top
                part = QRectF(bar.left(), plot.bottom() - height, bar.width(), height)
                painter.fillRect(part, self._colour(i))
                painter.fillRect(QRectF(part.left(), part.top() - 1, part.width(), 1.5), ring)
        if self._brush is not None:
            a, b = sorted(self.to_x(value) for value in self._brush)
            ring.setAlpha(70)
            painter.fillRect(QRectF(a, plot.top(), max(b - a, 1.0), plot.height()), ring)
        self._paint_foot(painter, plot)

    def _colour(self, i: int) -> QColor:
        counts, colouring = self.counts, self.colouring
        assert counts is not None and colouring is not None
        lut = colouring.lut
        if colouring.kind == "category":
            level = i
        else:
            middle = (counts.edges[i] + counts.edges[i + 1]) / 2
            share = (middle - colouring.low) / (colouring.high - colouring.low)
            level = int(np.clip(share * (len(lut) - 1), 0, len(lut) - 1))
        return QColor(*(int(value) for value in lut[min(level, len(lut) - 1)]))

    def _paint_foot(self, painter: QPainter, plot: QRectF) -> None:
        counts, colouring, look = self.counts, self.colouring, self.look
        assert counts is not None and colouring is not None
        metrics = QFontMetricsF(self.font())
        foot = QRectF(plot.left(), plot.bottom() + 8, plot.width(), metrics.height())
        painter.setPen(QColor(look.text))
        if colouring.kind == "category":
            words = f"{len(colouring.labels)} groups; click or brush to select"
            painter.drawText(foot, Qt.AlignmentFlag.AlignCenter, words)
            return
        step = (counts.edges[-1] - counts.edges[0]) / 100
        low, high = (number(float(counts.edges[i]), step=step) for i in (0, -1))
        painter.drawText(foot, Qt.AlignmentFlag.AlignLeft, low)
        painter.drawText(foot, Qt.AlignmentFlag.AlignRight, high)
        painter.drawText(
            foot,
            Qt.AlignmentFlag.AlignHCenter,
            metrics.elidedText(colouring.title, Qt.TextElideMode.ElideRight, plot.width() * 0.6),
        )
        if not self.has_handles:
            return
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(QPen(QColor(look.background), 1))
        painter.setBrush(QColor(look.accent))
        for value in (colouring.low, colouring.high):
            x, y = self.to_x(value), plot.bottom()
            corners = [QPointF(x, y), QPointF(x - 5, y + 9), QPointF(x + 5, y + 9)]
            painter.drawPolygon(QPolygonF(corners))
        painter.setRenderHint(QPainter.RenderHint.Antialiasing, False)
        for value in (colouring.low, colouring.high):
            x = self.to_x(value)
            painter.fillRect(QRectF(x - 0.5, plot.top(), 1, plot.height()), QColor(look.accent))

    # hands

    def _handle_at(self, at: QPointF) -> Literal["", "low", "high"]:
        if not self.has_handles or self.colouring is None or at.y() < self.plot().bottom() - 2:
            return ""
        low, high = self.to_x(self.colouring.low), self.to_x(self.colouring.high)
        near_low, near_high = abs(at.x() - low), abs(at.x() - high)
        if min(near_low, near_high) > REACH_PX:
            return ""
        return "low" if near_low < near_high else "high"

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self.counts is None or event.button() != Qt.MouseButton.LeftButton:
            return
        self._drag = self._handle_at(event.position())
        if not self._drag and event.position().y() <= self.plot().bottom():
            self._drag = "brush"
            value = self.to_value(event.position().x())
            self._brush = (value, value)
        self.update()

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self.counts is None:
            return
        if self._drag == "brush" and self._brush is not None:
            self._brush = (self._brush[0], self.to_value(event.position().x()))
            self.brushing.emit(*self._range(), event.modifiers())
            self.update()
        elif self._drag and self.colouring is not None:
            value, step = self.to_value(event.position().x()), float(np.diff(self.counts.edges[:2])[0])
            low, high = self.colouring.low, self.colouring.high
            if self._drag == "low":
                low = min(value, high - step / 4)
            else:
                high = max(value, low + step / 4)
            self.limits_moved.emit(low, high)
        else:
            over = bool(self._handle_at(event.position()))
            self.setCursor(Qt.CursorShape.SizeHorCursor if over else Qt.CursorShape.CrossCursor)

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        drag, self._drag = self._drag, ""
        if drag == "brush" and self._brush is not None:
            low, high = self._range()
            self._brush = None
            self.brushed.emit(low, high, event.modifiers())
        self.update()

    def _range(self) -> tuple[float, float]:
        """What the brush holds: whole bins where it is narrower than one, and open at the ends."""
        assert self._brush is not None and self.counts is not None and self.colouring is not None
        edges = self.counts.edges
        low, high = min(self._brush), max(self._brush)
        if self.to_x(high) - self.to_x(low) < 3 or self.colouring.kind == "category":
            low = float(edges[max(0, int(np.searchsorted(edges, low, "right")) - 1)])
            high = float(edges[min(edges.size - 1, int(np.searchsorted(edges, high, "right")))])
        # the bins at the ends hold all that lies beyond
        if self.colouring.kind == "continuous":
            low = -math.inf if low <= edges[0] else low
            high = math.inf if high >= edges[-1] else high
        return low, high


class HistogramPanel(QWidget):
    """The histogram, and the same in numbers."""

    gated = Signal(float, float)
    """select the particles from … to …"""
    reset = Signal()
    """colours over the usual range again"""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.histogram = Histogram()
        self.low, self.high = QLineEdit(), QLineEdit()
        for edit, words in ((self.low, "lowest"), (self.high, "highest")):
            edit.setPlaceholderText(words)
            edit.setToolTip(f"The {words} value to select; empty sets no limit")
            edit.returnPressed.connect(self._gate)
        self.select_button = QToolButton()
        self.select_button.setText("Select")
        self.select_button.setToolTip("Select the particles whose value lies from … to …, both included")
        self.select_button.clicked.connect(self._gate)
        self.reset_button = QToolButton()
        self.reset_button.setText("reset colours")
        self.reset_button.setToolTip("Let the colours span the usual range again")
        self.reset_button.clicked.connect(self.reset)
        self.words = QLabel("from")
        row = QHBoxLayout()
        row.setSpacing(4)
        row.addWidget(self.words)
        row.addWidget(self.low, 1)
        row.addWidget(QLabel("to"))
        row.addWidget(self.high, 1)
        row.addWidget(self.select_button)
        row.addWidget(self.reset_button)
        self.gate = QWidget()
        self.gate.setLayout(row)
        row.setContentsMargins(0, 0, 0, 0)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self.histogram)
        layout.addWidget(self.gate)
        self.histogram.brushed.connect(self._show_range)

    def show_counts(self, counts: Counts | None, colouring: Colouring | None) -> None:
        """Other values; numbers of another column go."""
        before = self.histogram.colouring
        if colouring is None or before is None or before.title != colouring.title:
            self.low.clear()
            self.high.clear()
        self.histogram.show_counts(counts, colouring)
        self.gate.setVisible(colouring is not None and colouring.kind in ("continuous", "cyclic"))
        self.reset_button.setVisible(self.histogram.has_handles)

    def _show_range(self, low: float, high: float, _: object) -> None:
        for edit, value in ((self.low, low), (self.high, high)):
            edit.setText(f"{value:.6g}" if math.isfinite(value) else "")

    def _gate(self) -> None:
        limits = []
        for edit, open_end in ((self.low, -math.inf), (self.high, math.inf)):
            text = edit.text().strip().replace("−", "-").replace(",", ".")
            try:
                limits.append(float(text) if text else open_end)
                edit.setStyleSheet("")
            except ValueError:
                edit.setStyleSheet("border: 1px solid #D55E00;")
                edit.setToolTip(f"{text!r} is not a number")
                return
        low, high = limits
        cyclic = self.histogram.colouring is not None and self.histogram.colouring.kind == "cyclic"
        if cyclic:
            low, high = max(low, -180.0), min(high, 180.0)
        elif low > high:
            low, high = high, low
        self.gated.emit(low, high)
