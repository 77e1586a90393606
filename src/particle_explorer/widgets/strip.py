"""Thumbnails in columns that scroll sideways: what is in sight, what is picked, what is swept over."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QEvent, QPoint, QRect, QRectF, QSize, Qt, Signal
from qtpy.QtGui import (
    QColor,
    QFontMetricsF,
    QHelpEvent,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QResizeEvent,
    QWheelEvent,
)
from qtpy.QtWidgets import (
    QAbstractScrollArea,
    QFrame,
    QToolTip,
    QWidget,
)

from particle_explorer.state import Mask
from particle_explorer.widgets.colours import number as figure
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.plot_frame import LOOKS, Look

Rows = NDArray[np.intp]
LEAST_PX, MOST_PX = 56, 128
"""Side of a thumbnail: as many rows of them as the height has room for."""
GAP_PX = 4
N_KEPT = 3000
EMPTY = "No particles yet: open a stack in the tab Particles."


class Words:
    """Values of the column sorted by, in words; each made when it is looked at: there may be a million."""

    def __init__(self, values: NDArray[Any], numeric: bool) -> None:
        self._values, self._numeric = values, numeric

    def __getitem__(self, index: int) -> str:
        value = self._values[index]
        if not self._numeric:
            return str(value)
        return figure(float(value)) if np.isfinite(float(value)) else "no value"


class Strip(QAbstractScrollArea):
    """Thumbnails in columns that scroll sideways; only those in sight are ever asked for."""

    wanted = Signal()
    """other thumbnails are in sight"""
    picked = Signal(int, object)
    """index of the thumbnail clicked, and the keys held down"""
    swept = Signal(int, int, object)
    """first and last index of a row of thumbnails dragged over, and the keys held down"""
    stepped = Signal(int)
    """arrow keys: so many thumbnails on"""
    marked = Signal(str)
    """G or B: the particle looked at is "good" or "bad" """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOn)
        self.setMinimumHeight(LEAST_PX + 2 * GAP_PX + self.horizontalScrollBar().sizeHint().height())
        self.setAccessibleName("Gallery of particles")
        self.viewport().setMouseTracking(True)
        self.look: Look = LOOKS["dark"]
        self.message = EMPTY
        self.rows: Rows = np.zeros(0, np.intp)
        self.texts: Words | None = None
        self.chosen: Mask = np.zeros(0, bool)
        self._all_chosen = False
        self.active: int | None = None
        self.pictures: OrderedDict[int, QImage] = OrderedDict()
        self._press: int | None = None
        self._sweep: tuple[int, int] | None = None
        self.horizontalScrollBar().valueChanged.connect(self._on_scrolled)

    # what is shown

    def set_rows(self, rows: Rows, texts: Words | None) -> None:
        """Show these particles, in this order; back to the start unless the one looked at is among them."""
        self.rows, self.texts, self._sweep = rows, texts, None
        self._note_chosen()
        self._fit_bar()
        at = np.flatnonzero(rows == self.active) if self.active is not None else np.zeros(0, int)
        if at.size:
            self.show_index(int(at[0]))
        else:
            self.horizontalScrollBar().setValue(0)
        self._on_scrolled()

    def set_chosen(self, mask: Mask) -> None:
        self.chosen = mask
        self._note_chosen()
        self.viewport().update()

    def _note_chosen(self) -> None:
        fits = self.rows.size > 0 and int(self.rows.max()) < self.chosen.size
        self._all_chosen = fits and bool(self.chosen[self.rows].all())

    def set_active(self, row: int | None) -> None:
        self.active = row
        index = self.index_of(row)
        if index is not None:
            self.show_index(index)
        self.viewport().update()

    def put(self, row: int, picture: QImage) -> None:
        """A thumbnail that has been made."""
        self.pictures[row] = picture
        self.pictures.move_to_end(row)
        while len(self.pictures) > N_KEPT:
            self.pictures.popitem(last=False)

    def index_of(self, row: int | None) -> int | None:
        """Where a particle is shown."""
        at = np.flatnonzero(self.rows == row) if row is not None else np.zeros(0, int)
        return int(at[0]) if at.size else None

    def in_sight(self) -> Rows:
        """Particles whose thumbnails are at least partly visible."""
        first, last = self._visible()
        return self.rows[first:last]

    def show_index(self, index: int) -> None:
        """Scroll no more than needed to see a thumbnail whole."""
        step, bar = self._step(), self.horizontalScrollBar()
        left = (index // self.n_lines) * step
        if left < bar.value():
            bar.setValue(left)
        elif left + step > bar.value() + self.viewport().width():
            bar.setValue(left + step + GAP_PX - self.viewport().width())

    # geometry

    @property
    def n_lines(self) -> int:
        return max(1, (self.viewport().height() - GAP_PX) // (LEAST_PX + 32 + GAP_PX))

    @property
    def side(self) -> int:
        room = (self.viewport().height() - GAP_PX) // self.n_lines - GAP_PX
        return int(np.clip(room, LEAST_PX, MOST_PX))

    def _step(self) -> int:
        return self.side + GAP_PX

    def _visible(self) -> tuple[int, int]:
        step, x = self._step(), self.horizontalScrollBar().value()
        first = x // step * self.n_lines
        last = ((x + self.viewport().width()) // step + 1) * self.n_lines
        return first, min(last, self.rows.size)

    def place(self, index: int) -> QRect:
        """Where a thumbnail is, in pixels of the viewport."""
        step = self._step()
        column, line = divmod(index, self.n_lines)
        x = GAP_PX + column * step - self.horizontalScrollBar().value()
        return QRect(x, GAP_PX + line * step, self.side, self.side)

    def index_at(self, at: QPoint) -> int | None:
        """The thumbnail at a place, or None."""
        step = self._step()
        column = (at.x() - GAP_PX // 2 + self.horizontalScrollBar().value()) // step
        line = min((at.y() - GAP_PX // 2) // step, self.n_lines - 1)
        index = column * self.n_lines + line
        return index if 0 <= index < self.rows.size and line >= 0 and column >= 0 else None

    def _fit_bar(self) -> None:
        n_columns = -(-self.rows.size // self.n_lines)
        bar = self.horizontalScrollBar()
        bar.setPageStep(self.viewport().width())
        bar.setSingleStep(self._step())
        bar.setRange(0, max(0, n_columns * self._step() + GAP_PX - self.viewport().width()))

    def _on_scrolled(self, *_: object) -> None:
        self.viewport().update()
        self.wanted.emit()

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        super().resizeEvent(event)
        self._fit_bar()
        self._on_scrolled()

    def sizeHint(self) -> QSize:
        return QSize(600, 100)

    # painting

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self.viewport())
        try:
            self._paint(painter)
        finally:
            painter.end()

    def _paint(self, painter: QPainter) -> None:
        painter.fillRect(self.viewport().rect(), QColor(self.look.plot))
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        if not self.rows.size:
            painter.setPen(QColor(self.look.text))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            painter.drawText(QRectF(self.viewport().rect()), flags, self.message)
            return
        some = bool(self.chosen.any())
        # where all that is shown is selected, a ring around each would say nothing
        mixed = some and not self._all_chosen
        ring, accent, line = (QColor(c) for c in (self.look.ring, self.look.accent, self.look.line))
        font = self.font()
        font.setPointSizeF(max(font.pointSizeF() * 0.85, 6.0))
        painter.setFont(font)
        metrics = QFontMetricsF(font)
        first, last = self._visible()
        swept = range(0) if self._sweep is None else range(min(self._sweep), max(self._sweep) + 1)
        for index in range(first, last):
            row, box = int(self.rows[index]), self.place(index)
            chosen = row < self.chosen.size and bool(self.chosen[row])
            painter.setOpacity(0.35 if some and not chosen and index not in swept else 1.0)
            picture = self.pictures.get(row)
            if picture is None:
                painter.fillRect(box, line)
            else:
                painter.drawImage(box, picture)
            if self.texts is not None:
                words = metrics.elidedText(
                    str(self.texts[index]), Qt.TextElideMode.ElideMiddle, box.width() - 4
                )
                strip = QRectF(box.left(), box.bottom() - metrics.height() + 1, box.width(), metrics.height())
                ground = QColor(0, 0, 0, 150)
                painter.fillRect(strip, ground)
                painter.setPen(QColor("white"))
                painter.drawText(strip, Qt.AlignmentFlag.AlignCenter, words)
            painter.setOpacity(1.0)
            painter.setBrush(Qt.BrushStyle.NoBrush)
            if (chosen and mixed) or index in swept:
                painter.setPen(QPen(ring, 1.5))
                painter.drawRect(QRectF(box).adjusted(-1, -1, 1, 1))
            if row == self.active:
                painter.setPen(QPen(accent, 2.5))
                painter.drawRect(QRectF(box).adjusted(1, 1, -1, -1))

    # hands

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is not None and event.button() == Qt.MouseButton.LeftButton:
            self._press = self.index_at(event.position().toPoint())

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self._press is None:
            return
        index = self.index_at(event.position().toPoint())
        if index is not None and (index != self._press or self._sweep is not None):
            self._sweep = (self._press, index)
            self.viewport().update()

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self._press is None:
            return
        press, sweep = self._press, self._sweep
        self._press = self._sweep = None
        self.viewport().update()
        if sweep is not None:
            self.swept.emit(min(sweep), max(sweep), event.modifiers())
        elif self.index_at(event.position().toPoint()) == press:
            self.picked.emit(press, event.modifiers())

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if event is None:
            return
        delta = event.angleDelta()
        turn = delta.y() or delta.x()
        bar = self.horizontalScrollBar()
        bar.setValue(bar.value() - round(turn / 120 * self._step()))
        event.accept()

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        if event is None:
            return
        steps = {
            Qt.Key.Key_Left: -self.n_lines,
            Qt.Key.Key_Right: self.n_lines,
            Qt.Key.Key_Up: -1,
            Qt.Key.Key_Down: 1,
        }
        key = Qt.Key(event.key())
        if key in steps:
            self.stepped.emit(steps[key])
        elif key in (Qt.Key.Key_G, Qt.Key.Key_B):
            self.marked.emit("good" if key == Qt.Key.Key_G else "bad")
        else:
            super().keyPressEvent(event)

    def viewportEvent(self, event: QEvent | None) -> bool:
        if isinstance(event, QHelpEvent) and event.type() == QEvent.Type.ToolTip:
            index = self.index_at(event.pos())
            QToolTip.showText(event.globalPos(), "" if index is None else self.words(index), self.viewport())
            return True
        return bool(super().viewportEvent(event))

    def words(self, index: int) -> str:
        """Number of the particle (from 1) and its value of the column sorted by."""
        value = "" if self.texts is None else f" · {self.texts[index]}"
        return f"particle {number(int(self.rows[index]) + 1)}{value}"
